"""`prunelight report RUN`: draw report.md, report.html and the pictures of a run again."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from prunelight.evaluation.report.record import FORMAT, RunRecord
from prunelight.evaluation.report.report import draw_report
from prunelight.evaluation.report.writing import check_report_files
from prunelight.verbs import VerbParser, run_verb

log = logging.getLogger(__name__)

REPORT = "report.json"


def main(arguments: Sequence[str]) -> None:
    """Run the verb."""
    parser = VerbParser(
        prog="prunelight report",
        description="Draw report.md, report.html and the pictures again, from report.json alone.",
    )
    parser.add_argument("run", type=str, help="Directory of a run, or its report.json.")
    run_verb(parser, arguments, _draw)


def _draw(given: Namespace) -> None:
    for file in draw_again(Path(given.run).expanduser()):
        log.info("wrote %s", file)


def draw_again(run: Path) -> list[Path]:
    """Draw the report of a run again, beside its report.json; return the files.

    Args:
        run: directory of the run, or its report.json.

    Raises:
        FileNotFoundError: if there is no report.json.
        ValueError: if it is damaged, is not ours, or was written by a newer version.
        FileExistsError: if a file of the report's names was not written by prunelight.
    """
    file = run / REPORT if run.is_dir() else run
    record = read_report(file)
    check_report_files(file.parent)
    return draw_report(file.parent, record)


def read_report(file: Path) -> RunRecord:
    """Return the record in a report.json.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, is not ours, or was written by a newer version.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(_missing(file)) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text: {_REMEDY}") from error
    try:
        data: Any = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({error}): {_REMEDY}") from error
    if not isinstance(data, dict) or not {"format", "model", "stages"} <= data.keys():
        raise ValueError(f"{file} is no report of prunelight: {_REMEDY}")
    if isinstance(data["format"], int) and data["format"] > FORMAT:
        raise ValueError(
            f"{file} has format={data['format']}, this version reads {FORMAT}; install a newer "
            "prunelight: pip install -U prunelight"
        )
    try:
        record = RunRecord.from_dict(data)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} lacks or misnames a fact ({error}): {_REMEDY}") from error
    if not record.stages:
        raise ValueError(f"{file} holds no measured stage; {_REMEDY}")
    return record


_REMEDY = "give the directory of a run of prunelight fit or prune, with the report.json it wrote"


def _missing(file: Path) -> str:
    directory = file.parent
    if not directory.is_dir() or (file.name != REPORT and not file.exists()):
        return f"{file} does not exist; {_REMEDY}"
    if (directory / "comparison.json").is_file():
        return (
            f"{directory} holds a comparison; the `prunelight compare` command that made it draws "
            "its page again within seconds, as it reuses finished cells"
        )
    if any(directory.glob("pruned-*/measured.json")):
        return (
            f"{directory} has no {REPORT}: the run has not ended; start the same command again, "
            "and it goes on"
        )
    return f"{directory} has no {REPORT}; {_REMEDY}"
