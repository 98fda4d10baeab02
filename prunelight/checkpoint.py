"""Whether a checkpoint fits the run that loads it: same base, same training, same parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

KEY = "prunelight"  # of a checkpoint, under which a RecoveryModule keeps what it says of itself


def facts_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the module that wrote a checkpoint said of itself.

    Raises:
        ValueError: if another module wrote it.
    """
    if KEY not in checkpoint:
        raise ValueError(f"the checkpoint has no key {KEY!r}: it is not from this module")
    earlier = {"zeros": "not kept", "masks": None, "quantization": "none"}  # before version 0.2
    return {**earlier, **checkpoint[KEY]}


def check_same_run(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Check that a checkpoint was trained on our base, in our way.

    Raises:
        ValueError: if not; names both.
    """
    if any(saved[key] != ours[key] for key in ("fingerprint", "recovery", "zeros", "quantization")):
        raise ValueError(
            f"the checkpoint was trained by {_describe(saved)}, this run trains by "
            f"{_describe(ours)}; use the arguments of that run, or start without ckpt_path"
        )


def _describe(run: Mapping[str, Any]) -> str:
    return (
        f"{run['recovery']} with quantization {run['quantization']} on base {run['fingerprint']} "
        f"({run['base']}) with zeros {run['zeros']}"
    )


def check_same_parameters(saved: Collection[str], trained: Collection[str]) -> None:
    """Check that a checkpoint holds the trained parameters, and no other.

    Raises:
        ValueError: if not; names one.
    """
    odd = set(saved) ^ set(trained)
    if odd:
        raise ValueError(
            f"{len(odd)} trained parameters are only on one side, e.g. {min(odd)}; the LoRA "
            "settings must be those of the run that wrote the checkpoint"
        )
