"""The job behind `moesaic report`: one HTML page of what a training run did.

The page is one file that asks nothing of the network: style and pictures stand inside it,
and a content security policy holds it to that.

Shapes.  P points in time    L MoE layers    E experts
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from moesaic.files import write_text_atomic
from moesaic.reporting import charts, words
from moesaic.reporting.charts import Bars, HeatMap, Pace, Panel
from moesaic.reporting.config import ReportConfig
from moesaic.reporting.runfolder import Array, Ranks, Routing, Run, read_run
from moesaic.version import __version__


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture and what it shows."""

    svg: str
    caption: str


@dataclass(kw_only=True)
class Section:
    """One heading of the page and what stands under it."""

    name: str
    title: str
    text: str = ""
    figures: list[Figure] = field(default_factory=list)


def report(config: ReportConfig) -> dict[str, Any]:
    """Write the page for a run folder.

    Returns:
        `report`, the path of the page; `summary`, its sentences; `notes`, what the run folder
        does not have.

    Raises:
        FolderError: If the folder holds no run, has no finished step yet, or is damaged.
    """
    run = read_run(config.run)
    out = config.out or config.run / "report.html"
    summary = words.summary(run)
    write_text_atomic(out, render_page(run, summary))
    return {"report": str(out), "summary": summary, "notes": list(run.notes)}


