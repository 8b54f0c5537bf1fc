"""What a training step reads: the order of samples, their bytes, and the transforms that turn them into tensors."""
