"""What autograd keeps of a forward until its backward, told from shapes and types alone.

The model is built of fake tensors: torch runs its forward in training mode on them, and autograd
says what it keeps. So no family needs a formula.
"""

# B sequences of a batch, T tokens of each, D hidden size

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from prunelight.models.forward import hidden_states_argument
from prunelight.recovery.distillation.language_head import LanguageHead, without_adapters
from prunelight.runtime.progress import logging_from


class SavedForBackward:
    """The memory that autograd keeps of a forward, by the decoder layer that was computing.

    Attributes:
        by_layer: layer -> bytes; None for what is kept outside of all layers.
        inputs: layer -> bytes of its hidden states.
    """

    def __init__(self, model: nn.Module, attention: str, seq_len: int) -> None:
        self.by_layer: Counter[int | None] = Counter()
        self.inputs: dict[int, int] = {}
        self._layer: int | None = None
        self._seq_len = seq_len
        # Masks and weights of T x T: the kernels of a GPU hold none of them.
        self._fused = attention != "eager"
        # Held, so that no other memory gets the address of one that is counted.
        self._known = [t.untyped_storage() for t in chain(model.parameters(), model.buffers())]
        self._addresses = {storage._cdata for storage in self._known}

    @contextmanager
    def watching(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Count what forwards inside keep."""
        with ExitStack() as stack:
            for index, layer in enumerate(layers):
                enter = partial(self._enter, index)
                stack.enter_context(layer.register_forward_pre_hook(enter, with_kwargs=True))
                stack.enter_context(layer.register_forward_hook(self._leave))
            stack.enter_context(saved_tensors_hooks(self._count, lambda tensor: tensor))
            yield

    def _enter(self, index: int, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs[hidden_states_argument(layer)]
        self._layer, self.inputs[index] = index, states.nbytes

    def _leave(self, *_: object) -> None:
        self._layer = None

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        square = tensor.shape[-2:] == (self._seq_len, self._seq_len)
        if storage._cdata not in self._addresses and not (square and self._fused):
            self._known.append(storage)
            self._addresses.add(storage._cdata)
            self.by_layer[self._layer] += storage.nbytes()
        return tensor

    def total(self, *, checkpointing: bool) -> int:
        """Return the bytes that are kept; with checkpointing one layer's, and all inputs."""
        if not checkpointing:
            return self.by_layer.total()
        within = [count for layer, count in self.by_layer.items() if layer is not None]
        return self.by_layer[None] + sum(self.inputs.values()) + max(within, default=0)


def saved_by_forward(
    trained: PreTrainedModel | PeftModel,
    layers: Iterable[nn.Module],
    batch_size: int,
    seq_len: int,
) -> tuple[SavedForBackward, Tensor]:
    """Return what a forward of a model on meta would keep, and the input of its head, (B, T, D).

    Raises:
        TypeError: if the forward depends on more than shapes and types.
    """
    config = without_adapters(trained).config
    # A fake kernel that fails logs its traceback; the error below says enough.
    quiet = logging_from("torch._subclasses.fake_tensor", logging.CRITICAL)
    with FakeTensorMode(), quiet:
        _give_fakes(trained)
        saved = SavedForBackward(trained, str(config._attn_implementation), seq_len)
        ids = torch.zeros(batch_size, seq_len, dtype=torch.long)
        try:
            with saved.watching([*layers]):
                states = LanguageHead(trained).hidden_states({"input_ids": ids, "use_cache": False})
        except (RuntimeError, NotImplementedError) as error:
            raise TypeError(
                f"what {config.model_type} keeps for its backward cannot be told from shapes and "
                f"types alone: {str(error).splitlines()[0]}"
            ) from error
    return saved, states


def _give_fakes(model: nn.Module) -> None:
    """Put fake tensors of the CPU in place of all weights and buffers, which are on meta."""
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        tensors: Any
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    trained = isinstance(tensor, nn.Parameter)
                    fakes[id(tensor)] = (
                        nn.Parameter(fake, tensor.requires_grad) if trained else fake
                    )
                if tensor is not None:
                    tensors[name] = fakes[id(tensor)]
