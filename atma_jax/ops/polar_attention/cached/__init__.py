"""Attention of new tokens over cached ones, for chunked prefill and decoding."""
