"""Conversion from and to other tools' formats: `python -m convert`."""
