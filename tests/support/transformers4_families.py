"""Write the families that transformers 4 knows; run with TRANSFORMERS4_PYTHON, see .ci/."""

import json
import os
import subprocess
import textwrap
from pathlib import Path

HERE = Path(__file__).parent
TARGET = HERE.parents[1] / "prunelight" / "models" / "families" / "transformers4.py"
TEXT = '''\
"""Families that transformers 4.57 knows, written by tests/support/transformers4_families.py."""

MODEL_TYPES = frozenset(
    """
{names}
    """.split()  # noqa: SIM905
)
'''

if __name__ == "__main__":
    side = [os.environ["TRANSFORMERS4_PYTHON"], HERE / "transformers4_side.py", "families"]
    names = " ".join(sorted(json.loads(subprocess.check_output(side, text=True))))
    lines = textwrap.wrap(names, 92, break_long_words=False, break_on_hyphens=False)
    TARGET.write_text(TEXT.format(names=textwrap.indent("\n".join(lines), "    ")))
