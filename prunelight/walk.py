"""The walk: all windows through one decoder layer after another, and what its matrices get to see.

A method that prunes layer by layer lets each layer see what the pruned layers before it put out.
Layers are replayed with the very arguments the model calls them with (recorded, never rebuilt), one
layer at a time on the compute device; the states wait there or, offloaded, on the CPU.
"""

# B sequences, T tokens, D hidden, I in_features

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from prunelight.architecture import Matrix, decoder_layers, first_tensor, restore_rwkv_scale
from prunelight.calibration import (
    Windows,
    evaluating,
    hidden_name,
    micro_batches,
    replaced_forward,
    run_layers,
)
from prunelight.shares import Ranks, ranks_of
from prunelight.statistics import InputNorm

_PROBE_TOKENS = 8
Statistic = TypeVar("Statistic", bound=InputNorm)
Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of a layer besides the hidden states


class LayerWalk:
    """All windows at the entrance of one decoder layer after another; a context manager.

        with LayerWalk(model, windows) as walk:
            for index, layer in walk.layers():  # the layer is on the compute device
                ...  # walk.forward(i) as often as needed, then
                walk.advance()

    Attributes:
        states: hidden states (B, T, D) of each micro-batch before the current layer.
        masks: attention mask (B, T) of each micro-batch, bool, or None without padding.
        ranks: that share the windows; states and masks are those of this one's rows.

    Args:
        model: in any place; its mode, cache setting and device are restored on exit.
        windows: token ids (N, T), or with an attention_mask.
        device: where the layers compute; None takes the model's own.
        offload: keep the states on the CPU.
        label: of the progress bar.

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
        label: str = "",
    ) -> None:
        self.model, self.windows, self.label = model, windows, label
        self.ranks = ranks_of(windows)
        self.device = device or model.device
        self.store = torch.device("cpu") if offload else self.device
        self.states: list[Tensor] = []
        self.masks: list[Tensor | None] = []
        self._calls: list[list[Call]] = []  # of each micro-batch, for each layer
        self._rests: list[tuple[Any, ...] | None] = []  # what layers put out beside the states
        self._layer: nn.Module
        self._index = 0
        self._stack = ExitStack()

    def __enter__(self) -> LayerWalk:
        """Record how the model calls its layers, and the states before the first one."""
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(_unscaled(self.model))
            self._rests = self._check_replay()
            for batch in micro_batches(self.model, self.windows):
                mask = batch.get("attention_mask")
                state, calls = _record(self.model, batch, self._rests)
                first = self._calls[0] if self._calls else calls
                self._calls.append([_shared(c, f) for c, f in zip(calls, first, strict=True)])
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

    def layers(self) -> Iterator[tuple[int, nn.Module]]:
        """Yield the decoder layers in order, each on the compute device meanwhile."""
        layers = decoder_layers(self.model)
        quiet = self.ranks.rank > 0 or None
        for index, layer in enumerate(tqdm(layers, desc=self.label, disable=quiet, leave=False)):
            self._index, self._layer = index, layer
            with self.placed(layer):
                yield index, layer

    @contextmanager
    def placed(self, layer: nn.Module) -> Iterator[None]:
        """Keep a layer on the compute device."""
        home = self.model.device
        try:
            if home != self.device:
                layer.to(self.device)
            yield
        finally:
            if home != self.device:
                layer.to(home)

    def forward(self, batch: int) -> Tensor:
        """Return what the current layer makes of a micro-batch, (B, T, D) on the device."""
        return self.call(self._layer, self._index, batch, self.states[batch])

    def call(self, layer: Callable[..., Any], index: int, batch: int, state: Tensor) -> Tensor:
        """Return what a layer makes of a state (B, T, D), called as the model calls layer `index`.

        Args:
            layer: on the compute device.
            index: of the decoder layer whose positions and masks it gets.
            batch: micro-batch that the state belongs to.
            state: hidden states, anywhere.
        """
        args, kwargs = _to(self._calls[batch][index], self.device)
        return first_tensor(layer(state.to(self.device), *args, **kwargs))

    def finish(self, state: Tensor, *, head: bool = False) -> Tensor:
        """Return what the model makes of a state (B, T, D) that its last layer puts out.

        Those are the final hidden states after the last norm (B, T, D), or with `head` logits
        (B, T, V); computed where the model is.
        """
        state = state.to(self.model.device)
        ids = torch.zeros(state.shape[:2], dtype=torch.long, device=state.device)

        def stand_in(rest: tuple[Any, ...] | None, *args: Any, **kwargs: Any) -> Any:
            return state if rest is None else (state, *rest)

        with _replaced(self.model, [partial(stand_in, rest) for rest in self._rests]):
            output = self.model(input_ids=ids) if head else self.model.base_model(input_ids=ids)
        return output[0]

    def advance(self) -> None:
        """Replace the states by what the current layer makes of them."""
        for batch in range(len(self.states)):
            self.states[batch] = self.forward(batch).to(self.store)

    def positions(self, ignore_first_tokens: int = 0) -> list[Tensor]:
        """Return which tokens count, bool (B, T) on the device: no padding, not the first few."""
        masks = [
            torch.ones(state.shape[:2], dtype=torch.bool, device=self.device)
            if mask is None
            else mask
            for state, mask in zip(self.states, self.masks, strict=True)
        ]
        return [mask & (mask.cumsum(1) > ignore_first_tokens) for mask in masks]

    def counted(self) -> int:
        """Return how many tokens of all windows are no padding."""
        return int(self.ranks.totals(sum(int(mask.sum()) for mask in self.positions()))[0])

    def _check_replay(self) -> list[tuple[Any, ...] | None]:
        """Return what each layer puts out beside the states; compare a short replay with the model.

        Raises:
            TypeError: if they differ.
        """
        batch = next(micro_batches(self.model, self.windows))
        batch = {"input_ids": batch["input_ids"][:1, :_PROBE_TOKENS]}
        outputs, rests = [], []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append(first_tensor(output))
            rests.append(tuple(output[1:]) if isinstance(output, (tuple, list)) else None)

        layers = decoder_layers(self.model)
        handles = [layer.register_forward_hook(keep) for layer in layers]
        try:
            # The rests are those of another text: layers that depend on them give themselves away.
            run_layers(self.model, {"input_ids": batch["input_ids"].flip(1)})
            run_layers(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        rests, outputs = rests[: len(layers)], outputs[len(layers) :]
        state, calls = _record(self.model, batch, rests)
        for index, (layer, (args, kwargs)) in enumerate(zip(layers, calls, strict=True)):
            state = first_tensor(layer(state, *args, **kwargs))
            difference = (state.float() - outputs[index].float()).norm(dim=-1)
            if bool((difference > 1e-2 * outputs[index].float().norm(dim=-1)).any()):  # not if NaN
                raise TypeError(
                    f"decoder layer {index} of {self.model.config.model_type} cannot be run on its "
                    "own: the model does more between its layers than hand on hidden states; "
                    "methods that go layer by layer do not support it"
                )
        return rests


def _record(
    model: PreTrainedModel, batch: Mapping[str, Tensor], rests: Sequence[tuple[Any, ...] | None]
) -> tuple[Tensor, list[Call]]:
    """Return the states before the first layer and how the model calls each; no layer is run."""
    calls: list[Call] = []
    states: list[Tensor] = []

    def stand_in(name: str, rest: tuple[Any, ...] | None, *args: Any, **kwargs: Any) -> Any:
        state = args[0] if args else kwargs.pop(name)
        states.append(state)
        calls.append((args[1:], kwargs))
        return state if rest is None else (state, *rest)

    names = [hidden_name(layer) for layer in decoder_layers(model)]
    with _replaced(model, [partial(stand_in, *x) for x in zip(names, rests, strict=True)]):
        run_layers(model, batch)
    return states[0], calls


@contextmanager
def _replaced(model: PreTrainedModel, forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Let other functions stand in for the forwards of the decoder layers."""
    with ExitStack() as stack:
        for layer, forward in zip(decoder_layers(model), forwards, strict=True):
            stack.enter_context(replaced_forward(layer, forward))
        yield


