"""What a merge takes: memory of tensors in work, floating-point operations, and time on this machine."""
