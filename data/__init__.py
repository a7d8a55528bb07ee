"""The data pipeline: text sources -> tokenizer -> shards of token ids -> batches. Independent of the model."""
