"""The frame of a page: whole, escaped, without network; charts that say what they show."""

from __future__ import annotations

import math
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from html_pages import read_page
from markupsafe import Markup

from prunelight.evaluation.report.page import charts, frame
from prunelight.evaluation.report.page.frame import Section, render_page

HOSTILE = (
    "<script>alert('x')</script>\"><img src=http://evil onerror=y> $x$ $\\frac{ \x00 \ud800 {{7*7}}"
)
CHARTS = {
    "bars": lambda name: charts.bar_chart(
        {name: [0.9, 0.03, None, math.inf], "other": [0.1, 0.2, 0.3, 0.4]},
        [name, "b", "c", "d"],
        alt=name,
        y_label=name,
        errors={name: [0.1, None, 0.1, 0.1]},
        line=(0.5, "level"),
        shaded=[1, 2],
        shaded_label="gone",
    ),
    "lines": lambda name: charts.line_chart(
        {name: ([1, 2, 3], [3.0, None, 100.0]), "other": ([1], [1.0])},
        alt=name,
        x_label="step",
        y_label=name,
        bands={name: ([1.0, 1.0, 1.0], [5.0, 5.0, 200.0])},
        levels={"dense": 2.0},
    ),
    "points": lambda name: charts.scatter(
        {name: [(1.0, 2.0), (2.0, 1.0)], **{f"series {i}": [(i, i)] for i in range(9)}},
        alt=name,
        x_label="size",
        y_label=name,
        intervals={name: [(1.5, 2.5), (0.5, 1.5)]},
        front=[(2.0, 1.0), (1.0, 2.0)],
        levels={"dense": 1.0},
    ),
    "map": lambda name: charts.heat_map(
        [[1.0, 0.5], [0.5, None]], alt=name, x_label="state", bar_label=name, outlines=[(0, 1)]
    ),
    "rows": lambda name: charts.heat_map(
        [[1.0, 0.5], [0.5, 0.1]],
        alt=name,
        x_label="layer",
        bar_label="zeros",
        row_names=[name, "b"],
        limits=(0, 1),
        log=False,
        wide=True,
    ),
}


def make_page(text: str) -> str:
    drawn = [frame.figure(make(text), text) for make in CHARTS.values()]
    parts = [
        frame.figures(drawn),
        frame.table([text, "b"], [[text, 1], ["y", 2.5]], caption=text, marked=[1]),
        frame.facts({text: text}),
        frame.bullets([text]),
        frame.beside([(text, text)]),
        frame.tiles([(text, text, text)]),
        frame.details(text, frame.code(text), frame.heading(text)),
        text,
    ]
    sections = [Section(f"{text} {i}", parts[i:], text) for i in range(2)]
    return render_page(text, [text, text], [*sections, Section("Empty", [])], warnings=[text])


def test_a_page_of_hostile_texts_shows_them_as_they_are() -> None:
    page = read_page(make_page(HOSTILE))
    assert page.text.count("<script>alert('x')</script>") > 20
    assert "{{7*7}}" in page.text
    assert "\x00" not in page.text


def test_a_page_is_the_same_each_time_it_is_drawn() -> None:
    assert make_page("a name") == make_page("a name")


def test_a_section_without_parts_is_left_out_of_page_and_contents() -> None:
    page = render_page(
        "T", "V", [Section(f"Part {i}", ["text"]) for i in range(4)] + [Section("Nil", [])]
    )
    reader = read_page(page)
    assert "Nil" not in reader.text
    assert [x for x in reader.loads if x.startswith("#part")] == [f"#part-{i}" for i in range(4)]
    assert {f"part-{i}" for i in range(4)} <= {*reader.ids}


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_is_xml_that_says_what_it_shows(name: str) -> None:
    root = ElementTree.fromstring(CHARTS[name]("a <b> & c"))
    assert root.get("role") == "img"
    assert root.get("aria-label") == "a <b> & c"
    assert root[0].text == "a <b> & c"
    assert root.get("width") is None  # the page decides
    assert len(CHARTS[name]("a")) < 60_000


def test_a_logarithmic_chart_has_plain_numbers() -> None:
    chart = charts.line_chart({"a": ([0, 1], [1.0, 50.0])}, alt="a", x_label="x", y_label="y")
    assert "y (log scale)" in chart
    assert ">10<" in chart.replace("\n", "")
    assert "mathdefault" not in chart


def test_long_texts_are_cut_with_a_word_on_how_much() -> None:
    assert "(1,000 more letters)" in frame.beside([("a", "x" * 5000)])


def test_pieces_are_safe_html_and_other_texts_are_not() -> None:
    page = read_page(render_page("T", "V", [Section("S", [Markup("<b>bold</b>"), "<b>text</b>"])]))
    assert page.tags.count("b") == 1


def test_the_frame_needs_no_torch() -> None:
    code = (
        "import sys; from prunelight.evaluation.report.page import charts, frame; "
        "print(sorted({'torch', 'lightning', 'transformers', 'matplotlib'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
