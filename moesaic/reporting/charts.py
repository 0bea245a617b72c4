"""Draw charts as SVG that belongs to its page: its text, its colours, its light or dark.

matplotlib draws with stand-in colours, which are then replaced by CSS variables, so one
picture reads well on white and on black. Layers are coloured by depth along viridis, which
keeps its order for every kind of colour vision; heat maps run from violet over white to
orange (PuOr) for the same reason. Each picture has a title and a description for screen
readers, and each layer's line names itself when pointed at.

Shapes.  P points in time    L layers    E experts    B bars
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from moesaic.reporting.runfolder import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 7.4
"""Inches; the page scales it to its column, which makes 8 pt text the size of the page's."""

INK, SOFT, GRID, ACCENT, SECOND = "#010101", "#010102", "#010103", "#010104", "#010105"
_ROLES = {INK: "ink", SOFT: "soft", GRID: "grid", ACCENT: "accent", SECOND: "second"}
_LONG = re.compile(r"(\.\d\d)\d+")
_STAND_IN = re.compile(r"#0101[0-9a-f]{2}|#04[0-9a-f]{4}")

MANY_BARS = 128
"""More bars than this are one outline, and only the marked one names itself."""

LOAD_LIMIT = 4.0
"""Loads beyond this multiple of a fair share, or below its inverse, get the last colour."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moesaic",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": GRID,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.formatter.useoffset": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One set of axes of lines over time."""

    title: str
    steps_P: Array
    values: Array
    """(P,) for one line, (P, L) for one a layer."""
    is_share: bool = False
    """Show the values in per cent."""
    from_zero: bool = False
    """Begin the axis at zero, unless a value lies below."""
    reference: float | None = None
    """Where to draw a dashed line."""


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Loads as multiples of a fair share: rows are layers or experts."""

    title: str
    ratios: Array
    """(rows, columns)."""
    row_label: str
    column_label: str
    rows: Sequence[int]
    columns: tuple[float, float] | None = None
    """First and last step when the columns are time; None when they are experts."""


@dataclass(frozen=True, kw_only=True)
class Bars:
    """One bar for each rank."""

    title: str
    values_B: Array
    texts: Sequence[str]
    """Each value as people read it, (B,)."""
    groups: Sequence[tuple[str, int]]
    """Ranks that stand together: their name, and how many they are."""
    fair_B: Array | None = None
    """Where a dashed line runs through each bar."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """One row: what part of a step it computes, and for how long it does not."""

    name: str
    compute: float
    """Seconds."""
    wait: float
    low: float
    high: float
    """The least and the most that one of its ranks computes."""
    text: str


def depth_colours(num_layers: int) -> tuple[list[str], list[str]]:
    """Colours of the layers from the first to the last, on a light and on a dark page."""
    viridis = mpl.colormaps["viridis"]
    places = np.linspace(0, 1, num_layers) if num_layers > 1 else np.array([0.4])
    return (
        [mpl.colors.to_hex(viridis(0.74 * place)) for place in places],
        [mpl.colors.to_hex(viridis(0.32 + 0.66 * place)) for place in places],
    )


def loss_chart(steps_P: Array, loss_P: Array, *, name: str, description: str) -> str:
    """The loss of every step, and its running mean."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        axes = figure.subplots()
        window = running_window(len(loss_P))
        steps_P, thin_P = thinned(steps_P), thinned(loss_P)
        smooth_P = thinned(running_mean(loss_P, window))
        if window > 1:
            axes.plot(steps_P, thin_P, color=ACCENT, alpha=0.35, linewidth=0.8, label="each step")
            axes.plot(
                steps_P, smooth_P, color=ACCENT, linewidth=1.8, label=f"mean of {window} steps"
            )
            axes.legend(frameon=False, labelcolor=SOFT, loc="upper right")
        else:
            axes.plot(steps_P, thin_P, color=ACCENT, linewidth=1.8, marker=_marker(thin_P))
        _time_axis(axes, steps_P)
        axes.set_ylabel("nats a token")
        return _svg(figure, name, "Training loss over steps", description)


