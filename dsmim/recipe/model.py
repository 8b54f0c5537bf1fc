"""The section of a recipe that describes the network."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from dsmim.recipe.section import Count, Positive, Section, UserPath


def _decodable(channels: int) -> int:
    if channels not in (1, 3, 4):
        raise ValueError("images are decoded to 1 channel (grey), 3 (RGB) or 4 (RGBA)")
    return channels


def _not_a_rate(kind: Any) -> Any:
    if isinstance(kind, (int, float)):
        raise ValueError("says how samples are drawn: independent or balanced; the rate is model.drop_path_rate")
    return kind


class Model(Section):
    """The network and the weights that it starts from."""

    name: str
    """A name that `dsmim.models.create_model` knows, or timm:NAME for any network of timm (fine-tuning only)."""
    img_size: Count
    """Side of the square input in pixels."""
    in_chans: Annotated[int, AfterValidator(_decodable)] = 3
    """Channels of the input, to which every image is decoded: 1 (grey), 3 (RGB) or 4 (RGBA)."""
    window_size: Count | None = None
    """Swin V2: side of the attention window in tokens (limited to the feature map)."""
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth: how often a sample leaves out a branch of a block. See drop_path_rates."""
    drop_path_rates: Literal["uniform", "linear"] | None = None
    """uniform: every block has drop_path_rate; linear: the deepest block, growing from 0; null: DeiT III uniform, all
    others linear."""
    drop_path: Annotated[Literal["independent", "balanced"], BeforeValidator(_not_a_rate)] = "independent"
    """balanced: of 2, 4, 8, … neighbouring samples a block always drops the same share, within one sample, so that
    ranks do equal work."""
    pretrained_window_sizes: list[int] | None = None
    """Swin V2, per stage: the window of the pre-training, to which position-bias coordinates are scaled; 0: the
    present window."""
    extra_norm_every: Annotated[int, Field(ge=0)] = 0
    """Swin V2: an extra norm after each n-th block of a stage (arXiv 2111.09883: 6 in the two largest); 0: none."""
    sequential_stages: Annotated[int, Field(ge=0)] = 0
    """Swin V2: in this many first stages, attention takes a few windows at a time: less memory at high resolution."""
    options: dict[str, Any] = {}
    """timm:NAME: more arguments for timm.create_model, such as {global_pool: avg}."""
    head_init_std: Positive | None = None
    """Deviation of the first weights of a new classifier; null: 2e-5 for the pre-trained weights of MAE, as their
    authors fine-tune, else the network's own (0.02; timm's BEiT 2e-5)."""
    grad_checkpointing: Annotated[int, Field(ge=0)] = 0
    """Recompute each n-th block in the backward pass instead of keeping its activations; 1: every block, 0: none."""
    grad_checkpointing_stages: Count | None = None
    """Recompute blocks only in this many first stages; null: in all stages."""
    compile: bool = False
    """Compile every block by torch.compile: faster steps after minutes of compilation."""
    trainable: Literal["all", "head"] = "all"
    """What learns: all, or the classifier alone (head: a linear probe). Everything else keeps its weights, and runs as
    in evaluation."""
    weights: UserPath | None = None
    """Where training starts from: a run directory, one of its checkpoints, a .safetensors file, or a file of
    torch.save; with the parameter names of dsmim, of timm, or of the authors of Swin V2, SimMIM, DeiT III, MAE or
    BEiT."""
    weights_head: UserPath | None = None
    """What to do with the classifier of the weights; needed if the model has one too: keep, drop (use a new one),
    imagenet22k-goog, imagenet22k-fall2011 or imagenet22k-ms (take the rows of ImageNet-1K's classes from a head in this
    order), or a file with one row number per class."""
