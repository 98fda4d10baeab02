"""The one place that knows model families: where the decoder layers are and what is inside them.

One table entry a family, keyed by `config.model_type`. Depth pruning also works on families that
are not in the table, if exactly one `ModuleList` of the model has `num_hidden_layers` members.
Everything else in prunelight asks the functions below and never looks at a class name or a path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunelight.sliced import PREFIX as SLICED_PREFIX
from prunelight.sliced import SHORTCUTS

# model_type of our own classes: this, or that of sliced.py, and the family whose modules they have.
REGISTERED_PREFIX = "prunelight_"
# Attributes in which transformers keeps a layer's own index (it selects the cache slot).
INDEX_ATTRIBUTES = ("layer_idx", "layer_id")
# Config fields by which logits are multiplied (1) or divided (-1): Cohere, Falcon-H1, Granite.
_LOGIT_SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}


@dataclass(frozen=True)
class Sublayers:
    """Names inside the decoder layers of a family whose sublayers add to the hidden states in turn.

    Attributes:
        attention: module of the attention.
        mlp: module of the MLP.
        attention_norm: norm before the attention.
        mlp_norm: norm before the MLP: what it gets is what the attention left.
        heads: projections whose rows are heads: query, key and value, or one that holds all three.
        head_output: projection whose columns are query heads.
        neurons: projections whose rows are neurons, apart or in one; none for experts.
        neuron_output: projection whose columns are neurons.
        droppable: x + f(norm(x)), with nothing after f; so x is what is left without f.
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
        experts: names of fused expert weights (3-D parameters), relative to a decoder layer.
        not_adapted: names of further projections, which can be sparsified but not adapted by LoRA.
        sublayers: what is known of attention and MLP; None: they cannot be dropped or narrowed.
    """

    layers: str
    projections: tuple[str, ...]
    experts: tuple[str, ...] = ()
    not_adapted: tuple[str, ...] = ()
    sublayers: Sublayers | None = None


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight of a decoder layer that can be sparsified, of `Linear`, `Conv1D` or fused experts.

    Attributes:
        name: dotted path of the module, or of the parameter for fused experts.
        owner: the module whose forward gets the input; the experts module for fused experts.
        parameter_name: name of the weight inside `owner`.
        transposed: stored (in, out), as a `Conv1D` does.
    """

    name: str
    owner: nn.Module
    parameter_name: str = "weight"
    transposed: bool = False

    @property
    def parameter(self) -> Tensor:
        """Return the weight as it is stored."""
        parameter: Tensor = getattr(self.owner, self.parameter_name)
        return parameter

    @property
    def fused(self) -> bool:
        """Return whether it is a stack of experts' weights, (experts, out, in)."""
        return self.parameter.ndim == 3

    def views(self, stored: Tensor | None = None) -> list[Tensor]:
        """Return views (out, in) of the weight, or of a tensor like it: one, or one an expert."""
        data = self.parameter.data if stored is None else stored
        if data.ndim == 3:
            return list(data)
        return [data.T if self.transposed else data]

    @property
    def in_features(self) -> int:
        """Return the width of the input."""
        return int(self.parameter.shape[0 if self.transposed else -1])


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_PROJECTIONS = (*_ATTENTION, "gate_proj", "up_proj", "down_proj")
_LLAMA = Architecture("model.layers", _PROJECTIONS, sublayers=Sublayers())
_GEMMA2 = Sublayers(mlp_norm="pre_feedforward_layernorm", droppable=False)  # norms after f
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
    """Return the table entry of the model's family, or None for an unknown family."""
    name = model.config.model_type.removeprefix(SLICED_PREFIX)
    return ARCHITECTURES.get(name.removeprefix(REGISTERED_PREFIX))


def is_sliced(model: PreTrainedModel) -> bool:
    """Return whether the hidden states of the model were sliced, see sliced.py."""
    return model.config.model_type.startswith(SLICED_PREFIX)


def sublayers_of(model: PreTrainedModel) -> Sublayers:
    """Return the names inside the decoder layers of the model's family.

    Raises:
        TypeError: if they are not known; lists the families whose are.
    """
    known = architecture_of(model)
    if known is None or known.sublayers is None:
        families = sorted(name for name, entry in ARCHITECTURES.items() if entry.sublayers)
        raise TypeError(
            f"attention and MLP of {model.config.model_type} cannot be pruned apart; families that "
            f"can: {', '.join(families)}. Remove or merge whole layers instead"
        )
    return known.sublayers


