"""The training job: set up or resume, step, tell, checkpoint, and leave a model folder.

One process, one device. What a step computes is a function of the step's number and of the
tensors that a checkpoint holds, so a run that is killed and resumed has the same losses, bit
for bit, on the same machine with the same number of threads.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from moesaic.checkpoint.folder import read_config, read_spec
from moesaic.checkpoint.training_state import (
    TrainingState,
    newest,
    prune,
    remove_leftovers,
    save_state,
)
from moesaic.config import to_toml
from moesaic.console import note
from moesaic.data.batches import BatchOrder
from moesaic.data.tokenfolder import TokenFolder
from moesaic.errors import ConfigError
from moesaic.files import write_text_atomic
from moesaic.model.attention import Attention
from moesaic.model.build import build_model, load_model, save_model
from moesaic.model.mlp import MLP
from moesaic.model.transformer import Transformer
from moesaic.moe.balance import AdaptiveCoefficient
from moesaic.moe.statistics import RoutingStatistics
from moesaic.spec import ModelSpec
from moesaic.training.config import TrainConfig
from moesaic.training.identity import changes, check_identity, identity
from moesaic.training.memory import reused_memory
from moesaic.training.metrics import (
    Metrics,
    mean,
    peak_flops,
    peak_memory_bytes,
    write_machine,
)
from moesaic.training.optimizer import (
    build_optimizer,
    freeze,
    gradient_norm,
    moments,
    set_learning_rate,
    update,
)
from moesaic.training.run_folder import RunFolder
from moesaic.training.schedule import learning_rate
from moesaic.training.step import accumulate, balance, check_finite
from moesaic.version import __version__


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, or go on training, until `config.steps` steps are done or somebody asks to stop.

    SIGINT or SIGTERM finishes the step at hand, writes a checkpoint and returns; a second one
    stops at once.

    Args:
        config: The run.

    Returns:
        What happened, fit for JSON; docs/run-folder.md lists it under summary.json.

    Raises:
        ConfigError: The config does not fit the model, the data, or the run it would go on with.
        FolderError: A folder cannot be read or written. Earlier checkpoints are as they were.
        TrainingError: A loss or gradient is not finite. No weight was touched.
    """
    _check_inputs(config)
    with RunFolder(config.run, resume=config.resume) as run, _StopRequest() as stop:
        spec = read_spec(config.model)
        folder = TokenFolder(config.data.tokens)
        _check_fit(config, spec, folder)
        remove_leftovers(run.checkpoints)
        ours, toml = identity(config), to_toml(config)
        finished = _finished(config, run, ours)
        if finished is not None:
            return finished
        state = newest(run.checkpoints)
        if state is not None:
            _check_resume(config, state, ours, toml)
        write_text_atomic(run.config, toml)
        write_machine(run, _device(config))
        with reused_memory():
            return _train_from(state, config, run, spec=spec, folder=folder, ours=ours, stop=stop)


def _train_from(
    state: TrainingState | None,
    config: TrainConfig,
    run: RunFolder,
    *,
    spec: ModelSpec,
    folder: TokenFolder,
    ours: Mapping[str, Any],
    stop: _StopRequest,
) -> dict[str, Any]:
    """Hold the model and its moments from the first step to the last, and no longer."""
    job = _Job.set_up(config, spec, state)
    toml = to_toml(config)
    _run(job, run, folder=folder, facts={"identity": ours}, toml=toml, stop=stop)
    return _finish(job, run, state=state, identity=ours, stop=stop)


