"""The result of an evaluation on disk: each part as soon as it is measured, and all in one file.

A part is kept by the fingerprint of what it depends on: models, settings, dtype, device, versions.
So a killed evaluation goes on with the missing parts, one with a further task measures that alone,
and one of another model or setting never takes a part that is not its own.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

from prunelight.evaluation.report.plan_facts import Json
from prunelight.runtime.files.atomic_files import check_writable, write_text
from prunelight.runtime.files.checksums import sealed, unsealed
from prunelight.runtime.processes import ProcessGroup

log = logging.getLogger(__name__)

FORMAT = 1
FILE = "evaluation.json"
PARTS = "parts"


class Record:
    """Parts of an evaluation in a directory; every process must make the same calls.

    Args:
        folder: of the result.
        group: processes that measure together; rank 0 reads and writes.

    Attributes:
        reused: names of parts that an earlier start had measured.
    """

    def __init__(self, folder: Path, group: ProcessGroup) -> None:
        self.folder, self.group = folder, group
        self.reused: list[str] = []
        self._measured = False

    def part(self, name: str, fingerprint: str, measure: Callable[[], Json]) -> Json:
        """Return a part: the one on disk if there is one, else it is measured and kept."""
        found = self._read(fingerprint)
        if found is not None:
            self.reused.append(name)
            return found
        if self.reused and not self._measured:
            log.info("measured before, and kept: %s", ", ".join(self.reused))
        self._measured = True
        return self._keep(name, fingerprint, measure())

    def known(self, name: str, fingerprint: str, describe: Callable[[], Json]) -> Json:
        """Return what is known of a model: from disk, else from the model, and kept."""
        found = self._read(fingerprint)
        return self._keep(name, fingerprint, describe()) if found is None else found

    def _file(self, fingerprint: str) -> Path:
        return self.folder / PARTS / f"{fingerprint}.json"

    def _read(self, fingerprint: str) -> Json | None:
        found: Json | None = self.group.run_on_rank_zero(
            lambda: _read_part(self._file(fingerprint))
        )
        return found

    def _keep(self, name: str, fingerprint: str, content: Json) -> Json:
        content = strict_json(content)
        text = sealed({"part": name, **content})
        self.group.run_on_rank_zero(lambda: write_text(self._file(fingerprint), text))
        return content

    def finish(self, result: Json) -> Json:
        """Write all parts as evaluation.json and return what it holds.

        A file that says the same is left as it is, with its date and command.
        """
        written: Json = self.group.run_on_rank_zero(lambda: self._finish(strict_json(result)))
        return written

    def _finish(self, result: Json) -> Json:
        file = self.folder / FILE
        earlier = read_evaluation(file) if file.exists() else None
        if earlier is not None and _without_origin(earlier) == _without_origin(result):
            log.info("%s is complete: nothing was left to measure", file)
            return earlier
        write_text(file, json.dumps(result, indent=1) + "\n")
        return result


def _without_origin(result: Json) -> Json:
    """Return a result without what differs between two starts of the same evaluation."""
    facts = {k: v for k, v in result["facts"].items() if k not in ("date", "command", "machine")}
    return {**result, "facts": facts}


def _read_part(file: Path) -> Json | None:
    """Return what a part holds; None if there is none, or it is damaged."""
    try:
        content = unsealed(file.read_text(encoding="utf-8"), must=True)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s): that part is measured again", file, error)
        return None
    return {name: value for name, value in content.items() if name != "part"}


def strict_json(content: Json) -> Json:
    """Return strict JSON data: NaN and infinities become strings, which `float` reads."""
    values: Json = json.loads(json.dumps(content), parse_constant=str)
    return values


def read_evaluation(file: Path) -> Json:
    """Return what an evaluation.json holds.

    Raises:
        ValueError: if this version of prunelight did not write it; names the remedy.
    """
    try:
        content: Json = json.loads(file.read_text(encoding="utf-8"))
        known = content["format"] == FORMAT and {"model", "facts"} <= set(content)
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(
            f"{file} was not written by this version of prunelight evaluate; move it, or choose "
            "another directory with --out"
        )
    return content


def check_out(folder: Path) -> None:
    """Check that a result can be written into a directory.

    Raises:
        ValueError: if it is a file, or the directory of a saved model, which must stay as it is, or
            holds an evaluation.json of another program.
        OSError: if it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={str(folder)!r} is a file; give a directory")
    for place in (folder.absolute(), *folder.absolute().parents):
        if (place / "config.json").exists():
            raise ValueError(
                f"out={str(folder)!r} lies in the directory of a model, whose files must stay as "
                "they were saved; give another directory"
            )
    if (folder / FILE).exists():
        read_evaluation(folder / FILE)
    check_writable(folder)
