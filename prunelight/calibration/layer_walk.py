"""The walk: all calibration windows through one decoder layer after another.

A method that prunes layer by layer gives each layer the outputs of the pruned layers before it.
Layers are called with the arguments that the model itself passes: recorded, never rebuilt. One
layer at a time is on the compute device. The hidden states stay there or, offloaded, on the CPU.
"""

# B sequences, T tokens, D hidden

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelight.calibration.kept_layers import KeptLayers, holding
from prunelight.calibration.shared_windows import MICRO_BATCH_TOKENS, group_of, own_windows
from prunelight.calibration.windows import Windows, counted_tokens, micro_batches, split_windows
from prunelight.models.families.config_fields import decoder_config
from prunelight.models.families.layers import (
    HANDS_ON,
    carried_arguments,
    decoder_layers,
    first_tensor,
)
from prunelight.models.families.rwkv import without_rescaling
from prunelight.models.forward import (
    evaluating,
    forward_without_head,
    hidden_states_argument,
)
from prunelight.models.placement import (
    compute_device,
    is_streamed,
    layers_arriving,
    on_device,
    replaced_forward,
    rest_on_device,
    with_index,
)
from prunelight.models.sizes import tensor_bytes
from prunelight.runtime.devices import free_memory
from prunelight.runtime.progress import show_progress

log = logging.getLogger(__name__)

_PROBE_TOKENS = 8
_STATE_BYTES = 4  # of a number; some models add their states up in float32

# Arguments of a layer besides the hidden states: positional and keyword.
Call = tuple[tuple[Any, ...], dict[str, Any]]