def layers_path(model: PreTrainedModel) -> str:
    """Return the dotted path of the `ModuleList` of decoder layers.

    Raises:
        TypeError: if the family is unknown and the structure does not tell which list it is.
    """
    known = architecture_of(model)
    if known is not None:
        return known.layers
    count = getattr(model.config, "num_hidden_layers", None)
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(paths) != 1:
        raise TypeError(
            f"model_type={model.config.model_type!r} is not a known family and {len(paths)} module "
            f"lists have num_hidden_layers={count} members, exactly one must; known families: "
            f"{', '.join(sorted(ARCHITECTURES))}. Add an entry to prunelight/architecture.py"
        )
    return paths[0]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the model's decoder layers (Mamba mixers and RWKV blocks included).

    Raises:
        TypeError: if they cannot be found, see `layers_path`.
    """
    layers = model.get_submodule(layers_path(model))
    assert isinstance(layers, nn.ModuleList)
    return layers


def layer_matrices(model: PreTrainedModel, index: int) -> list[Matrix]:
    """Return the weights of one decoder layer that can be sparsified, in the order of its modules.

    Projections of attention, mixer and MLP, and fused experts; never routers, norms, embeddings or
    the head. In a family that is not in the table: every `Linear` and `Conv1D` of the layer.

    Raises:
        TypeError: if a projection is quantized: it has no weight matrix to put zeros into.
    """
    known, layer = architecture_of(model), decoder_layers(model)[index]
    prefix = f"{layers_path(model)}.{index}"
    found = []
    for path, module in layer.named_modules():
        name = path.rpartition(".")[2]
        if known is not None and name not in known.projections + known.not_adapted:
            continue
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        if not module.weight.is_floating_point() or module.weight.shape[-1] == 1:
            raise TypeError(
                f"{prefix}.{path} is a quantized {type(module).__name__} ({module.weight.dtype}): "
                "prune first, save, and load the result in 4 or 8 bits"
            )
        found.append(Matrix(f"{prefix}.{path}", module, transposed=isinstance(module, Conv1D)))
    for path in known.experts if known is not None else ():
        owner, _, parameter = path.rpartition(".")
        if hasattr(layer.get_submodule(owner.partition(".")[0]), "experts"):
            found.append(Matrix(f"{prefix}.{path}", layer.get_submodule(owner), parameter))
    return found


def matrices(model: PreTrainedModel) -> dict[str, Matrix]:
    """Return all weights of the decoder layers that can be sparsified, by name; see `Matrix`."""
    layers = range(len(decoder_layers(model)))
    return {m.name: m for index in layers for m in layer_matrices(model, index)}


def lora_targets(model: PreTrainedModel) -> tuple[list[str] | str, list[str]]:
    """Return what LoRA adapts: (names of projections, names of fused expert parameters).

    An unknown family gives peft's own "all-linear", which leaves out the head.
    """
    known = architecture_of(model)
    if known is None:
        return "all-linear", []
    shortcuts = SHORTCUTS if is_sliced(model) else ()
    return [*known.projections, *shortcuts], list(known.experts)


def logits_finish(config: Any) -> Callable[[Tensor], Tensor] | None:
    """Return what the model does to its head's logits, scale or cap them; None for nothing."""
    scale, cap = 1.0, getattr(config, "final_logit_softcapping", None)  # Gemma
    for name, power in _LOGIT_SCALES.items():
        scale *= (getattr(config, name, None) or 1.0) ** power
    if scale == 1.0 and cap is None:
        return None
    return lambda logits: logits * scale if cap is None else cap * torch.tanh(logits * scale / cap)


def head_dim(config: Any) -> int:
    """Return the width of an attention head."""
    width: int = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return width


def accepts(config: PretrainedConfig, **fields: Any) -> bool:
    """Return whether the config class accepts these values instead of the config's own."""
    try:
        type(config).from_dict({**config.to_dict(), **fields})
    except (StrictDataclassError, ValueError):
        return False
    return True


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of token ids that the model has embeddings for."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def maximum_length(config: PretrainedConfig) -> int | None:
    """Return the longest sequence in tokens that the model allows, None if it has no limit."""
    for name in ("max_position_embeddings", "context_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def first_tensor(value: Any) -> Tensor:
    """Return the hidden states of a layer's output, which is a tensor or a tuple that starts so."""
    return value[0] if isinstance(value, (tuple, list)) else value


@torch.no_grad()
def restore_rwkv_scale(model: PreTrainedModel) -> None:
    """Undo, in place, the halving that an RWKV of transformers applies to its weights in eval mode.

    Its first eval forward divides the output weights of layer i by 2^(i // rescale_every). Saving,
    removing layers or taking a fingerprint then would mix two scales. Exact: powers of two.
    """
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if getattr(module, "layers_are_rescaled", False):
            was_training = module.training
            module.training = True
            module._rescale_layers()
            module.training = was_training
