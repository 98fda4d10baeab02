"""Where a result comes from: when, by which command, on what machine; no folder, no secret."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

# A path from the root or from home: its folders stay on this machine, its last part does not.
_FOLDERS = re.compile(r"(?:(?<=^)|(?<=[=:,\[\s'\"(]))(?:~[\w.-]*)?/(?!/)[^\s,\]'\")]+")
_SECRET_NAME = r"(?:^|[._-])(?:api_?key|password|secret|token|auth)"
_SECRET = re.compile(rf"({_SECRET_NAME}=).+", re.IGNORECASE)
_SECRET_OPTION = re.compile(rf"{_SECRET_NAME}$", re.IGNORECASE)


def date_now() -> str:
    """Return the time now, in UTC, to the minute."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def command_line(arguments: Sequence[str]) -> str:
    """Return a command as it may be published: without folders of this machine, without secrets.

    Args:
        arguments: as `sys.argv` has them.
    """
    if not arguments:
        return ""
    words = [Path(arguments[0]).name]
    if arguments[0].endswith(("prunelight/cli.py", "prunelight/__main__.py")):
        words = ["prunelight"]
    hidden = False
    for word in arguments[1:]:
        shown = "***" if hidden else _SECRET.sub(r"\1***", without_paths(word))
        hidden = word.startswith("--") and bool(_SECRET_OPTION.search(word))
        words.append(f'"{shown}"' if re.search(r"[\s\"'$&|;<>()]", shown) else shown)
    return " ".join(words)


def without_paths(text: str) -> str:
    """Return a text in which paths from the root or from home are their last parts."""
    option, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
    if value.startswith(("/", "~")) and not set(value) & set(",[{"):  # one path, maybe with spaces
        return option + equals + value.rstrip("/").rpartition("/")[2]
    return _FOLDERS.sub(lambda path: path[0].rstrip("/").rpartition("/")[2], text)


def machine_facts() -> dict[str, Any]:
    """Return the facts of this machine that explain its figures; not its name."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    known = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return known[1].strip() if known else platform.processor() or platform.machine()
