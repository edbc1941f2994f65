"""The benchmark command's library."""
