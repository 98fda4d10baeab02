"""A record of a run that measured everything, with texts that want to break out of the page."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from report_records import make_record

from prunelight.evaluation.report.record import RunRecord

HOSTILE = "</script><script src='http://evil/x.js'></script><img src=x onerror=y> | `a` $x_1$"


def task(value: float, outcomes: str, **changes: Any) -> dict[str, Any]:
    return {
        "task": "arc_easy",
        "metric": "acc_norm",
        "value": value,
        "stderr": 0.02,
        "metrics": {"acc": value},
        "num_questions": len(outcomes),
        "num_fewshot": 0,
        "version": "1.0",
        "data": "hub",
        "outcomes": outcomes,
        "fingerprint": "q1",
        "parts": [],
    } | changes


def between(value: float, spread: float) -> dict[str, float]:
    return {"value": value, "low": value - spread, "high": value + spread}


def divergence(kl: float) -> dict[str, Any]:
    return {
        "kl": between(kl, 0.02),
        "kl_median": kl / 2,
        "kl_p99": 9 * kl,
        "kl_by_position": [[0, kl / 2], [64, kl], [128, 2 * kl]],
        "same_top1": between(0.71, 0.01),
        "right_token_change": -0.05,
        "right_token_change_rms": 0.1,
        "right_token_change_percentiles": {"1": -0.9, "50": -0.01, "99": 0.2},
        "ln_perplexity_ratio": between(kl, 0.02),
        "tokens": 4096,
        "window_kl": [1.0],
        "window_same_top1": [1],
    }


def serving(factor: float) -> dict[str, Any]:
    rates = ("prefill_tokens_per_second", "decode_tokens_per_second")
    ratios = {
        rate: {"measured": [factor, factor - 0.05, factor + 0.05], "ideal": 1.3} for rate in rates
    }
    return {
        "shape": {
            "parameters": 113_300_000,
            "nonzeros": 113_000_000,
            "disk_bytes": 226_600_000,
            "prefill_multiply_adds_per_token": 1e8,
            "cache_bytes_per_token": 2048,
            "weight_bytes_per_token": 2e8,
        },
        "batches": {
            "1": {
                "prompt_tokens": 256,
                "new_tokens": 24,
                "time_to_first_token": [0.2, 0.19, 0.21],
                rates[0]: [1000.0 * factor, 900.0 * factor, 1100.0 * factor],
                rates[1]: [20.0 * factor, 19.0 * factor, 21.0 * factor],
                "working_bytes": 1e7,
            }
        },
        "ratios": {"1": ratios} if factor != 1 else {},
        "notes": ["The prompt was cut."],
        "verdicts": ["Decoding is 1.24 times as fast: fewer bytes are read for a token."],
    }


def probes(name: str, value: float) -> dict[str, Any]:
    right = int(20 * value)
    found = {"right": right, "total": 20, "chance": 0.0, "note": "", "score": value}
    unasked = {"right": 0, "total": 0, "chance": 0.0, "note": "no digits", "score": None}
    verdicts = {"dense": {}, "pruned": {"verdict": "collapsed"}, "recovered": {"verdict": "kept"}}
    return {
        "sums_2_digits": found | verdicts[name],
        "brackets": unasked | ({"verdict": "not asked"} if verdicts[name] else {}),
    }


def samples(text: str) -> list[dict[str, str]]:
    return [{"prompt": f"Once {HOSTILE}", "text": text}, {"prompt": "2 + 2 =", "text": " 4\n\n"}]


def make_examined_record(**changes: Any) -> RunRecord:
    """Return a record in which all examiners found something of every stage."""
    answers = ("1111011110" * 10, "0110011010" * 10, "1110011110" * 10)
    examined = [
        {
            "tasks": {
                "arc_easy": task(value, text),
                "hellaswag": task(value - 0.1, "1" * 40, task="hellaswag", metric="acc"),
            },
            "probes": probes(name, value),
            "samples": samples(name + HOSTILE),
            "serving": serving(factor),
            **({"divergence": divergence(kl)} if kl else {}),
        }
        for name, value, text, factor, kl in (
            ("dense", 0.8, answers[0], 1, 0.0),
            ("pruned", 0.5, answers[1], 1.24, 0.9),
            ("recovered", 0.7, answers[2], 1.24, 0.3),
        )
    ]
    stages = [
        replace(stage, examined=found)
        for stage, found in zip(make_record().stages, examined, strict=True)
    ]
    values: dict[str, Any] = {
        "model": f"org/{HOSTILE}",
        "stages": stages,
        "warnings": [f"Beware of {HOSTILE}"],
        "date": "2026-01-02 03:04 UTC",
        "command": "prunelight fit --config quickstart.yaml",
        "machine": {"processor": "a processor", "cores": 2},
        "seed": 7,
        "data": {"train": "sample:train"},
        "curves": {
            "train_loss": [[1, 3.0], [2, 2.5], [3, 2.4]],
            "learning_rate": [[1, 1e-4], [2, 5e-5], [3, 0.0]],
            "validation_perplexity": [[2, 30.0], [3, 25.0]],
        },
        "loads_in": {
            "vLLM": "yes",
            "llama.cpp": "no: <b>why</b>",
            "CTranslate2": "unknown: not tried",
        },
    }
    return make_record(**(values | changes))
