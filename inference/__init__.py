"""Inference for sample.py: engines, sampling, quantization, huge pages, detokenization."""
