"""Measurements of quality: `python -m evals RUN`."""
