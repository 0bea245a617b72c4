"""Published peaks of memory beside the predicted ones, source by source.

A row says sizes, a mesh and a peak. What it does not say of the software is taken from the scripts
and the code that its source publishes (`SETUPS`); nothing is fitted to a row. A peak is what the
allocator gave out at most (`max_memory_allocated`), on the fullest rank, in units of 1e9 bytes.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from moesaic.errors import PlanError
from moesaic.planning.activations import Means, Megatron
from moesaic.planning.cluster import read_cluster
from moesaic.planning.cost import default_stages
from moesaic.planning.job import Job
from moesaic.planning.memory import Ledger, pipeline_memory
from moesaic.planning.published_time import NotModelledError, read_rows, shape_of_row
from moesaic.planning.shape import DenseShape, ModelShape, MoEShape

GB = 1e9

Row = Mapping[str, str]


@dataclass(frozen=True)
class Setup:
    """What is known of the software behind a source's rows."""

    sign: str
    """Words of the row's group, source or address, as a regular expression."""
    reason: str
    """Where that is known from."""
    megatron: Megatron = field(default_factory=Megatron)
    choices: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the job."""
    dense_layers: int | None = None
    """Layers before the first with experts, in models cut to few layers; None: the model's own."""


SETUPS = (
    Setup(
        r"kwai",
        "kwai/Megatron-Kwai, branch atc24ae, examples/atc24/pretrain_llama.sh and megatron/model: "
        "Megatron's own layers of 2023, SwiGLU of two operations, float32 logits beside the "
        "softmax, no dropout, a distributed optimizer over data and context ranks",
        Megatron(fused_activation=False, spare_gradients=False, loss="old"),
    ),
    Setup(
        r"simumax",
        "MooreThreads/SimuMax, simu_tools/megatron_scripts: Megatron-LM 23e00ed on Transformer "
        "Engine 2.11, cp-comm-type a2a, capacity 1 with padding, one dense layer before those "
        "with experts, a distributed optimizer, no dropout; names of its cases: fused loss",
        Megatron(context_all_to_all=True, loss="fused"),
        {"capacity_factor": 1.0},
        dense_layers=1,
    ),
    Setup(
        r"korthikanti|2205\.05198",
        "arXiv 2205.05198: Megatron-LM of 2022, dropout, no fused attention, every rank with the "
        "whole optimizer",
        Megatron(spare_gradients=False, dropout=True, loss="old"),
        {"attention_core": "unfused", "zero": 0},
    ),
)
"""The first that fits is taken; none: Megatron-Core on Transformer Engine with its defaults."""


OTHERS = {
    r"torchtitan": "torchtitan shards with FSDP2 and reports what its allocator reserves",
    r"mindspeed|mindformers|ascend": "another implementation, on Ascend",
    r"deepspeed|galvatron|fsdp": "another implementation than Megatron",
}
"""Sources whose rows are of other software than what is modelled."""


class MemoryRow(NamedTuple):
    """A published peak beside the predicted one."""

    name: str
    group: str
    published: float | None
    """Bytes; None: it ran out of memory."""
    budget: float
    """Bytes of the device, where it ran out."""
    ledger: Ledger
    """Of the fullest rank."""
    notes: tuple[str, ...]

    @property
    def error(self) -> float:
        """Predicted over published, less 1; NaN where it ran out of memory."""
        return float("nan") if self.published is None else self.ledger.total / self.published - 1

    @property
    def is_called_a_fit(self) -> bool:
        """Whether a run that ran out of memory is predicted to fit."""
        return self.published is None and self.ledger.total <= self.budget


class GroupError(NamedTuple):
    """How far off the rows of one source are."""

    group: str
    rows: int
    median: float
    """Of the absolute relative errors."""
    worst: float
    bias: float
    """Median of the relative errors."""