def line_charts(panels: Sequence[Panel], *, name: str, title: str, description: str) -> str:
    """One line a panel, up to three panels side by side."""
    with mpl.rc_context(_STYLE):
        figure, grid = _grid(len(panels), height=1.9)
        for axes, panel in zip(grid, panels, strict=False):
            steps_P, values_P = thinned(panel.steps_P), thinned(panel.values)
            axes.plot(steps_P, values_P, color=ACCENT, marker=_marker(values_P))
            axes.set_title(panel.title)
            _time_axis(axes, steps_P)
            _value_axis(axes, panel)
        return _svg(figure, name, title, description)


def layer_charts(
    panels: Sequence[Panel], layers: Sequence[int], *, name: str, title: str, description: str
) -> str:
    """One line a layer, coloured by depth, with the key to the colours at the right."""
    with mpl.rc_context(_STYLE):
        figure, grid = _grid(len(panels), height=2.7 if len(panels) < 3 else 2.3)
        for number, (axes, panel) in enumerate(zip(grid, panels, strict=False)):
            for row, layer in enumerate(layers):
                (line,) = axes.plot(
                    panel.steps_P,
                    panel.values[:, row],
                    color=_depth(row),
                    linewidth=1.3 if len(layers) < 20 else 1.0,
                    marker=_marker(panel.values[:, row]),
                )
                line.set_gid(f"tip-{number}-{row}-layer {layer}")
            if panel.reference is not None:
                axes.axhline(panel.reference, color=SOFT, linewidth=0.8, linestyle=(0, (4, 3)))
            axes.set_title(panel.title)
            _time_axis(axes, panel.steps_P)
            _value_axis(axes, panel)
        _depth_key(figure, grid, layers)
        return _svg(figure, name, title, description)


def load_charts(maps: Sequence[HeatMap], *, name: str, title: str, description: str) -> str:
    """Heat maps side by side on one colour scale around a fair share."""
    with mpl.rc_context(_STYLE | {"axes.grid": False, "axes.spines.left": False}):
        most_rows = max(len(panel.rows) for panel in maps)
        height = min(5.0, max(1.7, 0.9 + 0.1 * most_rows))
        figure, grid = _grid(len(maps), height=height)
        image = None
        for axes, panel in zip(grid, maps, strict=False):
            rows, columns = panel.ratios.shape
            left, right = panel.columns or (0, columns)
            if left == right:
                left, right = left - 0.5, right + 0.5
            with np.errstate(divide="ignore"):
                log_ratios = np.log2(panel.ratios)
            image = axes.imshow(
                np.clip(log_ratios, -math.log2(LOAD_LIMIT), math.log2(LOAD_LIMIT)),
                cmap="PuOr_r",
                vmin=-math.log2(LOAD_LIMIT),
                vmax=math.log2(LOAD_LIMIT),
                extent=(left, right, rows, 0),
                aspect="auto",
                interpolation="none",
            )
            axes.set_title(panel.title)
            axes.set_ylabel(panel.row_label)
            axes.set_xlabel(panel.column_label)
            axes.spines[:].set_visible(False)
            _cell_ticks(axes, panel)
        assert image is not None, "there is at least one map"
        ticks = [-2, -1, 0, 1, 2]
        bar = figure.colorbar(image, ax=list(grid), ticks=ticks, aspect=24, pad=0.02, shrink=0.9)
        bar.ax.set_yticklabels(["≤ ¼", "½", "1", "2", "≥ 4"])
        bar.outline.set_visible(False)
        assert bar.solids is not None, "a colour bar of an image has solids"
        bar.solids.set_rasterized(True)
        bar.set_label("times a fair share", color=SOFT)
        return _svg(figure, name, title, description)


