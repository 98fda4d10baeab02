"""lm-eval's HFLM around a model in memory, whose batches several processes share.

Each process forms the batches that one process would form, and computes every n-th of them. A batch
holds the same prompts with the same padding, so that the results do not depend on the number of
processes, to the last bit on equal machines.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelight.runtime.processes import ProcessGroup
from prunelight.runtime.progress import Bar

log = logging.getLogger(__name__)

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class LiveModel(HFLM):
    """A model in memory, as lm-eval asks it.

    To lm-eval every process is alone: `rank` is 0 and `world_size` is 1, and each gets all answers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        group: ProcessGroup,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.group = group
        self._bar: Bar | None = None
        self._stderr = sys.stderr

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return log-likelihood and greediness of each continuation.

        Raises:
            ValueError: if a continuation alone is longer than what the model reads.
        """
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Any],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        for _, _, continuation in requests:
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"an answer has {len(continuation)} tokens, and the model reads at most "
                    f"{self.max_length}; leave this task out"
                )
        lengths = [len(context) + len(continuation) - 1 for _, context, continuation in requests]
        self._tell_of_cuts(sum(length > self.max_length for length in lengths), len(requests))
        return self._shared(
            requests, _batches_of_contexts(requests, self.batch_size), super()._loglikelihood_tokens
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context.

        Raises:
            ValueError: if a question asks for more tokens than the model reads.
        """
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        written = [
            normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            for request in requests
        ]
        if max(written) >= self.max_length:
            raise ValueError(
                f"a question asks for {max(written)} tokens of answer, and the model reads at most "
                f"{self.max_length}; leave this task out"
            )
        both = [length + answer for length, answer in zip(lengths, written, strict=True)]
        self._tell_of_cuts(sum(length > self.max_length for length in both), len(requests))
        batches = _batches_of_settings(requests, lengths, self.batch_size)
        return self._shared(requests, batches, super().generate_until)

    def _tell_of_cuts(self, num_cut: int, num_requests: int) -> None:
        """Say how many prompts lose their beginning, as lm-eval cuts them."""
        if num_cut and self.group.rank == 0:
            log.warning(
                "%d of %d prompts are longer than the %d tokens that the model reads with their "
                "answer: their beginning is cut off, as lm-eval does it",
                *(num_cut, num_requests, self.max_length),
            )

    def _shared(
        self,
        requests: Sequence[Request],
        batches: list[list[list[int]]],
        compute: Callable[..., list[Answer]],
    ) -> list[Answer]:
        """Return the answers to all requests; each process computes some batches.

        Args:
            requests: of all processes.
            batches: for each batch its prompts, and for each prompt its requests.
            compute: answers requests.
        """
        own = batches[self.group.rank :: self.group.size]
        indices = sorted(index for batch in own for prompt in batch for index in prompt)
        num_prompts = sum(len(batch) for batch in own)
        answers: list[Answer] = []
        with self.group.failing_together(), self._showing(num_prompts):
            if indices:
                answers = compute([requests[index] for index in indices], disable_tqdm=True)
        parts = self.group.gather([*zip(indices, answers, strict=True)])
        by_index = {index: answer for part in parts for index, answer in part}
        return [by_index[index] for index in range(len(requests))]

    @contextlib.contextmanager
    def _showing(self, num_prompts: int) -> Iterator[None]:
        quiet = self.group.rank > 0
        with (
            contextlib.redirect_stderr(self._stderr),
            Bar("tasks", num_prompts, unit="prompts", quiet=quiet) as self._bar,
        ):
            yield

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        logits: Tensor = super()._model_call(inps, *args, **kwargs)
        if self._bar is not None:
            self._bar.update(len(inps))
        return logits

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tokens: Tensor = super()._model_generate(context, *args, **kwargs)
        if self._bar is not None:
            self._bar.update(len(context))
        return tokens


def _batches_of_contexts(requests: Sequence[Any], size: int) -> list[list[list[int]]]:
    """Return the batches that HFLM forms of continuations.

    Continuations that differ in their last token alone share a prompt, that of the longest of them.
    HFLM sorts prompts by length, then by tokens.
    """
    prompts: dict[Hashable, list[int]] = {}
    for index, (_, context, continuation) in enumerate(requests):
        prompts.setdefault(tuple(context + continuation[:-1]), []).append(index)

    def place(indices: list[int]) -> tuple[int, tuple[int, ...]]:
        _, context, continuation = max(
            (requests[index] for index in indices), key=lambda request: len(request[-1])
        )
        tokens = tuple(context + continuation)
        return -len(tokens), tokens

    return _in_batches(sorted(prompts.values(), key=place), size)


def _batches_of_settings(
    requests: Sequence[Any], lengths: list[int], size: int
) -> list[list[list[int]]]:
    """Return the batches that HFLM forms of generations: one setting each, longest first."""
    by_settings: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        by_settings.setdefault(repr(sorted(request.args[1].items())), []).append(index)
    batches = []
    for indices in by_settings.values():
        order = sorted(indices, key=lambda index: (-lengths[index], requests[index].args[0]))
        batches += _in_batches([[index] for index in order], size)
    return batches


def _in_batches(prompts: list[list[int]], size: int) -> list[list[list[int]]]:
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


@contextlib.contextmanager
def seeded(seed: int, seed_of_arrays: int) -> Iterator[None]:
    """Seed the random numbers of python, numpy and torch, as lm-eval's command line does."""
    import random

    import numpy as np

    random.seed(seed)
    np.random.seed(seed_of_arrays)
    torch.manual_seed(seed_of_arrays)
    yield
