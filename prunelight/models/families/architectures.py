"""The table of model families: where a family has its decoder layers, and what is inside them.

The table has one entry a family, keyed by `config.model_type`. Depth pruning also works on families
outside the table, if exactly one `ModuleList` of the model has `num_hidden_layers` members. Code
outside this folder calls this folder's functions, and never looks at a class name or a path.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from prunelight.models.families.own_classes.registration import family_of
from prunelight.models.families.own_classes.sliced import PREFIX as SLICED_PREFIX
from prunelight.models.families.own_classes.sliced import SHORTCUTS


@dataclass(frozen=True)
class Sublayers:
    """Names inside the decoder layers of a family: first attention, then MLP, each with a residual.

    Attributes:
        attention: module of the attention.
        mlp: module of the MLP.
        attention_norm: norm before the attention.
        mlp_norm: norm before the MLP; its input is the hidden states after the attention.
        heads: projections whose rows are heads: query, key and value, or one that holds all three.
        head_output: projection whose columns are query heads.
        neurons: projections whose rows are neurons: gate and up, or one that holds both; empty for
            experts.
        neuron_output: projection whose columns are neurons.
        droppable: whether sublayers can be dropped. A droppable sublayer f computes x + f(norm(x))
            and nothing else, so that x remains without f.
    """

    attention: str = "self_attn"
    mlp: str = "mlp"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    heads: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    head_output: str = "o_proj"
    neurons: tuple[str, ...] = ("gate_proj", "up_proj")
    neuron_output: str = "down_proj"
    droppable: bool = True


@dataclass(frozen=True)
class Architecture:
    """Module names of one model family.

    Attributes:
        layers: dotted path from the causal language model to its `ModuleList` of decoder layers.
        projections: names of the linear projections of attention (or mixer) and MLP.
        experts: paths of fused expert weights (3-D parameters), relative to a decoder layer.
        not_adapted: names of further projections, which can be sparsified but get no LoRA.
        sublayers: names of attention and MLP; None if they cannot be dropped or narrowed.
    """

    layers: str
    projections: tuple[str, ...]
    experts: tuple[str, ...] = ()
    not_adapted: tuple[str, ...] = ()
    sublayers: Sublayers | None = None


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

_PROJECTIONS = (*_ATTENTION, "gate_proj", "up_proj", "down_proj")

_LLAMA = Architecture("model.layers", _PROJECTIONS, sublayers=Sublayers())

# Gemma 2 and 3 have a second norm after each sublayer, so that dropping is more than leaving f out.
_GEMMA2 = Sublayers(mlp_norm="pre_feedforward_layernorm", droppable=False)

_OTHER = Architecture("model.layers", _PROJECTIONS)

_MIXTURE = Architecture("model.layers", _PROJECTIONS, _EXPERTS, (), Sublayers(neurons=()))

_FALCON = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": replace(_OTHER, sublayers=_GEMMA2),
    "gemma3_text": replace(_OTHER, sublayers=_GEMMA2),
    "granite": _LLAMA,
    "smollm3": _LLAMA,
    "olmo2": _OTHER,
    "stablelm": _OTHER,
    "cohere": _OTHER,
    "nemotron": Architecture("model.layers", (*_ATTENTION, "up_proj", "down_proj")),
    "glm4": Architecture("model.layers", (*_ATTENTION, "gate_up_proj", "down_proj")),
    "phi3": Architecture(
        "model.layers",
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        sublayers=Sublayers(heads=("qkv_proj",), neurons=("gate_up_proj",)),
    ),
    "phi": Architecture("model.layers", ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")),
    "starcoder2": Architecture("model.layers", (*_ATTENTION, "c_fc", "c_proj")),
    "mixtral": _MIXTURE,
    "qwen3_moe": _MIXTURE,
    "opt": Architecture(
        "model.decoder.layers", ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    ),
    "gpt2": Architecture("transformer.h", ("c_attn", "c_proj", "c_fc")),
    "gpt_neox": Architecture("gpt_neox.layers", _FALCON),
    "falcon": Architecture("transformer.h", _FALCON),
    "bloom": Architecture("transformer.h", _FALCON),
    # peft refuses LoRA on a Mamba's out_proj: the fused kernel reads that weight directly.
    "mamba": Architecture("backbone.layers", ("in_proj", "x_proj"), (), ("out_proj",)),
    "mamba2": Architecture("backbone.layers", ("in_proj",), (), ("out_proj",)),
    "rwkv": Architecture("rwkv.blocks", ("key", "value", "receptance", "output")),
}


def architecture_of(model: PreTrainedModel) -> Architecture | None:
    """Return the table entry of a model's family, or None for an unknown family."""
    return ARCHITECTURES.get(family_of(model.config.model_type))


def is_sliced(model: PreTrainedModel) -> bool:
    """Return whether the hidden states of a model were sliced, see sliced.py."""
    return model.config.model_type.startswith(SLICED_PREFIX)


def sublayers_of(model: PreTrainedModel) -> Sublayers:
    """Return the names of attention and MLP inside the decoder layers of a model's family.

    Raises:
        TypeError: if the table has no such names for the family; lists the families that have them.
    """
    architecture = architecture_of(model)
    if architecture is None or architecture.sublayers is None:
        families = sorted(name for name, entry in ARCHITECTURES.items() if entry.sublayers)
        raise TypeError(
            f"attention and MLP of {model.config.model_type} cannot be pruned apart; families that "
            f"can: {', '.join(families)}. Remove or merge whole layers instead"
        )
    return architecture.sublayers


def lora_targets(model: PreTrainedModel) -> tuple[list[str] | str, list[str]]:
    """Return what LoRA adapts: (names of projections, paths of fused expert parameters).

    For an unknown family the first is peft's "all-linear": all linear modules except the head.
    """
    architecture = architecture_of(model)
    if architecture is None:
        return "all-linear", []
    shortcuts = SHORTCUTS if is_sliced(model) else ()
    return [*architecture.projections, *shortcuts], list(architecture.experts)
