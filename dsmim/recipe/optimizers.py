"""timm's optimizers, their own arguments, and how far each is off under ZeRO: measured by benchmarks/optimizers.py.

DeepSpeed hands an optimizer flat pieces of the tensors (stages 1 and 2: of all tensors of a group; stage 3: of each
tensor, in sub-groups). An optimizer that treats every element alone computes the same as without ZeRO. One that looks
at a whole tensor (a norm, a mean, rows and columns) computes something else, silently. docs/optimizers.md shows TIMM.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

TIMM_PREFIX = "timm:"
VERSIONS = {"deepspeed": "0.19.8", "timm": "1.0.31", "torch": "2.14.1"}
"""What the figures below were measured with: two ranks on CPU, fp32, 6 steps, two parameter groups."""
EXACT = 1e-5
"""Largest relative error that is rounding: sums in another order give about 1e-6."""
BEGIN, END = "<!-- optimizers -->", "<!-- /optimizers -->"
"""Marks around the table in docs/optimizers.md."""


class Measured(NamedTuple):
    """What is known of one of timm's optimizers."""

    betas: tuple[float, ...] | None
    """Its own; None: it takes none, or they are no plain numbers (then optim.options has them)."""
    eps: float | None
    errors: tuple[float | None, ...]
    """|weights - those of a plain loop| / |the loop's update|, at ZeRO stages 0, 1, 2 and 3. None: it fails there; at
    stage 0, where DeepSpeed hands an optimizer whole tensors, also: not measured."""
    failure: str = ""
    """What it fails with."""

    @property
    def exact(self) -> bool:
        """Whether it computes the same at every stage."""
        return not self.failure and max(self.errors[1:]) <= EXACT


