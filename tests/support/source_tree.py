"""Where the source lies, and what a file of it imports."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def imported(source):
    """Dotted names of all imports, those inside functions too; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
