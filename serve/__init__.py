"""python -m serve RUN: an HTTP server with OpenAI's API, for a model that was trained here or imported."""
