"""Data: sources of text, tokenizers, token shards, the Grain pipeline and the needle of the evaluation."""
