"""Shards, their indexes, the order of samples, and what turns bytes into tensors."""
