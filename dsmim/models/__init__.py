"""Networks only: built by name, plain torch, no engine and no data."""

from dsmim.models.registry import create_model, layer_ids, model_names, timm_arguments
from dsmim.models.simmim import SimMIM

__all__ = ["SimMIM", "create_model", "layer_ids", "model_names", "timm_arguments"]