@dataclass(frozen=True)
class MemoryCheck:
    """Every row that could be compared, and why the others could not."""

    rows: tuple[MemoryRow, ...]
    not_modelled: Mapping[str, str]
    """By row, the reason."""

    @property
    def measured(self) -> tuple[MemoryRow, ...]:
        """Rows that ran."""
        return tuple(row for row in self.rows if row.published is not None)

    @property
    def median(self) -> float:
        """Of the absolute relative errors of all rows that ran; NaN of none."""
        errors = [abs(row.error) for row in self.measured]
        return statistics.median(errors) if errors else float("nan")

    @property
    def called_a_fit(self) -> tuple[MemoryRow, ...]:
        """Runs that ran out of memory and are predicted to fit."""
        return tuple(row for row in self.rows if row.is_called_a_fit)

    def by_group(self) -> list[GroupError]:
        """Errors by source."""
        found = []
        for group in dict.fromkeys(row.group for row in self.measured):
            errors = [row.error for row in self.measured if row.group == group]
            sizes = [abs(error) for error in errors]
            found.append(
                GroupError(
                    group,
                    len(errors),
                    statistics.median(sizes),
                    max(sizes),
                    statistics.median(errors),
                )
            )
        return found

    def table(self) -> str:
        """Every row and every source, for a terminal."""
        lines = [f"{'row':8} {'source':16} {'published':>10} {'predicted':>10} {'error':>8}"]
        for row in self.rows:
            published = "ran out" if row.published is None else f"{row.published / GB:.2f}"
            error = f"{row.error:+.1%}" if row.published else ""
            if row.published is None:
                error = "FITS?" if row.is_called_a_fit else "refused"
            lines.append(
                f"{row.name:8} {row.group:16} {published:>10} {row.ledger.total / GB:10.2f} "
                f"{error:>8}"
            )
        for of_group in self.by_group():
            lines.append(
                f"{of_group.group}: {of_group.rows} rows, median {of_group.median:.1%}, "
                f"worst {of_group.worst:.1%}, bias {of_group.bias:+.1%}"
            )
        if self.measured:
            lines.append(f"all: {len(self.measured)} rows, median {self.median:.1%}")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.not_modelled.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"not modelled: {' '.join(names)}: {why}" for why, names in reasons.items()]
        return "\n".join(lines)


def compare_memory(path: Path | str) -> MemoryCheck:
    """Predict the peak of every row that publishes one.

    Raises:
        PlanError: The file cannot be read.
    """
    rows: list[MemoryRow] = []
    left_out: dict[str, str] = {}
    for number, row in enumerate(read_rows(path), 2):
        if not (row.get("peak_mem_GB") or "").strip():
            continue
        name = row.get("id") or f"line {number}"
        try:
            rows.append(_compare(row, name))
        except PlanError as error:
            left_out[name] = str(error)
    return MemoryCheck(tuple(rows), left_out)


def _compare(row: Row, name: str) -> MemoryRow:
    published, budget = _peak(row)
    setup = _setup(row)
    shape = shape_of_row(row)
    if setup.dense_layers is not None:
        shape = _with_dense_layers(shape, setup.dense_layers)
    recompute, again = _recompute(row.get("recompute") or "")
    job, notes = _job(row, shape, setup)
    means = Means(megatron=replace(setup.megatron, again=again))
    ledgers = pipeline_memory(
        shape,
        job,
        default_stages(shape, job.stages),
        dict.fromkeys(range(len(shape.layers)), recompute),
        means,
    )
    fullest = max(ledgers, key=lambda ledger: ledger.total)
    group = row.get("group") or row.get("source") or "all"
    return MemoryRow(name, group, published, budget, fullest, (*notes, setup.reason))


def _peak(row: Row) -> tuple[float | None, float]:
    """Published bytes, and those of the device where it had too few."""
    text = row["peak_mem_GB"].strip()
    if text.lower().startswith("oom"):
        match = re.search(r"([\d.]+)", text)
        if match is not None:
            return None, float(match[1]) * GB
        return None, read_cluster(f"1x{row['gpu'].strip()}").device(0).memory_bytes
    try:
        return float(text) * GB, 0.0
    except ValueError:
        raise NotModelledError(f"peak_mem_GB is {text!r}, which is no number") from None


def _setup(row: Row) -> Setup:
    words = " ".join(row.get(key) or "" for key in ("group", "source", "url")).lower()
    for sign, reason in OTHERS.items():
        if re.search(sign, words):
            raise NotModelledError(reason)
    for setup in SETUPS:
        if re.search(setup.sign, words):
            return setup
    return Setup("", "Megatron-Core on Transformer Engine, assumed")


