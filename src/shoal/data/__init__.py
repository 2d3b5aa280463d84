"""Corpus -> tokenizer -> token shards -> rows -> batches."""
