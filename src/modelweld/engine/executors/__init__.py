"""Who makes the tensors of a merge: threads of this process, one process per device, or tasks on a Ray cluster."""
