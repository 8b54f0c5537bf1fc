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
    """|weights - those of a plain loop| / |the loop's update|, at ZeRO stages 0, 1, 2 and 3; None: it fails."""
    failure: str = ""
    """What it fails with."""

    @property
    def exact(self) -> bool:
        """Whether it computes the same at every stage."""
        return all(error is not None and error <= EXACT for error in self.errors)


TIMM: dict[str, Measured] = {
    "adabelief": Measured((0.9, 0.999), 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "adadelta": Measured(None, 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "adam": Measured((0.9, 0.999), 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "adamax": Measured((0.9, 0.999), 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "adamc": Measured((0.9, 0.999), 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "adamw": Measured((0.9, 0.999), 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "adamwlegacy": Measured((0.9, 0.999), 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "adopt": Measured((0.9, 0.999), 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "adoptc": Measured((0.9, 0.999), 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "adoptw": Measured((0.9, 0.999), 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "laprop": Measured((0.9, 0.999), 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "lapropc": Measured((0.9, 0.999), 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "lion": Measured((0.9, 0.99), None, (1e-06, 1e-06, 1e-06, 1e-06)),
    "lionc": Measured((0.9, 0.99), None, (1e-06, 1e-06, 1e-06, 1e-06)),
    "madgrad": Measured(None, 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "madgradw": Measured(None, 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "momentum": Measured(None, None, (1e-06, 1e-06, 1e-06, 1e-06)),
    "nadam": Measured((0.9, 0.999), 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "nadamc": Measured((0.9, 0.999), 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "nadamlegacy": Measured((0.9, 0.999), 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "nadamw": Measured((0.9, 0.999), 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "nesterov": Measured(None, None, (1e-06, 1e-06, 1e-06, 1e-06)),
    "nesterovw": Measured(None, None, (1e-06, 1e-06, 1e-06, 1e-06)),
    "radabelief": Measured((0.9, 0.999), 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "radam": Measured((0.9, 0.999), 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "radamlegacy": Measured((0.9, 0.999), 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "radamw": Measured((0.9, 0.999), 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "rmsprop": Measured(None, 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "rmsproptf": Measured(None, 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "rmsproptfc": Measured(None, 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "rmsproptfw": Measured(None, 1e-08, (1e-06, 1e-06, 1e-06, 1e-06)),
    "sgd": Measured(None, None, (1e-06, 1e-06, 1e-06, 1e-06)),
    "sgdc": Measured(None, None, (1e-06, 1e-06, 1e-06, 1e-06)),
    "sgdw": Measured(None, None, (1e-06, 1e-06, 1e-06, 1e-06)),
    "momentum)": Measured((0.9, 0.999), None, (1e-06, 1e-06, 1e-06, 1e-06)),
    "nmuon": Measured((0.9, 0.999), 1e-08, (1e-06, 2.5e00, 2.5e00, 2.5e00)),
    "nadamuon": Measured((0.9, 0.999), 1e-08, (1e-06, 2.4e00, 2.4e00, 2.4e00)),
    "muon": Measured((0.9, 0.999), 1e-08, (1e-06, 2.2e00, 2.2e00, 2.2e00)),
    "adamuon": Measured((0.9, 0.999), 1e-08, (1e-06, 2.1e00, 2.1e00, 2.1e00)),
    "adafactor": Measured((0.9, 0.999), 1e-08, (1e-06, 6.8e-01, 6.8e-01, 6.8e-01)),
    "kron": Measured((0.9, 0.999), 1e-08, (1e-06, 6.6e-01, 6.6e-01, 6.6e-01)),
    "kronc": Measured((0.9, 0.999), 1e-08, (1e-06, 6.6e-01, 6.6e-01, 6.6e-01)),
    "kronw": Measured((0.9, 0.999), 1e-08, (1e-06, 6.6e-01, 6.6e-01, 6.6e-01)),
    "novogradc": Measured((0.9, 0.999), 1e-08, (1e-06, 6.5e-01, 6.5e-01, 6.6e-01)),
    "novogradw": Measured((0.9, 0.999), 1e-08, (1e-06, 6.5e-01, 6.5e-01, 6.6e-01)),
    "novograd": Measured((0.9, 0.999), 1e-08, (1e-06, 6.2e-01, 6.2e-01, 6.2e-01)),
    "adafactorbv": Measured((0.9, 0.999), 1e-08, (1e-06, 5.7e-01, 5.7e-01, 5.7e-01)),
    "adafactorbvc": Measured((0.9, 0.999), 1e-08, (1e-06, 5.7e-01, 5.7e-01, 5.7e-01)),
    "cadafactorbv": Measured((0.9, 0.999), 1e-08, (1e-06, 5.6e-01, 5.6e-01, 5.6e-01)),
    "cadafactorbvc": Measured((0.9, 0.999), 1e-08, (1e-06, 5.6e-01, 5.6e-01, 5.6e-01)),
    "cadafactor": Measured((0.9, 0.999), 1e-08, (1e-06, 5.3e-01, 5.3e-01, 5.3e-01)),
    "cadanw": Measured((0.9, 0.999), 1e-08, (1e-06, 4.1e-02, 4.1e-02, 3.1e-01)),
    "cadan": Measured((0.9, 0.999), 1e-08, (1e-06, 4.1e-02, 4.1e-02, 3.1e-01)),
    "mars": Measured((0.9, 0.999), 1e-08, (1e-06, 3.0e-01, 3.0e-01, 3.0e-01)),
    "cmars": Measured((0.9, 0.999), 1e-08, (1e-06, 3.0e-01, 3.0e-01, 3.0e-01)),
    "csgdc": Measured((0.9, 0.999), 1e-08, (1e-06, 2.9e-01, 2.9e-01, 2.8e-01)),
    "csgdw": Measured((0.9, 0.999), 1e-08, (1e-06, 2.9e-01, 2.9e-01, 2.8e-01)),
    "adanw": Measured((0.9, 0.999), 1e-08, (1e-06, 1.3e-06, 1.3e-06, 2.7e-01)),
    "adan": Measured((0.9, 0.999), 1e-08, (1e-06, 1.2e-06, 1.2e-06, 2.7e-01)),
    "csgdp": Measured((0.9, 0.999), 1e-08, (1e-06, 2.6e-01, 2.6e-01, 2.5e-01)),
    "lamb": Measured((0.9, 0.999), 1e-08, (1e-06, 1.4e-01, 1.4e-01, 1.6e-01)),
    "lambc": Measured((0.9, 0.999), 1e-08, (1e-06, 1.4e-01, 1.4e-01, 1.6e-01)),
    "lambcd": Measured((0.9, 0.999), 1e-08, (1e-06, 1.4e-01, 1.4e-01, 1.6e-01)),
    "lambcw": Measured((0.9, 0.999), 1e-08, (1e-06, 1.4e-01, 1.4e-01, 1.6e-01)),
    "lambw": Measured((0.9, 0.999), 1e-08, (1e-06, 1.4e-01, 1.4e-01, 1.6e-01)),
    "clamb": Measured((0.9, 0.999), 1e-08, (1e-06, 1.4e-01, 1.4e-01, 1.6e-01)),
    "clambw": Measured((0.9, 0.999), 1e-08, (1e-06, 1.4e-01, 1.4e-01, 1.6e-01)),
    "crmsproptf": Measured((0.9, 0.999), 1e-08, (1e-06, 5.7e-02, 5.7e-02, 6.7e-02)),
    "cadopt": Measured((0.9, 0.999), 1e-08, (1e-06, 3.8e-02, 3.8e-02, 4.3e-02)),
    "cadamc": Measured((0.9, 0.999), 1e-08, (1e-06, 4.0e-02, 4.0e-02, 4.3e-02)),
    "cadamw": Measured((0.9, 0.999), 1e-08, (1e-06, 4.0e-02, 4.0e-02, 4.3e-02)),
    "sgdp": Measured((0.9, 0.999), 1e-08, (1e-06, 3.9e-02, 3.9e-02, 3.9e-02)),
    "cadamp": Measured((0.9, 0.999), 1e-08, (1e-06, 2.9e-02, 2.9e-02, 3.1e-02)),
    "claprop": Measured((0.9, 0.999), 1e-08, (1e-06, 2.9e-02, 2.9e-02, 3.1e-02)),
    "cnadamc": Measured((0.9, 0.999), 1e-08, (1e-06, 2.8e-02, 2.8e-02, 3.0e-02)),
    "cnadamw": Measured((0.9, 0.999), 1e-08, (1e-06, 2.8e-02, 2.8e-02, 3.0e-02)),
    "cadoptc": Measured((0.9, 0.999), 1e-08, (1e-06, 2.1e-02, 2.1e-02, 2.6e-02)),
    "cadoptw": Measured((0.9, 0.999), 1e-08, (1e-06, 2.1e-02, 2.1e-02, 2.6e-02)),
    "clion": Measured((0.9, 0.999), 1e-08, (1e-06, 2.4e-02, 2.4e-02, 2.5e-02)),
    "clionc": Measured((0.9, 0.999), 1e-08, (1e-06, 2.4e-02, 2.4e-02, 2.5e-02)),
    "nlarc": Measured((0.9, 0.999), 1e-08, (1e-06, 1.8e-02, 1.8e-02, 1.9e-02)),
    "larc": Measured((0.9, 0.999), 1e-08, (1e-06, 1.8e-02, 1.8e-02, 1.8e-02)),
    "adamp": Measured((0.9, 0.999), 1e-08, (1e-06, 5.6e-03, 5.6e-03, 5.6e-03)),
    "nlars": Measured((0.9, 0.999), 1e-08, (1e-06, 3.7e-03, 3.7e-03, 3.8e-03)),
    "lars": Measured((0.9, 0.999), 1e-08, (1e-06, 3.6e-03, 3.6e-03, 3.7e-03)),
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
    if error is None:
        return f"optim.name: {TIMM_PREFIX}{name} fails at ZeRO stage {stage} ({failure}); {_instead(name)}"
    if stage == 0:
        return None
    if error > EXACT:
        return (
            f"optim.name: {TIMM_PREFIX}{name} at ZeRO stage {stage} is another optimizer: the update is "
            f"{100 * error:.2g} % off, because DeepSpeed hands it pieces of the tensors (measured with timm "
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
            cells = " | ".join("fails" if error is None else f"{error:.1e}" for error in known.errors)
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