@dataclass
class _Job:
    """What a run holds in memory."""

    config: TrainConfig
    model: Transformer
    optimizer: torch.optim.AdamW
    coefficient: AdaptiveCoefficient
    recompute: frozenset[int]
    step: int = 0
    """Optimizer steps done."""
    loss: float | None = None
    """Of the last step."""
    seconds: float = 0.0
    """Spent in steps since the run began."""

    @classmethod
    def set_up(cls, config: TrainConfig, spec: ModelSpec, state: TrainingState | None) -> Self:
        device = _device(config)
        if state is None:
            if read_config(config.model).get("quantization_config"):
                note(f"{config.model} is FP8: its weights are widened, and trained in float32.")
            model = load_model(config.model, dtype=torch.float32, device=device)
        else:
            model = build_model(spec, dtype=torch.float32, device=device)
        model.compute_dtype = getattr(torch, config.compute_dtype)
        freeze(model, config.freeze)
        job = cls(
            config=config,
            model=model,
            optimizer=build_optimizer(model, config.optimizer),
            coefficient=AdaptiveCoefficient(
                len(spec.moe_layers),
                maximum=config.routing.coefficient_max,
                slope=config.routing.coefficient_slope,
                decay=config.routing.coefficient_decay,
            ),
            recompute=recompute_layers(config, spec),
        )
        if state is not None:
            state.load(job.tensors())
            job.step = state.step
            job.loss, job.seconds = state.facts["loss"], state.facts["seconds"]
        if config.compile:
            for part in model.modules():
                # Not the MoE layers: their row counts differ from step to step.
                if isinstance(part, Attention | MLP):
                    part.compile()
        return job

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a step changes, by name; nothing is copied."""
        weights = {f"weights.{k}": v.detach() for k, v in self.model.state_dict().items()}
        of_routing = {"routing.coefficient": self.coefficient.values_L}
        if self.coefficient.values_L.numel() == 0:
            of_routing = {}
        return {**weights, **moments(self.model, self.optimizer), **of_routing}

    def take_step(self, order: BatchOrder, *, last_state: str) -> _Step:
        """One optimizer step. If it raises, no weight was touched."""
        config = self.config
        micros = config.data.accumulation
        lr = learning_rate(self.step, config.schedule, peak=config.optimizer.lr, steps=config.steps)
        set_learning_rate(self.optimizer, lr)
        coefficients_L = self.coefficient.values_L
        gradients = accumulate(
            self.model,
            [order.batch(self.step, micro, micros) for micro in range(micros)],
            routing=config.routing,
            coefficients_L=coefficients_L,
            recompute=self.recompute,
            attend_across_documents=config.data.attend_across_documents,
        )
        loss, norm = float(gradients.loss), gradient_norm(self.optimizer)
        check_finite(self.step + 1, loss=loss, norm=norm, last_state=last_state)
        update(self.optimizer, norm=norm, clip=config.optimizer.clip)
        balance(
            self.model,
            gradients.statistics,
            routing=config.routing,
            coefficient=self.coefficient,
        )
        self.step += 1
        self.loss = loss
        return _Step(loss, norm, lr, gradients.statistics, coefficients_L.tolist())


@dataclass(frozen=True)
class _Step:
    """What one step measured."""

    loss: float
    gradient_norm: float
    learning_rate: float
    statistics: list[RoutingStatistics]
    coefficients: list[float]
    """Those that the step used, by MoE layer."""


def _run(
    job: _Job,
    run: RunFolder,
    *,
    folder: TokenFolder,
    facts: Mapping[str, Any],
    toml: str,
    stop: _StopRequest,
) -> None:
    """Step, tell and checkpoint until the last step or a request to stop."""
    config, spec, device = job.config, job.model.spec, _device(job.config)
    rows = config.data.micro_batch * config.data.accumulation
    order = BatchOrder(folder, batch_size=rows, seed=config.seed, weights=config.data.weights)
    tokens_a_step = rows * folder.sequence_length
    # A causal sequence of S tokens attends to (S + 1) / 2 of them on average.
    flops = 3 * spec.flops_per_token((folder.sequence_length + 1) / 2) * tokens_a_step
    dtype = getattr(torch, config.compute_dtype)
    peak = config.metrics.peak_flops or peak_flops(run, device, dtype)
    saved_step = job.step
    metrics = Metrics(
        run,
        config.metrics,
        layers=spec.moe_layers,
        last_step=job.step if job.step else -1,
        steps=config.steps,
    )
    try:
        if job.step == 0 and metrics.wants_similarity(0):
            metrics.add_similarity(0, job.model)
        while job.step < config.steps and stop.signal is None:
            begin = time.perf_counter()
            done = job.take_step(order, last_state=_last_state(saved_step))
            seconds = time.perf_counter() - begin
            job.seconds += seconds
            metrics.add(
                {
                    "step": job.step,
                    "tokens": job.step * tokens_a_step,
                    "loss": done.loss,
                    "gradient_norm": done.gradient_norm,
                    "learning_rate": done.learning_rate,
                    "tokens_per_second": tokens_a_step / seconds,
                    "mfu": flops / seconds / peak,
                    "drop_rate": mean([layer.would_drop_rate for layer in done.statistics]),
                    "coefficient": mean(done.coefficients),
                    "seconds": seconds,
                    "peak_memory_bytes": peak_memory_bytes(device),
                }
            )
            if done.statistics:
                metrics.add_routing(job.step, done.statistics, done.coefficients)
            if metrics.wants_similarity(job.step):
                metrics.add_similarity(job.step, job.model)
            every = config.checkpoint.every
            is_due = every > 0 and job.step % every == 0
            is_last = job.step == config.steps
            if is_due or is_last or stop.signal is not None:
                # First the lines, then the state: a state never stands without its lines.
                metrics.sync()
                if is_due or not is_last or config.checkpoint.at_end:
                    _save(job, run, facts=facts, toml=toml)
                    saved_step = job.step
    finally:
        metrics.close()


def _save(job: _Job, run: RunFolder, *, facts: Mapping[str, Any], toml: str) -> None:
    save_state(
        run.checkpoints,
        job.step,
        job.tensors(),
        facts={
            "step": job.step,
            "loss": job.loss,
            "seconds": job.seconds,
            "versions": {"moesaic": __version__, "torch": torch.__version__},
            **facts,
        },
        config_toml=toml,
    )
    prune(run.checkpoints, keep=job.config.checkpoint.keep)


def _finish(
    job: _Job,
    run: RunFolder,
    *,
    state: TrainingState | None,
    identity: Mapping[str, Any],
    stop: _StopRequest,
) -> dict[str, Any]:
    """Leave the model folder, if all steps are done, and say what happened."""
    config = job.config
    is_finished = job.step == config.steps
    if is_finished:
        dtype = getattr(torch, config.save_dtype)
        save_model(job.model, run.model, like=config.model, dtype=dtype, overwrite=True)
    else:
        note(
            f"Stopped by {stop.signal} after step {job.step}; the same command goes on from there."
        )
    summary = {
        "run": str(run.path),
        "model": str(run.model) if is_finished else None,
        "step": job.step,
        "steps": config.steps,
        "loss": job.loss,
        "seconds": job.seconds,
        "resumed_from": None if state is None else state.step,
        "stopped_by": None if is_finished else stop.signal,
        "peak_memory_bytes": peak_memory_bytes(_device(config)),
        "save_dtype": config.save_dtype,
        "identity": dict(identity),
    }
    if is_finished:
        write_text_atomic(run.summary, json.dumps(summary, indent=1) + "\n")
    return summary


def _finished(
    config: TrainConfig, run: RunFolder, ours: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do; None if it has."""
    try:
        summary: dict[str, Any] = json.loads(run.summary.read_text())
        has_all = summary["step"] == config.steps and summary["save_dtype"] == config.save_dtype
        before = summary["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not has_all or not (run.model / "config.json").exists():
        return None
    check_identity(before, ours, run=config.run)
    return summary


def _check_resume(
    config: TrainConfig, state: TrainingState, ours: Mapping[str, Any], toml: str
) -> None:
    check_identity(state.facts["identity"], ours, run=config.run)
    if state.step > config.steps:
        raise ConfigError(
            f"steps is {config.steps}, but {config.run} has already done {state.step}. "
            f"Raise steps, or begin a new run folder."
        )
    before = (state.folder / "config.toml").read_text(encoding="utf-8")
    for change in changes(before, toml):
        note(f"Going on after step {state.step} with {change}.")


def _check_inputs(config: TrainConfig) -> None:
    for source in (config.model, config.data.tokens):
        if source.resolve().is_relative_to(config.run.resolve()):
            raise ConfigError(f"The run folder {config.run} holds its input {source}. Move one.")


def _check_fit(config: TrainConfig, spec: ModelSpec, folder: TokenFolder) -> None:
    """Refuse what the config, the model and the data cannot be together."""
    for source in (config.model, config.data.tokens):
        if source.resolve().is_relative_to(config.run.resolve()):
            raise ConfigError(
                f"The run folder {config.run} holds its own input {source}. Move one."
            )
    if folder.vocab_size > spec.vocab_size:
        raise ConfigError(
            f"{folder.path} holds tokens up to {folder.vocab_size - 1}, but {config.model} has "
            f"{spec.vocab_size} embeddings. Prepare the text with the model's own tokenizer."
        )
    if config.routing.bias_rate > 0 and (spec.moe is None or not spec.moe.selection_bias):
        raise ConfigError(
            f"routing.bias_rate is {config.routing.bias_rate}, but {config.model} has no selection "
            f"bias. Upcycle with one, or set the rate to 0."
        )
    recompute_layers(config, spec)


def recompute_layers(config: TrainConfig, spec: ModelSpec) -> frozenset[int]:
    """The layers whose activations are computed again in the backward pass.

    Raises:
        ConfigError: The model has no such layer, or not so many.
    """
    wanted = config.recompute
    if wanted == "none":
        return frozenset()
    if wanted == "all":
        return frozenset(range(spec.num_layers))
    assert not isinstance(wanted, str), f"{wanted=}"
    layers = range(wanted) if isinstance(wanted, int) else wanted
    beyond = [layer for layer in layers if not 0 <= layer < spec.num_layers]
    if beyond or (isinstance(wanted, int) and wanted < 0):
        raise ConfigError(
            f"recompute is {wanted}, but the model has {spec.num_layers} layers, "
            f"0 to {spec.num_layers - 1}."
        )
    return frozenset(layers)


def _device(config: TrainConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch finds no GPU. Use device auto or cpu.")
    wants_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if wants_gpu else "cpu")


def _last_state(step: int) -> str:
    return f"The last checkpoint is that of step {step}." if step else "There is no checkpoint yet."


class _StopRequest:
    """Turns the first SIGINT or SIGTERM into a request, and leaves the second alone."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for kind in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[kind] = signal.signal(kind, self._request)
            except ValueError:  # not the main thread, which alone may do this
                break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        note(f"{self.signal}: finishing this step, then writing a checkpoint.")
        self.__exit__(None, None, None)
