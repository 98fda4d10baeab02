"""Which other programs read a model's config as transformers does: `loads_in`.

Some engines know a family's rule for its layers (every fourth layer of SmolLM3 without RoPE) and
ignore what the config lists. They read a model without some layers right only if the layers that
stay follow the rule for their number. Others recognise a variant of a family by its number of
layers. The family's rule is derived: it is what the config's class lists for so many layers when it
is given no lists. `READINGS` says only which engine differs in what; an entry is measured by
`tests/engines/loaders.py`, and docs/loaders.md holds the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from transformers import PretrainedConfig, PreTrainedModel

from prunelight.models.families.config_fields import head_dim
from prunelight.models.families.own_classes.registration import PREFIX
from prunelight.models.families.own_classes.sliced import PREFIX as SLICED_PREFIX
from prunelight.models.families.shorter_config import LISTS_NOT_PER_LAYER
from prunelight.models.packed.grids import is_packed_config
from prunelight.models.transformers4 import transformers4_misreading, transformers4_refusal
from prunelight.planning.layer_pattern import Pattern
from prunelight.runtime.arguments import check_choice

YES, NO, NOT_TRIED = "yes", "no: ", "unknown: not tried"
WRONG, REFUSED = "reads it wrong: ", "refuses it: "


class Reading(Protocol):
    """One way in which an engine reads a family otherwise than transformers."""

    def fault(self, config: PretrainedConfig) -> str | None:
        """Return what the engine makes of a config, and the remedy; None if it reads it right."""


@dataclass(frozen=True)
class ByPlace:
    """The engine derives a layer's kind from its place, by the family's rule.

    Attributes:
        fields: lists of the config that the engine does not read.
        key: of a GGUF; where it holds one value a layer, the engine reads that instead.
    """

    fields: tuple[str, ...]
    key: str | None = None

    def fault(self, config: PretrainedConfig) -> str | None:
        """Return the fault if the layers do not follow the family's rule."""
        rule = family_pattern(config, self.fields)(config.num_hidden_layers)
        if layer_kinds(config, self.fields) == list(rule):
            return None
        lists = " and ".join(self.fields)
        key = f", or write {self.key} with one value a layer into the GGUF" if self.key else ""
        return (
            f"{WRONG}it derives {lists} from a layer's place, and the layers that are left do not "
            f"follow that rule; remove layers so that they do{key}"
        )


@dataclass(frozen=True)
class ByDepth:
    """The engine recognises a variant of a family by its number of layers.

    Attributes:
        depths: numbers of layers at which the engine takes a model for the variant.
        is_variant: whether a config is one.
        what: the variant.
        outcome: WRONG or REFUSED.
    """

    depths: Collection[int]
    is_variant: Callable[[PretrainedConfig], bool]
    what: str
    outcome: str = WRONG

    def fault(self, config: PretrainedConfig) -> str | None:
        """Return the fault if the number of layers says another variant than the config."""
        total, variant = config.num_hidden_layers, self.is_variant(config)
        if (total in self.depths) == variant:
            return None
        known = ", ".join(map(str, self.depths))
        return (
            f"{self.outcome}it takes models of {known} layers, and no others, for those with "
            f"{self.what}; this one has {total} and {'is' if variant else 'is not'} one of them. "
            "Remove no whole layers of it, or do not use this engine"
        )


@dataclass(frozen=True)
class OtherWindows:
    """The engine attends to other tokens than transformers where layers have a window.

    Attributes:
        does: what the engine does with the window.
        outcome: WRONG or REFUSED.
    """

    does: str
    outcome: str = WRONG

    def fault(self, config: PretrainedConfig) -> str | None:
        """Return the fault if a layer has a window."""
        if not has_windows(config):
            return None
        window = config.sliding_window
        return (
            f"{self.outcome}it {self.does} sliding_window={window}; keep texts within {window} "
            "tokens there"
        )


@dataclass(frozen=True)
class WithoutMixedWindows:
    """The engine refuses a model of which only some layers have a window."""

    def fault(self, config: PretrainedConfig) -> str | None:
        """Return the fault if some layers have a window and others do not."""
        if len(set(layer_kinds(config, ("layer_types",)))) == 1:
            return None
        return f"{REFUSED}it takes no windows in only some of the layers; use another engine"


