"""Data: sources of text, tokenizers, token shards, the Grain pipeline and needles."""
