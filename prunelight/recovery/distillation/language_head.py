"""The language-model head of a transformers model, apart from the rest of its forward.

The model's own forward runs, with the forward of its head replaced for that one call: families
differ in what they do before and after it, and under FSDP2 the head's weights are whole only inside
the forward of the whole model. What comes after the head is known by `logits_finish`; `runs_apart`
checks that it is all there is.
"""

# B sequences, T tokens, D hidden size, V vocabulary

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelight.losses import TokenLoss, linear_loss, module_loss
from prunelight.models.families.config_fields import logits_finish
from prunelight.models.forward import evaluating, replaced_forward

# Of the largest logit: the same products in the same dtype, up to their order.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}


def without_adapters(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the transformers model inside peft's wrapper."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner


class LanguageHead:
    """The head of a model, or of the model inside peft's wrapper.

    Attributes:
        module: its linear layer, or what adapts or quantizes that.
        finish: what the model does to its logits; None for nothing.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model, base = model, without_adapters(model)
        self.module: Any = base.get_output_embeddings()
        self.finish = logits_finish(base.config)
        self._job: tuple[TokenLoss, Tensor] | None = None
        self._found: Tensor | None = None
        # One function for all steps, and none that torch.compile looks into or compiles anew for.
        self._take_loss = torch.compiler.disable(self._loss_of)

    def runs_apart(self) -> bool:
        """Return whether the model's logits are those of its head, up to `finish`.

        Runs the model on four tokens, on all ranks.
        """
        if self.module is None:
            return False
        apart: list[Tensor] = []

        def forward(states: Tensor) -> Tensor:
            logits: Tensor = plain_forward(states)
            apart.append(logits if self.finish is None else self.finish(logits))
            return logits

        ids = torch.arange(4, device=self.model.device)[None]
        with (
            evaluating(without_adapters(self.model)),
            replaced_forward(self.module, forward) as plain_forward,
        ):
            mask = torch.ones_like(ids)
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        if not apart or apart[0].shape != logits.shape:
            return False
        allowed = _TOLERANCE.get(logits.dtype, 0.02) * logits.float().abs().max()
        return bool((apart[0] - logits).abs().max() <= allowed)

    def hidden_states(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return what the head gets, (B, T, D); no logits are made."""
        found: list[Tensor] = []

        def forward(states: Tensor) -> Tensor:
            found.append(states)
            return states[..., :1]

        with replaced_forward(self.module, forward):
            self.model(**inputs)
        return found[0]

    def logits(self, states: Tensor) -> Tensor:
        """Return the model's logits (..., V) for what its head gets, (..., D)."""
        logits: Tensor = self.module(states)
        return logits if self.finish is None else self.finish(logits)

    def loss(self, inputs: Mapping[str, Any], loss: TokenLoss, tokens: Tensor) -> Tensor:
        """Return the mean loss over the tokens that count without holding their logits.

        Args:
            inputs: of the model's forward.
            loss: of the M tokens that count.
            tokens: (M,), which of the B * T count.
        """
        self._job = loss, tokens
        try:
            with replaced_forward(self.module, self._take_loss):
                logits = self.model(**inputs).logits
            assert self._found is not None
            # FSDP2 prepares its backward when a gradient reaches the output of the whole model.
            return self._found + 0.0 * logits.float().sum()
        finally:
            self._job = self._found = None

    def _loss_of(self, states: Tensor) -> Tensor:
        """Take the loss, and return something in the place of the logits, (B, T, 1)."""
        assert self._job is not None
        flat, (loss, tokens) = states.flatten(0, -2), self._job
        if _is_linear(self.module):
            weights = self.module.weight, self.module.bias
            self._found = linear_loss(flat, *weights, loss, tokens, self.finish)
        else:
            forward = type(self.module).forward.__get__(self.module)
            self._found = module_loss(flat, forward, loss, tokens, self.finish)
        return (0.0 * self._found).to(states.dtype).expand(*states.shape[:-1], 1)


def _is_linear(module: nn.Module) -> bool:
    """Return whether it is a plain linear layer, or one that FSDP2 sharded; not a quantized one."""
    return type(module).forward is nn.Linear.forward
