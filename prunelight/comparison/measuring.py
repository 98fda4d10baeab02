"""What is measured of a model in a comparison: texts, divergence from the dense model, tasks."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from prunelight.comparison.bench import Bench
from prunelight.comparison.statistics import paired
from prunelight.evaluation.quality.results import Divergence, Interval, TextQuality
from prunelight.models.forward import evaluating

_TOKENS = 1024


@torch.no_grad()
def measure(model: PreTrainedModel, bench: Bench, *, tasks: bool) -> dict[str, Any]:
    """Return what is measured of a model, as JSON values.

    Args:
        model: dense, pruned or recovered.
        bench: of this process.
        tasks: ask the tasks of the comparison too.
    """
    found: dict[str, Any] = {"texts": [], "divergence": []}
    for name, windows in bench.texts.items():
        quality, divergence = _text(name, windows, model, bench)
        found["texts"].append(asdict(quality))
        if divergence is not None:
            found["divergence"].append(asdict(divergence))
    return found


def _text(
    name: str, windows: torch.Tensor, model: PreTrainedModel, bench: Bench
) -> tuple[TextQuality, Divergence | None]:
    rows: dict[str, list[float]] = {k: [] for k in ("nll", "correct", "kl", "same", "dense")}
    compares = model is not bench.dense
    size = max(1, _TOKENS // windows.shape[1])
    with evaluating(model), evaluating(bench.dense):
        for start in range(0, len(windows), size):
            ids = windows[start : start + size].to(bench.device)
            labels = ids[:, 1:, None]
            logp = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
            rows["nll"] += (-logp.gather(-1, labels)).sum((1, 2)).tolist()
            rows["correct"] += (logp.argmax(-1, keepdim=True) == labels).sum((1, 2)).tolist()
            if compares:
                dense = bench.dense(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
                rows["kl"] += (dense.exp() * (dense - logp)).sum((1, 2)).tolist()
                rows["same"] += (dense.argmax(-1) == logp.argmax(-1)).sum(1).tolist()
                rows["dense"] += (-dense.gather(-1, labels)).sum((1, 2)).tolist()
    per = windows.shape[1] - 1
    counts = [[float(per)] * len(windows)]
    tokens = per * len(windows)

    def interval(values: list[float], exp: bool = False) -> Interval:
        one = paired([[values]], counts, lower_is_better=True)[0]
        f = math.exp if exp else float
        return Interval(f(one.value), f(one.low), f(one.high))

    quality = TextQuality(
        text=name,
        protocol="windows that do not overlap",
        seq_len=windows.shape[1],
        perplexity=interval(rows["nll"], exp=True),
        accuracy=sum(rows["correct"]) / tokens,
        tokens=tokens,
        window_nll=rows["nll"],
        window_tokens=[per] * len(windows),
        window_correct=[int(x) for x in rows["correct"]],
    )
    if not compares:
        return quality, None
    ratio = (np.array(rows["nll"]) - np.array(rows["dense"])).tolist()
    divergence = Divergence(
        kl=interval(rows["kl"]),
        kl_median=0.0,
        kl_p99=0.0,
        kl_by_position=[],
        same_top1=interval(rows["same"]),
        right_token_change=0.0,
        right_token_change_rms=0.0,
        right_token_change_percentiles={},
        ln_perplexity_ratio=interval(ratio),
        tokens=tokens,
        window_kl=rows["kl"],
        window_same_top1=[int(x) for x in rows["same"]],
    )
    return quality, divergence