TIMM: dict[str, Measured] = {
    "adabelief": Measured((0.9, 0.999), 1e-16, (4e-07, 4e-07, 4e-07, 4e-07)),
    "adadelta": Measured(None, 1e-06, (3.3e-06, 3.3e-06, 3.3e-06, 3.3e-06)),
    "adafactor": Measured(None, 1e-30, (1.4e-06, 0.37, 0.37, 0.37)),
    "adafactorbv": Measured(None, None, (8.1e-05, 0.5, 0.5, 0.5)),
    "adafactorbvc": Measured(None, None, (8.6e-05, 0.5, 0.5, 0.5)),
    "adagrad": Measured(None, 1e-08, (7.1e-08, None, None, None), "IndexError: list index out of range"),
    "adahessian": Measured(
        (0.9, 0.999), 1e-08, (None, None, None, None), "AttributeError: 'Tensor' object has no attribute 'hess'"
    ),
    "adam": Measured((0.9, 0.999), 1e-08, (1.4e-07, 1.4e-07, 1.4e-07, 1.4e-07)),
    "adamax": Measured((0.9, 0.999), 1e-08, (5.3e-08, 5.3e-08, 5.3e-08, 5.3e-08)),
    "adamc": Measured((0.9, 0.999), 1e-08, (9.3e-07, 9.3e-07, 9.3e-07, 9.3e-07)),
    "adamp": Measured((0.9, 0.999), 1e-08, (1.2e-06, 0.01, 0.01, 0.01)),
    "adamuon": Measured((0.9, 0.95), 1e-07, (0.0086, 2.2, 2.2, 2.2)),
    "adamw": Measured((0.9, 0.999), 1e-08, (8.6e-07, 8.6e-07, 8.6e-07, 8.6e-07)),
    "adamwlegacy": Measured((0.9, 0.999), 1e-08, (8.6e-07, 8.6e-07, 8.6e-07, 8.6e-07)),
    "adan": Measured((0.98, 0.92, 0.99), 1e-08, (1.3e-06, 1.3e-06, 1.3e-06, 0.29)),
    "adanw": Measured((0.98, 0.92, 0.99), 1e-08, (1.2e-06, 1.2e-06, 1.2e-06, 0.29)),
    "adopt": Measured((0.9, 0.9999), 1e-06, (6.3e-07, 6.3e-07, 6.3e-07, 6.3e-07)),
    "adoptc": Measured((0.9, 0.9999), 1e-06, (1.4e-06, 1.4e-06, 1.4e-06, 1.4e-06)),
    "adoptw": Measured((0.9, 0.9999), 1e-06, (9.4e-07, 9.4e-07, 9.4e-07, 9.4e-07)),
    "cadafactor": Measured((0.9, 0.999), 1e-30, (2e-06, 0.37, 0.37, 0.37)),
    "cadafactorbv": Measured(None, None, (5.6e-05, 0.46, 0.46, 0.46)),
    "cadafactorbvc": Measured(None, None, (5.1e-05, 0.46, 0.46, 0.46)),
    "cadamc": Measured((0.9, 0.999), 1e-08, (7.7e-07, 0.053, 0.053, 0.057)),
    "cadamp": Measured((0.9, 0.999), 1e-08, (4.5e-05, 0.12, 0.12, 0.12)),
    "cadamw": Measured((0.9, 0.999), 1e-08, (8.4e-07, 0.053, 0.053, 0.057)),
    "cadan": Measured((0.98, 0.92, 0.99), 1e-08, (1.2e-06, 0.065, 0.065, 0.3)),
    "cadanw": Measured((0.98, 0.92, 0.99), 1e-08, (1.1e-06, 0.065, 0.065, 0.3)),
    "cadopt": Measured((0.9, 0.9999), 1e-06, (9.8e-08, 0.018, 0.018, 0.02)),
    "cadoptc": Measured((0.9, 0.9999), 1e-06, (6.7e-07, 0.07, 0.07, 0.074)),
    "cadoptw": Measured((0.9, 0.9999), 1e-06, (6.8e-07, 0.07, 0.07, 0.074)),
    "clamb": Measured((0.9, 0.999), 1e-06, (3.8e-07, 0.15, 0.15, 0.16)),
    "clambw": Measured((0.9, 0.999), 1e-06, (None, 0.14, 0.14, 0.16)),
    "claprop": Measured((0.9, 0.999), 1e-15, (2.6e-07, 0.06, 0.06, 0.06)),
    "clion": Measured((0.9, 0.99), None, (0.0, 0.082, 0.082, 0.086)),
    "clionc": Measured((0.9, 0.99), None, (0.0, 0.082, 0.082, 0.086)),
    "cmars": Measured((0.9, 0.99), 1e-08, (9.2e-07, 0.14, 0.14, 0.15)),
    "cnadamc": Measured((0.9, 0.999), 1e-08, (1.1e-06, 0.035, 0.035, 0.04)),
    "cnadamw": Measured((0.9, 0.999), 1e-08, (1.1e-06, 0.035, 0.035, 0.039)),
    "crmsproptf": Measured(None, 1e-10, (2.4e-07, 0.22, 0.22, 0.22)),
    "csgdc": Measured(None, None, (1.9e-07, 0.078, 0.078, 0.076)),
    "csgdp": Measured(None, 1e-08, (1.6e-07, 0.84, 0.84, 0.84)),
    "csgdw": Measured(None, None, (3e-07, 0.078, 0.078, 0.076)),
    "kron": Measured(None, None, (None, 0.66, 0.66, 0.66)),
    "kronc": Measured(None, None, (None, 0.66, 0.66, 0.66)),
    "kronw": Measured(None, None, (None, 0.66, 0.66, 0.66)),
    "lamb": Measured((0.9, 0.999), 1e-06, (None, 0.14, 0.14, 0.16)),
    "lambc": Measured((0.9, 0.999), 1e-06, (None, 0.14, 0.14, 0.16)),
    "lambcd": Measured((0.9, 0.999), 1e-06, (4.2e-07, 0.15, 0.15, 0.16)),
    "lambcw": Measured((0.9, 0.999), 1e-06, (None, 0.14, 0.14, 0.16)),
    "lambw": Measured((0.9, 0.999), 1e-06, (None, 0.14, 0.14, 0.16)),
    "laprop": Measured((0.9, 0.999), 1e-15, (2.6e-07, 2.6e-07, 2.6e-07, 2.6e-07)),
    "lapropc": Measured((0.9, 0.999), 1e-15, (2.5e-07, 2.5e-07, 2.5e-07, 2.5e-07)),
    "larc": Measured(None, 1e-08, (None, 0.018, 0.018, 0.018)),
    "lars": Measured(None, 1e-08, (2e-07, 0.0019, 0.0019, 0.004)),
    "lion": Measured((0.9, 0.99), None, (0.0, 0.0, 0.0, 0.0)),
    "lionc": Measured((0.9, 0.99), None, (0.0, 0.0, 0.0, 0.0)),
    "madgrad": Measured(None, 1e-06, (1e-07, 1.1e-07, 1.1e-07, 1.1e-07)),
    "madgradw": Measured(None, 1e-06, (5.5e-07, 5.7e-07, 5.7e-07, 5.5e-07)),
    "mars": Measured((0.9, 0.99), 1e-08, (8.8e-07, 0.13, 0.13, 0.13)),
    "momentum": Measured(None, None, (2.3e-07, 2.3e-07, 2.3e-07, 2.3e-07)),
    "muon": Measured((0.9, 0.95), 1e-07, (0.0031, 2.5, 2.5, 2.5)),
    "nadam": Measured((0.9, 0.999), 1e-08, (3.6e-07, 3.6e-07, 3.6e-07, 3.6e-07)),
    "nadamc": Measured((0.9, 0.999), 1e-08, (1.1e-06, 1.1e-06, 1.1e-06, 1.1e-06)),
    "nadamlegacy": Measured((0.9, 0.999), 1e-08, (1.7e-07, 1.7e-07, 1.7e-07, 1.7e-07)),
    "nadamuon": Measured((0.9, 0.95), 1e-07, (0.017, 2.5, 2.5, 2.5)),
    "nadamw": Measured((0.9, 0.999), 1e-08, (1.1e-06, 1.1e-06, 1.1e-06, 1.1e-06)),
    "nesterov": Measured(None, None, (3.3e-07, 3.3e-07, 3.3e-07, 3.3e-07)),
    "nesterovw": Measured(None, None, (2.5e-07, 2.5e-07, 2.5e-07, 2.5e-07)),
    "nlarc": Measured(None, 1e-08, (3e-07, 0.62, 0.62, 0.62)),
    "nlars": Measured(None, 1e-08, (3.9e-07, 0.002, 0.002, 0.0043)),
    "nmuon": Measured((0.9, 0.95), 1e-07, (0.0062, 2.8, 2.8, 2.8)),
    "novograd": Measured((0.95, 0.98), 1e-08, (5.5e-07, 0.88, 0.88, 0.94)),
    "novogradc": Measured((0.95, 0.98), 1e-08, (1.9e-06, 0.88, 0.88, 0.94)),
    "novogradw": Measured((0.95, 0.98), 1e-08, (2.6e-06, 0.88, 0.88, 0.94)),
    "radabelief": Measured((0.9, 0.999), 1e-16, (None, 2e-06, 2e-06, 2e-06)),
    "radam": Measured((0.9, 0.999), 1e-08, (None, 2e-06, 2e-06, 2e-06)),
    "radamlegacy": Measured((0.9, 0.999), 1e-08, (None, 2e-06, 2e-06, 2e-06)),
    "radamw": Measured((0.9, 0.999), 1e-08, (None, 2e-06, 2e-06, 2e-06)),
    "rmsprop": Measured(None, 1e-08, (None, 2e-06, 2e-06, 2e-06)),
    "rmsproptf": Measured(None, 1e-10, (None, 2e-06, 2e-06, 2e-06)),
    "rmsproptfc": Measured(None, 1e-10, (None, 2e-06, 2e-06, 2e-06)),
    "rmsproptfw": Measured(None, 1e-10, (None, 2e-06, 2e-06, 2e-06)),
    "sgd": Measured(None, None, (None, 2e-06, 2e-06, 2e-06)),
    "sgdc": Measured(None, None, (None, 2e-06, 2e-06, 2e-06)),
    "sgdp": Measured(None, 1e-08, (None, 0.039, 0.039, 0.039)),
    "sgdw": Measured(None, None, (None, 2e-06, 2e-06, 2e-06)),
}
_EXACT_ONES = "take adamw, lamb, or one of those that docs/optimizers.md lists as exact"
_NEEDS = {"bnb": "the package bitsandbytes and a GPU", "fused": "the package apex and a GPU"}