@dataclass(frozen=True)
class WithExpertsEverywhere:
    """The engine refuses a mixture of experts with some layers that have none."""

    def fault(self, config: PretrainedConfig) -> str | None:
        """Return the fault if a layer has no experts."""
        if config.decoder_sparse_step == 1 and not config.mlp_only_layers:
            return None
        return f"{REFUSED}it takes no layers without experts; use another engine"


@dataclass(frozen=True)
class ExpertsByStep:
    """The engine expects Llama 4's experts in every `interleave_moe_layer_step`-th layer."""

    def fault(self, config: PretrainedConfig) -> str | None:
        """Return the fault if other layers have them."""
        step = config.interleave_moe_layer_step
        expected = list(range(step - 1, config.num_hidden_layers, step))
        if list(config.moe_layers) == expected:
            return None
        return (
            f"{REFUSED}it expects experts in every layer whose number is a multiple of "
            f"interleave_moe_layer_step={step}, and moe_layers={list(config.moe_layers)} are "
            f"others; remove layers so that they are {expected}"
        )


@dataclass(frozen=True)
class WithoutHeadDim:
    """The engine takes hidden_size / num_attention_heads for the width of a head."""

    def fault(self, config: PretrainedConfig) -> str | None:
        """Return the fault if heads have another width, as after the removal of heads."""
        width, heads = head_dim(config), config.num_attention_heads
        if width * heads == config.hidden_size:
            return None
        return (
            f"{REFUSED}it takes hidden_size / num_attention_heads = {config.hidden_size} / {heads} "
            f"for the width of a head, which is {width}; do not prune heads for this engine"
        )


@dataclass(frozen=True)
class Always:
    """The engine reads no model of the family as transformers does, dense ones neither."""

    reason: str
    outcome: str = REFUSED

    def fault(self, config: PretrainedConfig) -> str | None:
        """Return the reason."""
        return f"{self.outcome}{self.reason}"


@dataclass(frozen=True)
class _AttentionScale:
    """llama.cpp takes hidden_size / num_attention_heads for Gemma's scale at one depth only."""

    depth: int

    def fault(self, config: PretrainedConfig) -> str | None:
        total, scalar = config.num_hidden_layers, config.query_pre_attn_scalar
        mean = config.hidden_size // config.num_attention_heads
        used = mean if total == self.depth else head_dim(config)
        if used == scalar:
            return None
        return (
            f"{WRONG}it scales attention by query_pre_attn_scalar={used} in a model of {total} "
            f"layers, and the config says {scalar}: it knows the 27B by its {self.depth} layers. "
            "Remove no whole layers of it, or do not use this engine"
        )


def has_windows(config: PretrainedConfig) -> bool:
    """Return whether a layer of a model attends only to a window of tokens before it."""
    if not getattr(config, "sliding_window", None):
        return False
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return "sliding_attention" in kinds
    return bool(getattr(config, "use_sliding_window", True))


def _gguf(architecture: str) -> ByPlace:
    return ByPlace(("layer_types",), f"{architecture}.attention.sliding_window_pattern")


def _without_query_rank(config: PretrainedConfig) -> bool:
    return config.q_lora_rank is None