def render_page(run: Run, summary: list[str]) -> str:
    """The whole page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup
    light, dark = charts.depth_colours(len(run.routing.layers) if run.routing else 1)
    return environment.get_template("page.html.jinja").render(
        title=run.path.resolve().name,
        summary=summary,
        tiles=_tiles(run),
        sections=_sections(run),
        layer_table=_layer_table(run),
        heldout=_heldout_table(run),
        prompts=_prompts(run),
        config_text=run.config_text,
        machine=_flat(run.machine),
        notes=run.notes,
        made_with=f"Moesaic {__version__}, Python {platform.python_version()}",
        light=light,
        dark=dark,
    )


def _sections(run: Run) -> list[Section]:
    sections = [_loss_section(run), _speed_section(run)]
    if run.routing is not None:
        sections += [
            _drop_section(run, run.routing),
            _load_section(run.routing),
            _gate_section(run.routing),
        ]
    sections.append(_similarity_section(run))
    if run.ranks is not None:
        sections.append(_ranks_section(run.ranks))
    return [section for section in sections if section.figures]


def _loss_section(run: Run) -> Section:
    section = Section(name="loss", title="Loss")
    loss_P = run.metrics.get("loss")
    if loss_P is not None and np.isfinite(loss_P).any():
        known_P = loss_P[np.isfinite(loss_P)]
        first, last = words.first_and_last(known_P)
        caption = "Cross entropy on the training text, in nats a token"
        if len(known_P) > 1:
            caption += (
                f": {float(first):.3f} at the start, {float(last):.3f} at the end, "
                f"lowest {known_P.min():.3f}"
            )
        caption += "."
        svg = charts.loss_chart(run.metrics["step"], loss_P, name="loss", description=caption)
        section.figures.append(Figure(svg=svg, caption=caption))
    return section


def _speed_section(run: Run) -> Section:
    section = Section(name="speed", title="Learning rate, gradient and speed")
    titles = {
        "learning_rate": "Learning rate",
        "gradient_norm": "Gradient norm, before the clip",
        "tokens_per_second": "Tokens a second",
    }
    panels = [
        Panel(title=title, steps_P=run.metrics["step"], values=run.metrics[name], from_zero=True)
        for name, title in titles.items()
        if name in run.metrics and np.isfinite(run.metrics[name]).any()
    ]
    if panels:
        caption = _speed_caption(run.metrics)
        svg = charts.line_charts(
            panels, name="speed", title="Learning rate, gradient norm, speed", description=caption
        )
        section.figures.append(Figure(svg=svg, caption=caption))
    return section


def _speed_caption(metrics: Mapping[str, Array]) -> str:
    parts = []
    if "tokens_per_second" in metrics and np.isfinite(metrics["tokens_per_second"]).any():
        parts.append(f"median {np.nanmedian(metrics['tokens_per_second']):,.0f} tokens a second")
    if "mfu" in metrics and np.isfinite(metrics["mfu"]).any():
        parts.append(f"median MFU {words.percent(float(np.nanmedian(metrics['mfu'])))}")
    if "peak_memory_bytes" in metrics and np.isfinite(metrics["peak_memory_bytes"]).any():
        peak = words.byte_count(float(np.nanmax(metrics["peak_memory_bytes"])))
        parts.append(f"peak memory {peak}")
    sentence = ", ".join(parts)
    return sentence[:1].upper() + sentence[1:] + "." if parts else "As the run recorded them."


def _drop_section(run: Run, routing: Routing) -> Section:
    section = Section(
        name="drops",
        title="Token drops and the balance coefficient",
        text=(
            "An expert takes only so many tokens; copies beyond that overflow. Each layer's "
            "balance loss has a coefficient that can follow the layer's own drop rate "
            "(Skywork-MoE, section 4.2): it rises where tokens overflow and relaxes where they "
            "do not."
        ),
    )
    if run.is_dropless:
        section.text += (
            " This run dropped nothing: the rate is what the stated capacity would have dropped."
        )
    titles = {"drop_rate": _drop_title(run), "coefficient": "Balance coefficient"}
    panels = _panels(routing, titles, from_zero=True, shares=("drop_rate",))
    if panels:
        caption = "One line a layer, coloured by depth; point at a line to see which it is."
        if "drop_rate" in routing.numbers:
            last_L = words.first_and_last(routing.numbers["drop_rate"])[1]
            caption += f" At the end the layers' rates are {_range(last_L, words.percent)}."
        _add_layers(section, panels, routing.layers, caption + _interval(routing))
    return section


def _drop_title(run: Run) -> str:
    return "Beyond capacity" if run.is_dropless else "Token drop rate"


def _gate_section(routing: Routing) -> Section:
    experts = routing.load_PLE.shape[-1]
    section = Section(
        name="gates",
        title="How decided the gates are",
        text=(
            "Max1, Max2 and Max3 are a token's largest gate probabilities. A ratio near 1 means "
            "the gate hardly prefers its choice. The dashed line is the entropy of a gate that "
            f"prefers nothing: ln {experts} = {math.log(experts):.2f} nats."
        ),
    )
    titles = {
        "max1_over_max2": "Max1 / Max2",
        "max2_over_max3": "Max2 / Max3",
        "entropy": "Entropy, nats",
    }
    panels = _panels(routing, titles, references={"entropy": math.log(experts)})
    if panels:
        parts = [
            f"{panel.title.split(',')[0]} is {_range(words.first_and_last(panel.values)[1])}"
            for panel in panels
        ]
        caption = "At the end " + "; ".join(parts) + ". Means over tokens." + _interval(routing)
        _add_layers(section, panels, routing.layers, caption)
    return section


def _load_section(routing: Routing) -> Section:
    section = Section(
        name="load",
        title="Expert load",
        text=(
            "A fair share is 1: every expert is sent equally many tokens. Orange experts get "
            "more, violet ones less."
        ),
    )
    ratios_PLE = words.fair_ratios(routing.load_PLE)
    first_LE, last_LE = words.first_and_last(ratios_PLE)
    axes: dict[str, Any] = {"row_label": "layer", "rows": routing.layers}
    ends = [
        HeatMap(title="At the start", ratios=first_LE, column_label="expert", **axes),
        HeatMap(title="At the end", ratios=last_LE, column_label="expert", **axes),
    ]
    if len(ratios_PLE) < 2:
        ends = [HeatMap(title="Load", ratios=last_LE, column_label="expert", **axes)]
    caption = (
        f"Load of every expert. The busiest one of a layer takes {_range(last_LE.max(axis=1))} "
        f"times its share at the end, the idlest {_range(last_LE.min(axis=1))} times."
    )
    svg = charts.load_charts(ends, name="load", title="Load of every expert", description=caption)
    section.figures.append(Figure(svg=svg, caption=caption))
    if len(ratios_PLE) > 1:
        section.figures.append(_load_over_time(routing, ratios_PLE))
    return section


def _load_over_time(routing: Routing, ratios_PLE: Array) -> Figure:
    busiest_PL = ratios_PLE.max(axis=2)
    uneven = int(np.argmax(words.mean(busiest_PL)))
    layer = routing.layers[uneven]
    span = (float(routing.steps_P[0]), float(routing.steps_P[-1]))
    maps = [
        HeatMap(
            title="Busiest expert of each layer",
            ratios=busiest_PL.T,
            row_label="layer",
            column_label="step",
            rows=routing.layers,
            columns=span,
        ),
        HeatMap(
            title=f"Experts of layer {layer}",
            ratios=ratios_PLE[:, uneven].T,
            row_label="expert",
            column_label="step",
            rows=range(ratios_PLE.shape[-1]),
            columns=span,
        ),
    ]
    caption = (
        f"Load over time: the busiest expert of every layer, and all experts of layer {layer}, "
        f"whose load was the least even over the run.{_interval(routing)}"
    )
    svg = charts.load_charts(maps, name="load-time", title="Load over time", description=caption)
    return Figure(svg=svg, caption=caption)


def _similarity_section(run: Run) -> Section:
    section = Section(
        name="similarity",
        title="Expert similarity",
        text=(
            "The definition is ours, since Skywork-MoE gives none: the mean over all pairs of a "
            "layer's experts of the cosine between their weights, w1, w3 and w2 laid end to end. "
            "Copies have 1, independent random experts about 0."
        ),
    )
    if run.similarity is not None and np.isfinite(run.similarity.values_PL).any():
        last_L = run.similarity.values_PL[-1]
        lowest, highest = words.cosines(float(np.nanmin(last_L)), float(np.nanmax(last_L)))
        caption = f"Similarity of each layer's experts; at the end from {lowest} to {highest}."
        panel = Panel(
            title="Mean cosine between experts",
            steps_P=run.similarity.steps_P,
            values=run.similarity.values_PL,
        )
        _add_layers(section, [panel], run.similarity.layers, caption)
    return section


def _ranks_section(ranks: Ranks) -> Section:
    """Memory and load of each rank, and how long each stage computes."""
    section = Section(
        name="ranks",
        title="Ranks and stages",
        text=(
            "The fullest rank decides whether a plan fits its devices, and the slowest stage how "
            "fast all of them are; both are orange."
        ),
    )
    groups = [(words.stages(ranks, members[0]), len(members)) for members in ranks.by_pipeline]
    if len(groups) > 1:
        section.text += " Ranks that run the same stages stand together, under the stages' numbers."
    unit, size = _memory_unit(float(ranks.peak_memory_R.max()))
    panels = [
        Bars(
            title=f"Peak memory, {unit}",
            values_B=ranks.peak_memory_R / size,
            texts=[words.byte_count(value) for value in ranks.peak_memory_R],
            groups=groups,
        )
    ]
    caption = words.fullest(ranks)
    if ranks.tokens_R.any():
        panels.append(
            Bars(
                title="Rows to the rank's experts, a step",
                values_B=ranks.tokens_R,
                texts=[f"{value:,.0f}" for value in ranks.tokens_R],
                groups=groups,
                fair_B=words.fair_tokens(ranks),
            )
        )
        caption += f" {words.busiest(ranks)} The dashed line is that mean."
    svg = charts.rank_charts(
        panels, name="ranks", title="Memory and load of each rank", description=caption
    )
    section.figures += [Figure(svg=svg, caption=caption), _pace_figure(ranks)]
    return section


def _pace_figure(ranks: Ranks) -> Figure:
    is_pipeline = len(ranks.by_pipeline) > 1
    members = ranks.by_pipeline if is_pipeline else [[rank] for rank in range(len(ranks.places))]
    rows = []
    for own, compute in zip(members, words.pace(ranks), strict=True):
        first, last = own[0], own[-1]
        of_ranks = f"rank {first}"
        if last > first:
            of_ranks = f"ranks {first} {'to' if last - first > 1 else 'and'} {last}"
        name = f"{words.stages(ranks, first)}, {of_ranks}" if is_pipeline else of_ranks
        rows.append(
            Pace(
                name=name,
                compute=compute,
                wait=float(ranks.wait_R[own].mean()),
                low=float(ranks.compute_R[own].min()),
                high=float(ranks.compute_R[own].max()),
                text=words.seconds(compute),
            )
        )
    points = len(ranks.steps_P)
    caption = (
        f"{words.slowest(ranks)} Computing is the time inside forward and backward passes, with "
        f"what they exchange; the rest is waiting for others, sums over ranks and the update."
    )
    if any(row.high > row.low for row in rows):
        caption += " Bars are means over a stage's ranks, and thin lines span them."
    if points > 1:
        caption += (
            f" Medians of {points} steps from {ranks.steps_P[0]:,.0f} to {ranks.steps_P[-1]:,.0f}."
        )
    svg = charts.pace_chart(rows, name="pace", title="Time of each stage", description=caption)
    return Figure(svg=svg, caption=caption)


def _memory_unit(most: float) -> tuple[str, float]:
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if most >= 1024**power:
            return unit, float(1024**power)
    return "bytes", 1.0


def _panels(
    routing: Routing,
    titles: Mapping[str, str],
    *,
    from_zero: bool = False,
    shares: Collection[str] = (),
    references: Mapping[str, float] | None = None,
) -> list[Panel]:
    return [
        Panel(
            title=title,
            steps_P=routing.steps_P,
            values=routing.numbers[name],
            is_share=name in shares,
            from_zero=from_zero,
            reference=(references or {}).get(name),
        )
        for name, title in titles.items()
        if name in routing.numbers and np.isfinite(routing.numbers[name]).any()
    ]


def _add_layers(
    section: Section, panels: list[Panel], layers: tuple[int, ...], caption: str
) -> None:
    svg = charts.layer_charts(
        panels, layers, name=section.name, title=section.title, description=caption
    )
    section.figures.append(Figure(svg=svg, caption=caption))


def _interval(routing: Routing) -> str:
    return f" Each point is the mean of {routing.width} steps." if routing.width > 1 else ""


def _range(values: Array, show: Callable[[float], str] = "{:.2f}".format) -> str:
    low, high = show(float(np.nanmin(values))), show(float(np.nanmax(values)))
    return low if low == high else f"{low} to {high}"


def _tiles(run: Run) -> list[tuple[str, str]]:
    """The few numbers that a reader looks for first, each with its name."""
    tiles = [("steps", _steps(run))]
    metrics = run.metrics
    if "tokens" in metrics and np.isfinite(metrics["tokens"][-1]):
        tiles.append(("tokens", words.count(metrics["tokens"][-1])))
    if "loss" in metrics and np.isfinite(metrics["loss"]).any():
        last = words.first_and_last(metrics["loss"][np.isfinite(metrics["loss"])])[1]
        tiles.append(("training loss", f"{float(last):.3f}"))
    if run.routing is not None:
        rates_PL = run.routing.numbers.get("drop_rate")
        if rates_PL is not None and np.isfinite(rates_PL[-1]).any():
            last_L = words.first_and_last(rates_PL)[1]
            tiles.append((_drop_title(run).lower(), words.percent(float(np.nanmean(last_L)))))
    if run.ranks is not None:
        tiles.append(("ranks", str(len(run.ranks.places))))
    if "seconds" in metrics and np.isfinite(metrics["seconds"]).any():
        tiles.append(("time in steps", words.duration(float(np.nansum(metrics["seconds"])))))
    return tiles


def _steps(run: Run) -> str:
    if run.planned_steps is None or run.is_finished:
        return f"{run.last_step:,}"
    return f"{run.last_step:,} of {run.planned_steps:,}"


def _layer_table(run: Run) -> dict[str, Any] | None:
    """Every layer's numbers at the start and at the end, for those who want digits."""
    if run.routing is None:
        return None
    routing = run.routing
    columns: dict[str, list[str]] = {}
    for name, title, show in (
        ("drop_rate", _drop_title(run), lambda rate: f"{100 * rate:.2f} %"),
        ("coefficient", "Coefficient", "{:.4f}".format),
        ("max1_over_max2", "Max1/Max2", "{:.2f}".format),
        ("max2_over_max3", "Max2/Max3", "{:.2f}".format),
        ("entropy", "Entropy", "{:.2f}".format),
    ):
        if name in routing.numbers:
            columns[title] = _arrows(routing.numbers[name], show)
    ratios_PLE = words.fair_ratios(routing.load_PLE)
    columns["Busiest"] = _arrows(ratios_PLE.max(axis=2), "{:.2f}".format)
    columns["Idlest"] = _arrows(ratios_PLE.min(axis=2), "{:.2f}".format)
    if run.similarity is not None and run.similarity.layers == routing.layers:
        values_PL = run.similarity.values_PL
        columns["Similarity"] = _arrows(values_PL[[0, -1]], lambda value: words.cosines(value)[0])
    rows = [
        [str(layer), *(column[row] for column in columns.values())]
        for row, layer in enumerate(routing.layers)
    ]
    return {"header": ["Layer", *columns], "rows": rows}


