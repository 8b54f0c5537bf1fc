"""The networks, built by name: plain torch, without engine and data."""

from dsmim.models.attention.window import fix_position_bias
from dsmim.models.blocks import Recompute, compile_blocks
from dsmim.models.build import materialise, materialised
from dsmim.models.foreign import named_without_decay
from dsmim.models.freezing import freeze_all_but_classifier, frozen_modules
from dsmim.models.registry import classifier, create_model, layer_ids, model_names, set_recompute, timm_arguments
from dsmim.models.simmim import SimMIM
from dsmim.models.stochastic_depth import PositionDraws

__all__ = [
    "PositionDraws",
    "Recompute",
    "SimMIM",
    "classifier",
    "compile_blocks",
    "create_model",
    "fix_position_bias",
    "freeze_all_but_classifier",
    "frozen_modules",
    "layer_ids",
    "materialise",
    "materialised",
    "model_names",
    "named_without_decay",
    "set_recompute",
    "timm_arguments",
]