class LayerWalk:
    """The hidden states of all windows, before one decoder layer after another; a context manager.

        with LayerWalk(model, windows) as walk:
            for index, layer in walk.layers():  # the layer is on the compute device
                ...  # walk.forward(i) as often as needed, then
                walk.advance()

    Attributes:
        states: hidden states (B, T, D) of each micro-batch before the current layer.
        device: on which layers compute.
        home: device of the model outside the walk.
        masks: attention mask (B, T) of each micro-batch, bool, or None without padding.
        group: the processes that share the windows; states and masks are of this rank's windows.

    Args:
        model: on any device; its mode, cache setting and device are restored on exit.
        windows: token ids (N, T), or a mapping of these and an attention_mask.
        device: device on which the layers compute; None takes `compute_device` of the model.
            Embeddings, last norm and head are there too during the walk.
        offload: keep the states on the CPU.
        tokens: of a micro-batch.
        label: name of the progress bar.

    Raises:
        TypeError: on entry, if replaying the layers does not give what the model computes.
        ValueError: on entry, if all tokens are padding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Windows,
        *,
        device: torch.device | None = None,
        offload: bool = False,
        tokens: int = MICRO_BATCH_TOKENS,
        label: str = "",
    ) -> None:
        carried = {name for layer in decoder_layers(model) for name in carried_arguments(layer)}
        if carried - {*HANDS_ON}:
            raise TypeError(
                f"a decoder layer of {model.config.model_type} cannot be run on its own: it reads "
                f"{min(carried)} of the layer before it; methods that go layer by layer do not "
                "support it"
            )
        self.model, self.windows, self.tokens, self.label = model, windows, tokens, label
        self.group = group_of(windows)
        self.device = compute_device(model) if device is None else with_index(device)
        self.home = model.device
        self.store = torch.device("cpu") if offload else self.device
        self.states: list[Tensor] = []
        self.masks: list[Tensor | None] = []
        self._calls: list[list[Call]] = []  # of each micro-batch, for each layer
        self._rests: list[tuple[Any, ...] | None] = []  # of each layer, outputs beside the states
        self._layer: nn.Module
        self._index = 0
        self._stack = ExitStack()

    def __enter__(self) -> LayerWalk:
        """Record how the model calls its layers, and the states before the first layer."""
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model, at_home=True))
            stack.enter_context(without_rescaling(self.model))
            stack.enter_context(rest_on_device(self.model, self.device))
            weights = decoder_layers(self.model).parameters()
            arrive = any(weight.device != self.device for weight in weights)
            rests = self._check_by_stand_ins() if arrive else None
            with layers_arriving(self.model, self.device):
                self._rests = self._check_replay() if rests is None else rests
            for batch in micro_batches(self.model, self.windows, tokens=self.tokens):
                mask = batch.get("attention_mask")
                state, calls = _record_calls(self.model, batch, self._rests)
                first = self._calls[0] if self._calls else calls
                self._calls.append([_reuse_equal(c, f) for c, f in zip(calls, first, strict=True)])
                self.states.append(state.to(self.store))
                self.masks.append(None if mask is None else mask.bool().to(self.device))
            if not self.counted():
                raise ValueError("0 tokens were counted; mask less")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the model, on errors too."""
        self._stack.close()
        self.states.clear()
        self._calls.clear()

    def layers(self, kept: KeptLayers | None = None) -> Iterator[tuple[int, nn.Module]]:
        """Yield index and module of each decoder layer in order; the layer is on the device.

        Args:
            kept: gets each layer that the caller has changed, and gives back those that an earlier
                process finished. The caller need only advance through these.
        """
        layers = decoder_layers(self.model)
        quiet = self.group.rank > 0 or not self.label
        shown = show_progress(layers, self.label, unit="layers", quiet=quiet)
        for index, layer in enumerate(shown):
            self._index, self._layer = index, layer
            with holding(kept, index, layer), on_device(layer.modules(), self.device):
                yield index, layer

    def forward(self, batch: int) -> Tensor:
        """Return the current layer's output for a micro-batch, (B, T, D) on the compute device."""
        return self.call(self._layer, self._index, batch, self.states[batch])

    def call(self, layer: Callable[..., Any], index: int, batch: int, state: Tensor) -> Tensor:
        """Return the output (B, T, D) of a layer that is called as the model calls layer `index`.

        Args:
            layer: the layer to call, on the compute device.
            index: index of the decoder layer whose positions and masks `layer` gets.
            batch: index of the micro-batch that the state belongs to.
            state: hidden states (B, T, D), on any device.
        """
        args, kwargs = _move_to(self._calls[batch][index], self.device)
        return first_tensor(layer(state.to(self.device), *args, **kwargs))

    def finish(self, state: Tensor, *, head: bool = False) -> Tensor:
        """Run what follows the last layer on that layer's output (B, T, D).

        Returns:
            Hidden states after the final norm (B, T, D), or with `head` logits (B, T, V), on the
            compute device.
        """
        state = state.to(self.device)
        # transformers warns of ids that look like padding.
        not_padding = 1 if getattr(self.model.config, "pad_token_id", None) == 0 else 0
        ids = torch.full(state.shape[:2], not_padding, device=state.device)

        def stand_in(rest: tuple[Any, ...] | None, *args: Any, **kwargs: Any) -> Any:
            return state if rest is None else (state, *rest)

        with _replaced_layers(self.model, [partial(stand_in, rest) for rest in self._rests]):
            output = self.model(input_ids=ids) if head else self.model.base_model(input_ids=ids)
        return output[0]

    def advance(self) -> None:
        """Replace the states by the current layer's outputs."""
        for batch in range(len(self.states)):
            self.states[batch] = self.forward(batch).to(self.store)

    def positions(self, ignore_first_tokens: int = 0) -> list[Tensor]:
        """Return which tokens of each micro-batch count, bool (B, T) on the compute device.

        Padding does not count, nor do the first `ignore_first_tokens` tokens of a sequence.
        """
        masks = [
            torch.ones(state.shape[:2], dtype=torch.bool, device=self.device)
            if mask is None
            else mask
            for state, mask in zip(self.states, self.masks, strict=True)
        ]
        return [mask & (mask.cumsum(1) > ignore_first_tokens) for mask in masks]

    def counted(self) -> int:
        """Return how many tokens of all ranks' windows are no padding."""
        return counted_tokens(self.windows)

    def _probe(self) -> dict[str, Tensor]:
        """Return the first tokens of the windows, as arguments of the model."""
        batch = next(micro_batches(self.model, self.windows))
        return {"input_ids": batch["input_ids"][:1, :_PROBE_TOKENS]}

    def _check_by_stand_ins(self) -> list[tuple[Any, ...] | None] | None:
        """Check, without a forward of all layers, that the model only hands on hidden states.

        `_check_replay` brings each layer to the device three times. Here stand-ins return numbers
        that are drawn: each layer must get what the one before it returned, and whatever is handed
        on, all must get the same other arguments.

        Returns:
            None for each layer, as each returns a tensor; or None, if a kind of layer returns more.

        Raises:
            TypeError: if the model does more between its layers.
        """
        batch, layers = self._probe(), decoder_layers(self.model)
        rests: list[tuple[Any, ...] | None] = [None] * len(layers)
        try:
            state, calls = _record_calls(self.model, batch, rests)
        except (TypeError, ValueError, IndexError):  # it unpacks what a layer returns
            return None
        kinds: dict[type[nn.Module], int] = {}  # its first layer; later ones of a slice are narrow
        for index, layer in enumerate(layers):
            kinds.setdefault(type(layer), index)
        for index in kinds.values():
            args, kwargs = calls[index]
            with on_device(layers[index].modules(), self.device):
                if not isinstance(layers[index](state, *args, **kwargs), Tensor):
                    return None
        drawn = torch.randn(state.shape, generator=torch.Generator().manual_seed(0)).to(state)
        for index, faithful in enumerate(_handed_on(self.model, batch, drawn, calls)):
            if not faithful:
                raise TypeError(_not_alone(self.model, index))
        return rests

    def _check_replay(self) -> list[tuple[Any, ...] | None]:
        """Compare a replay of a few tokens, layer by layer, with the model's own forward.

        Returns:
            For each layer its outputs beside the hidden states; None if it returns a tensor.

        Raises:
            TypeError: if replay and forward differ.
        """
        batch = self._probe()
        outputs, rests = [], []

        def record(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append(first_tensor(output))
            rests.append(tuple(output[1:]) if isinstance(output, (tuple, list)) else None)

        layers = decoder_layers(self.model)
        handles = [layer.register_forward_hook(record) for layer in layers]
        try:
            # The rests come from the reversed text. A layer that depends on the rest of the layer
            # before it then differs in the replay, and is refused.
            forward_without_head(self.model, {"input_ids": batch["input_ids"].flip(1)})
            forward_without_head(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        rests, outputs = rests[: len(layers)], outputs[len(layers) :]
        state, calls = _record_calls(self.model, batch, rests)
        for index, (layer, (args, kwargs)) in enumerate(zip(layers, calls, strict=True)):
            state = first_tensor(layer(state, *args, **kwargs))
            difference = (state.float() - outputs[index].float()).norm(dim=-1)
            # NaN passes here; the statistics report it.
            if bool((difference > 1e-2 * outputs[index].float().norm(dim=-1)).any()):
                raise TypeError(_not_alone(self.model, index))
        return rests


def enter_walk(
    stack: ExitStack,
    model: PreTrainedModel,
    windows: Windows,
    *,
    device: torch.device | None = None,
    offload: bool = False,
    tokens: int = MICRO_BATCH_TOKENS,
    label: str = "",
    must: bool = False,
) -> LayerWalk | None:
    """Enter the walk of a model; a warning says so where its layers cannot be run alone.

    Args:
        stack: exits the walk.
        model: a streamed one keeps its states on the CPU where its device has no room for them.
        windows: that walk.
        device: as `LayerWalk` takes it.
        offload: as `LayerWalk` takes it.
        tokens: of a micro-batch.
        label: name of the progress bar.
        must: raise instead of the warning.

    Returns:
        The walk; None after the warning.

    Raises:
        TypeError: if the layers cannot be run alone, and `must` is set or ranks share the windows.
    """
    offload = offload or (is_streamed(model) and not _states_fit(model, windows))
    try:
        return stack.enter_context(
            LayerWalk(model, windows, device=device, offload=offload, tokens=tokens, label=label)
        )
    except TypeError as error:
        if must or group_of(windows).size > 1:  # ranks that passed wait for this one
            raise
        log.warning("%s: each micro-batch brings all layers to the device", error)
        return None


def _states_fit(model: PreTrainedModel, windows: Windows) -> bool:
    """Return whether a streamed model's device holds the states of this rank's windows.

    They get half of what it has free beside what will come: all but the layers, and two layers.
    """
    device, layers = compute_device(model), decoder_layers(model)
    inside = {*layers.parameters()}
    rest = tensor_bytes(x for x in model.parameters() if x not in inside and x.device != device)
    largest = sorted(tensor_bytes(layer.parameters()) for layer in layers)[-2:]
    tokens = split_windows(own_windows(windows))[0].numel()
    states = tokens * decoder_config(model.config).hidden_size * _STATE_BYTES
    return 2 * states <= free_memory(device) - rest - sum(largest)


def _not_alone(model: PreTrainedModel, index: int) -> str:
    return (
        f"decoder layer {index} of {model.config.model_type} cannot be run on its own: the model "
        "does more between its layers than hand on hidden states; methods that go layer by layer "
        "do not support it"
    )


def _handed_on(
    model: PreTrainedModel, batch: Mapping[str, Tensor], drawn: Tensor, calls: Sequence[Call]
) -> list[bool]:
    """Return for each layer whether it gets what the layer before it returned, and nothing new.

    Args:
        model: none of its layers runs; layer i returns `drawn` times i + 1.
        batch: arguments of the model.
        drawn: of the shape of the hidden states.
        calls: other arguments of each layer when the layers return their inputs.
    """
    names = [hidden_states_argument(layer) for layer in decoder_layers(model)]
    faithful: list[bool] = []

    def stand_in(index: int, *args: Any, **kwargs: Any) -> Tensor:
        state = args[0] if args else kwargs.pop(names[index])
        others = (args[1:], kwargs)
        same = index == 0 or torch.equal(state, drawn * index)
        faithful.append(same and _equal(others, calls[index]))
        return drawn * (index + 1)

    with _replaced_layers(model, [partial(stand_in, index) for index in range(len(names))]):
        forward_without_head(model, batch)
    return faithful


def _equal(first: Any, second: Any) -> bool:
    """Return whether two arguments are equal; of objects such as caches, whether of one class."""
    if isinstance(first, Tensor):
        return (
            isinstance(second, Tensor)
            and first.shape == second.shape
            and torch.equal(first, second)
        )
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(map(_equal, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            _equal(value, second[key]) for key, value in first.items()
        )
    plain = isinstance(first, (bool, int, float, str, torch.dtype, torch.device))
    return first == second if plain else type(first) is type(second)


def _record_calls(
    model: PreTrainedModel, batch: Mapping[str, Tensor], rests: Sequence[tuple[Any, ...] | None]
) -> tuple[Tensor, list[Call]]:
    """Return the states before the first layer, and the arguments of each layer; no layer is run.

    A stand-in for each layer returns its input and the layer's member of `rests`.
    """
    calls: list[Call] = []
    states: list[Tensor] = []

    def stand_in(name: str, rest: tuple[Any, ...] | None, *args: Any, **kwargs: Any) -> Any:
        state = args[0] if args else kwargs.pop(name)
        states.append(state)
        calls.append((args[1:], kwargs))
        return state if rest is None else (state, *rest)

    names = [hidden_states_argument(layer) for layer in decoder_layers(model)]
    with _replaced_layers(model, [partial(stand_in, *x) for x in zip(names, rests, strict=True)]):
        forward_without_head(model, batch)
    return states[0], calls


@contextmanager
def _replaced_layers(
    model: PreTrainedModel, forwards: Sequence[Callable[..., Any]]
) -> Iterator[None]:
    """Replace the forward of each decoder layer by one of `forwards`; restore all on exit."""
    with ExitStack() as stack:
        for layer, forward in zip(decoder_layers(model), forwards, strict=True):
            stack.enter_context(replaced_forward(layer, forward))
        yield


def _reuse_equal(new: Any, first: Any) -> Any:
    """Return `new` with each tensor that equals its counterpart in `first` replaced by that one.

    This saves memory: most arguments of a layer are the same for all micro-batches.
    """
    if isinstance(new, Tensor):
        same_shape = isinstance(first, Tensor) and new.shape == first.shape
        return first if same_shape and torch.equal(new, first) else new
    if isinstance(new, tuple) and type(new) is type(first) and len(new) == len(first):
        return tuple(_reuse_equal(a, b) for a, b in zip(new, first, strict=True))
    if isinstance(new, dict) and isinstance(first, dict):
        return {key: _reuse_equal(value, first.get(key)) for key, value in new.items()}
    return new


def _move_to(value: Any, device: torch.device) -> Any:
    """Return `value` with each tensor in it on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_move_to(part, device) for part in value)
    if type(value) is dict:
        return {key: _move_to(part, device) for key, part in value.items()}
    return value
