"""Generation: sampling, incremental text, and an engine that decodes many requests together."""
