"""What transformers 4 must find in a saved directory: old names beside those of transformers 5.

transformers 4 ignores names that it does not know and takes its defaults, without a word. It knows
nothing of `rope_parameters`, for instance. So `add_old_names` states the same facts under the old
names too. Each old name is found by asking the config's class in transformers 5 where it puts a
value of that name. No name is written that would change what transformers 5 reads.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from prunelight.models.families.transformers4 import MODEL_TYPES

log = logging.getLogger(__name__)

# Old names of numbers in `rope_parameters`: the name there -> top-level names in transformers 4.
_OLD_NUMBERS = {
    "rope_theta": (
        "rope_theta",
        "rope_local_base_freq",
        "rotary_emb_base",
        "global_rope_theta",
        "local_rope_theta",
    ),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
}
_UNSCALED = {"rope_type": "default"}

_PROBE = 0.375  # a value that no config has by default, exact in binary

# Families whose config in transformers 4 refuses `rope_type`, and wants `type` in its place.
_WANT_TYPE = (
    "fuyu",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "olmo",
    "olmo2",
    "persimmon",
    "phi3",
    "phimoe",
)

# Families whose code in transformers 4 gives other logits, with the same config and weights.
_OTHER_CODE = (
    "apertus",
    "bigbird_pegasus",
    "blt",
    "cpmant",
    "gemma3n_text",
    "modernbert-decoder",
    "recurrent_gemma",
    "xlstm",
)

# Families whose lists of layer kinds have other names in transformers 4; transformers 5 takes both.
_OLD_KINDS = {
    "granitemoehybrid": {"linear_attention": "mamba", "full_attention": "attention"},
    "zamba": {"linear_attention": "mamba"},
    "zamba2": {"linear_attention": "mamba"},
}
_KINDS_FIELDS = ("layer_types", "layers_block_type")

# Families that cap attention scores. transformers 4 caps them in its plain implementation only, and
# takes another one by default; transformers 5 takes the plain one by itself.
_CAPPED = ("gemma2", "vaultgemma")

# Fields that transformers 4 reads under another name: family -> name in 5 -> name in 4.
_OLD_FIELDS = {"qwen3_moe": {"num_local_experts": "num_experts"}}

_OLD_TOKENIZER_CLASS = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def add_old_names(config: PretrainedConfig, directory: Path) -> None:
    """Rewrite config.json and tokenizer_config.json of a directory, so that both versions read it.

    Args:
        config: of the model that was saved in the directory.
        directory: what `save_pretrained` of transformers 5 wrote.
    """
    file = directory / "config.json"
    values = _decoded(json.loads(file.read_text(encoding="utf-8")))
    _write(file, {**values, **old_names(type(config), values)})
    file = directory / "tokenizer_config.json"
    if file.is_file():
        _write(file, old_tokenizer_names(json.loads(file.read_text(encoding="utf-8"))))


def old_names(config_class: type[PretrainedConfig], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields to add to those of a config.json, so that transformers 4 reads the same.

    Args:
        config_class: class of the config in transformers 5.
        values: fields of its config.json.
    """
    names: dict[str, Any] = {}
    for name, value in _candidates(config_class, values):
        if _reads_the_same(config_class, values, {**values, **names, name: value}):
            names[name] = value
    for name, sub in getattr(config_class, "sub_configs", {}).items():
        if isinstance(values.get(name), dict) and hasattr(sub, "from_dict"):
            names[name] = {**values[name], **old_names(sub, values[name])}
    return names


def transformers4_fault(config: PretrainedConfig) -> str:
    """Return why transformers 4 cannot read a config; empty where it reads it right."""
    return transformers4_refusal(config) or transformers4_misreading(config)


def transformers4_refusal(config: PretrainedConfig) -> str:
    """Return why transformers 4 ends with an error of its own; empty where it does not."""
    kind, scaled = config.model_type, _scaled(config)
    if kind not in MODEL_TYPES:
        return f"transformers 4 has no causal language model {kind}"
    if kind == "dbrx":
        return "transformers 4 refuses the fields that transformers 5 writes for dbrx"
    if kind in _WANT_TYPE and any("type" not in parameters for parameters in scaled):
        return f"transformers 4 reads no scaled RoPE of {kind} without the key `type`"
    long = any(parameters["rope_type"] == "longrope" for parameters in scaled)
    if long and not hasattr(config, "original_max_position_embeddings"):
        return "transformers 4 reads longrope only with a field original_max_position_embeddings"
    return ""


def transformers4_misreading(config: PretrainedConfig) -> str:
    """Return why transformers 4 computes something else, without an error; empty if it does not."""
    kind, groups = config.model_type, getattr(config, "n_groups", 1)
    if kind in _OTHER_CODE or (kind == "mamba2" and groups > 1):
        return f"the code of {kind} in transformers 4 computes other logits"
    if kind in _CAPPED and getattr(config, "attn_logit_softcapping", None) is not None:
        return (
            f"transformers 4 leaves out attn_logit_softcapping of {kind}; there load it with "
            "attn_implementation='eager'"
        )
    if lost := _lost_parameters(config, _decoded(json.loads(config.to_json_string()))):
        return f"transformers 4 has no name for {lost}"
    return ""


