"""How text becomes batches: corpora -> tokenizer -> shards of token ids -> batches. No module here knows a model."""
