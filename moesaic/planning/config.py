"""What `moesaic plan train`, `plan serve` and `plan check` may be asked. No numpy is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moesaic.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PlanTrainConfig:
    """The fastest legal layout for training a model on a cluster."""

    model: str
    """A preset such as skywork-moe-146b, a `config.json`, a model folder, or a training recipe."""

    cluster: str
    """Devices, such as 8x4090, 192x8xA800, 2xH100+6xA800 or cpu2, or a TOML file."""

    sequence: int | None = None
    """Tokens of a sequence; none: the recipe's."""

    global_batch: int | None = None
    """Sequences of a step, over all ranks; none: the recipe's."""

    fix: str = ""
    """What is given, as name=value,name=value: pp, tp, dp, cp, ep, etp, experts-over, micro-batch,
    schedule, interleave, zero, shard, dispatch and others of a published run; recompute, one
    choice for every layer; layers, those of each stage as 4+4.5+4."""

    dtype: Literal["bf16", "fp8", "fp32"] = "bf16"
    """What matrix products run in."""

    framework: Literal["moesaic", "megatron"] = "moesaic"
    """Whose memory and overlap are meant: this program's training, or Megatron's."""

    load_mean: float = 1.1
    """Tokens at the fullest rank's experts over the mean rank's, averaged over steps: for time.
    Ours."""

    load_tail: float = 1.5
    """The same at the 99th percentile of steps: for memory. Ours."""

    usable: float = 0.92
    """Part of each device's memory to fill. Ours; the rest is for what is not counted."""

    half_layers: bool = True
    """Whether stages may part a layer between attention and feed-forward network."""

    measured: Path | None = None
    """Table that `moesaic measure` saved; it replaces the formulas for what it has."""

    count: int = 5
    """Plans to show."""

    out: Path | None = None
    """File to write the plan to."""

    draw: Path | None = None
    """File to draw the timeline of the plan to, above the uniform one's: .svg or .png."""

    curve: tuple[float, ...] = ()
    """Memory of a device in GB, once and again: what the plan's mesh gains over fair baselines."""

    compare: tuple[Path, ...] = ()
    """Plan files to evaluate beside the one that is found."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"count is {self.count}. Show at least 1 plan.")
        if not 0 < self.usable <= 1:
            raise ConfigError(f"usable is {self.usable}. It is a part of memory, at most 1.")
        if self.draw is not None and self.draw.suffix not in (".svg", ".png"):
            raise ConfigError(f"draw is {self.draw}. Name a file that ends with .svg or .png.")
        if any(not gigabytes > 0 for gigabytes in self.curve):
            raise ConfigError(f"curve is {self.curve}. Give gigabytes above 0.")


@dataclass(frozen=True, kw_only=True)
class PlanCheckConfig:
    """Predictions beside published runs."""

    runs: Path
    """CSV file of runs; docs/planner.md has its columns."""


@dataclass(frozen=True, kw_only=True)
class PlanServeConfig:
    """The fastest way to share a model over ranks that serve it, and the memory of each."""

    model: str
    """A preset such as skywork-moe-146b, a `config.json`, or a model folder."""

    cluster: str
    """Devices, such as 8x4090, 6x4090+1x4090-48gb or cpu2, or a TOML file."""

    ranks: int | None = None
    """Use the first so many devices; none: all."""

    weights: Literal["float32", "bfloat16", "float8", "int8"] = "bfloat16"
    """What matrices are stored in. 8-bit ones have a float32 scale a row."""

    kv_cache: Literal["float32", "bfloat16", "float8"] = "bfloat16"
    """What keys and values are stored in."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of activations, embedding and head."""

    context: int = 1024
    """Positions of a sequence on average, prompt and what is answered so far."""

    batch: int | None = None
    """Sequences at once by which layouts are compared; none: as many as the cache has room for."""

    max_batch: int = 512
    """Sequences at once, at the most."""

    layout: Literal["fastest", "rotated", "weighted", "fixed", "whole experts"] = "fastest"
    """Plan this one in place of the fastest."""

    usable: float | None = None
    """Part of each device's memory to fill; none: 0.95 of a GPU's, half of a CPU's."""

    reserve_gib: float = 0.4
    """Taken off each rank's part for what no ledger counts: the device's context, kernels, buffers
    of collectives, the interpreter. Ours."""

    kv_tokens: int | None = None
    """Positions of the cache; none: all that fit, at most max_batch of the model's longest."""

    max_step_tokens: int = 512
    """Tokens that go through the model in one step, at the most; prompts are read in chunks of
    this size."""

    block_tokens: int = 16
    """Positions in one block of the cache."""

    kernels: Literal["auto", "packed", "plain"] = "auto"
    """How matrices lie in memory; auto: packed as Moesaic's CPU kernels read them, on a CPU with
    bfloat16 activations."""

    one_box: bool = False
    """All devices are in one machine, also where the cluster's string names several kinds."""

    peer_access: bool = False
    """The driver lets consumer cards reach each other's memory, which doubles their bus."""

    bus_gbs: float | None = None
    """GB/s of each rank in a sum over ranks; none: the cluster's."""

    hop_us: float | None = None
    """Microseconds of one step of such a sum; none: the cluster's."""

    sum_bytes: float = 2.0
    """Bytes of one number that is summed: 2 for bfloat16, 1 for sums in 8 bits."""

    host_us: float = 0.0
    """Microseconds a layer that the device waits for the host: 0 with CUDA graphs or C++ all
    through; some 250 for eager PyTorch."""

    memory_efficiency: float = 0.85
    """Part of the memory's bandwidth that a step reaches. Reference on serving, 6.2."""

    matmul_efficiency: float = 0.55
    """Part of the peak that a step's products reach. Reference on serving, 6.2."""

    batches: tuple[int, ...] = (1, 4, 8, 16, 32, 64, 128, 256)
    """Batches to show."""

    contexts: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    """Contexts to show."""

    target: float | None = None
    """Tokens a second: show up to which context each layout reaches them."""

    out: Path | None = None
    """File to write the plan to, for `moesaic serve --plan`."""

    def __post_init__(self) -> None:
        for name in ("ranks", "context", "batch", "max_batch", "kv_tokens", "max_step_tokens"):
            self._check(name, 1)
        self._check("block_tokens", 1)
        for name in ("batches", "contexts"):
            if not all(count >= 1 for count in getattr(self, name)):
                raise ConfigError(f"{name} is {getattr(self, name)}. Give numbers above 0.")
        for name in ("usable", "memory_efficiency", "matmul_efficiency"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"{name} is {value}. It is a part, above 0 and at most 1.")
        for name in ("bus_gbs", "sum_bytes", "target"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}. Give a number above 0.")
        for name in ("hop_us", "host_us", "reserve_gib"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{name} is {value}. Give 0 or more.")
        for name in ("weights", "kv_cache"):
            if self.dtype == "bfloat16" and getattr(self, name) == "float32":
                raise ConfigError(
                    f"{name} is float32, but activations are bfloat16, which cannot use that. "
                    f"Choose dtype float32, or {name} bfloat16."
                )
        if self.kernels == "packed" and self.dtype == "float32":
            raise ConfigError("Packed kernels compute in bfloat16. Choose that dtype, or plain.")
        if self.bus_gbs is not None and self.peer_access:
            raise ConfigError("bus_gbs says what the bus does, so peer_access has no place.")

    def _check(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}. Choose {least} or more.")