@contextmanager
def _unscaled(model: PreTrainedModel) -> Iterator[None]:
    """Keep an RWKV from halving weights and states between its layers, which no layer shows."""
    scale = getattr(model.config, "rescale_every", None)
    restore_rwkv_scale(model)
    if scale is not None:
        model.config.rescale_every = 0
    try:
        yield
    finally:
        restore_rwkv_scale(model)  # nothing was halved: only the flag that says so is cleared
        if scale is not None:
            model.config.rescale_every = scale


def _shared(new: Any, first: Any) -> Any:
    """Return `first` wherever it holds the same: most arguments do not depend on the text."""
    if isinstance(new, Tensor):
        same = isinstance(first, Tensor) and new.shape == first.shape
        return first if same and torch.equal(new, first) else new
    if isinstance(new, tuple) and type(new) is type(first) and len(new) == len(first):
        return tuple(_shared(a, b) for a, b in zip(new, first, strict=True))
    if isinstance(new, dict) and isinstance(first, dict):
        return {key: _shared(value, first.get(key)) for key, value in new.items()}
    return new


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_to(part, device) for part in value)
    if type(value) is dict:
        return {key: _to(part, device) for key, part in value.items()}
    return value


class InputStatistics(Generic[Statistic]):
    """Statistics of what the matrices of one decoder layer get to see; one for each shared input.

    Q, k and v see the same tensor, and so do gate and up: they share a statistic. Each expert of a
    fused stack has its own.

    Args:
        matrices: of the layer.
        make: called with the width of an input.
    """

    def __init__(self, matrices: Sequence[Matrix], make: Callable[[int], Statistic]) -> None:
        self.matrices, self.make = matrices, make
        self._leader: dict[str, str] = {}
        self._found: dict[str, list[Statistic]] = {}
        self._inputs: list[tuple[Tensor, str]] = []  # of the forward at hand

    @contextmanager
    def watching(self, mask: Tensor | None = None) -> Iterator[None]:
        """Add the inputs of the forwards inside; `mask` (B, T) says which tokens are real."""
        handles = [
            owner.register_forward_pre_hook(partial(self._see, found, mask), with_kwargs=True)
            for owner, found in self._by_owner().items()
        ]
        try:
            yield
        finally:
            self._inputs.clear()
            for handle in handles:
                handle.remove()

    def of(self, matrix: Matrix) -> list[Statistic]:
        """Return a matrix' statistics, one for each of its views.

        Raises:
            ValueError: if its module was never called.
        """
        leader = self._leader.get(matrix.name)
        if leader is None:
            raise ValueError(
                f"{matrix.name} was never called in a forward, so nothing is known of its inputs; "
                "leave it out, or turn off the fused kernel that reads its weight"
            )
        return self._found[leader]

    def groups(self) -> list[list[Matrix]]:
        """Return the matrices that share an input, together."""
        groups: dict[str, list[Matrix]] = {}
        for matrix in self.matrices:
            self.of(matrix)
            groups.setdefault(self._leader[matrix.name], []).append(matrix)
        return list(groups.values())

    def reduce(self, call: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums of squares by what `call` makes of them, over processes say."""
        for found in self._found.values():
            for one in found:
                one.squares = call(one.squares)

    def pool(self, ranks: Ranks) -> None:
        """Add up the sums of all ranks, in place; some experts only others' tokens may reach."""
        for leaders in ranks.gather(self._leader):
            self._leader = {**leaders, **self._leader}
        for matrix in self.matrices:
            if self._leader.get(matrix.name) == matrix.name:
                made = [self.make(matrix.in_features) for _ in matrix.views()]
                for one in self._found.setdefault(matrix.name, made):
                    one.pool(ranks)

    def state_dict(self) -> dict[str, Any]:
        """Return all sums, for a checkpoint."""
        sums = {
            name: [(one.tokens, one.squares) for one in found]
            for name, found in self._found.items()
        }
        return {"leader": dict(self._leader), "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the sums of a checkpoint."""
        self._leader = dict(state["leader"])
        for name, sums in state["sums"].items():
            self._found[name] = [self.make(len(squares)) for _, squares in sums]
            for one, (tokens, squares) in zip(self._found[name], sums, strict=True):
                one.tokens, one.squares = tokens, squares

    def _by_owner(self) -> dict[nn.Module, list[Matrix]]:
        owners: dict[nn.Module, list[Matrix]] = {}
        for matrix in self.matrices:
            owners.setdefault(matrix.owner, []).append(matrix)
        return owners

    @torch.no_grad()
    def _see(
        self,
        matrices: list[Matrix],
        mask: Tensor | None,
        owner: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if matrices[0].fused:
            self._see_experts(matrices, mask, owner, *args, **kwargs)
            return
        x = args[0] if args else next(iter(kwargs.values()))
        name = matrices[0].name
        if name not in self._leader:
            twin = next((other for seen, other in self._inputs if seen is x), name)
            self._leader[name] = twin
            self._inputs.append((x, name))
            if twin == name:
                self._found[name] = [self.make(x.shape[-1])]
        if self._leader[name] == name:
            self._found[name][0].update(_tokens(x, mask))

    def _see_experts(
        self,
        matrices: list[Matrix],
        mask: Tensor | None,
        owner: Any,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> None:
        """Add the inputs of each expert's first and second weight: the second is computed here."""
        for matrix in matrices:
            self._leader[matrix.name] = matrix.name
            if matrix.name not in self._found:
                made = [self.make(matrix.in_features) for _ in matrix.views()]
                self._found[matrix.name] = made
        chosen = top_k_index if mask is None else top_k_index.masked_fill(~mask.view(-1, 1), -1)
        for expert, weight in enumerate(owner.gate_up_proj):
            x = hidden_states[(chosen == expert).any(-1)]
            if len(x):
                gate, up = linear(x, weight).chunk(2, dim=-1)
                inputs = {"gate_up_proj": x, "down_proj": owner.act_fn(gate) * up}
                for matrix in matrices:
                    self._found[matrix.name][expert].update(inputs[matrix.parameter_name])


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the inputs of the tokens that count, (B, T, I) or (B * T, I) -> (tokens, I)."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if mask is None else flat[mask.flatten()]
