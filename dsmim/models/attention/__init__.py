"""Cosine attention within windows (Swin Transformer V2), in three implementations with equal results."""
