"""What a training step reads: the order of samples, their bytes, and the transforms that make tensors of them."""
