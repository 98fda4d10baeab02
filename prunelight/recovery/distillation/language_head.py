"""The language-model head of a transformers model, apart from the rest of the model's forward.

The model's own forward runs, with the forward of its head replaced for that one call. For families
differ in their code before and after the head, and under FSDP2 the head's weights are whole only
inside the forward of the whole model. `logits_finish` knows the code after the head, such as a
scale; `is_separable` checks that nothing else changes the logits.
"""

# B sequences, T tokens, D hidden size, V vocabulary

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunelight.losses import TokenLoss, linear_loss, module_loss, next_token_sums
from prunelight.models.families.config_fields import logits_finish, vocabulary_size
from prunelight.models.forward import evaluating
from prunelight.models.placement import replaced_forward

# Allowed difference as a share of the largest logit: both sides sum the same products in another
# order.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}


def without_adapters(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the transformers model inside peft's wrapper."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner


class LanguageHead:
    """The head of a model, or of the model inside peft's wrapper.

    Attributes:
        model: the model, or peft's wrapper of the model.
        module: linear layer of the head, or the layer that adapts or quantizes it.
        finish: function that the model applies to the logits; None for none.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model, base = model, without_adapters(model)
        self.module: Any = base.get_output_embeddings()
        self.finish = logits_finish(base.config)
        self._loss_and_tokens: tuple[TokenLoss, Tensor] | None = None
        self._loss_value: Tensor | None = None
        # torch.compile must not trace this function, nor compile again for a new one in each step.
        self._forward_loss = torch.compiler.disable(self._compute_loss)

    def is_separable(self) -> bool:
        """Return whether the model's logits are `finish` of the head's output and nothing more.

        Runs the model on four tokens; all processes must call it.
        """
        if self.module is None:
            return False
        separate: list[Tensor] = []

        def forward(states: Tensor) -> Tensor:
            logits: Tensor = plain_forward(states)
            separate.append(logits if self.finish is None else self.finish(logits))
            return logits

        ids = torch.arange(4, device=self.model.device)[None]
        with (
            evaluating(without_adapters(self.model)),
            replaced_forward(self.module, forward) as plain_forward,
        ):
            mask = torch.ones_like(ids)
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        if not separate or separate[0].shape != logits.shape:
            return False
        allowed = _TOLERANCE.get(logits.dtype, 0.02) * logits.float().abs().max()
        return bool((separate[0] - logits).abs().max() <= allowed)

    def hidden_states(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the input of the head, (B, T, D), without computing logits."""
        captured: list[Tensor] = []

        def forward(states: Tensor) -> Tensor:
            captured.append(states)
            return states[..., :1]

        with replaced_forward(self.module, forward):
            self.model(**inputs)
        return captured[0]

    def logits(self, states: Tensor) -> Tensor:
        """Return the model's logits (..., V) for inputs of its head, (..., D)."""
        logits: Tensor = self.module(states)
        return logits if self.finish is None else self.finish(logits)

    @torch.no_grad()
    def next_token_sums(
        self, inputs: Mapping[str, Any], labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `losses.next_token_sums` does of all logits, which are never held at once.

        Args:
            inputs: arguments of the model's forward.
            labels: (B, T), -100 where a token does not count.
        """
        sums: list[tuple[Tensor, Tensor, Tensor]] = []

        @torch.compiler.disable
        def forward(states: Tensor) -> Tensor:
            def logits(part: Tensor) -> Tensor:
                out: Tensor = plain_forward(part)
                return out if self.finish is None else self.finish(out)

            sums.append(next_token_sums(states, labels, logits))
            return states[..., :1]

        with replaced_forward(self.module, forward) as plain_forward:
            self.model(**inputs)
        return sums[0]

    def loss(self, inputs: Mapping[str, Any], loss: TokenLoss, tokens: Tensor) -> Tensor:
        """Return the mean loss over the tokens that count; never holds the logits of all of them.

        Args:
            inputs: arguments of the model's forward.
            loss: loss of the M tokens that count.
            tokens: (M,), indices of these tokens among the B * T.
        """
        self._loss_and_tokens = loss, tokens
        try:
            with replaced_forward(self.module, self._forward_loss):
                logits = self.model(**inputs).logits
            assert self._loss_value is not None
            # FSDP2 prepares its backward only when a gradient reaches the whole model's output.
            return self._loss_value + 0.0 * logits.float().sum()
        finally:
            self._loss_and_tokens = self._loss_value = None

    def _compute_loss(self, states: Tensor) -> Tensor:
        """Compute the loss instead of the logits; returns a stand-in for them, (B, T, 1)."""
        assert self._loss_and_tokens is not None
        flat, (loss, tokens) = states.flatten(0, -2), self._loss_and_tokens
        if _is_linear(self.module):
            weights = self.module.weight, self.module.bias
            self._loss_value = linear_loss(flat, *weights, loss, tokens, self.finish)
        else:
            forward = type(self.module).forward.__get__(self.module)
            self._loss_value = module_loss(
                flat,
                forward,
                loss,
                tokens,
                self.finish,
                vocabulary=vocabulary_size(without_adapters(self.model)),
            )
        return (0.0 * self._loss_value).to(states.dtype).expand(*states.shape[:-1], 1)


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module is a plain linear layer, sharded or not; a quantized one is not."""
    return type(module).forward is nn.Linear.forward
