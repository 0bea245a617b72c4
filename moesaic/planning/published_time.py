"""Published training runs as jobs, and how far the predicted step time is from the published one.

A row says sizes and a mesh, and leaves out much of the software. What it does not say is taken
from what its source is known to have run (`SOFTWARE`), or inferred and noted. Nothing is fitted
to a row. Beside each error stands what a null model makes of the same rows, which knows only one
number of each source, the median of its rows' MFU:

    skill = 1 - MAPE / MAPE of the null

The null is told one number that was measured at the source; the planner is not. So that the two
can be compared on equal terms there is a second pair, in which the planner's times are divided by
the median of their own ratio at that source.
"""

from __future__ import annotations

import csv
import itertools
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from moesaic.errors import PlanError
from moesaic.planning.cluster import ClusterSpec, read_cluster
from moesaic.planning.cost import RECOMPUTE, default_stages, predict, rank_of
from moesaic.planning.job import Job
from moesaic.planning.memory import pipeline_memory
from moesaic.planning.shape import (
    AttentionShape,
    DenseShape,
    LayerShape,
    ModelShape,
    MoEShape,
    preset_shapes,
    read_shape,
)

Row = Mapping[str, str]


class NotModelledError(PlanError):
    """A row that says too little, or something that the planner does not know."""


class Software(NamedTuple):
    """What a source's implementation does, where its rows do not say."""

    sign: str
    """Words of the source's name, as a regular expression."""
    choices: Mapping[str, Any]
    """Fields of the job."""
    reason: str
    """Where that is known from."""
    network_bandwidth: float | None = None
    """Of each device, where the source's network is not the preset's."""


SOFTWARE = (
    Software(
        r"vtrain",
        {
            "attention_core": "unfused",
            "sequence_parallel": False,
            "overlap_gradients": False,
            "zero": 0,
        },
        "Megatron-LM before fused attention, sequence parallelism and a distributed optimizer; "
        "vTrain's configuration has 800 Gb/s between nodes of 8",
        12.5e9,
    ),
    Software(
        r"sc'?21|2104\.04473",
        {
            "attention_core": "unfused",
            "sequence_parallel": False,
            "overlap_gradients": False,
            "zero": 0,
        },
        "Megatron-LM before fused attention, sequence parallelism and a distributed optimizer",
    ),
    Software(
        r"korthikanti|2205\.05198",
        {"attention_core": "unfused", "overlap_gradients": False, "zero": 0},
        "Megatron-LM with sequence parallelism, before fused attention",
    ),
    Software(
        r"bridge",
        {"overlap_tensor": True, "gradient_bytes": 2, "fused_loss": True}
        | {"deduplicate": True, "etp": 1},
        "Megatron-Bridge's recipes: tensor-parallel overlap, fused loss, gradients reduced in "
        "bf16, a token sent once to each node, experts not split over tensor-parallel ranks",
    ),
    Software(
        r"dgx cloud|dgxc|nemo",
        {"overlap_tensor": True, "gradient_bytes": 2, "fused_loss": True},
        "NeMo's recipes: tensor-parallel overlap, fused loss, gradients reduced in bf16",
    ),
    Software(
        r"simumax",
        {"overlap_gradients": False, "capacity_factor": 1.0, "fused_loss": True},
        "SimuMax's launch scripts: nothing overlaps, experts take their capacity; one dense layer; "
        "its cases are named for a fused loss",
    ),
    Software(
        r"kwai",
        {"overlap_tensor": True},
        "Megatron-Kwai: tensor-parallel communication overlapped with products",
    ),
    Software(
        r"deepseek-v3 (technical )?report|2412\.19437",
        {"overlap_experts": True},
        "DualPipe overlaps the experts' exchange",
    ),
)
"""The first that fits is taken; none: Megatron-Core's defaults, gradients reduced in fp32 beside
the backward pass, tensor-parallel communication not hidden."""


@dataclass(frozen=True)
class Setting:
    """A published run, as the planner takes it."""

    name: str
    group: str
    source: str
    shape: ModelShape
    job: Job
    cluster: ClusterSpec
    recompute: Mapping[int | str, str]
    """By unit."""
    seconds: float | None
    """Of a step, as published or from what is; None: the row has no speed."""
    notes: tuple[str, ...] = ()
    """What was inferred."""

    @property
    def flops(self) -> float:
        """Operations of a step, by the common convention."""
        return self.shape.flops_per_token(self.job.sequence) * self.job.step_tokens

    @property
    def peak(self) -> float:
        """Of all devices."""
        return self.cluster.device(0).peak(self.job.dtype) * self.job.world_size