def rank_charts(panels: Sequence[Bars], *, name: str, title: str, description: str) -> str:
    """Bars side by side, one for each rank, the tallest marked and named."""
    with mpl.rc_context(_STYLE):
        figure, grid = _grid(len(panels), height=2.4)
        for number, (axes, panel) in enumerate(zip(grid, panels, strict=False)):
            count, most = len(panel.values_B), float(panel.values_B.max())
            marked = int(panel.values_B.argmax())
            tips = [f"rank {rank}: {text}" for rank, text in enumerate(panel.texts)]
            _draw_bars(axes, panel.values_B, marked=marked, tips=tips, number=number)
            if panel.fair_B is not None:
                ends = np.arange(count + 1) - 0.5
                dashes = (0, (4, 3))
                axes.stairs(
                    panel.fair_B, ends, baseline=None, color=INK, linewidth=0.8, linestyle=dashes
                )
            side = (
                "left" if marked < count / 3 else "right" if marked >= 2 * count / 3 else "center"
            )
            shift = {"left": -0.45, "center": 0.0, "right": 0.45}[side]
            axes.text(marked + shift, most, f" {tips[marked]} ", ha=side, va="bottom", color=INK)
            _name_groups(axes, panel.groups, inches=0.85 * WIDTH / len(panels))
            axes.set(title=panel.title, xlabel="rank", xlim=(-0.6, count - 0.4))
            axes.set_ylim(0, (1.35 if len(panel.groups) > 1 else 1.2) * most or 1)
            axes.set_xticks(_spread(count, 16 if count <= 64 else 8))
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
            axes.grid(visible=False, axis="x")
            axes.set_axisbelow(True)
        return _svg(figure, name, title, description)


