"""Reading a GGUF back: with llama.cpp in a process of its own, or else with transformers' reader.

The Python with llama.cpp is the option `engine_python`, the environment variable
PRUNELIGHT_LLAMA_CPP_PYTHON, or this one. transformers' reader proves the tensors alone: it does not
say what llama.cpp computes from them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from prunelight.export.gguf import llamacpp_reader
from prunelight.export.gguf.families import rope_parameters
from prunelight.export.targets import ExportOptions, NotReadableError, Reading
from prunelight.models.families.config_fields import head_dim
from prunelight.models.forward import evaluating
from prunelight.models.loading import quiet_transformers

VARIABLE = "PRUNELIGHT_LLAMA_CPP_PYTHON"
PIP_LINE = "pip install xllamacpp (a wheel), or llama-cpp-python (it builds llama.cpp)"
_READ_BY_TRANSFORMERS = ("llama", "mistral", "qwen2", "starcoder2")
_WEAK = (
    "llama.cpp itself did not read the export: the package transformers read its tensors and keys. "
    f"For the proof in llama.cpp: {PIP_LINE}"
)


@dataclass(frozen=True)
class LlamaCpp:
    """A Python that has llama.cpp.

    Attributes:
        python: the program.
        package: llama_cpp or xllamacpp.
        version: of the package.
    """

    python: str
    package: str
    version: str


def find_llama_cpp(options: ExportOptions) -> LlamaCpp | None:
    """Return the Python with llama.cpp, or None.

    Raises:
        NotReadableError: if one was named, and has no llama.cpp.
    """
    named = options.engine_python or os.environ.get(VARIABLE)
    python = named or sys.executable
    facts = _probe(python)
    if facts:
        return LlamaCpp(python, facts["package"], facts["version"])
    if named is not None:
        raise NotReadableError(f"{named} has no llama.cpp; there: {PIP_LINE}")
    return None


@cache
def _probe(python: str) -> dict[str, str]:
    if python == sys.executable:
        return llamacpp_reader.probe()
    command = [python, llamacpp_reader.__file__, "probe"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    facts: dict[str, str] = json.loads(run.stdout) if run.returncode == 0 else {}
    return facts


def run_llama_cpp(llama_cpp: LlamaCpp, verb: str, job: dict[str, Any], folder: str) -> None:
    """Run the reader in the Python that has llama.cpp.

    Raises:
        RuntimeError: if llama.cpp refuses; says what it said last.
    """
    file, complaint = Path(folder) / f"{verb}.json", Path(folder) / "complaint.txt"
    facts = {"threads": torch.get_num_threads(), "complaint": str(complaint)}
    file.write_text(json.dumps({**facts, **job}), encoding="utf-8")
    command = [llama_cpp.python, llamacpp_reader.__file__, verb, str(file)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        lines = [line.strip() for line in run.stderr.splitlines() if line.strip()]
        last = lines[-1] if lines else "it says nothing"
        reason = complaint.read_text(encoding="utf-8") if complaint.exists() else last
        raise RuntimeError(
            f"llama.cpp ({llama_cpp.package} {llama_cpp.version}) does not {verb} the export, so "
            f"nothing was kept: {' '.join(reason.split())}"
        )


def read_with_llama_cpp(
    llama_cpp: LlamaCpp,
    file: Path,
    windows: Sequence[Sequence[int]],
    texts: Sequence[str],
    vocabulary: int,
) -> tuple[Reading, list[list[int]]]:
    """Return the logits of windows, and the token ids of texts, as llama.cpp computes them."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "reading.npz"
        job = {
            "file": str(file),
            "windows": [[*window] for window in windows],
            "texts": [*texts],
            "vocabulary": vocabulary,
            "output": str(output),
        }
        run_llama_cpp(llama_cpp, "read", job, folder)
        with np.load(output) as arrays:
            logits = [arrays[f"logits{index}"] for index in range(len(windows))]
            positions = [arrays[f"positions{index}"].tolist() for index in range(len(windows))]
            ids = [arrays[f"ids{index}"].tolist() for index in range(len(texts))]
    version = f"({llama_cpp.package} {llama_cpp.version})"
    return Reading("llama.cpp", version, logits, positions), ids


def transformers_reads(config: Any) -> bool:
    """Return whether transformers reads the GGUF of a model as it reads the model.

    It ignores keys for windows, rotations and heads, and knows few families: see tests/export.
    """
    natural = head_dim(config) * config.num_attention_heads == config.hidden_size
    plain = rope_parameters(config).get("rope_type", "default") == "default"
    return config.model_type in _READ_BY_TRANSFORMERS and natural and plain


def read_with_transformers(file: Path, windows: Sequence[Sequence[int]]) -> Reading:
    """Return the logits that transformers computes from the weights of a GGUF."""
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    with evaluating(model):
        logits = [model(torch.tensor([[*window]])).logits[0].float() for window in windows]
    return Reading(
        "transformers (GGUF)", transformers.__version__, [row.numpy() for row in logits], note=_WEAK
    )