def _arrows(values_PL: Array, show: Callable[[float], str]) -> list[str]:
    first_L, last_L = words.first_and_last(values_PL)
    return [
        " → ".join(show(value) if math.isfinite(value) else "–" for value in (first, last))
        for first, last in zip(first_L.tolist(), last_L.tolist(), strict=True)
    ]


def _heldout_table(run: Run) -> dict[str, Any] | None:
    rows = words.heldout_rows(run)
    if not rows:
        return None
    evaluation = run.evaluation or {}
    amount = ""
    if isinstance(evaluation.get("tokens"), int) and isinstance(evaluation.get("sequences"), int):
        amount = f" on {evaluation['tokens']:,} tokens in {evaluation['sequences']:,} sequences"
    return {
        "amount": amount,
        "first": rows[0].get("label", "the first"),
        "rows": [
            {
                "label": row.get("label", "–"),
                "loss": _digits(row.get("loss"), 4),
                "error": _digits(row.get("standard_error"), 4),
                "perplexity": _digits(row.get("perplexity"), 2),
                "difference": _digits(row.get("difference"), 4, sign="+"),
                "difference_error": _digits(row.get("difference_standard_error"), 4),
            }
            for row in rows
        ],
    }


def _digits(value: object, digits: int, *, sign: str = "") -> str:
    if not isinstance(value, int | float):
        return "–"
    return f"{value:{sign}.{digits}f}".replace("-", "−")


def _prompts(run: Run) -> list[dict[str, Any]]:
    """Samples by prompt, each prompt's answers side by side."""
    prompts: dict[str, list[dict[str, str]]] = {}
    for sample in run.samples:
        answer = {"model": sample.model, "text": sample.text}
        prompts.setdefault(sample.prompt, []).append(answer)
    return [{"prompt": prompt, "answers": answers} for prompt, answers in prompts.items()]


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested objects as rows of a table, with dotted names."""
    rows: list[tuple[str, str]] = []
    for name, item in value.items():
        if isinstance(item, Mapping):
            rows += _flat(item, f"{prefix}{name}.")
        else:
            shown = f"{item:,.4g}" if isinstance(item, float) else str(item)
            rows.append((f"{prefix}{name}", "–" if item is None else shown))
    return rows
