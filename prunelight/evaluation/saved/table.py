"""The table of an evaluation for a console: the model beside its reference, with intervals."""

from __future__ import annotations

import math

from rich.markup import escape
from rich.table import Table

from prunelight.evaluation.quality.bootstrap import exp_or_infinity
from prunelight.evaluation.report.plan_facts import Json, percent

Row = tuple[str, str, str, str]  # name, model, reference, change

_FEW_ZEROS = 0.01  # share of zeros that says nothing: rounded weights have some


def evaluation_table(result: Json) -> Table:
    """Return the table: one row a figure; a second column for the reference, and the change.

    Args:
        result: what evaluation.json holds.
    """
    model, reference = result["model"], result["reference"]
    dtype = result["facts"]["dtype"]
    table = Table(title=escape(f"{model['name']}, {dtype}"))
    names = [model["name"], *([reference["name"], "change"] if reference else [])]
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(escape(name), justify="right")
    for row in evaluation_rows(result):
        table.add_row(*(escape(cell) for cell in row[: 1 + len(names)]))
    return table


def evaluation_notes(result: Json) -> list[str]:
    """Return what stands below the table: how each figure was measured, and verdicts."""
    notes = [f"{text['text']}: {text['protocol']}." for text in result.get("texts", [])]
    if notes:
        notes.append("In brackets: 95 % bootstrap intervals over windows, paired for a change.")
    if "flips" in result:
        notes.append("Tasks: +- is the standard error; lost: right in the reference, now wrong.")
    warnings = [f"WARNING: {text}" for text in result.get("warnings", [])]
    return [*notes, *result.get("serving", {}).get("verdicts", []), *warnings]


def evaluation_rows(result: Json) -> list[Row]:
    """Return the rows of the table; without a reference the last two cells are empty."""
    rows = _size_rows(result)
    texts = result.get("texts", [])
    references = result.get("reference_texts") or [None] * len(texts)
    divergences = result.get("divergence") or [None] * len(texts)
    for text, reference, divergence in zip(texts, references, divergences, strict=True):
        rows += _text_rows(text, reference, divergence)
    return [*rows, *_task_rows(result), *_probe_rows(result), *_serving_rows(result)]


def _size_rows(result: Json) -> list[Row]:
    model, reference = result["model"], result["reference"] or {}
    rows: list[Row] = []
    for label, name, show in (
        ("parameters", "parameters", lambda value: f"{value / 1e6:,.1f}M"),
        ("layers", "layers", str),
        ("zeros in linears", "zeros", percent),
    ):
        value, base = model[name], reference.get(name)
        if value is None or (name == "zeros" and max(value, base or 0) < _FEW_ZEROS):
            continue
        change = f"{100 * (value / base - 1):+.1f} %" if base and name != "zeros" else ""
        rows.append((label, show(value), "" if base is None else show(base), change))
    return rows


def _text_rows(text: Json, reference: Json | None, divergence: Json | None) -> list[Row]:
    name = text["text"]
    perplexity, accuracy = interval(text["perplexity"]), f"{text['accuracy']:.3f}"
    if reference is None or divergence is None:
        rows = [(name, "", "", ""), ("  perplexity", perplexity, "", "")]
        return [*rows, ("  next-token accuracy", accuracy, "", "")]
    percentiles = divergence["right_token_change_percentiles"]
    spread = f"{float(percentiles['5']):+.3f} to {float(percentiles['95']):+.3f}"
    change = f"{text['accuracy'] - reference['accuracy']:+.3f}"
    factor = _factor(divergence["ln_perplexity_ratio"])
    return [
        (name, "", "", ""),
        ("  perplexity", perplexity, interval(reference["perplexity"]), factor),
        ("  next-token accuracy", accuracy, f"{reference['accuracy']:.3f}", change),
        ("  same top-1", "", "", interval(divergence["same_top1"])),
        ("  KL in nats: mean", "", "", interval(divergence["kl"])),
        ("    median", "", "", f"{float(divergence['kl_median']):.3g}"),
        ("    99th percentile", "", "", f"{float(divergence['kl_p99']):.3g}"),
        ("  right token: mean", "", "", f"{float(divergence['right_token_change']):+.4f}"),
        ("    RMS", "", "", f"{float(divergence['right_token_change_rms']):.4f}"),
        ("    5 % to 95 %", "", "", spread),
    ]


def _task_rows(result: Json) -> list[Row]:
    references, flips = result.get("reference_tasks", {}), result.get("flips", {})
    rows: list[Row] = []
    for name, task in result.get("tasks", {}).items():
        reference, flipped, change = references.get(name), flips.get(name), ""
        if reference is not None:
            change = f"{float(task['value']) - float(reference['value']):+.3f}"
        if flipped is not None:
            change += f"; {flipped['right_to_wrong']} lost, {flipped['wrong_to_right']} won"
        label = f"{name}, {task['metric']}, {task['num_questions']} questions"
        rows.append((label, _score(task), _score(reference), change))
    return rows


def _score(task: Json | None) -> str:
    if task is None:
        return ""
    error = "" if task["stderr"] is None else f" +-{float(task['stderr']):.3f}"
    return f"{float(task['value']):.3f}{error}"


def _probe_rows(result: Json) -> list[Row]:
    probes, references = result.get("probes", {}), result.get("reference_probes", {})
    rows: list[Row] = [("collapse probes", "", "", "")] if probes else []
    for name, probe in probes.items():
        own, other = (_share(each) for each in (probe, references.get(name)))
        rows.append((f"  {name.replace('_', ' ')}", own, other, probe.get("verdict", "")))
    return rows


def _share(probe: Json | None) -> str:
    if probe is None or not probe["total"]:
        return ""
    return f"{probe['right']} of {probe['total']}"


def _serving_rows(result: Json) -> list[Row]:
    if "serving" not in result:
        return []
    own, other = result["serving"], result.get("reference_serving", {})
    rows: list[Row] = []
    for size, batch in own["batches"].items():
        lengths = f"{batch['prompt_tokens']} + {batch['new_tokens']} tokens"
        rows.append((f"serving, batch {size}, {lengths}", "", "", ""))
        beside = other.get("batches", {}).get(size, {})
        ratios = own.get("ratios", {}).get(size, {})
        for label, name in (
            ("prefill, tokens/s", "prefill_tokens_per_second"),
            ("decoding, tokens/s", "decode_tokens_per_second"),
        ):
            ratio, change = ratios.get(name), ""
            if ratio:
                change = f"{_factor_of(ratio['measured'])}; ideal x{ratio['ideal']:.2f}"
            rows.append((f"  {label}", _rate(batch[name]), _rate(beside.get(name)), change))
    return rows


def _rate(figures: list[float] | None) -> str:
    return "" if figures is None else f"{float(figures[0]):,.0f}"


def _factor_of(figures: list[float]) -> str:
    middle, low, high = (float(each) for each in figures)
    return f"x{middle:.2f} [{low:.2f}, {high:.2f}]"


def interval(value: Json, digits: int = 3) -> str:
    """Return a figure with its interval, or alone where that is not known."""
    middle, low, high = (float(value[name]) for name in ("value", "low", "high"))
    shown = f"{middle:.{digits}g}"
    if math.isnan(low):
        return shown
    return f"{shown} [{low:.{digits}g}, {high:.{digits}g}]"


def _factor(ratio: Json) -> str:
    """Return a logarithm of a ratio as a factor, with its interval."""
    return "x" + interval({name: exp_or_infinity(float(value)) for name, value in ratio.items()})