def pace_chart(rows: Sequence[Pace], *, name: str, title: str, description: str) -> str:
    """How much of a step each stage, or each rank, computes; the slowest is marked."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, min(6.0, 0.9 + 0.26 * len(rows))), layout="constrained")
        axes = figure.subplots()
        compute_B = np.array([row.compute for row in rows])
        wait_B = np.array([row.wait for row in rows])
        marked = int(compute_B.argmax())
        longest = float((compute_B + wait_B).max())
        tips = [f"{row.name}: {row.text}" for row in rows]
        _draw_bars(axes, compute_B, marked=marked, tips=tips, number=0, is_sideways=True)
        _draw_bars(
            axes, wait_B, start_B=compute_B, tips=tips, number=1, is_sideways=True, colour=SOFT
        )
        if len(rows) <= 24:
            for place, row in enumerate(rows):
                if row.high > row.low:
                    axes.plot([row.low, row.high], [place, place], color=INK, linewidth=1)
                axes.text(
                    row.compute + row.wait + 0.01 * longest,
                    place,
                    row.text,
                    va="center",
                    color=INK if place == marked else SOFT,
                )
        shown = _spread(len(rows), 24)
        axes.set_yticks(shown, [rows[place].name for place in shown])
        axes.set(xlabel="seconds of a step", ylim=(len(rows) - 0.4, -0.6))
        axes.set_xlim(0, 1.12 * longest or 1)
        axes.grid(visible=False, axis="y")
        axes.set_axisbelow(True)
        handles = [
            Patch(color=ACCENT, label="computing"),
            Patch(color=SECOND, label="computing, the slowest"),
            Patch(color=SOFT, alpha=_FAINT, label="the rest of the step"),
        ]
        figure.legend(
            handles=handles, loc="outside upper left", ncols=3, frameon=False, labelcolor=SOFT
        )
        return _svg(figure, name, title, description)


def running_window(points: int) -> int:
    """Steps that the running mean of the loss takes together: a fiftieth of them, odd."""
    return max(1, points // 50 // 2 * 2 + 1) if points >= 15 else 1


def running_mean(values_P: Array, window: int) -> Array:
    """Mean over `window` points around each, fewer at the ends; what is not finite is left out."""
    known_P = np.isfinite(values_P)
    kernel = np.ones(window)
    sums_P = np.convolve(np.where(known_P, values_P, 0), kernel, mode="same")
    counts_P = np.convolve(known_P.astype(float), kernel, mode="same")
    means_P: Array = np.divide(
        sums_P, counts_P, out=np.full_like(sums_P, np.nan), where=counts_P > 0
    )
    return means_P


def thinned(values_P: Array, most: int = 1000) -> Array:
    """Means of neighbours where there are more points than a picture can show."""
    group = -(-len(values_P) // most)
    if group <= 1:
        return values_P
    starts = range(0, len(values_P), group)
    return np.array([_mean(values_P[start : start + group]) for start in starts])


def _mean(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def _grid(panels: int, *, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(panels, 3)
    rows = -(-panels // columns)
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in grid[panels:]:
        unused.set_visible(False)
    return figure, grid[:panels]


_FAINT = 0.3
"""Opacity of what is only the rest."""


def _draw_bars(
    axes: Axes,
    values_B: Array,
    *,
    tips: Sequence[str],
    number: int,
    start_B: Array | None = None,
    marked: int | None = None,
    is_sideways: bool = False,
    colour: str = ACCENT,
) -> None:
    """Bars at 0, 1, 2, ...; the marked one in the second colour. Each names itself if few."""
    count = len(values_B)
    base_B = np.zeros(count) if start_B is None else start_B
    alpha = 1.0 if start_B is None else _FAINT
    drawn = range(count)
    if count > MANY_BARS:
        axes.stairs(
            base_B + values_B,
            np.arange(count + 1) - 0.5,
            baseline=base_B,
            orientation="horizontal" if is_sideways else "vertical",
            fill=True,
            color=colour,
            alpha=alpha,
            linewidth=0,
        )
        drawn = range(0) if marked is None else range(marked, marked + 1)
    draw = axes.barh if is_sideways else axes.bar
    for bar in drawn:
        (patch,) = draw(
            [bar],
            [values_B[bar]],
            # One bar of a thousand has to be seen, too.
            0.8 if bar != marked else max(0.8, count / 100),
            [base_B[bar]],
            color=SECOND if bar == marked else colour,
            alpha=alpha,
            linewidth=0,
        )
        patch.set_gid(f"tip-{number}-{bar}-{tips[bar]}")


def _name_groups(axes: Axes, groups: Sequence[tuple[str, int]], *, inches: float) -> None:
    """Lines between groups of bars, and on top their names, or their numbers if there is no room
    for names, or nothing."""
    if len(groups) == 1:
        return
    bars = sum(size for _, size in groups)
    numbers = [text.partition(" ")[2] for text, _ in groups]
    names = ([text for text, _ in groups], numbers, [""] * len(groups))
    a_letter = 0.065
    shown = next(
        texts
        for texts in names
        if all(
            len(text) * a_letter <= inches * size / bars
            for text, (_, size) in zip(texts, groups, strict=True)
        )
    )
    start = 0
    for text, (_, size) in zip(shown, groups, strict=True):
        if start:
            axes.axvline(start - 0.5, color=GRID, linewidth=0.8)
        if text:
            axes.text(
                start + (size - 1) / 2,
                0.98,
                text,
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="top",
                color=SOFT,
            )
        start += size


def _depth(row: int) -> str:
    return f"#04{row:04x}"


def _marker(values_P: Array) -> str | None:
    # A lone point has no line, and between few the line says more than was measured.
    return "o" if np.isfinite(values_P).sum() <= 4 else None


def _time_axis(axes: Axes, steps_P: Array) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: _short(step)))
    first, last = float(steps_P[0]), float(steps_P[-1])
    if first == last:
        axes.set_xticks([first])
    margin = 0.02 * (last - first) if last > first else 0.5
    axes.set_xlim(first - margin, last + margin)


def _short(number: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 10 * size or (abs(number) >= size and number % (size / 10) == 0):
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def _value_axis(axes: Axes, panel: Panel) -> None:
    known = panel.values[np.isfinite(panel.values)]
    top = float(known.max()) if known.size else 0.0
    if panel.is_share and top > 0 and top > 8 * float(np.median(known)):
        # The outlier of Fig. 4 is ten times the bulk; on a linear axis the bulk is one line.
        floor = max(float(np.median(known)) / 2, top / 100)
        axes.set_yscale("symlog", linthresh=floor, linscale=0.4)
        decades = range(math.floor(math.log10(floor)), math.ceil(math.log10(top)) + 1)
        ticks = [digit * 10.0**power for power in decades for digit in (1, 2, 5)]
        axes.set_yticks([0.0, *(tick for tick in ticks if floor <= tick <= 1.1 * top)])
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(0, 1.15 * top)
    elif panel.from_zero and known.size and known.min() >= 0:
        axes.set_ylim(0, 1.08 * top if top > 0 else 1)
    if panel.is_share:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))
    elif 0 < top < 0.001:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    elif top >= 10_000:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _depth_key(figure: Figure, grid: Sequence[Axes], layers: Sequence[int]) -> None:
    if len(layers) < 2:
        return
    # A real axes, so that the layout makes room for it: one bar a layer, the first on top.
    key = figure.colorbar(
        mpl.cm.ScalarMappable(), ax=list(grid), aspect=30, pad=0.02, shrink=0.9
    ).ax
    key.clear()
    key.grid(False)
    key.spines[:].set_visible(False)
    for row in range(len(layers)):
        key.barh(row + 0.5, 1, height=1, color=_depth(row), linewidth=0)
    key.set(xlim=(0, 1), ylim=(len(layers), 0), xticks=[])
    key.yaxis.tick_right()
    shown = _spread(len(layers), 6)
    key.set_yticks([row + 0.5 for row in shown], [str(layers[row]) for row in shown])
    key.yaxis.set_label_position("right")
    key.set_ylabel("layer")


def _cell_ticks(axes: Axes, panel: HeatMap) -> None:
    rows, columns = panel.ratios.shape
    shown = _spread(rows, 9)
    axes.set_yticks([row + 0.5 for row in shown], [str(panel.rows[row]) for row in shown])
    if panel.columns is None:
        shown = _spread(columns, 8)
        axes.set_xticks([column + 0.5 for column in shown], [str(column) for column in shown])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: _short(step)))


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` positions, evenly apart, the first among them."""
    return list(range(0, count, -(-count // most)))


def _svg(figure: Figure, name: str, title: str, description: str) -> str:
    """The figure as an <svg> element that may stand beside others in one HTML page."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, dpi=144, metadata={"Date": None, "Creator": None}
    )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # The style sheet inside would rule the whole page; page.css has the same rule for svg alone.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    # Ids are unique in a figure only, and must be in the page.
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{name}-", svg)
    svg = re.sub(rf'(<g id="{name}-tip-\d+-\d+)-([^"]+)">', r'\1"><title>\2</title>', svg)
    # The page's own font; matplotlib writes either both properties or, when older, one.
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    # A hundredth of a point is finer than any screen; the digits after it double the page.
    svg = re.sub(r'\bd="[^"]+"', lambda path: _LONG.sub(r"\1", path.group(0)), svg)
    svg = _STAND_IN.sub(_variable, svg)
    opening = (
        f'<svg role="img" aria-labelledby="{name}-title {name}-desc" '
        f'viewBox="{_view_box(svg)}" xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">'
        f'<title id="{name}-title">{html.escape(title)}</title>'
        f'<desc id="{name}-desc">{html.escape(description)}</desc>'
    )
    svg = re.sub(r"^<svg[^>]*>", lambda _: opening, svg)
    return re.sub(r"\s*\n\s*", " ", svg).strip()


def _view_box(svg: str) -> str:
    match = re.search(r'viewBox="([^"]+)"', svg)
    assert match, "matplotlib writes a viewBox"
    return match.group(1)


def _variable(match: re.Match[str]) -> str:
    colour = match.group(0)
    if colour in _ROLES:
        return f"var(--{_ROLES[colour]})"
    return f"var(--depth-{int(colour[3:], 16)})"