_NO_WINDOWS = (OtherWindows("ignores"),)
_NOT_BEYOND_WINDOW = OtherWindows("takes no text longer than", REFUSED)
_LATENT = Always(
    "on a CPU its attention differs for this family, also in dense models; it was not tried on a "
    "GPU",
    WRONG,
)
_LITE = ByDepth((26, 27), _without_query_rank, "q_lora_rank=null (Lite)", REFUSED)
# Engine -> model_type -> in what the engine differs from transformers. Every family of an engine
# that was tried is here, also with nothing.
READINGS: dict[str, dict[str, tuple[Reading, ...]]] = {
    "vLLM": {
        "llama": (),
        "mistral": (),
        "qwen2": (WithoutMixedWindows(),),
        "qwen3": (),
        "gemma": (),
        "gemma2": (),
        "gemma3_text": (),
        "cohere2": (OtherWindows("adds one token to"),),
        "olmo2": (),
        "olmo3": (),
        "exaone4": (),
        "smollm3": (),
        "phi3": (),
        "granite": (),
        "starcoder2": (),
        "glm4": (),
        "gpt2": (),
        "gpt_oss": (ByPlace(("layer_types",)),),
        "mixtral": (),
        "qwen3_moe": (),
        "olmoe": (),
        "deepseek_v3": (_LATENT,),
        "llama4_text": (ExpertsByStep(),),
    },
    "llama.cpp": {
        "llama": (),
        "mistral": _NO_WINDOWS,
        "qwen2": _NO_WINDOWS,
        "qwen3": _NO_WINDOWS,
        "gemma": (),
        "gemma2": (_gguf("gemma2"), _AttentionScale(46)),
        "gemma3_text": (_gguf("gemma3"), _AttentionScale(62)),
        "cohere2": (_gguf("cohere2"),),
        "olmo2": (),
        "olmo3": (),
        "exaone4": (ByDepth((64,), has_windows, "sliding windows"),),
        "smollm3": (ByPlace(("no_rope_layers",)),),
        "phi3": _NO_WINDOWS,
        "granite": (),
        "starcoder2": _NO_WINDOWS,
        "glm4": (),
        "gpt2": (),
        "gpt_oss": (_gguf("gpt-oss"),),
        "mixtral": _NO_WINDOWS,
        "qwen3_moe": (WithExpertsEverywhere(),),
        "olmoe": (),
        "deepseek_v3": (_LITE,),
        "llama4_text": (
            ExpertsByStep(),
            ByPlace(("no_rope_layers", "layer_types")),
        ),
    },
    "CTranslate2": {
        "llama": (WithoutHeadDim(),),
        "mistral": (_NOT_BEYOND_WINDOW,),
        "qwen2": _NO_WINDOWS,
        "qwen3": (),
        "gemma": (),
        "gemma2": _NO_WINDOWS,
        "gemma3_text": (_NOT_BEYOND_WINDOW,),
        "smollm3": (Always("it has no converter for this family; use another engine"),),
        "phi3": (Always("its converter fails on this family's RoPE; use another engine"),),
        "gpt2": (),
    },
}
_TRANSFORMERS4 = "transformers 4.57"  # of which transformers4.py knows what it reads
ENGINES = (_TRANSFORMERS4, *READINGS)
_FULL_WEIGHTS_ONLY = ("llama.cpp", "CTranslate2")  # they quantize by themselves
# Engine -> beginning of the model types of ours whose exported code it runs.
_RUNS_OUR_CODE = {_TRANSFORMERS4: PREFIX, "vLLM": SLICED_PREFIX}


def loads_in(model: PreTrainedModel | PretrainedConfig) -> dict[str, str]:
    """Return for each engine whether it reads a model as transformers does.

    Returns:
        engine -> "yes", "no: " with the reason and the remedy, or "unknown: not tried".
    """
    config = model.config if isinstance(model, PreTrainedModel) else model
    return {engine: _answer(config, engine) for engine in ENGINES}


def misreadings(model: PreTrainedModel | PretrainedConfig) -> dict[str, str]:
    """Return the engines that load a model and compute something else, each with the reason."""
    wrong = NO + WRONG
    return {
        engine: answer.removeprefix(NO)
        for engine, answer in loads_in(model).items()
        if answer.startswith(wrong)
    }


def check_engine(model: PreTrainedModel | PretrainedConfig, engine: str) -> None:
    """Check that an engine reads a model as transformers does; one that was not tried passes.

    Raises:
        ValueError: if it does not, with the remedy; if no such engine is known.
    """
    check_choice("engine", engine, ENGINES)
    config = model.config if isinstance(model, PreTrainedModel) else model
    answer = _answer(config, engine)
    if answer.startswith(NO):
        raise ValueError(f"engine={engine!r}: {engine} {answer.removeprefix(NO)}")


def fields_by_place(config: PretrainedConfig, engine: str | None = None) -> tuple[str, ...]:
    """Return the lists by layer that an engine, or any engine, derives from a layer's place."""
    engines = ENGINES if engine is None else (engine,)
    by_engine = [READINGS.get(name, {}).get(config.model_type, ()) for name in engines]
    readings = [reading for of_engine in by_engine for reading in of_engine]
    names = [name for x in readings if isinstance(x, ByPlace) for name in x.fields]
    return tuple(dict.fromkeys(names))


def engine_patterns(
    config: PretrainedConfig, engines: Collection[str] | None
) -> list[tuple[list[tuple[Hashable, ...]], Pattern]]:
    """Return what engines derive from a layer's place: kinds of the layers, and the rule."""
    fields = [fields_by_place(config, engine) for engine in engines or ()]
    return [
        (layer_kinds(config, names), family_pattern(config, names)) for names in fields if names
    ]


