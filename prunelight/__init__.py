"""prunelight: make causal language models smaller, bring them back, and save what others can load.

The names below are what a script needs; `prunelight.callbacks` holds the pruning methods. Each name
is imported at its first use, so that `import prunelight` is quick. After it, transformers loads our
models of classes of our own, such as sliced ones, by plain `from_pretrained`.
"""

import logging
from importlib import import_module
from pathlib import Path
from typing import Any

from prunelight.version import __version__ as __version__

# A source checkout keeps `callbacks/` and `configs/` beside this folder. Without the next lines,
# anything started from the repository root after a wheel install would not find them.
_repository = Path(__file__).resolve().parent.parent
if (_repository / "pyproject.toml").is_file() and (_repository / "callbacks").is_dir():
    __path__.append(str(_repository))

# Its import, which peft needs, tells of a faster kernel that training switches off: noise.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

from prunelight import moved as _moved  # noqa: E402
from prunelight.models.families.own_classes import registration as _registration  # noqa: E402

# No callbacks: LightningCLI writes the shortest import path of a class into a run's config, and
# that of a callback stays `prunelight.callbacks.X`.
_HOMES = {
    "BitsAndBytes": "recovery.quantization",
    "Distillation": "recovery.distillation.objective",
    "DropSublayers": "planning.steps",
    "LatencyProtocol": "evaluation.speed",
    "LoRA": "recovery.lora",
    "MergeLayers": "planning.steps",
    "Plan": "planning.plan",
    "PruneWidth": "planning.steps",
    "RecoveryModule": "training.recovery_module",
    "RemoveExperts": "planning.steps",
    "RemoveLayers": "planning.steps",
    "Schedule": "recovery.zeros.gradual_zeros",
    "SliceHidden": "planning.steps",
    "SparseGPT": "pruning.sparsity.sparsegpt",
    "Sparsify": "planning.steps",
    "Step": "planning.steps",
    "TextDataModule": "training.text_datamodule",
    "Trainer": "training.trainer",
    "analyze": "scoring.analysis",
    "apply": "pruning.apply",
    "calibration_windows": "data.token_windows",
    "evaluate": "evaluation.perplexity",
    "load": "models.loading",
    "load_tokenizer": "models.loading",
    "perplexity": "evaluation.perplexity",
    "read_documents": "data.sources",
    "save": "models.saving",
    "share_windows": "calibration.shared_windows",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a name at its first use; modules that were imported here before, too."""
    path = f"{__name__}.{name}"
    if name in _HOMES:
        globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return globals()[name]
    if path in _moved.HOMES:
        return import_module(path)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


_registration.register()
_moved.find_moved_modules()
