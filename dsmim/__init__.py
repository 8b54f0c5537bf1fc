"""dsmim: billion-parameter vision models on DeepSpeed, from WebDataset tars."""

__version__ = "0.1.0"