def _with_dense_layers(shape: ModelShape, count: int) -> ModelShape:
    """The same layers with experts, `count` of the first replaced by dense ones."""
    dense = [layer for layer in shape.layers if isinstance(layer.feed_forward, DenseShape)]
    mixed = [layer for layer in shape.layers if isinstance(layer.feed_forward, MoEShape)]
    if not dense or not mixed:
        return shape
    rest = len(shape.layers) - count
    return replace(shape, layers=(dense[0],) * count + (mixed[0],) * rest)


_SWITCHES = {
    r"core.?att": "core_attn",
    r"layer.?norm|\bnorm": "layernorm",
    r"moe.?act": "moe_act",
    r"mla.?up": "mla_up_proj",
    r"shared.?exp": "shared_experts",
    r"\bmlp\b": "mlp",
    r"\bmoe\b(?!.?act)": "moe",
}


def _recompute(words: str) -> tuple[str, frozenset[str]]:
    """What each layer recomputes, and modules that all of them do."""
    words = re.sub(r",?\s*offload.*", "", words.lower())
    if "balanced ckpt" in words:
        # --kaimm-recompute-mlp-activation-func --kaimm-recompute-norm
        return "none", frozenset({"activation", "norm"})
    if "not published" in words:
        raise NotModelledError("the recompute is not published")
    if re.search(r"\b(no|none)\b", words) or not words.strip(" -"):
        return "none", frozenset()
    again = frozenset(name for sign, name in _SWITCHES.items() if re.search(sign, words))
    if again:
        return "none", again
    if re.search(r"\bfull\b", words) and not re.search(r"\d+ ?(/|of|layers)|block|partial", words):
        return "full", again
    if "selective" in words:
        return "none", frozenset({"core_attn"})
    raise NotModelledError(f"recompute {words!r} does not say what of which layers")


def _job(row: Row, shape: ModelShape, setup: Setup) -> tuple[Job, tuple[str, ...]]:
    words = " ".join(row.get(key) or "" for key in ("recompute", "routing_and_layout")).lower()
    offload = re.search(r"offload\D*([\d.]+)", words)
    if "offload" in words and not (offload and float(offload[1]) == 0):
        raise NotModelledError("activations are offloaded to the host")
    if "fsdp" in words:
        raise NotModelledError("FSDP of another implementation")
    precision = (row.get("precision") or "BF16").upper()
    if precision not in ("BF16", "FP16"):
        raise NotModelledError(f"products in {precision}")
    count, sequence = _whole(row, "n_gpus"), _whole(row, "seq")
    if count is None or sequence is None:
        raise NotModelledError("the row lacks n_gpus or seq")
    tp, pp, cp = (_whole(row, key) or 1 for key in ("TP", "PP", "CP"))
    if count % (tp * pp * cp):
        raise NotModelledError(f"tp {tp} x pp {pp} x cp {cp} does not divide {count} devices")
    dp, interleave = count // (tp * pp * cp), _whole(row, "VPP") or 1
    notes: list[str] = []
    micro, batch = _whole(row, "mbs"), _whole(row, "gbs")
    if micro is None:
        micro = 1
        notes.append("micro-batch 1, which the row does not say")
    if batch is None:
        batch = 4 * pp * dp * micro
        notes.append("a batch that fills the pipeline, which the row does not say")
    experts: dict[str, Any] = {}
    if any(isinstance(layer.feed_forward, MoEShape) for layer in shape.layers):
        # Without --expert-tensor-parallel-size Megatron cuts experts as it does the rest.
        etp = _whole(row, "ETP") or tp
        experts = {"experts_over": "ep", "ep": _whole(row, "EP") or 1, "etp": etp}
    job = Job(
        sequence=sequence,
        micro_batch=micro,
        global_batch=batch,
        pp=pp,
        tp=tp,
        dp=dp,
        cp=cp,
        interleave=interleave if pp > 1 else 1,
        schedule="interleaved" if interleave > 1 and pp > 1 else "1f1b",
        framework="megatron",
        **experts,
        **setup.choices,
    )
    return job, tuple(notes)


def _whole(row: Row, key: str) -> int | None:
    match = re.match(r"\s*(\d+)(?:\.0*)?(?![\d.])", row.get(key) or "")
    return int(match[1]) if match else None
