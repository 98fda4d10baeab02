"""Export to DeciLM for vLLM: models whose layers differ, of families that compute as Llama does.

vLLM runs a model of transformers from its own directory. It has one class for layers that differ,
made for NVIDIA's Nemotron models: DeciLM (model type nemotron-nas), Llama with settings for each
layer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from prunelight.export.decilm import configuration_decilm
from prunelight.export.decilm.layers import (
    block_configs,
    filled_shapes,
    filled_weights,
    layer_shapes,
)
from prunelight.export.decilm.reading import ENGINE, find_vllm, read_with_vllm
from prunelight.export.targets import TORCH_DTYPES, Bound, ExportOptions, Reading, Source
from prunelight.export.tokenizer_files import copy_tokenizer
from prunelight.models.engines import YES, has_windows, loads_in
from prunelight.models.families.config_fields import head_dim
from prunelight.models.families.own_classes.dropped_sublayers import gap_layers
from prunelight.models.families.own_classes.layer_widths import BIASED, LISTS
from prunelight.models.families.own_classes.registration import PREFIX, family_of
from prunelight.models.families.own_classes.sliced import PREFIX as SLICED_PREFIX
from prunelight.models.transformers4 import old_names

# Families that compute as Llama does -> the fields of DeciLM's config that say where biases are.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"attention_bias": False, "mlp_bias": False},
    "qwen2": {"attention_bias": False, "mlp_bias": False, "qkv_bias": True},
}
# Fields of our classes, and of their families, that DeciLM does not have.
_LEFT_OUT = (
    *LISTS,
    BIASED,
    *("drop_attention", "drop_mlp", "sublayer_names", "per_layer_config"),
    *("layer_types", "sliding_window", "use_sliding_window", "max_window_layers"),
)
DTYPES = {
    "f32": Bound("largest_difference", 5e-3),
    "f16": Bound("mean_kl", 2e-3),
    "bf16": Bound("mean_kl", 1e-2),
}


class DeciLMTarget:
    """A directory that vLLM loads as DeciLM."""

    name = "decilm"
    engine = ENGINE
    suffix = ""
    dtypes = DTYPES
    quantizations = ()

    def check(self, source: Source, options: ExportOptions) -> list[str]:
        """Check that DeciLM can hold the model; see `Target.check`."""
        check_model(source)
        return [
            "vLLM loads the export with --trust-remote-code (trust_remote_code=True): it reads its "
            "config through configuration_decilm.py, which lies beside the weights",
            *head_warnings(source.config),
        ]

    def longest_text(self, source: Source) -> int | None:
        """No limit: models with windows are refused; see `Target.longest_text`."""
        return None

    def check_reader(self, source: Source, options: ExportOptions) -> None:
        """Check that vLLM is somewhere; see `Target.check_reader`."""
        find_vllm(options)

    def write(
        self,
        source: Source,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        out: Path,
        options: ExportOptions,
    ) -> None:
        """Write config, weights and tokenizer; see `Target.write`."""
        kind = TORCH_DTYPES[options.dtype]
        config = {**decilm_config(source), "dtype": kind, "torch_dtype": kind}
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (out / "config.json").write_text(text, encoding="utf-8")
        code = Path(configuration_decilm.__file__)
        shutil.copyfile(code, out / code.name)
        weights = filled_weights(source.config, dict(model.state_dict()))
        if source.config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        dtype = getattr(torch, kind)
        save_torch_state_dict({name: w.to(dtype) for name, w in weights.items()}, out)
        copy_tokenizer(source.directory, out)
        generation = source.directory / "generation_config.json"
        if generation.is_file():
            shutil.copyfile(generation, out / generation.name)

    def read_back(
        self, source: Source, out: Path, windows: Sequence[Sequence[int]], options: ExportOptions
    ) -> Reading:
        """Compute the log-probabilities of windows with vLLM; see `Target.read_back`."""
        return read_with_vllm(find_vllm(options), out, windows, source.config.vocab_size)


def check_model(source: Source) -> None:
    """Check that DeciLM holds a model and computes what transformers computes.

    Raises:
        ValueError: if it does not; says what could be exported, or how else vLLM loads the model.
    """
    config: Any = source.config
    kind = config.model_type
    if kind.startswith(SLICED_PREFIX):
        raise ValueError(
            f"DeciLM has one hidden size for all layers and cannot hold {kind}; save the model "
            "with export_remote_code=True, and vLLM runs the directory itself with "
            "--trust-remote-code"
        )
    if not kind.startswith(PREFIX):
        raise ValueError(_nothing_to_export(source))
    family = family_of(kind)
    if family not in FAMILIES:
        raise ValueError(
            f"DeciLM computes as Llama does, and {family} does otherwise; it holds layers that "
            f"differ of {', '.join(FAMILIES)}. Remove or merge whole layers, or narrow all layers "
            "alike, and vLLM loads the directory itself"
        )
    if gaps := gap_layers(config):
        raise ValueError(
            f"DeciLM has no matrix behind a layer, as behind {gaps} here; heal by 'linear', which "
            "leaves a stock model, and vLLM loads that directory itself"
        )
    if biased := getattr(config, BIASED, None):
        raise ValueError(
            f"DeciLM has no biases of {', '.join(biased)} alone; prune with correction=True, not "
            "'bias', or save with export_remote_code=True"
        )
    if config.hidden_act != "silu":
        raise ValueError(
            f"DeciLM computes silu in its MLPs, not hidden_act={config.hidden_act!r}; remove whole "
            "layers, or narrow all layers alike, and vLLM loads the directory itself"
        )
    if has_windows(config):
        raise ValueError(
            f"DeciLM attends to all tokens, and this model has sliding_window="
            f"{config.sliding_window}; remove whole layers, or narrow all layers alike, and vLLM "
            "loads the directory itself"
        )
    if not layer_shapes(config)[0].heads:
        raise ValueError(
            "vLLM's DeciLM fails without the attention of layer 0, which this model has dropped; "
            "drop attentions with protected=[0]"
        )


def head_warnings(config: PretrainedConfig) -> list[str]:
    """Return a warning about the heads of zeros that an export gets."""
    shapes = layer_shapes(config)
    pairs = list(zip(shapes, filled_shapes(shapes), strict=True))
    layers = [layer for layer, (old, new) in enumerate(pairs) if old != new]
    if not layers:
        return []
    queries = sum(new.heads - old.heads for old, new in pairs)
    groups = sum(new.key_value_heads - old.key_value_heads for old, new in pairs)
    return [
        f"DeciLM has {max(new.heads for _, new in pairs)} query heads in each layer: layers "
        f"{', '.join(map(str, layers))} get {queries} heads of zeros and {groups} key-value heads "
        "of zeros, which change no result and cost memory and time"
    ]


def decilm_config(source: Source) -> dict[str, Any]:
    """Return the config.json of the export, without its dtype."""
    config: Any = source.config
    shapes = filled_shapes(layer_shapes(config))
    attention = next(shape for shape in shapes if shape.heads)
    values = {
        name: value
        for name, value in config.to_dict().items()
        if name not in _LEFT_OUT and not name.startswith("_")
    }
    values |= old_names(type(config), values)
    values |= FAMILIES[family_of(config.model_type)]
    return values | {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "model_type": configuration_decilm.DeciLMConfig.model_type,
        "block_configs": block_configs(shapes),
        "head_dim": head_dim(config),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.key_value_heads,
        "intermediate_size": max(shape.neurons for shape in shapes),
    }


def _nothing_to_export(source: Source) -> str:
    answer = loads_in(source.config)[ENGINE]
    begin = f"{source.directory} is a model of transformers without layers that differ, "
    if answer == YES:
        return begin + (
            f"and vLLM loads the directory itself: vllm serve {source.directory}; nothing need be "
            "exported"
        )
    return begin + (
        "for which there is no DeciLM. vLLM loads such directories itself; here: "
        f"{answer.removeprefix('no: ').removeprefix('unknown: ')}"
    )
