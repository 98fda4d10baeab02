"""A record of a run survives JSON, whatever its numbers are."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from report_records import (
    MIXED,
    make_plan,
    make_record,
    make_sparse_record,
)

from prunelight.evaluation.report.record import RunRecord
from prunelight.evaluation.report.report import write_report


@pytest.mark.parametrize("record", [make_record(), make_sparse_record(), make_sparse_record(MIXED)])
def test_a_record_survives_the_way_through_json(record: RunRecord) -> None:
    assert RunRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_a_record_from_before_there_was_sparsity_is_read() -> None:
    data = make_record().to_dict()
    del data["outcomes"]
    for stage in data["stages"]:
        del stage["sparsity"], stage["linear_sparsity"]
    assert RunRecord.from_dict(data) == make_record()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_survive_in_valid_json(tmp_path: Path, value: float) -> None:
    stages = [make_record().stages[0], replace(make_record().stages[1], perplexity=value)]
    plan = make_plan(scores={"block_influence": [value] + [0.1] * 9})
    record = make_record(stages=stages, plans=[plan], evaluation={"worst": [value, "NaN-free"]})
    write_report(tmp_path, record)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = RunRecord.from_dict(data)
    assert repr(again) == repr(record)  # repr, since NaN is not equal to itself


def test_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match=r"report format=2 must be 1; read it with the version"):
        RunRecord.from_dict(make_record().to_dict() | {"format": 2})
