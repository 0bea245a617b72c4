"""Numbers as people read them, and the sentences at the top of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moesaic.reporting.runfolder import Array, Ranks, Routing, Run


def count(number: float) -> str:
    """1234567 -> 1.23 M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(number) >= size:
            return f"{number / size:.4g} {letter}"
    return f"{number:,.0f}"


def byte_count(number: float) -> str:
    """Bytes in the binary unit that leaves a short number."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            return f"{number / 1024**power:.2f} {unit}"
    return f"{number:.0f} bytes"


def percent(share: float) -> str:
    """A share in per cent with two significant digits."""
    return f"{100 * share:.2g} %" if abs(share) < 0.1 else f"{100 * share:.0f} %"


def duration(seconds: float) -> str:
    """Seconds as hours and minutes."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def edge(points: int) -> int:
    """Points whose mean stands for the first or the last value: a tenth, 1 to 20."""
    return max(1, min(20, points // 10))


def first_and_last(values: Array) -> tuple[Array, Array]:
    """Means over the first and over the last points, along the first axis."""
    points = edge(len(values))
    return mean(values[:points]), mean(values[-points:])


def mean(values: Array) -> Array:
    """Mean over the first axis of what is finite; NaN where nothing is."""
    known = np.isfinite(values)
    counts = known.sum(axis=0)
    sums = np.where(known, values, 0).sum(axis=0)
    means: Array = np.divide(sums, counts, out=np.full(np.shape(sums), np.nan), where=counts > 0)
    return means


def summary(run: Run) -> list[str]:
    """What happened, in a few sentences with numbers."""
    sentences = [_what_ran(run), _loss(run)]
    if run.routing is not None:
        sentences += [_drops(run, run.routing), _load(run.routing)]
    if run.similarity is not None:
        sentences.append(_similarity(run))
    if run.ranks is not None:
        sentences.append(f"{_world(run.ranks)} {fullest(run.ranks)} {slowest(run.ranks)}")
    sentences.append(_heldout(run))
    return [sentence for sentence in sentences if sentence]


def _what_ran(run: Run) -> str:
    if run.routing is not None or (run.spec and run.spec.moe):
        model = "a mixture of experts"
    elif run.spec or not np.isfinite(run.metrics.get("drop_rate", np.array([0.0]))).any():
        model = "a dense model"
    else:
        model = "a model"
    if run.spec is not None:
        model += f" of {count(run.spec.num_params())} parameters"
        if run.spec.moe is not None:
            model += (
                f", {count(run.spec.active_params())} of them active for a token "
                f"({run.spec.moe.num_experts} experts, top-{run.spec.moe.top_k}),"
            )
    steps = f"{run.last_step:,} step" + "s" * (run.last_step != 1)
    amount = f"This run trained {model} for {steps}"
    tokens = run.metrics.get("tokens")
    if tokens is not None and np.isfinite(tokens[-1]):
        amount += f", {count(tokens[-1])} tokens"
    if run.planned_steps is None:
        return amount + "."
    if run.is_finished:
        return amount + ", and finished."
    return (
        f"{amount}. {run.planned_steps:,} steps were planned, so it is still going or was stopped."
    )


def _loss(run: Run) -> str:
    loss_P = run.metrics.get("loss", np.array([]))
    loss_P = loss_P[np.isfinite(loss_P)]
    if not len(loss_P):
        return ""
    if len(loss_P) == 1:
        return f"Its training loss was {loss_P[0]:.3f} nats a token."
    first, last = first_and_last(loss_P)
    points = edge(len(loss_P))
    over = f" (means of the first and the last {points} steps)" if points > 1 else ""
    verb = "fell" if last < first else "rose"
    return f"The training loss {verb} from {first:.3f} to {last:.3f} nats a token{over}."


def _drops(run: Run, routing: Routing) -> str:
    rates_PL = routing.numbers.get("drop_rate")
    if rates_PL is None or not np.isfinite(rates_PL).any():
        return ""
    last_L = first_and_last(rates_PL)[1]
    if not np.isfinite(last_L).any():
        return ""
    if not np.nansum(rates_PL):
        return "No token overflowed its expert."
    what = "The token drop rate"
    if run.is_dropless:
        what = "No token was dropped; the share beyond the stated capacity"
    change = _change(rates_PL, percent)
    sentence = f"{what}, mean over {_layers(len(last_L))}, {change}"
    if len(last_L) > 1:
        worst = int(np.nanargmax(last_L))
        sentence += (
            f"; at the end it was highest in layer {routing.layers[worst]} "
            f"({percent(float(last_L[worst]))})"
        )
    coefficient_PL = routing.numbers.get("coefficient")
    if coefficient_PL is None or not np.isfinite(coefficient_PL).any():
        return sentence + "."
    end_L = first_and_last(coefficient_PL)[1]
    by_layer = f" ({np.nanmin(end_L):.2g} to {np.nanmax(end_L):.2g} by layer)" * (len(end_L) > 1)
    change = _change(coefficient_PL, "{:.2g}".format)
    return f"{sentence}. The balance coefficient {change} on average{by_layer}."


def _change(values_PL: Array, show: Callable[[float], str]) -> str:
    first, last = (show(_mean(values)) for values in first_and_last(values_PL))
    return f"was {last}" if first == last else f"went from {first} to {last}"


def _load(routing: Routing) -> str:
    ratios_LE = fair_ratios(first_and_last(routing.load_PLE)[1])
    if not np.isfinite(ratios_LE).all() or ratios_LE.shape[1] < 2:
        return ""
    most, least = (
        np.unravel_index(i, ratios_LE.shape) for i in (ratios_LE.argmax(), ratios_LE.argmin())
    )
    unused = int((ratios_LE < 0.1).sum())
    sentence = (
        f"At the end the busiest expert, number {most[1]} of layer {routing.layers[most[0]]}, took "
        f"{ratios_LE[most]:.2f} times its fair share of tokens, the idlest, number {least[1]} of "
        f"layer {routing.layers[least[0]]}, {ratios_LE[least]:.2f} times"
    )
    if unused:
        return f"{sentence}; {unused} of {ratios_LE.size} experts got less than a tenth of theirs."
    return f"{sentence}; no expert got less than a tenth of its share."


def _similarity(run: Run) -> str:
    assert run.similarity is not None
    values_PL = run.similarity.values_PL
    if not np.isfinite(values_PL[-1]).any():
        return ""
    first, last = cosines(_mean(values_PL[0]), _mean(values_PL[-1]))
    if len(values_PL) == 1:
        return f"The experts' similarity was {last}, where 1 means copies of each other."
    change = f"stayed at {last}" if first == last else f"went from {first} to {last}"
    return f"Expert similarity, where 1 means copies of each other, {change}."


def _world(ranks: Ranks) -> str:
    axes = (("pp", "pipeline"), ("dp", "data"), ("tp", "tensor"))
    sizes = {word: len({getattr(place, name) for place in ranks.places}) for name, word in axes}
    mesh = " x ".join(f"{size} {word}" for word, size in sizes.items() if size > 1)
    return f"It ran on {len(ranks.places)} ranks ({mesh})."


def fullest(ranks: Ranks) -> str:
    """Which rank held the most memory."""
    memory_R = ranks.peak_memory_R
    rank, most = int(memory_R.argmax()), float(memory_R.max())
    if memory_R.min() > 0.97 * most:
        return f"All are equally full, {byte_count(most)} at most."
    return (
        f"Rank {rank}{_of_stages(ranks, rank, ', of ', ',')} is the fullest with "
        f"{byte_count(most)} at most, {most / memory_R.mean():.2f} times the mean."
    )


def slowest(ranks: Ranks) -> str:
    """Which stage, or with one stage which rank, computes the longest."""
    rows = pace(ranks)
    long, short = max(rows), min(rows)
    step = f"of a step of {seconds(ranks.seconds)}"
    if short > 0.97 * long:
        return f"All compute equally long, {seconds(long)} {step}."
    number = rows.index(long)
    if len(ranks.by_pipeline) > 1:
        name = stages(ranks, ranks.by_pipeline[number][0])
        return (
            f"{_capital(name)} {'is' if name.startswith('stage ') else 'are'} the slowest, "
            f"computing {seconds(long)} {step}; the quickest computes {seconds(short)}."
        )
    return (
        f"Rank {number} is the slowest, computing {seconds(long)} {step}; the quickest computes "
        f"{seconds(short)}."
    )


def busiest(ranks: Ranks) -> str:
    """Which rank's experts get the most rows, and how many that is for its stages."""
    rank = int(ranks.tokens_R.argmax())
    most, fair = ranks.tokens_R[rank], fair_tokens(ranks)[rank]
    return (
        f"The experts of rank {rank} get the most rows, {most:,.0f} a step: {most / fair:.2f} "
        f"times the mean{_of_stages(ranks, rank, ' of the ranks of ')}."
    )


def fair_tokens(ranks: Ranks) -> Array:
    """Mean over the ranks that run the same stages, (R,)."""
    fair_R = np.empty(len(ranks.places))
    for members in ranks.by_pipeline:
        fair_R[members] = ranks.tokens_R[members].mean()
    return fair_R


def pace(ranks: Ranks) -> list[float]:
    """Seconds of computing in a step: of each pipeline place, or with one place of each rank."""
    if len(ranks.by_pipeline) > 1:
        return [float(ranks.compute_R[members].mean()) for members in ranks.by_pipeline]
    return [float(value) for value in ranks.compute_R]


def stages(ranks: Ranks, rank: int) -> str:
    """The stages of a rank by number."""
    *others, last = map(str, ranks.places[rank].stages)
    return f"stages {', '.join(others)} and {last}" if others else f"stage {last}"


def _of_stages(ranks: Ranks, rank: int, before: str, after: str = "") -> str:
    """The stages of a rank within a sentence; nothing where all ranks run the same."""
    is_pipeline = len(ranks.by_pipeline) > 1
    return f"{before}{stages(ranks, rank)}{after}" if is_pipeline else ""


def seconds(value: float) -> str:
    """Seconds with three significant digits, or whole ones."""
    return f"{value:#.3g} s" if value < 99.95 else f"{value:.0f} s"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def cosines(*values: float) -> list[str]:
    """Cosines with one number of digits, enough to tell the closest to 1 from 1."""
    gap = min((abs(1 - v) for v in values if abs(1 - v) > 5e-7), default=1.0)
    digits = 3 if gap >= 0.01 else min(6, 1 - math.floor(math.log10(gap)))
    return [f"{value:.{digits}f}" for value in values]


def _heldout(run: Run) -> str:
    rows = heldout_rows(run)
    known = [row for row in rows if isinstance(row.get("loss"), int | float)]
    if not known:
        return ""
    losses = "; ".join(f"{row.get('label', 'model')} {row['loss']:.3f}" for row in known)
    best = min(known, key=lambda row: float(row["loss"]))
    lowest = f" Lowest: {best.get('label', 'model')}." if len(known) > 1 else ""
    return f"Held-out loss in nats a token: {losses}.{lowest}"


def heldout_rows(run: Run) -> list[dict[str, Any]]:
    """Rows of evaluation.json, one a model."""
    rows = (run.evaluation or {}).get("models", [])
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def fair_ratios(load_xE: Array) -> Array:
    """Loads that sum to 1 over the last axis, as multiples of an even share."""
    ratios: Array = load_xE * load_xE.shape[-1]
    return ratios


def _layers(number: int) -> str:
    return "1 layer" if number == 1 else f"{number} layers"


def _mean(values: Array | Sequence[float]) -> float:
    return float(np.nanmean(values))