def read_rows(path: Path | str) -> list[dict[str, str]]:
    """The rows of a table of published runs.

    Raises:
        PlanError: The file cannot be read, or lacks columns.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PlanError(f"{path} cannot be read as CSV: {error}.") from None
    needed = {"model", "gpu", "n_gpus", "seq", "gbs", "TP", "PP"}
    if not rows or not needed <= set(rows[0]):
        lacking = needed - set(rows[0] if rows else ())
        raise PlanError(f"{path} has no rows, or lacks columns: {', '.join(sorted(lacking))}.")
    return rows


def setting_of(row: Row) -> Setting:
    """A row as a job.

    Raises:
        NotModelledError: The row says too little, or something that the planner does not know.
    """
    try:
        return _setting(row)
    except NotModelledError:
        raise
    except PlanError as error:
        raise NotModelledError(str(error)) from None


def _setting(row: Row) -> Setting:
    notes: list[str] = []
    shape = shape_of_row(row)
    count = _whole(row, "n_gpus")
    sequence, batch = _whole(row, "seq"), _whole(row, "gbs")
    if count is None or sequence is None or batch is None:
        lacking = [key for key in ("n_gpus", "seq", "gbs") if _whole(row, key) is None]
        raise NotModelledError(f"the row lacks {', '.join(lacking)}")
    cluster = read_cluster(f"{count}x{_device(row)}")
    tp, pp, cp = (_whole(row, key) or 1 for key in ("TP", "PP", "CP"))
    if count % (tp * pp * cp):
        raise NotModelledError(f"tp {tp} x pp {pp} x cp {cp} does not divide {count} devices")
    micro = _whole(row, "mbs")
    if micro is None:
        micro = 1
        notes.append("micro-batch 1, which the row does not say")
    source = " ".join(row.get(key) or "" for key in ("group", "source", "url")).lower()
    software = next((s for s in SOFTWARE if re.search(s.sign, source)), None)
    choices: dict[str, Any] = dict(software.choices) if software else {}
    if software:
        notes.append(software.reason)
        if software.network_bandwidth:
            cluster = replace(cluster, network_bandwidth=software.network_bandwidth)
    interleave = (_whole(row, "VPP") or 1) if pp > 1 else 1
    if "folding" in source and pp > 1 and not _whole(row, "VPP") and len(shape.layers) % pp == 0:
        # The best mapping was searched for, and without interleaving it could not be that fast.
        interleave = len(shape.layers) // pp
        notes.append(f"{interleave} stages a rank, which the row does not say")
    words = " ".join(row.get(key) or "" for key in ("routing_and_layout", "recompute")).lower()
    choices |= _layout_words(words, pp)
    if (etp := _whole(row, "ETP")) is not None or "folding" in words:
        choices["etp"] = etp or 1
    if not any(isinstance(layer.feed_forward, MoEShape) for layer in shape.layers):
        choices.pop("etp", None)
    is_moe = any(isinstance(layer.feed_forward, MoEShape) for layer in shape.layers)
    layout: dict[str, Any] = {"deduplicate": False}
    if is_moe:
        layout |= _expert_layout(row, tp)
    job = Job(
        sequence=sequence,
        micro_batch=micro,
        global_batch=batch,
        pp=pp,
        tp=tp,
        cp=cp,
        dp=count // (tp * pp * cp),
        interleave=interleave,
        schedule="interleaved" if interleave > 1 else "1f1b",
        dtype=_dtype(row),
        framework="megatron",
        **(layout | choices),
    )
    if re.search(r"balanced|uneven|non-?uniform|per stage", (row.get("recompute") or "").lower()):
        recompute = _fewest(shape, job, cluster)
        notes.append("the fewest whole layers of each rank that must be computed again to fit")
    else:
        recompute = _recompute(row, shape, job)
    if not _is_stated(row) and (choice := _fitting(shape, job, cluster)) != "none":
        recompute = dict.fromkeys(recompute, choice)
        notes.append(f"recompute {choice}, which the row does not say, and less does not fit")
    return Setting(
        name=row.get("id") or row["model"],
        group=row.get("group") or row.get("source") or "all",
        source=row.get("source") or "",
        shape=shape,
        job=job,
        cluster=cluster,
        recompute=recompute,
        seconds=_published_seconds(row, shape, job),
        notes=tuple(notes),
    )


def _device(row: Row) -> str:
    """The device as presets are named, whatever the row adds to it."""
    text = row["gpu"].strip()
    name = re.search(r"(GB|GH|B|H|A)\d{2,3}|MI3\d\dX|L40S|(?<!\d)[34]090", text.upper())
    if name is None:
        return text
    if "PCIE" in text.upper():
        return f"{name[0]}-PCIe"
    if name[0] == "A100" and re.search(r"40 ?GB?", text.upper()):
        return "A100-40GB"
    return name[0]


def _whole(row: Row, key: str) -> int | None:
    match = re.match(r"\s*(\d+)(?:\.0*)?(?![\d.])", row.get(key) or "")
    return int(match[1]) if match else None


def _number(row: Row, key: str) -> float | None:
    try:
        value = float(row.get(key) or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _dtype(row: Row) -> Any:
    text = (row.get("precision") or "bf16").lower()
    if "fp4" in text:
        raise NotModelledError(f"products in {row['precision']}")
    if "fp8" in text or text.startswith("mx"):
        return "fp8"
    if "bf16" in text or "fp16" in text:
        return "bf16"
    raise NotModelledError(f"products in {row['precision']!r}")


def _layout_words(words: str, pp: int) -> dict[str, Any]:
    choices: dict[str, Any] = {}
    if ("fsdp" in words and pp == 1) or re.search(r"zero-?3", words):
        # Beside a pipeline weights stay gathered over a step (Llama 3, arXiv 2407.21783).
        choices["zero"] = 3
    if "offload" in words and not re.search(r"offload alpha=0(\.0)?$", words.strip()):
        raise NotModelledError("activations are offloaded to the host")
    if match := re.search(r"\bcf ?= ?([\d.]+)", words):
        choices["capacity_factor"] = float(match[1])
    if re.search(r"overlap[_ -]?(moe|ep|a2a|all-to-all|dispatch)|1f1b a2a|dualpipe", words):
        choices["overlap_experts"] = True
    if "lora" in words:
        raise NotModelledError("LoRA: most weights have no gradient")
    return choices


def _expert_layout(row: Row, tp: int) -> dict[str, Any]:
    # Without other word Megatron-Core splits each expert's columns as it does the rest.
    return {"experts_over": "ep", "ep": _whole(row, "EP") or 1, "etp": tp}


def _is_stated(row: Row) -> bool:
    words = (row.get("recompute") or "").lower().strip(" -")
    return bool(words) and "stated" not in words


def _fitting(shape: ModelShape, job: Job, cluster: ClusterSpec) -> str:
    """The least that all layers must compute again to fit; "none" if nothing fits either."""
    stages = default_stages(shape, job.stages)
    most = USABLE * cluster.device(0).memory_bytes
    for choice in RECOMPUTE:
        again = dict.fromkeys(range(len(shape.layers)), choice)
        if max(x.total for x in pipeline_memory(shape, job, stages, again)) <= most:
            return choice
    return "none"


USABLE = 0.94
"""Part of a device's memory that tensors can have. Ours: the driver's context, NCCL's buffers and
fragments take 3 to 6 GB of 80."""


def _fewest(shape: ModelShape, job: Job, cluster: ClusterSpec) -> dict[int | str, str]:
    """Whole layers that each pipeline rank computes again, as few as fit."""
    stages = default_stages(shape, job.stages)
    most = USABLE * cluster.device(0).memory_bytes
    found: dict[int | str, str] = {}
    for place in range(job.pp):
        units = [
            unit
            for stage, span in enumerate(stages)
            if rank_of(stage, job) == place
            for unit in range(*span)
        ]
        layers = sorted({(unit - 1) // 2 for unit in units} & set(range(len(shape.layers))))
        for count in range(len(layers) + 1):
            again: dict[int | str, str] = {
                layer: "full" if number < count else "none" for number, layer in enumerate(layers)
            }
            kept = dict.fromkeys(range(len(shape.layers)), "none") | again
            (ledger,) = pipeline_memory(shape, job, stages, kept, only=place)
            if ledger.total <= most:
                break
        found |= again
    return found


def _recompute(row: Row, shape: ModelShape, job: Job) -> dict[int | str, str]:
    """What each unit computes again, by its name."""
    words = (row.get("recompute") or "").lower()
    if "not published" in words:
        raise NotModelledError("the recompute is not published")
    if "ckpt" in words and not re.search(r"\bno\b|full", words):
        raise NotModelledError(f"recompute {row['recompute']!r} is not stated by layer")
    attention, network = "none", "none"
    if "full" in words:
        attention = network = "full"
    elif not re.search(r"\b(no|none)\b", words):
        if re.search(r"core|attn|attention|selective|mla", words):
            attention = "attention"
        if re.search(r"\b(mlp|moe|shared_experts)\b", words):
            network = "full"
        elif re.search(r"act", words):
            network = "moe_activations"
        known = attention != "none" or network != "none" or "norm" in words
        if words.strip(" -") and not known:
            raise NotModelledError(f"recompute {row['recompute']!r} is not stated by layer")
    count = re.search(r"(\d+) ?layers", words)
    most = int(count[1]) if count else len(shape.layers)
    found: dict[int | str, str] = {}
    for start, end in default_stages(shape, job.stages):
        # Megatron's block method: the first layers of each stage.
        layers = sorted({(unit - 1) // 2 for unit in range(max(start, 1), end)})
        for place, layer in enumerate(layers):
            again = place < most
            found[f"{layer}.attention"] = attention if again else "none"
            found[f"{layer}.feed_forward"] = network if again else "none"
    return found


def _published_seconds(row: Row, shape: ModelShape, job: Job) -> float | None:
    if step := _number(row, "step_time_s"):
        return step
    if speed := _number(row, "tok_s_gpu"):
        return job.step_tokens / (speed * job.world_size)
    # Megatron's and most others' count: attention as if it were not causal.
    whole = sum(layer.attention.core_flops(job.sequence) for layer in shape.layers)
    flops = (shape.flops_per_token(job.sequence) + 3.0 * whole) * job.step_tokens
    if rate := _number(row, "tflops_gpu_published"):
        return flops / (rate * 1e12 * job.world_size)
    if (mfu := _number(row, "mfu_published_pct")) and (peak := _number(row, "peak_bf16_tflops")):
        return flops / (mfu / 100 * peak * 1e12 * job.world_size)
    return None


_NAMES = (
    (r"skywork.*moe|skywork.*146", "skywork-moe-146b"),
    (r"skywork.*13b", "skywork-13b"),
    (r"mixtral.*8x22", "mixtral-8x22b"),
    (r"mixtral.*8x7", "mixtral-8x7b"),
    (r"qwen3.*30b", "qwen3-30b-a3b"),
    (r"qwen3.*235b", "qwen3-235b-a22b"),
    (r"qwen2.*57b", "qwen2-57b-a14b"),
    (r"deepseek.*v2.*lite", "deepseek-v2-lite"),
    (r"deepseek.*v2", "deepseek-v2"),
    (r"deepseek.*(v3|r1)|dsv3", "deepseek-v3"),
    (r"kimi.*k2", "kimi-k2"),
    (r"gpt.?oss.*120", "gpt-oss-120b"),
    (r"grok", "grok-1"),
    (r"nemotron.?4.*15b", "nemotron4-15b"),
    (r"nemotron.?4.*340b", "nemotron4-340b"),
    (r"llama.?3.*405b", "llama3-405b"),
    (r"llama.?3.*70b", "llama3-70b"),
    (r"llama.?3.*8b", "llama3-8b"),
    (r"llama.?2.*70b", "llama2-70b"),
    (r"llama.?2.*13b", "llama2-13b"),
    (r"llama.?2.*7b", "llama2-7b"),
    (r"llama.*65b", "llama-65b"),
    (r"gpt.?3.*175b|\b175b", "gpt3-175b"),
)
"""Models by what rows call them."""


def shape_of_row(row: Row) -> ModelShape:
    """The model that a row names, or the one that its columns describe.

    Raises:
        NotModelledError: It names none that is known, and lacks columns.
    """
    name = row["model"].strip()
    low = name.lower()
    preset = next((known for sign, known in _NAMES if re.search(sign, low)), None)
    if preset is None and low in preset_shapes():
        preset = low
    layers, vocab = _whole(row, "layers"), _whole(row, "vocab")
    if preset is not None:
        shape = read_shape(preset)
        if _agrees(row, shape):
            count = layers or len(shape.layers)
            dense = [x for x in shape.layers if isinstance(x.feed_forward, DenseShape)]
            if 2 * count < len(shape.layers) and 0 < len(dense) < len(shape.layers):
                # A model cut to a few layers keeps one of those that begin it.
                kept = (dense[0], *[shape.layers[-1]] * (count - 1))
            else:
                kept = (*shape.layers, *[shape.layers[-1]] * count)[:count]
            return replace(shape, name=name, layers=kept, vocab=vocab or shape.vocab)
    return _shape_of_columns(row, name)


def _agrees(row: Row, shape: ModelShape) -> bool:
    """Whether the row's columns, where it has them, are the preset's."""
    last = shape.layers[-1]
    network = last.feed_forward
    widths = {network.expert_dim} if isinstance(network, MoEShape) else {network.ffn_dim}
    widths |= {
        layer.feed_forward.ffn_dim
        for layer in shape.layers
        if isinstance(layer.feed_forward, DenseShape)
    }
    experts = network.experts if isinstance(network, MoEShape) else None
    expected = {"hidden": {shape.hidden}, "heads": {last.attention.heads}, "ffn": widths}
    if experts is not None:
        expected["experts"] = {experts}
    return all(_whole(row, key) in (None, *values) for key, values in expected.items())


def _shape_of_columns(row: Row, name: str) -> ModelShape:
    columns = ("layers", "hidden", "ffn", "heads", "vocab")
    if lacking := [key for key in columns if _whole(row, key) is None]:
        raise NotModelledError(
            f"no preset is like {name!r}, and the row lacks {', '.join(lacking)}"
        )
    if re.search(r"nemotron.?h|mamba|hybrid|nano", name.lower()):
        raise NotModelledError(f"{name!r} has layers that are no attention")
    layers, hidden, ffn, heads, vocab = (_whole(row, key) or 1 for key in columns)
    kv_heads = _whole(row, "kv_heads") or heads
    experts, top_k = _whole(row, "experts"), _whole(row, "topk")
    gated = not re.search(r"gpt|nemotron|megatron|mt-?nlg|turing|^\d+(\.\d+)?[bt]$", name.lower())
    count = 3 if gated and ffn != 4 * hidden else 2
    if hidden % heads:
        raise NotModelledError(f"{heads} heads do not divide a width of {hidden}")
    attention = AttentionShape(
        heads=heads, kv_heads=kv_heads, head_dim=hidden // heads, value_dim=hidden // heads
    )
    network: DenseShape | MoEShape = DenseShape(ffn_dim=ffn, matrices_count=count)
    if experts and top_k:
        network = MoEShape(experts=experts, top_k=top_k, expert_dim=ffn, matrices_count=count)
    return ModelShape(
        name=name,
        vocab=vocab,
        hidden=hidden,
        layers=(LayerShape(attention=attention, feed_forward=network),) * layers,
        norm="layer" if count == 2 else "rms",
    )


@dataclass(frozen=True)
class Compared:
    """A published step time beside the predicted one."""

    setting: Setting
    seconds: float
    """Predicted."""

    @property
    def published(self) -> float:
        """Seconds of a step."""
        assert self.setting.seconds is not None
        return self.setting.seconds

    @property
    def ratio(self) -> float:
        """Predicted over published."""
        return self.seconds / self.published

    @property
    def mfu(self) -> float:
        """Published, by the common convention."""
        return self.setting.flops / self.setting.peak / self.published


@dataclass(frozen=True)
class SourceError:
    """How far off the rows of a source are."""

    name: str
    rows: int
    mape: float
    """Mean of |predicted / published - 1|."""
    bias: float
    """Median of predicted / published."""
    null: float
    """MAPE of the constant MFU."""
    scaled: float
    """MAPE when divided by the bias, as the null is."""

    @property
    def skill(self) -> float:
        """Over the null; 0 or below: no better."""
        return 1 - self.mape / self.null if self.null else math.nan

    @property
    def scaled_skill(self) -> float:
        """Over the null, both with one number of the source."""
        return 1 - self.scaled / self.null if self.null else math.nan


@dataclass(frozen=True)
class TimeCheck:
    """Every row that could be compared, and why the others could not."""

    compared: tuple[Compared, ...]
    not_modelled: Mapping[str, str] = field(default_factory=dict)
    """By row, the reason."""

    def by(self, key: str) -> list[SourceError]:
        """Errors by `group` or by `source`."""
        names = dict.fromkeys(getattr(item.setting, key) for item in self.compared)
        return [
            source_error(name, [c for c in self.compared if getattr(c.setting, key) == name])
            for name in names
        ]

    def noise(self) -> list[float]:
        """Relative differences between rows that publish the same plan, in order."""
        same: dict[Any, list[float]] = {}
        for item in self.compared:
            setting = item.setting
            recompute = tuple(sorted(setting.recompute.values()))
            key = (setting.shape, setting.job, setting.cluster.name, recompute)
            same.setdefault(key, []).append(item.published)
        return [
            abs(after / before - 1)
            for times in same.values()
            for before, after in itertools.pairwise(times)
        ]

    def table(self) -> str:
        """Every row and every source, for a terminal."""
        lines = [f"{'row':8} {'source':16} {'published':>10} {'predicted':>10} {'error':>8}"]
        for item in self.compared:
            setting = item.setting
            lines.append(
                f"{setting.name:8} {setting.group:16} {item.published:9.3f}s {item.seconds:9.3f}s "
                f"{item.ratio - 1:+8.1%}"
            )
        lines.append("")
        lines.append(
            f"{'':28} {'rows':>4} {'error':>7} {'null':>7} {'skill':>7} {'bias':>7}"
            f" {'rescaled':>9} {'skill':>7}"
        )
        for key in ("group", "source"):
            errors = self.by(key)
            if key == "source" and len(errors) == len(self.by("group")):
                continue
            for of in errors:
                skills = (
                    "" if math.isnan(skill) else f"{skill:+.2f}"
                    for skill in (of.skill, of.scaled_skill)
                )
                own, rescaled = skills
                lines.append(
                    f"{of.name[:28]:28} {of.rows:4} {of.mape:7.1%} {of.null:7.1%} {own:>7} "
                    f"{of.bias - 1:+7.1%} {of.scaled:9.1%} {rescaled:>7}"
                )
        if noise := self.noise():
            lines.append(
                f"noise: {len(noise)} plans published again differ by "
                f"{statistics.median(noise):.1%} in the median, {max(noise):.1%} at most"
            )
        reasons: dict[str, list[str]] = {}
        for name, reason in self.not_modelled.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"not modelled: {' '.join(names)}: {why}" for why, names in reasons.items()]
        return "\n".join(lines)


def source_error(name: str, compared: Sequence[Compared]) -> SourceError:
    """The errors of some rows, the null calibrated on these very rows."""
    ratios = [item.ratio for item in compared]
    bias = statistics.median(ratios)
    mfu = statistics.median(item.mfu for item in compared)
    return SourceError(
        name=name,
        rows=len(compared),
        mape=statistics.fmean(abs(ratio - 1) for ratio in ratios),
        bias=bias,
        null=statistics.fmean(abs(item.mfu / mfu - 1) for item in compared),
        scaled=statistics.fmean(abs(ratio / bias - 1) for ratio in ratios),
    )


def compare_time(path: Path | str) -> TimeCheck:
    """Predict the step time of every row of a file that has one.

    Raises:
        PlanError: The file cannot be read.
    """
    return check_time(read_rows(path))


def check_time(rows: Iterable[Row]) -> TimeCheck:
    """Predict the step time of every row that has one."""
    compared, reasons = [], {}
    for number, row in enumerate(rows):
        name = row.get("id") or f"row {number + 1}"
        try:
            setting = setting_of(row)
            if setting.seconds is None:
                reasons[name] = "the row has no step time"
                continue
            prediction = predict(
                setting.shape, setting.job, setting.cluster, recompute=setting.recompute
            )
        except PlanError as error:
            reasons[name] = str(error)
            continue
        compared.append(Compared(setting, prediction.seconds))
    return TimeCheck(tuple(compared), reasons)
