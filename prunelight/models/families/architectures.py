"""The table of model families: what the structure of a model does not tell.

The table has one entry a family, keyed by `config.model_type`. Depth pruning, zeros and LoRA also
work on families outside the table: layers, matrices and routers are found by the structure. Code
outside this folder calls this folder's functions, and never looks at a class name or a path.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from prunelight.models.families.own_classes.registration import family_of
from prunelight.models.families.own_classes.sliced import PREFIX as SLICED_PREFIX


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
    """What the structure of a model family does not tell; whatever is left out is derived.

    Attributes:
        layers: dotted path from the causal language model to its `ModuleList` of decoder layers.
        projections: names of the linear modules that are sparsified and adapted, and no others.
        experts: stacks of experts that transformers does not mark: their paths inside a decoder
            layer, for weights that are stored (..., out, in).
        not_adapted: names of further linear modules, which are sparsified but get no LoRA.
        sublayers: names of attention and MLP; None if they cannot be dropped or narrowed.
        transposed_experts: the same as `experts`, for weights that are stored (..., in, out).
    """

    layers: str = ""
    projections: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    not_adapted: tuple[str, ...] = ()
    sublayers: Sublayers | None = None
    transposed_experts: tuple[str, ...] = ()


_LLAMA = Architecture(sublayers=Sublayers())

# Gemma 2 and 3 have a second norm after each sublayer, so that dropping is more than leaving f out.
_GEMMA2 = Architecture(sublayers=Sublayers(mlp_norm="pre_feedforward_layernorm", droppable=False))

_MIXTURE = Architecture(sublayers=Sublayers(neurons=()))

_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

_LLAMA4 = Architecture(
    transposed_experts=("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj")
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "granite": _LLAMA,
    "smollm3": _LLAMA,
    "phi3": Architecture(sublayers=Sublayers(heads=("qkv_proj",), neurons=("gate_up_proj",))),
    "mixtral": _MIXTURE,
    "qwen3_moe": _MIXTURE,
    "dbrx": Architecture(
        experts=("ffn.experts.mlp.w1", "ffn.experts.mlp.v1"),
        transposed_experts=("ffn.experts.mlp.w2",),
    ),
    "inkling_text": Architecture(
        experts=(
            "mlp.shared_experts.gate_proj",
            "mlp.shared_experts.up_proj",
            "mlp.shared_experts.down_proj",
        )
    ),
    "jetmoe": Architecture(
        experts=(
            "mlp.input_linear.weight",
            "mlp.output_linear.weight",
            "self_attention.experts.input_linear.weight",
            "self_attention.experts.output_linear.weight",
        )
    ),
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "longcat_flash": Architecture(experts=_EXPERTS),
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


def stacks_of(model: PreTrainedModel, path: str) -> dict[str, bool]:
    """Return the stacks of experts that the table names in a module of a decoder layer.

    Returns:
        Name of the parameter -> whether it is stored (..., in, out).
    """
    known = architecture_of(model) or Architecture()
    stacks = dict.fromkeys(known.experts, False) | dict.fromkeys(known.transposed_experts, True)
    named = {stack: stack.rpartition(".") for stack in stacks}
    return {name: stacks[stack] for stack, (owner, _, name) in named.items() if owner == path}


def names_apart(model: PreTrainedModel, path: str) -> tuple[bool, bool]:
    """Return what the table says of a linear module: (it is left out, it gets no LoRA)."""
    known, name = architecture_of(model) or Architecture(), path.rpartition(".")[2]
    left_out = bool(known.projections) and name not in known.projections + known.not_adapted
    return left_out, name in known.not_adapted
