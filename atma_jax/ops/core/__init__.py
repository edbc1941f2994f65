"""What the implementations of all ops share: dispatch, the device table, tiles, streaming statistics."""
