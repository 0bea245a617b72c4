"""Draw what each pipeline rank does when, of a plan and of the obvious one beneath it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from moesaic.errors import FolderError
from moesaic.planning.cost import send_seconds
from moesaic.planning.search import Answer
from moesaic.planning.simulate import Timeline, simulate

COLOURS = {"F": "#4477aa", "B": "#ee8866", "I": "#ee8866", "W": "#eedd88"}
NAMES = {"F": "forward", "B": "backward", "I": "gradient of the input", "W": "of the weights"}


def timeline(answer: Answer) -> Timeline:
    """All passes of a plan's step, simulated one by one."""
    job, question = answer.job, answer.question
    schedule = "gpipe" if job.pp == 1 else job.schedule
    return simulate(
        schedule,
        answer.prediction.stage_seconds,
        ranks=job.pp,
        micro_batches=job.micro_batches,
        send_seconds=send_seconds(question.shape, job, question.cluster, table=question.table),
    )


def draw(best: Answer, plain: Answer | None, path: Path) -> None:
    """Write the timelines to a .svg or .png file, whole or not at all.

    Raises:
        FolderError: The file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    answers = [("this plan", best)]
    if plain is not None:
        answers.append(("uniform layers and recompute", plain))
    rows = sum(answer.job.pp for _, answer in answers)
    figure = Figure(figsize=(13, 1.6 + 0.28 * rows + 0.5 * len(answers)), layout="constrained")
    panels = figure.subplots(
        len(answers), 1, sharex=True, squeeze=False, height_ratios=[a.job.pp for _, a in answers]
    )[:, 0]
    kinds: set[str] = set()
    for panel, (name, answer) in zip(panels, answers, strict=True):
        kinds |= _draw_one(panel, name, answer)
    panels[-1].set_xlabel("seconds")
    shown = [Patch(color=COLOURS[kind], label=NAMES[kind]) for kind in "FBIW" if kind in kinds]
    shown.append(Patch(facecolor="#f2f2f2", edgecolor="#bbbbbb", label="waiting"))
    figure.legend(handles=shown, loc="outside upper right", ncols=len(shown), frameon=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder) / path.name
            figure.savefig(part, dpi=130)
            part.replace(path)
    except OSError as error:
        raise FolderError(f"{path} cannot be written: {error.strerror or error}.") from error


def _draw_one(panel: Any, name: str, answer: Answer) -> set[str]:
    line = timeline(answer)
    job = answer.job
    bars: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for done in line.done:
        bars.setdefault((done.rank, done.action.kind), []).append(
            (done.start, done.end - done.start)
        )
    for (rank, kind), spans in bars.items():
        panel.broken_barh(
            spans, (rank - 0.42, 0.84), color=COLOURS[kind], edgecolor="white", linewidth=0.2
        )
    idle = 1 - sum(line.busy) / (line.seconds * job.pp)
    panel.set_facecolor("#f2f2f2")
    panel.set_ylim(job.pp - 0.5, -0.5)
    panel.set_yticks(range(job.pp))
    panel.set_ylabel("pipeline rank")
    panel.set_title(
        f"{name}: {line.seconds:.3g} s of passes, ranks wait {idle:.1%} of it "
        f"({job.schedule}, {job.micro_batches} micro-batches)",
        loc="left",
        fontsize=10,
    )
    return {kind for _, kind in bars}
