"""Checkpoints of any ZeRO stage and any number of ranks, read one parameter at a time.

    stage 0     mp_rank_00_model_states.pt                  weights; the optimizer's state by parameter number
    stage 1, 2  mp_rank_00_model_states.pt                  weights, buffers
                zero_pp_rank_R_mp_rank_00_optim_states.pt   rank R's part of every group, flat: master weights and state
    stage 3     zero_pp_rank_R_mp_rank_00_model_states.pt   buffers, rank R's part of frozen parameters
                zero_pp_rank_R_mp_rank_00_optim_states.pt   rank R's piece of every parameter, flat by sub-group

Files are mapped into memory: only tensors that are asked for are read from the disk. torch's restricted loader
unpickles them, so a file can name no classes except torch's own and `_allowed_classes`.
"""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from dsmim.checkpoint.saved_layout import (
    PARAMETER_ORDER,
    SavedLayout,
    SavedPiece,
    stage_0_layout,
    stage_1_2_layout,
    stage_3_layout,
    torch_optimizer_state,
)

MODEL_FILE, OPTIMIZER_FILE = "mp_rank_00_model_states.pt", "mp_rank_00_optim_states.pt"
"""Names of DeepSpeed's files; those that each rank has begin with zero_pp_rank_R_."""

_ORDER_UNKNOWN = (
    f"state.json does not say which moments belong to which parameter (it has no {PARAMETER_ORDER}: an older dsmim "
    "wrote it); resume at ZeRO stage 0 with the recipe that it was saved with, on any number of ranks, and save once "
    "(a network of timm needs optim.model_no_decay=false --fork for that: older versions grouped so)"
)


class ZeroShards:
    """The DeepSpeed files of one checkpoint.

    Raises ValueError, when it is created and when tensors are read, for files that are missing or cannot be read.
    """

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint
        optimizers = _by_rank(checkpoint, "optim_states")
        self._optimizers = [load_file(path)["optimizer_state_dict"] for path in optimizers]
        self.stage = int(self._optimizers[0]["zero_stage"]) if optimizers else 0
        self._model_files = [checkpoint / MODEL_FILE]
        if self.stage == 3:
            self._model_files = _by_rank(checkpoint, "model_states")
        self._check_complete()
        self._model = load_file(self._model_files[0])
        self.world_size: int = self._model["dp_world_size"]
        self._order = _read_order(checkpoint) if self.stage == 0 else None
        self._layout = self._read_layout()
        self.names = list(self._layout.shapes)
        """Names of the trained parameters."""
        self.shared: dict[str, str] = dict(self._model["shared_params"] or {}) or self._same_storage()
        """Second names of shared parameters: name → its name in `names`."""
        self.frozen = self._frozen_names()
        """Names of the parameters that are not trained."""
        self.shapes = self._layout.shapes | {name: self._frozen_shape(name) for name in self.frozen}
        """Whole shapes of trained and frozen parameters."""

    @property
    def keys(self) -> list[str]:
        """What can be read of every trained parameter: fp32, the weight, and what the optimizer keeps per element once
        it has stepped, for example exp_avg, exp_avg_sq, ema.

        One state stands for all: DeepSpeed steps all parameters or none, those without a gradient with zeros.
        """
        self._check_order_known()
        state = next((state for groups in self._layout.states for state in groups if state), {})
        return ["fp32", *(key for key, value in state.items() if value is not None and not is_scalar(value))]

    def tensor(self, name: str, key: str = "fp32") -> torch.Tensor:
        """Return a copy of one parameter's whole fp32 tensor. A frozen parameter has its weight only, whatever the key.

        Raises KeyError for an unknown name or key.
        """
        if name in self.frozen:
            return self._frozen_tensor(name)
        pieces = [
            self._flat(piece, key).detach().narrow(0, piece.start, piece.numel) for piece in self._layout.pieces[name]
        ]
        return torch.cat(pieces).float().view(self.shapes[name])

    @property
    def scalars(self) -> dict[str, dict[str, Any]]:
        """What the optimizer keeps once per tensor, by name and key: step, how often it has stepped the parameter, and
        others. {}: it never stepped it.

        Raises ValueError for a state that is neither of this kind nor per element.
        """
        self._check_order_known()
        found = {}
        for name, (first, *_) in self._layout.pieces.items():
            state = self._layout.states[first.rank][first.group]
            self._check_per_element(name, state, self._layout.masters[first.rank][first.group].numel())
            found[name] = {key: value for key, value in state.items() if is_scalar(value)}
        return found

    def _check_per_element(self, name: str, state: dict[str, Any], numel: int) -> None:
        known = [key for key, value in state.items() if value is None or is_scalar(value) or _is_flat(value, numel)]
        other = [key for key in state if key not in known]
        if other or any("step" in group for group in self.param_groups):
            what = f"{other[0]} of {name} per tensor" if other else "a step counter per group"
            raise ValueError(
                f"{self.checkpoint}: its optimizer keeps {what}, so it can only be loaded with the parameter groups "
                "that it was saved with; restore the recipe's optim section, or start a new run from its weights "
                "(model.weights)"
            )

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """Copies of the module's saved buffers."""
        return {name: self._model["module"][name].clone() for name in self._model["buffer_names"]}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, without their parameters."""
        saved = self._model["optimizer"] if self.stage == 0 else torch_optimizer_state(self._optimizers[0])
        return [{key: value for key, value in group.items() if key != "params"} for group in saved["param_groups"]]

    @property
    def header(self) -> dict[str, Any]:
        """What DeepSpeed's engine saves besides tensors: counters, versions, its configuration."""
        tensors = ("module", "optimizer", "param_shapes", "frozen_param_shapes", "frozen_param_fragments")
        return {key: value for key, value in self._model.items() if key not in tensors}

    def _read_layout(self) -> SavedLayout:
        if self.stage == 3:
            return stage_3_layout(self._model["param_shapes"], self._optimizers)
        if self.stage:
            return stage_1_2_layout(self._model["param_shapes"], self._optimizers)
        return stage_0_layout(self._model, self._order, self.checkpoint)

    def _flat(self, piece: SavedPiece, key: str) -> torch.Tensor:
        if key == "fp32":
            return self._layout.masters[piece.rank][piece.group]
        self._check_order_known()
        return self._layout.states[piece.rank][piece.group][key]

    def _check_order_known(self) -> None:
        if self.stage == 0 and self._order is None and self._model["optimizer"]["state"]:
            raise ValueError(f"{self.checkpoint}: {_ORDER_UNKNOWN}")

    def _check_complete(self) -> None:
        """Check that every rank's files are there. In a run's own checkpoint the manifest has shown this before."""
        counts = [saved["partition_count"] for saved in self._optimizers[:1]]
        wanted = max([1, *(counts[0] if counts and isinstance(counts[0], list) else counts)])
        found = [len(self._optimizers) or 1, len(self._model_files) if self.stage == 3 else wanted]
        if found != [wanted, wanted]:
            raise ValueError(
                f"{self.checkpoint}: was written by {wanted} ranks and holds the optimizer files of {found[0]} and the "
                f"model files of {found[1]}; restore what is missing"
            )

    def _same_storage(self) -> dict[str, str]:
        """Find shared parameters at stage 0, where DeepSpeed does not record them, by their common storage."""
        if self.stage:
            return {}
        module, buffers = self._model["module"], set(self._model["buffer_names"])
        owners = {module[name].data_ptr(): name for name in self.names if module[name].numel()}
        others = [name for name in module if name not in buffers and name not in self._layout.shapes]
        found = {name: owners.get(module[name].data_ptr()) for name in others if torch.is_tensor(module[name])}
        return {name: owner for name, owner in found.items() if owner is not None}

    def _frozen_names(self) -> list[str]:
        if self.stage == 3:
            return list(self._model["frozen_param_shapes"])
        known = {*self.names, *self.shared, *self._model["buffer_names"]}
        return [name for name, value in self._model["module"].items() if name not in known and torch.is_tensor(value)]

    def _frozen_shape(self, name: str) -> torch.Size:
        return self._model["frozen_param_shapes"][name] if self.stage == 3 else self._model["module"][name].shape

    def _frozen_tensor(self, name: str) -> torch.Tensor:
        if self.stage < 3:
            return self._model["module"][name].float().clone()
        shape = self.shapes[name]
        models = [self._model, *map(load_file, self._model_files[1:])]
        pieces = torch.cat([model["frozen_param_fragments"][name].flatten() for model in models])
        return pieces[: shape.numel()].float().view(shape)


