"""Export to CTranslate2, with the package's own converter, read back with its own generator.

The converter runs on a copy of the model in memory: it takes layers apart while it works, and
quantizes weights in place. What it cannot hold is refused first, by what
`prunelight.models.engines` knows of it.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from prunelight.export.targets import Bound, ExportOptions, Reading, Source
from prunelight.export.tokenizer_files import copy_tokenizer
from prunelight.models.engines import NO, has_windows, loads_in
from prunelight.models.families.config_fields import vocabulary_size
from prunelight.models.families.own_classes.dropped_sublayers import gap_layers
from prunelight.models.families.own_classes.registration import PREFIX
from prunelight.models.families.own_classes.sliced import PREFIX as SLICED_PREFIX
from prunelight.models.loading import quiet_transformers

if TYPE_CHECKING:
    from ctranslate2.converters import TransformersConverter

ENGINE = "CTranslate2"
# dtype -> how the converter names it, and the type in which it is read back on a CPU.
_TYPES = {
    "f32": ("float32", "float32"),
    "f16": ("float16", "float32"),
    "bf16": ("bfloat16", "float32"),
    "int8": ("int8", "int8_float32"),
}
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token")
_LOADERS = "_MODEL_LOADERS"  # private: name of a config's class -> what converts it
_OTHERS = "take --to gguf, or serve the directory itself with transformers or vLLM"
# Two programs order their sums in float32 differently; massive activations make 1e-3 of that. int8
# rounds activations too, which costs a dense SmolLM2-135M 0.08 nats.
DTYPES = {
    "f32": Bound("largest_difference", 5e-3),
    "f16": Bound("mean_kl", 2e-3),
    "bf16": Bound("mean_kl", 1e-2),
    "int8": Bound("mean_kl", 0.5),
}


class CTranslate2Target:
    """A model directory of CTranslate2."""

    name = "ctranslate2"
    engine = ENGINE
    suffix = ""
    dtypes = DTYPES
    quantizations = ()

    def check(self, source: Source, options: ExportOptions) -> list[str]:
        """Check that CTranslate2 can hold the model; see `Target.check`."""
        check_package()
        check_model(source.config)
        if options.engine_python is None:
            return []
        return [
            "engine_python has no effect: CTranslate2 reads its export in this Python, where it "
            "converts"
        ]

    def longest_text(self, source: Source) -> int | None:
        """No limit: models with windows are refused; see `Target.longest_text`."""
        return None

    def check_reader(self, source: Source, options: ExportOptions) -> None:
        """The package that converts also reads; see `Target.check_reader`."""

    def write(
        self,
        source: Source,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        out: Path,
        options: ExportOptions,
    ) -> None:
        """Convert, and copy the tokenizer; see `Target.write`."""
        kind, _ = _TYPES[options.dtype]
        converter = _converter(source.directory, model, tokenizer)
        with quiet_transformers(), _quick_collections(), _explaining("convert the model"):
            converter.convert(str(out), quantization=kind, force=True)
        _name_missing_tokens(out / "config.json")
        copy_tokenizer(source.directory, out)

    def read_back(
        self, source: Source, out: Path, windows: Sequence[Sequence[int]], options: ExportOptions
    ) -> Reading:
        """Compute the logits of windows with `ctranslate2.Generator`; see `Target.read_back`."""
        import ctranslate2

        _, kind = _TYPES[options.dtype]
        with _explaining("read the export"):
            generator = ctranslate2.Generator(str(out), device="cpu", compute_type=kind)
            # One window at a time: a batch pads the shorter ones.
            logits = [np.array(generator.forward_batch([[*window]]))[0] for window in windows]
        return Reading(ENGINE, ctranslate2.__version__, logits)


def check_package() -> None:
    """Check that the package is here.

    Raises:
        ImportError: if it is not; names its pip line.
    """
    if importlib.util.find_spec("ctranslate2") is None:
        raise ImportError(
            "an export to CTranslate2 needs the package ctranslate2; install it with: "
            "pip install 'prunelight[export]'"
        )


def check_model(config: PretrainedConfig) -> None:
    """Check that CTranslate2 holds a model and computes what transformers computes.

    Raises:
        ValueError: if it does not; says what could be exported, or where else.
    """
    kind = config.model_type
    if kind.startswith(PREFIX):
        other = "or export with --to gguf or --to decilm, which hold layers that differ"
        if kind.startswith(SLICED_PREFIX):
            other = "slicing leaves what no export holds but SliceGPT(rotation='shared') in GGUF"
        elif gap_layers(config):
            other = "heal by 'linear' instead of the matrices at gaps, which no export holds"
        raise ValueError(
            f"CTranslate2 cannot hold {kind}: it keeps layers that are all alike. Remove or merge "
            f"whole layers, narrow all MLPs alike, or zero weights for it; {other}"
        )
    families = converted_families()
    if families is not None and type(config).__name__ not in families:
        raise ValueError(
            f"CTranslate2 has no converter for the family {kind} ({type(config).__name__}); "
            + _OTHERS
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "CTranslate2 converts models in full precision, and the weights of this one are "
            "quantized; save it de-quantized (prunelight.load with quantization=None), then "
            "export it as int8"
        )
    if has_windows(config):
        raise ValueError(
            f"CTranslate2 handles sliding_window={config.sliding_window} otherwise than "
            f"transformers, for texts longer than it; {_OTHERS}"
        )
    answer = loads_in(config)[ENGINE]
    if answer.startswith(NO):
        raise ValueError(f"CTranslate2 {answer.removeprefix(NO)}; or {_OTHERS}")


def converted_families() -> frozenset[str] | None:
    """Return the names of the config classes that have a converter; None if it does not tell."""
    from ctranslate2.converters import transformers as converters

    loaders = getattr(converters, _LOADERS, None)
    return None if loaders is None else frozenset(loaders)


@contextmanager
def _quick_collections() -> Iterator[None]:
    """Let collections of garbage pass over what exists: converters collect after each layer."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _explaining(what: str) -> Iterator[None]:
    """Turn an error of the package into one sentence."""
    from ctranslate2 import __version__

    try:
        yield
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RuntimeError(
            f"CTranslate2 {__version__} does not {what}, so nothing was kept: "
            f"{type(error).__name__}: {reason}; {_OTHERS}"
        ) from error


def _converter(
    directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> TransformersConverter:
    """Return the package's converter, which takes what is in memory instead of loading it."""
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):  # type: ignore[misc, unused-ignore]
        def load_model(self, *_: Any, **__: Any) -> PreTrainedModel:
            return copy.deepcopy(model)  # also of the weights: they are quantized in place

        def load_tokenizer(self, *_: Any, **__: Any) -> PreTrainedTokenizerBase:
            return _with_tokens_below(tokenizer, vocabulary_size(model))

    return Converter(str(directory))


def _with_tokens_below(tokenizer: PreTrainedTokenizerBase, size: int) -> PreTrainedTokenizerBase:
    """Return the tokenizer without ids that the model has no embedding for."""
    known = {token: index for token, index in tokenizer.get_vocab().items() if index < size}
    shorter = copy.copy(tokenizer)
    shorter.get_vocab = lambda: known  # type: ignore[method-assign]
    return shorter


def _name_missing_tokens(file: Path) -> None:
    """Write "" for special tokens that the tokenizer does not have: the engine takes no null."""
    config = json.loads(file.read_text(encoding="utf-8"))
    named = {
        name: "" if value is None and name in _SPECIAL_TOKENS else value
        for name, value in config.items()
    }
    file.write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