def known_optimizer(name: str) -> str:
    """Return a value of optim.name. Raises ValueError for a name that dsmim does not know, with the nearest one."""
    bare = name.removeprefix(TIMM_PREFIX)
    if name in ("adamw", "lamb") or (bare != name and bare in TIMM):
        return name
    if bare in TIMM:
        raise ValueError(f"is one of timm's; write {TIMM_PREFIX}{bare}")
    if needs := next((needs for prefix, needs in _NEEDS.items() if bare.startswith(prefix)), None):
        raise ValueError(f"needs {needs}, and its error under ZeRO is not known; take another one")
    if bare.startswith("lookahead_"):
        raise ValueError(
            "Lookahead keeps its state where neither DeepSpeed nor a checkpoint finds it, and was measured 16 % off "
            f"under ZeRO; take {TIMM_PREFIX}{bare.removeprefix('lookahead_')}"
        )
    names = ["adamw", "lamb", *(TIMM_PREFIX + known for known in TIMM)]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    raise ValueError(f"is unknown; {f'did you mean {close[0]}?' if close else _EXACT_ONES}")


def own_arguments(name: str) -> dict[str, Any]:
    """Return the betas and eps that an optimizer of optim.name has by itself; None: it takes none. Those of adamw and
    lamb are also returned for an unknown name, whose error is another one."""
    known = TIMM.get(name.removeprefix(TIMM_PREFIX)) if name.startswith(TIMM_PREFIX) else None
    return {"betas": known.betas, "eps": known.eps} if known else {"betas": (0.9, 0.999), "eps": 1e-8}


