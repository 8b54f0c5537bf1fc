"""Cosine attention in windows of Swin Transformer V2, in several implementations with equal results."""