def is_scalar(value: Any) -> bool:
    """Return whether a value of an optimizer's state is a single number, in a tensor or not."""
    return isinstance(value, (int, float)) or (torch.is_tensor(value) and value.ndim == 0)


def _is_flat(value: Any, numel: int) -> bool:
    return torch.is_tensor(value) and value.ndim == 1 and value.numel() >= numel


def read_weights(checkpoint: Path, which: str = "fp32") -> dict[str, torch.Tensor]:
    """Return weights and buffers by name, as in a model's state_dict, floating-point ones in fp32.

    which: "fp32", or "ema" for the moving average. Needs host memory for the whole model.
    Raises ValueError when the checkpoint cannot be read or has no such weights.
    """
    shards = ZeroShards(checkpoint)
    if which != "fp32" and which not in shards.keys:
        raise ValueError(f"{checkpoint}: holds no moving average; a run without optim.ema_decay saved it")
    found = {name: value.float() if value.is_floating_point() else value for name, value in shards.buffers.items()}
    for name in [*shards.frozen, *shards.names]:
        found[name] = shards.tensor(name, which)
    return found | {name: found[owner] for name, owner in shards.shared.items() if owner in found}


def load_file(path: Path) -> dict[str, Any]:
    """Return the content of one of DeepSpeed's files, its tensors mapped into memory.

    Raises ValueError when the file is missing, damaged, or names a class that is not allowed.
    """
    try:
        with torch.serialization.safe_globals(_allowed_classes() if path.name.endswith("optim_states.pt") else []):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"{path}: cannot be read as DeepSpeed's file ({reason})") from None


def _read_order(checkpoint: Path) -> list[str] | None:
    try:
        groups = json.loads((checkpoint / "state.json").read_text()).get(PARAMETER_ORDER)
    except (OSError, ValueError, AttributeError):
        return None
    return None if groups is None else [name for group in groups for name in group]


def _by_rank(checkpoint: Path, kind: str) -> list[Path]:
    """Return the files of one kind in the order of ranks."""
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint}: no such checkpoint")
    pattern = re.compile(rf"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_{kind}\.pt")
    matches = [pattern.fullmatch(path.name) for path in checkpoint.iterdir()]
    found = {int(match[1]): checkpoint / match[0] for match in matches if match}
    return [found[rank] for rank in sorted(found)]


def _allowed_classes() -> list[type]:
    """Return DeepSpeed's classes in optimizer files: the loss scaler (fixed at 1: precision is never fp16), the stage
    as an enum, and at stages 1 and 2 the addresses of parameters. They only hold numbers."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]
