"""Read a GGUF with llama.cpp, in a process of its own; nothing of prunelight is imported.

    PYTHON llamacpp_reader.py probe
    PYTHON llamacpp_reader.py read JOB.json
    PYTHON llamacpp_reader.py quantize JOB.json

PYTHON has the package llama_cpp or xllamacpp. `probe` prints which, as JSON. `read` takes {"file",
"windows", "vocabulary", "texts", "threads", "output", "complaint"}, and writes OUTPUT, an npz with
the logits of each window, the positions that they belong to, and the token ids of each text.
`quantize` takes {"file", "output", "kind", "threads", "complaint"}. llama.cpp ends the process on
some faults, hence the process.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = {"llama_cpp": "llama_cpp_python", "xllamacpp": "xllamacpp"}
# Each position costs xllamacpp a request, whose answer lists the whole vocabulary.
POSITIONS = 8

Job = dict[str, Any]


def package() -> str | None:
    """Return the package that has llama.cpp, or None; the one that gives whole logits first."""
    return next((name for name in PACKAGES if importlib.util.find_spec(name)), None)


def probe() -> dict[str, str]:
    """Return name and version of the package; {} for none."""
    name = package()
    return {} if name is None else {"package": name, "version": version(PACKAGES[name])}


def read(job: Job) -> None:
    """Carry out a job with the package that is here."""
    reader = read_with_llama_cpp if package() == "llama_cpp" else read_with_xllamacpp
    arrays: Any = reader(job)
    np.savez(job["output"], **arrays)


def read_with_llama_cpp(job: Job) -> dict[str, np.ndarray[Any, Any]]:
    """Read with llama-cpp-python: the logits of every position."""
    import llama_cpp

    complaints: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
    def listen(level: int, text: bytes, _: Any) -> None:
        if level == 4:  # an error
            complaints.append(text.decode(errors="replace").strip())

    llama_cpp.llama_log_set(listen, None)
    try:
        engine = llama_cpp.Llama(
            job["file"],
            n_ctx=max(64, *map(len, job["windows"])),
            n_threads=job["threads"],
            logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32,  # the cache is float16 otherwise
            type_v=llama_cpp.GGML_TYPE_F32,
            flash_attn=False,
            # The package's defaults would stand before what the file says.
            **dict.fromkeys(("yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"), -1.0),
            n_gpu_layers=0,
            verbose=False,
        )
    except ValueError as error:
        raise ValueError(complaints[0] if complaints else error) from error
    arrays = {}
    for index, ids in enumerate(job["windows"]):
        engine.reset()
        engine.eval(ids)
        arrays[f"logits{index}"] = np.array(engine.scores[: len(ids)])
        arrays[f"positions{index}"] = np.arange(len(ids))
    for index, text in enumerate(job["texts"]):
        arrays[f"ids{index}"] = np.array(engine.tokenize(text.encode(), add_bos=True))
    engine.close()
    return arrays


def read_with_xllamacpp(job: Job) -> dict[str, np.ndarray[Any, Any]]:
    """Read with xllamacpp's server: log-probabilities after some prefixes of each window."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = job["file"]
    parameters.n_ctx = max(64, *(len(ids) + 8 for ids in job["windows"]))
    parameters.n_batch = parameters.n_ubatch = parameters.n_ctx
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.warmup = False
    parameters.cpuparams.n_threads = job["threads"]
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for index, ids in enumerate(job["windows"]):
        positions = np.unique(np.linspace(0, len(ids) - 1, POSITIONS).astype(int))
        rows = [_after(server, ids[: place + 1], job["vocabulary"]) for place in positions]
        arrays[f"logits{index}"] = np.stack(rows)
        arrays[f"positions{index}"] = positions
    for index, text in enumerate(job["texts"]):
        arrays[f"ids{index}"] = _tokens(server, text)
    return arrays


def _after(server: Any, ids: list[int], vocabulary: int) -> np.ndarray[Any, Any]:
    """Return the log-probabilities of the token after a prefix, (V,)."""
    asked = {"prompt": ids, "n_predict": 1, "n_probs": vocabulary, "cache_prompt": False}
    answer = server.handle_completions({**asked, "temperature": 1.0})
    if "choices" not in answer:
        raise ValueError(json.dumps(answer)[:300])
    row = np.full(vocabulary, np.nan, dtype=np.float32)
    for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        row[entry["id"]] = entry["logprob"]
    return row


def _tokens(server: Any, text: str) -> np.ndarray[Any, Any]:
    """Return the ids that llama.cpp makes of a text, with those that surround it."""
    from urllib.request import Request, urlopen

    body = json.dumps({"content": text, "add_special": True}).encode()
    headers = {"Content-Type": "application/json"}
    request = Request(f"{server.listening_address}/tokenize", body, headers)
    with urlopen(request, timeout=60) as answer:
        return np.array(json.load(answer)["tokens"])


def quantize(job: Job) -> None:
    """Let llama.cpp quantize a GGUF."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{job['kind'].upper()}")
    parameters.nthread = job["threads"]
    files = (job["file"].encode(), job["output"].encode())
    if code := llama_cpp.llama_model_quantize(*files, parameters):
        raise ValueError(f"llama_model_quantize gives {code}")


def main(verb: str, file: str = "") -> None:
    """Carry out a verb; the reason of a failure goes to the job's file `complaint`."""
    if verb == "probe":
        sys.stdout.write(json.dumps(probe()) + "\n")
        return
    job = json.loads(Path(file).read_text(encoding="utf-8"))
    try:
        {"read": read, "quantize": quantize}[verb](job)
    except Exception as error:
        Path(job["complaint"]).write_text(f"{error}", encoding="utf-8")
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
