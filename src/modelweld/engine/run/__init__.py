"""How one output tensor is made: reading, merging whole or in chunks, on the host or a device, rounding and writing."""
