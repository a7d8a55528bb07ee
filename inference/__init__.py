"""What sample.py uses: the engine, sampling, quantization, huge pages, detokenization."""
