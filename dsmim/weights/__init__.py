"""Weights from other projects' files into our models, and ours into their formats."""
