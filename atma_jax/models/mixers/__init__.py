"""Mixers, one file each: module, layer cache, operation count and start."""
