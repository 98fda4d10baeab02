"""What a model costs by its shape, on any machine: sizes, multiply-adds, and bytes of its cache.

A short generation of the model itself is counted, not its config: so the figures hold for every
family and every class of ours. The forward of the prompt gives the logits of its last token only,
where the family can, as every server does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from prunelight.calibration.windows import check_length
from prunelight.evaluation.serving.counting import counting_work
from prunelight.models.families.config_fields import vocabulary_size
from prunelight.models.forward import evaluating, generate_tokens
from prunelight.models.placement import compute_device
from prunelight.models.sizes import (
    longest_sequence,
    nonzero_count,
    parameter_count,
    stored_bytes,
    tensor_bytes,
)
from prunelight.runtime.arguments import at_least, checked_value

PROMPT_TOKENS = 256


@dataclass(frozen=True)
class ShapeCost:
    """What a model costs by its shape; of one sequence.

    Multiply-adds are those of all products and of attention over all pairs of positions. Those of
    element-wise work, such as the scan of Mamba, do not count.

    Attributes:
        parameters: tied ones once.
        nonzeros: parameters that are not zero; None for packed weights, whose zeros do not show.
        parameters_per_token: weights that one step of decoding reads. Experts that are not chosen
            and rows of a table that are not looked up do not count.
        memory_bytes: of parameters and buffers.
        disk_bytes: of the weights, as they are saved.
        prompt_tokens: length of the prompt, and so of the cache at the step of decoding.
        prefill_multiply_adds: of the whole prompt.
        prefill_decoder_multiply_adds: of them, those in the decoder layers.
        decode_multiply_adds: of the next token.
        decode_decoder_multiply_adds: of them, those in the decoder layers.
        weight_bytes_per_token: weights that one step of decoding reads, in bytes.
        cache_bytes: keys, values and states after the prompt.
        cache_bytes_per_token: by how much they grow with the next token; 0 for states, and for
            windows that are full.
    """

    parameters: int
    nonzeros: int | None
    parameters_per_token: int
    memory_bytes: int
    disk_bytes: int
    prompt_tokens: int
    prefill_multiply_adds: int
    prefill_decoder_multiply_adds: int
    decode_multiply_adds: int
    decode_decoder_multiply_adds: int
    weight_bytes_per_token: int
    cache_bytes: int
    cache_bytes_per_token: int

    @property
    def prefill_multiply_adds_per_token(self) -> float:
        """Mean over the prompt."""
        return self.prefill_multiply_adds / self.prompt_tokens

    def decode_bytes_per_token(
        self, batch_size: int = 1, cache_tokens: float | None = None
    ) -> float:
        """Return the bytes that memory delivers for a token of a step of decoding.

        All sequences of a batch read the weights once, each its own cache. For experts this is a
        lower bound, as more tokens choose more experts.

        Args:
            batch_size: sequences.
            cache_tokens: tokens in the cache; None for those of the prompt.
        """
        more = 0 if cache_tokens is None else cache_tokens - self.prompt_tokens
        cache = self.cache_bytes + more * self.cache_bytes_per_token
        return self.weight_bytes_per_token / batch_size + cache


def shape_cost(model: PreTrainedModel, *, prompt_tokens: int | None = None) -> ShapeCost:
    """Count what a model costs by its shape, in a generation of two tokens.

    Args:
        model: of any family, with its weights in memory.
        prompt_tokens: at least 1; None for 256, or as many as the model allows.

    Raises:
        ValueError: if the length is out of range, or longer than the model allows.
        TypeError: if the length is no whole number.
    """
    length = prompt_length(model, prompt_tokens, new_tokens=2)
    with evaluating(model), counting_work(model) as works:
        generate_tokens(model, prompt(model, length), 2)
    prefill, decode = works[0], works[-1]
    return ShapeCost(
        parameters=parameter_count(model),
        nonzeros=nonzero_count(model.parameters()),
        parameters_per_token=decode.weights_read,
        memory_bytes=tensor_bytes([*model.parameters(), *model.buffers()]),
        disk_bytes=stored_bytes(model),
        prompt_tokens=length,
        prefill_multiply_adds=prefill.multiply_adds,
        prefill_decoder_multiply_adds=prefill.decoder_multiply_adds,
        decode_multiply_adds=decode.multiply_adds,
        decode_decoder_multiply_adds=decode.decoder_multiply_adds,
        weight_bytes_per_token=decode.weight_bytes_read,
        cache_bytes=prefill.cache_bytes,
        cache_bytes_per_token=decode.cache_bytes - prefill.cache_bytes,
    )


def prompt_length(model: PreTrainedModel, prompt_tokens: int | None, *, new_tokens: int) -> int:
    """Return the length of a prompt: the one asked for, or 256 clipped to what the model allows.

    Raises:
        ValueError, TypeError: as `shape_cost`.
    """
    if prompt_tokens is None:
        limit = longest_sequence(model)
        return PROMPT_TOKENS if limit is None else max(1, min(PROMPT_TOKENS, limit - new_tokens))
    checked_value("prompt_tokens", prompt_tokens, int, at_least(1))
    check_length(model, prompt_tokens + new_tokens)
    return prompt_tokens


def prompt(model: PreTrainedModel, tokens: int, batch_size: int = 1) -> torch.Tensor:
    """Return token ids (batch_size, tokens), the same in each row, without special tokens first."""
    ids = torch.arange(3, 3 + tokens, device=compute_device(model))[None] % vocabulary_size(model)
    return ids.expand(batch_size, -1).contiguous()