def tell_fault(config: PretrainedConfig) -> None:
    """Say why transformers 4 cannot read a config; warn if it would do so without an error."""
    if refusal := transformers4_refusal(config):
        log.info("the saved model needs transformers 5: %s", refusal)
    elif misreading := transformers4_misreading(config):
        log.warning("the saved model needs transformers 5: %s", misreading)


def _scaled(config: PretrainedConfig) -> list[dict[str, Any]]:
    """Return the RoPE parameters of each kind of layer whose RoPE is scaled."""
    by_type = _by_layer_type(getattr(config, "rope_parameters", None) or {})
    return [x for x in by_type.values() if x.get("rope_type", "default") != "default"]


def old_tokenizer_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a tokenizer_config.json under names that both versions know."""
    values = dict(values)
    kind = values.get("tokenizer_class")
    values["tokenizer_class"] = _OLD_TOKENIZER_CLASS.get(kind, kind)
    if isinstance(values.get("extra_special_tokens"), list):  # a mapping in transformers 4
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    return values


def _candidates(
    config_class: type[PretrainedConfig], values: Mapping[str, Any]
) -> Iterable[tuple[str, Any]]:
    """Yield old names and their values, which the config may state beside the new ones."""
    if values.get("dtype") is not None:
        yield "torch_dtype", values["dtype"]
    kind = values.get("model_type", "")
    for new, old in _OLD_FIELDS.get(kind, {}).items():
        if new in values:
            yield old, values[new]
    kinds = _OLD_KINDS.get(kind, {})
    for field in _KINDS_FIELDS if kinds else ():
        if isinstance(values.get(field), list):
            yield field, [kinds.get(name, name) for name in values[field]]
    parameters = values.get("rope_parameters")
    if not isinstance(parameters, dict):
        return
    by_type = _by_layer_type(parameters)
    for key, names in _OLD_NUMBERS.items():
        for name in names:
            places = _places(config_class, values, {name: _PROBE}, key)
            stated = [by_type[place].get(key) for place in places if place in by_type]
            if stated and stated[0] is not None and all(value == stated[0] for value in stated):
                yield name, stated[0]
    probe = {"rope_scaling": {"rope_type": "linear", "factor": 7.0 + _PROBE}}
    places = [""] if "" in by_type else _places(config_class, values, probe, "factor")
    scalings = [_old_scaling(by_type[place], values) for place in places if place in by_type]
    if scalings and all(value == scalings[0] for value in scalings):
        yield "rope_scaling", scalings[0]


def _by_layer_type(parameters: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return RoPE parameters by kind of layer; those of all layers have the key ""."""
    nested = {name: value for name, value in parameters.items() if isinstance(value, dict)}
    return nested or {"": dict(parameters)}


def _places(
    config_class: type[PretrainedConfig],
    values: Mapping[str, Any],
    probe: Mapping[str, Any],
    key: str,
) -> list[str]:
    """Return the kinds of layers whose `key` an old name sets, by reading a config with a probe."""
    ((name, value),) = probe.items()
    wanted = value["factor"] if name == "rope_scaling" else value
    # Some families have a default of all parameters, which any `rope_scaling` replaces.
    for base in ({}, {"rope_scaling": dict(_UNSCALED)}):
        without = {name: value for name, value in values.items() if name != "rope_parameters"}
        try:
            config: Any = config_class.from_dict(_copied({**without, **base, **probe}))
            by_type = _by_layer_type(config.rope_parameters or {})
        except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError):
            continue
        if places := [kind for kind, stated in by_type.items() if stated.get(key) == wanted]:
            return places
    return []


def _old_scaling(parameters: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the `rope_scaling` of transformers 4, None for unscaled RoPE."""
    if parameters.get("rope_type", "default") == "default":
        return None
    apart = {*_OLD_NUMBERS}
    if "type" in parameters:  # the oldest layout, which some families ask for key by key
        apart.add("rope_type")
    if "original_max_position_embeddings" in values:
        apart.add("original_max_position_embeddings")
    return {name: value for name, value in parameters.items() if name not in apart}


def _lost_parameters(config: PretrainedConfig, values: Mapping[str, Any]) -> str:
    """Return which RoPE parameters the old names do not carry; empty, if they carry all."""
    parameters = values.get("rope_parameters")
    if not isinstance(parameters, dict):
        return ""
    old = {**values, **old_names(type(config), values)}
    del old["rope_parameters"]
    old["rope_scaling"] = old.get("rope_scaling") or dict(_UNSCALED)
    read_config: Any = type(config).from_dict(_copied(old))
    read = _by_layer_type(read_config.rope_parameters or {})
    return ", ".join(
        f"{name or 'rope_parameters'}: {stated}"
        for name, stated in _by_layer_type(parameters).items()
        if read.get(name) != stated
    )


def _reads_the_same(
    config_class: type[PretrainedConfig], values: Mapping[str, Any], more: Mapping[str, Any]
) -> bool:
    try:
        before, after = (config_class.from_dict(_copied(fields)) for fields in (values, more))
    except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError):
        return False
    return bool(before.to_dict() == after.to_dict())


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy: reading a config changes the lists and mappings in its fields."""
    copied: dict[str, Any] = json.loads(json.dumps(dict(values)))
    return copied


def _decoded(value: Any) -> Any:
    """Return JSON with infinities as numbers: transformers 5 writes {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {name: _decoded(member) for name, member in value.items()}
    return [_decoded(member) for member in value] if isinstance(value, list) else value


def _write(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
