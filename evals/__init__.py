"""Evaluation of model quality: `python -m evals RUN`."""