def refusal(name: str, stage: int, options: Mapping[str, Any]) -> str | None:
    """Return why one of timm's optimizers (a key of TIMM) is refused at a ZeRO stage; None: it is right there."""
    error, failure = TIMM[name].errors[stage], TIMM[name].failure
    if error is None and failure:
        return f"optim.name: {TIMM_PREFIX}{name} fails at ZeRO stage {stage} ({failure}); {_instead(name)}"
    if stage == 0:
        return None
    if error > EXACT:
        return (
            f"optim.name: {TIMM_PREFIX}{name} at ZeRO stage {stage} is another optimizer: the update is "
            f"{100 * error:.3g} % off, because DeepSpeed hands it pieces of the tensors (measured with timm "
            f"{VERSIONS['timm']}); use stage 0 (engine.deepspeed=zero0), or {_instead(name)}"
        )
    if options.get("caution"):
        return (
            f"optim.options.caution: at ZeRO stage {stage} it takes means over pieces of the tensors, which is 2 to "
            "30 % off; remove it, or use stage 0 (engine.deepspeed=zero0)"
        )
    return None


def markdown() -> str:
    """Return the table of docs/optimizers.md: exact ones in a line, the others in rows."""
    exact = [name for name, known in TIMM.items() if known.exact]
    lines = [
        f"Measured with {', '.join(f'{key} {value}' for key, value in VERSIONS.items())}.",
        "",
        f"**Exact at every stage** (at most {EXACT:g}), {len(exact)} names: {', '.join(exact)}.",
        "",
        "**Not exact:**",
        "",
        "| timm:NAME | ZeRO-0 | ZeRO-1 | ZeRO-2 | ZeRO-3 |",
        "|---|---|---|---|---|",
    ]
    for name, known in TIMM.items():
        if not known.exact:
            none = "fails" if known.failure else "-"
            cells = " | ".join(none if error is None else f"{error:.1e}" for error in known.errors)
            lines.append(f"| {name} | {cells} |")
    failing = [f"- {name}: {known.failure}" for name, known in TIMM.items() if known.failure]
    return "\n".join([*lines, "", "**Failures:**", "", *failing]) + "\n"


def _instead(name: str) -> str:
    """Return the end of a message: what to take instead of one of timm's optimizers."""
    if "lamb" in name:
        return "take optim.name=lamb, which is exact at every stage"
    exact = [other for other, known in TIMM.items() if known.exact]
    close = difflib.get_close_matches(name, exact, n=1, cutoff=0.6)
    return f"take one that is exact, such as {TIMM_PREFIX}{close[0]}" if close else _EXACT_ONES
