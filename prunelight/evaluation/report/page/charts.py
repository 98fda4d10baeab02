"""Charts as inline SVG: bars, lines, points, heat maps, for colour-blind readers and for print.

Series differ by colour (Okabe and Ito's palette) and by hatch, dash or mark. Each chart says in
words what it shows (`alt`). matplotlib draws; it is imported only then. Texts stay texts, in the
reader's font.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from prunelight.evaluation.report.page.frame import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette without yellow, which is too pale on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
HATCHES = ("", "////", "\\\\\\\\", "xxxx", "----", "||||", "++++")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
GREY, _PALE = "#595959", "#f6dccb"
_SVG_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "prunelight",
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.7,
    "hatch.linewidth": 0.5,
    "hatch.color": "white",
    "legend.frameon": False,
    "legend.fontsize": 9,
}
_WIDTH, _WIDE = 5.4, 10.6  # inches
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif"

Values = Sequence[float | None]


def bar_chart(
    series: Mapping[str, Values],
    labels: Sequence[str],
    *,
    alt: str,
    y_label: str,
    x_label: str = "",
    errors: Mapping[str, Values] | None = None,
    line: tuple[float, str] | None = None,
    shaded: Iterable[int] = (),
    shaded_label: str = "",
    log: bool | None = None,
    top: float | None = None,
    wide: bool = False,
    height: float = 2.6,
) -> Markup:
    """Return grouped bars: one group a label, one bar a series.

    Args:
        series: name -> one value a label; None or NaN leaves a gap.
        labels: of the groups; if they are numbers, some may go untold for want of room.
        alt: what the chart shows, in words.
        y_label: of the values.
        x_label: of the groups.
        errors: name of a series -> half the height of each error bar.
        line: a level and what it is, drawn across.
        shaded: numbers of groups with a background.
        shaded_label: what these groups are.
        log: scale of the values; None takes a logarithm where they span more than 20 to 1.
        top: of the scale of the values.
        wide: over the whole page.
        height: in inches.
    """
    rows = {name: _finite(values) for name, values in series.items()}
    every = [value for row in rows.values() for value in row if math.isfinite(value)]
    log = _is_wide(every) if log is None else log

    def draw(axes: Axes) -> None:
        shade(axes, shaded, shaded_label)
        width = 0.8 / max(len(rows), 1)
        for number, (name, row) in enumerate(rows.items()):
            places = [i + (number - (len(rows) - 1) / 2) * width for i in range(len(row))]
            bars: dict[str, Any] = {
                "color": COLOURS[number % 7],
                "hatch": HATCHES[number % 7],
                "label": name,
            }
            axes.bar(places, row, width, **bars, zorder=2)
            if errors and name in errors:
                half = _finite(errors[name])
                style: dict[str, Any] = {"fmt": "none", "ecolor": "#1a1a1a", "elinewidth": 1}
                axes.errorbar(places, row, yerr=half, capsize=2.5, **style, zorder=3)
        if line is not None:
            draw_level(axes, *line)
        _name_places(axes, labels)
        axes.set_xlim(-0.7, len(labels) - 0.3)
        if log and every:
            _use_logarithm(axes)
            axes.set_ylim(bottom=min(every) / 2)  # or the shortest bar would have no height
        elif every:
            axes.set_ylim(top=top, bottom=min(0.0, *every))
        axes.set_ylabel(f"{y_label} (log scale)" if log else y_label)
        axes.set_xlabel(x_label)
        told = [*rows] if len(rows) > 1 else []
        _legend(axes, [*told, *([line[1]] if line else []), shaded_label])

    return svg_of(draw, alt, wide=wide, height=height)


def line_chart(
    series: Mapping[str, tuple[Values, Values]],
    *,
    alt: str,
    x_label: str,
    y_label: str,
    bands: Mapping[str, tuple[Values, Values]] | None = None,
    levels: Mapping[str, float] | None = None,
    marks: bool = True,
    log: bool | None = None,
    wide: bool = False,
    height: float = 2.6,
) -> Markup:
    """Return lines.

    Args:
        series: name -> values on the horizontal axis, values on the vertical one.
        alt: what the chart shows, in words.
        x_label: of the horizontal axis.
        y_label: of the vertical one.
        bands: name of a series -> low and high of each point, drawn as a pale band.
        levels: name -> a level that is drawn across.
        marks: draw a mark at each point.
        log: scale of the vertical axis; None takes a logarithm where values span more than 20 to 1.
        wide: over the whole page.
        height: in inches.
    """
    every = [y for _, ys in series.values() for y in _finite(ys) if math.isfinite(y)]
    log = _is_wide(every) if log is None else log

    def draw(axes: Axes) -> None:
        for number, (name, (xs, ys)) in enumerate(series.items()):
            look: dict[str, Any] = {"color": COLOURS[number % 7], "label": name}
            look["linestyle"] = DASHES[number % 7]
            mark = MARKS[number % 7] if marks else ""
            axes.plot(_finite(xs), _finite(ys), marker=mark, markersize=4, linewidth=1.6, **look)
            if bands and name in bands:
                low, high = (_finite(side) for side in bands[name])
                look = {"color": COLOURS[number % 7], "alpha": 0.18, "linewidth": 0}
                axes.fill_between(_finite(xs), low, high, **look)
        for number, (name, level) in enumerate((levels or {}).items()):
            draw_level(axes, level, name, number)
        if log:
            _use_logarithm(axes)
        if all(float(x).is_integer() for xs, _ in series.values() for x in xs if x is not None):
            axes.locator_params(axis="x", integer=True)
        axes.set_xlabel(x_label)
        axes.set_ylabel(f"{y_label} (log scale)" if log else y_label)
        told = [*series] if len(series) > 1 or levels else []
        _legend(axes, [*told, *(levels or {})])

    return svg_of(draw, alt, wide=wide, height=height)


def scatter(
    points: Mapping[str, Sequence[tuple[float, float]]],
    *,
    alt: str,
    x_label: str,
    y_label: str,
    intervals: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    front: Sequence[tuple[float, float]] = (),
    levels: Mapping[str, float] | None = None,
    log: bool | None = None,
    least_width: float = 0.0,
    as_curve: bool = False,
    wide: bool = False,
    height: float = 3.4,
) -> Markup:
    """Return points: one colour and mark a series.

    Args:
        points: name of a series -> its points.
        alt: what the chart shows, in words.
        x_label: of the horizontal axis.
        y_label: of the vertical one.
        intervals: name of a series -> low and high of each point's vertical value.
        front: points that a grey line joins, such as a Pareto front.
        levels: name -> a level that is drawn across, such as the dense model.
        log: scale of the vertical axis; None takes a logarithm where values span more than 20 to 1.
        least_width: of the horizontal axis, so that small differences look small.
        as_curve: a thin line joins the points of a series, such as a curve over amounts.
        wide: over the whole page.
        height: in inches.
    """
    every = [y for row in points.values() for _, y in row if math.isfinite(y)]
    log = _is_wide(every) if log is None else log

    def draw(axes: Axes) -> None:
        if len(front) > 1:
            joined = sorted(front)
            places, levels_of = [x for x, _ in joined], [y for _, y in joined]
            axes.plot(places, levels_of, color="#9a9a9a", linewidth=2.5, label="front", zorder=1)
        for number, (name, row) in enumerate(points.items()):
            xs, ys = [x for x, _ in row], [y for _, y in row]
            look: dict[str, Any] = {"color": COLOURS[number % 7], "label": name}
            # Series beyond the palette take hollow marks, so that none looks like another.
            hollow: dict[str, Any] = {"markerfacecolor": "white"} if number >= 7 else {}
            style = MARKS[number % 7] + ("-" if as_curve else "")
            axes.plot(xs, ys, style, markersize=7, linewidth=1, zorder=3, **look, **hollow)
            if intervals and name in intervals:
                sides = zip(ys, intervals[name], strict=True)
                half = [(max(0, y - low), max(0, high - y)) for y, (low, high) in sides]
                bars: dict[str, Any] = {"fmt": "none", "elinewidth": 1, "capsize": 2.5}
                axes.errorbar(xs, ys, yerr=[*zip(*half, strict=True)], ecolor=look["color"], **bars)
        for number, (name, level) in enumerate((levels or {}).items()):
            draw_level(axes, level, name, number)
        if log:
            _use_logarithm(axes)
        left, right = axes.get_xlim()
        missing = max(0.0, least_width - (right - left))
        axes.set_xlim(left - missing / 2, right + missing / 2)
        axes.set_xlabel(x_label)
        axes.set_ylabel(f"{y_label} (log scale)" if log else y_label)
        _legend(axes, [*points, "front", *(levels or {})])

    return svg_of(draw, alt, wide=wide, height=height)


def heat_map(
    rows: Sequence[Values],
    *,
    alt: str,
    x_label: str,
    y_label: str = "",
    bar_label: str,
    row_names: Sequence[str] = (),
    outlines: Sequence[tuple[float, float]] = (),
    limits: tuple[float, float] | None = None,
    log: bool = False,
    wide: bool = False,
    height: float = 3.6,
) -> Markup:
    """Return a heat map; its colours are dark for low values also without colour.

    Args:
        rows: of values.
        alt: what the chart shows, in words.
        x_label: of the columns.
        y_label: of the rows.
        bar_label: what the colours mean.
        row_names: of the rows; without them they are numbered from below, as in a square map.
        outlines: first and last place of squares on the diagonal that get a frame.
        limits: of the colours; None takes the lowest and highest value.
        log: scale of the colours.
        wide: over the whole page.
        height: in inches.
    """

    def draw(axes: Axes) -> None:
        from matplotlib.patches import Rectangle

        values = [_finite(row) for row in rows]
        origin: Any = "upper" if row_names else "lower"
        aspect: Any = "auto" if row_names else "equal"
        look: dict[str, Any] = {"cmap": "cividis", "norm": "log" if log else None}
        image = axes.imshow(values, origin=origin, aspect=aspect, interpolation="none", **look)
        if limits is not None:
            image.set_clim(*limits)
        for first, last in outlines:
            size = last - first + 1
            corner = (first - 0.5, first - 0.5)
            axes.add_patch(
                Rectangle(corner, size, size, fill=False, edgecolor="#d55e00", linewidth=2)
            )
        if row_names:
            axes.set_yticks(range(len(row_names)), [*map(_short, row_names)], fontsize=8)
            axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=10, integer=True)
        axes.figure.colorbar(image, ax=axes, label=bar_label, aspect=20, pad=0.02)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.spines[:].set_visible(False)

    return svg_of(draw, alt, wide=wide, height=height)


def svg_of(
    draw: Callable[[Axes], None], alt: str, *, wide: bool = False, height: float = 2.6
) -> Markup:
    """Return what a function draws as an SVG element for a page.

    Args:
        draw: draws on axes.
        alt: what the chart shows, in words.
        wide: over the whole page.
        height: in inches.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # the object API: no pyplot, no global state
    from matplotlib.text import Text

    text = io.StringIO()
    with rc_context(_SVG_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's font has it
        drawing = Figure((_WIDE if wide else _WIDTH, height), layout="constrained")
        axes = drawing.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
        axes.set_axisbelow(True)
        draw(axes)
        if axes.images:
            axes.grid(visible=False)
        for written in drawing.findobj(Text):
            written.set_text(_short(written.get_text()))
        no_facts = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        drawing.savefig(text, format="svg", metadata=no_facts, transparent=True)
    return _inline(text.getvalue(), alt)


def shade(axes: Axes, places: Iterable[int], label: str = "") -> None:
    """Give places on the horizontal axis a background; neighbours share one."""
    runs: list[list[int]] = []
    for place in sorted({*places}):
        if runs and runs[-1][1] == place - 1:
            runs[-1][1] = place
        else:
            runs.append([place, place])
    for number, (first, last) in enumerate(runs):
        name: dict[str, Any] = {"label": label} if label and not number else {}
        axes.axvspan(first - 0.5, last + 0.5, color=_PALE, linewidth=0, zorder=0, **name)


def draw_level(axes: Axes, level: float, label: str, number: int = 0) -> None:
    """Draw a level across the chart; its number among several gives it a look of its own."""
    look: dict[str, Any] = {"color": ("#1a1a1a", "#8a4b00", GREY)[number % 3]}
    look["linestyle"] = ("--", ":", "-.")[number % 3]
    axes.axhline(level, linewidth=1.4, label=label, zorder=4, **look)


def _name_places(axes: Axes, labels: Sequence[str]) -> None:
    numbers = all(label.lstrip("-").isdigit() for label in labels)
    step = math.ceil(len(labels) / 20) if numbers else 1
    places = range(0, len(labels), step)
    turned = not numbers and sum(map(len, labels)) > 45
    look: dict[str, Any] = {"rotation": 30, "ha": "right"} if turned else {}
    axes.set_xticks(places, [_short(labels[place]) for place in places], **look)


def _short(text: str) -> str:
    """Return a text that leaves room for the chart."""
    text = printable(text)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _use_logarithm(axes: Axes) -> None:
    """Give the vertical axis a logarithmic scale, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes, names: Iterable[str]) -> None:
    """Put a legend above the chart, where it hides nothing, of those names that are drawn."""
    handles, labels = axes.get_legend_handles_labels()
    drawn = dict(zip(labels, handles, strict=True))
    shown = [name for name in names if name in drawn]
    if shown:
        place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1)}
        columns = min(len(shown), 3)
        axes.legend([drawn[name] for name in shown], shown, ncols=columns, **place)


def _inline(svg: str, alt: str) -> Markup:
    """Return an SVG file as an element: named, sized by the page, its ids unlike other charts'."""
    body = svg[svg.index("<svg") :]
    head, _, rest = body.partition(">")
    box = re.search(r'viewBox="([^"]+)"', head)
    assert box is not None
    prefix = f"c{zlib.crc32(body.encode()):08x}-"
    rest = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", rest)
    rest = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", _FONTS, rest)
    rest = re.sub(r"<!--.*?-->\s*", "", rest, flags=re.DOTALL).replace("xlink:href", "href")
    name = escape(printable(alt))
    return Markup(  # matplotlib escapes its texts
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box[1]}" role="img" '
        f'aria-label="{name}"><title>{name}</title>{rest.rstrip()}'
    )


def _finite(values: Values) -> list[float]:
    return [math.nan if x is None or not math.isfinite(x) else float(x) for x in values]


def _is_wide(values: Sequence[float]) -> bool:
    """Return whether values need a log scale: all are positive, and span more than 20 to 1."""
    return bool(values) and min(values) > 0 and max(values) > 20 * min(values)