def known_engines(names: Collection[str] | None) -> list[str] | None:
    """Return the names of engines as a list; None, the default of a method's argument, stays.

    Raises:
        ValueError: if one is not known.
    """
    for name in names or ():
        check_choice("loads_in", name, ENGINES)
    return None if names is None else list(names)


def check_engines(config: PretrainedConfig, engines: Collection[str] | None) -> None:
    """Check that each of these engines reads a config as transformers does.

    Raises:
        ValueError: see `check_engine`.
    """
    for engine in engines or ():
        check_engine(config, engine)


def layer_kinds(
    config: PretrainedConfig, fields: Collection[str] | None = None
) -> list[tuple[Hashable, ...]]:
    """Return the kind of each layer: what the config lists for it.

    Args:
        config: of the model, dense or pruned.
        fields: the lists that count; None takes every list with one entry a layer.
    """
    columns = [getattr(config, name) for name in _lists_by_layer(config, fields)]
    return [_kind(columns, layer) for layer in range(config.num_hidden_layers)]


def family_pattern(config: PretrainedConfig, fields: Collection[str] | None = None) -> Pattern:
    """Return the family's rule for its layers: number of layers -> kind of each.

    The rule is what the config's class lists for so many layers when it is given no lists.

    Args:
        config: of the model, dense or pruned.
        fields: the lists that count; None takes every list with one entry a layer.
    """
    return partial(_kinds_by_rule, config, _lists_by_layer(config, fields))


def _kinds_by_rule(
    config: PretrainedConfig, names: Sequence[str], total: int
) -> list[tuple[Hashable, ...]]:
    lists = _lists_by_layer(config)  # all of them: the others would be too long or too short
    values = {name: value for name, value in config.to_dict().items() if name not in lists}
    derived = type(config).from_dict({**values, "num_hidden_layers": total})
    columns = [getattr(derived, name) for name in names]
    return [_kind(columns, layer) for layer in range(total)]


def _lists_by_layer(config: PretrainedConfig, fields: Collection[str] | None = None) -> list[str]:
    return [
        name
        for name, value in config.to_dict().items()
        if isinstance(value, (list, tuple)) and len(value) == config.num_hidden_layers
        if not LISTS_NOT_PER_LAYER.fullmatch(name) and (fields is None or name in fields)
    ]


def _kind(columns: Sequence[Sequence[Any]], layer: int) -> tuple[Hashable, ...]:
    """Return the entries of a layer; a list within them becomes its text, which can be compared."""
    entries = [column[layer] for column in columns]
    return tuple(str(entry) if isinstance(entry, (list, dict)) else entry for entry in entries)


def _answer(config: PretrainedConfig, engine: str) -> str:
    if config.model_type.startswith(PREFIX):
        return _answer_for_own_class(config, engine)
    if is_packed_config(config) and engine in _FULL_WEIGHTS_ONLY:
        return (
            f"{NO}{REFUSED}its weights are packed by compressed-tensors, which {engine} does not "
            "read; export the model in full precision"
        )
    if engine == _TRANSFORMERS4:
        return _answer_of_transformers4(config)
    readings = READINGS[engine].get(config.model_type)
    if readings is None:
        return NOT_TRIED
    faults = [fault for reading in readings if (fault := reading.fault(config)) is not None]
    return NO + "; ".join(faults) if faults else YES


def _answer_of_transformers4(config: PretrainedConfig) -> str:
    if refusal := transformers4_refusal(config):
        return NO + REFUSED + refusal
    misreading = transformers4_misreading(config)
    return NO + WRONG + misreading if misreading else YES


def _answer_for_own_class(config: PretrainedConfig, engine: str) -> str:
    prefix = _RUNS_OUR_CODE.get(engine)
    if prefix is None or not config.model_type.startswith(prefix):
        return (
            f"{NO}{REFUSED}it cannot run this class of prunelight's own; remove or merge whole "
            "layers, narrow all layers alike, or zero weights instead"
        )
    if getattr(config, "auto_map", None):
        return YES
    return (
        f"{NO}{REFUSED}the class is prunelight's own; save it with export_remote_code=True and "
        "load it with trust_remote_code=True"
    )
