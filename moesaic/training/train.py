"""The training job: set up or resume, step, tell, checkpoint, and leave a model folder.

One process a rank; in a world of one rank nothing is sent. What a step computes is a function of
the step's number and of the tensors that a checkpoint holds, so a run that is killed and resumed
has the same losses, bit for bit, on the same machine with the same number of threads.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from moesaic.checkpoint.export import export_state
from moesaic.checkpoint.folder import read_config, read_spec
from moesaic.checkpoint.pieces import Held, parameter_names, whole_piece
from moesaic.checkpoint.state_writer import StateWriter
from moesaic.checkpoint.training_state import TrainingState, newest, remove_leftovers
from moesaic.config import to_toml
from moesaic.console import note
from moesaic.data.batches import BatchOrder
from moesaic.data.tokenfolder import TokenFolder
from moesaic.errors import ConfigError, PlanError
from moesaic.evaluation.similarity import expert_similarity
from moesaic.files import write_text_atomic
from moesaic.memory import reused_memory
from moesaic.model.build import save_model
from moesaic.moe.balance import AdaptiveCoefficient
from moesaic.moe.statistics import RoutingStatistics
from moesaic.parallel.agreement import all_do, first_does
from moesaic.parallel.gradients import gradient_norm, update
from moesaic.parallel.join import Needs, joined
from moesaic.parallel.watch import Watch
from moesaic.parallel.world import World
from moesaic.planning.layout import Layout, fit
from moesaic.planning.plan import Recompute, TrainPlan
from moesaic.planning.schedules import check_micro_batches
from moesaic.quantization.compressed import IN_WORDS, quantization_of
from moesaic.spec import ModelSpec
from moesaic.training.config import TrainConfig
from moesaic.training.identity import changes, check_identity, identity
from moesaic.training.metrics import (
    Metrics,
    mean,
    peak_flops,
    peak_memory_bytes,
    wants_similarity,
    write_machine,
)
from moesaic.training.optimizer import (
    build_optimizer,
    frozen_names,
    moments,
    set_learning_rate,
)
from moesaic.training.ranks import RankRecord, rank_line
from moesaic.training.run_folder import RunFolder
from moesaic.training.schedule import learning_rate
from moesaic.training.sharded import ShardedModel
from moesaic.training.step import accumulate, balance, check_finite
from moesaic.version import __version__


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, or go on training, until `config.steps` steps are done or somebody asks to stop.

    SIGINT or SIGTERM finishes the step at hand, writes a checkpoint and returns; a second one
    stops at once. Where `config.plan` needs several ranks, every rank calls this alike.

    Args:
        config: The run.

    Returns:
        What happened, fit for JSON; docs/run-folder.md lists it under summary.json.

    Raises:
        ConfigError: The config does not fit the model, the data, or the run it would go on with.
        PlanError: The plan does not fit the model or the step.
        FolderError: A folder cannot be read or written. Earlier checkpoints are as they were.
        TrainingError: A loss or gradient is not finite. No weight was touched.
    """

    def needs() -> Needs:
        return Needs(_plan(config).world_size, _device(config).type)

    # First of all, so that what is wrong is said by one rank and not by each.
    with joined(needs, config=config.launch) as watch, ExitStack() as stack:
        return _train_joined(config, watch, stack)


def _train_joined(config: TrainConfig, watch: Watch, stack: ExitStack) -> dict[str, Any]:
    """What a rank does once all are there."""
    _check_inputs(config)
    spec = read_spec(config.model)
    folder = TokenFolder(config.data.tokens)
    layout = fit(_plan(config), spec)
    config = with_plan(config, layout)
    _check_fit(config, spec, folder)
    run = RunFolder(config.run, resume=config.resume)
    world = World.join(layout, _device(config))
    stop = stack.enter_context(_StopRequest(world))
    # Only the first rank holds the folder; the others know where things lie in it.
    first_does(world.everyone, lambda: _enter(stack, run))
    watch.describe(_place_in_words(world))
    watch.keep_log(run.logs)
    ours, toml = identity(config), to_toml(config)
    finished = first_does(world.everyone, lambda: _finished(config, run, ours))
    if finished is not None:
        return finished
    first_does(world.everyone, lambda: remove_leftovers(run.checkpoints))
    state = newest(run.checkpoints, world.writers)
    first_does(world.everyone, lambda: _begin(config, run, state, ours, toml))
    with reused_memory():
        return _train_from(
            state,
            config,
            run,
            world=world,
            folder=folder,
            ours=ours,
            stop=stop,
            watch=watch,
        )


def _enter(stack: ExitStack, run: RunFolder) -> None:
    stack.enter_context(run)


def _place_in_words(world: World) -> str:
    if len(world.layout.stages) == 1:
        return ""
    numbers = " and ".join(map(str, world.stages))
    return f"stage {numbers}" if len(world.stages) == 1 else f"stages {numbers}"


def _begin(
    config: TrainConfig,
    run: RunFolder,
    state: TrainingState | None,
    ours: Mapping[str, Any],
    toml: str,
) -> None:
    if state is not None:
        _check_resume(config, state, ours, toml)
    write_text_atomic(run.config, toml)
    if config.plan is not None:
        _plan(config).save(run.plan)
    write_machine(run, _device(config))


def _train_from(
    state: TrainingState | None,
    config: TrainConfig,
    run: RunFolder,
    *,
    world: World,
    folder: TokenFolder,
    ours: Mapping[str, Any],
    stop: _StopRequest,
    watch: Watch,
) -> dict[str, Any]:
    """Hold the model and its moments from the first step to the last, and no longer."""
    job = all_do(world.everyone, lambda: _Job.set_up(config, world, state))
    toml = to_toml(config)
    watch.progress(job.step)
    _run(job, run, folder=folder, facts={"identity": ours}, toml=toml, stop=stop, watch=watch)
    watch.progress(job.step, "writing the model")
    return _finish(job, run, state=state, identity=ours, stop=stop)


@dataclass
class _Job:
    """What a rank holds in memory."""

    config: TrainConfig
    model: ShardedModel
    optimizer: torch.optim.AdamW
    coefficient: AdaptiveCoefficient
    copies: Mapping[str, int]
    """Ranks that hold the same piece of each parameter."""
    step: int = 0
    """Optimizer steps done."""
    loss: float | None = None
    """Of the last step."""
    seconds: float = 0.0
    """Spent in steps since the run began."""

    @classmethod
    def set_up(cls, config: TrainConfig, world: World, state: TrainingState | None) -> Self:
        spec = world.layout.spec
        model = ShardedModel.build(
            world,
            compute_dtype=getattr(torch, config.compute_dtype),
            recompute=recompute_choices(config, world.layout),
        )
        if state is None:
            quantization = quantization_of(read_config(config.model))
            if world.is_first and quantization is not None:
                what = IN_WORDS[quantization.format]
                note(f"{config.model} is {what}: its weights are widened, and trained in float32.")
            model.load(config.model)
        frozen = frozen_names(parameter_names(spec), config.freeze)
        model.freeze(frozen)
        job = cls(
            config=config,
            model=model,
            optimizer=build_optimizer(model.parameters, config.optimizer),
            coefficient=AdaptiveCoefficient(
                len(spec.moe_layers),
                maximum=config.routing.coefficient_max,
                slope=config.routing.coefficient_slope,
                decay=config.routing.coefficient_decay,
            ),
            copies={name: model.copies(name) for name in model.parameters},
        )
        if state is not None:
            state.load(job.tensors())
            model.spread()
            job.step = state.step
            job.loss, job.seconds = state.facts["loss"], state.facts["seconds"]
        if config.compile:
            model.compile()
        return job

    def tensors(self) -> dict[str, Held]:
        """Everything that a step changes, by name; nothing is copied."""
        model = self.model
        held = {f"weights.{name}": held for name, held in model.weights.items()}
        held |= moments(model.weights, model.parameters, self.optimizer)
        values_L = self.coefficient.values_L
        if values_L.numel():
            held["routing.coefficient"] = Held(values_L, whole_piece(tuple(values_L.shape)))
        return held

    def take_step(self, order: BatchOrder, *, last_state: str) -> _Step:
        """One optimizer step. If it raises, no weight was touched."""
        config, model = self.config, self.model
        micros, plan = config.data.accumulation, model.world.layout.plan
        mine = range(micros // plan.dp)
        first = model.world.place.dp * len(mine)
        lr = learning_rate(self.step, config.schedule, peak=config.optimizer.lr, steps=config.steps)
        set_learning_rate(self.optimizer, lr)
        coefficients_L = self.coefficient.values_L
        gradients = accumulate(
            model,
            [order.batch(self.step, first + micro, micros) for micro in mine],
            routing=config.routing,
            coefficients_L=coefficients_L,
            attend_across_documents=config.data.attend_across_documents,
        )
        loss = float(gradients.loss)
        norm = gradient_norm(model.parameters, copies=self.copies, everyone=model.world.everyone)
        check_finite(self.step + 1, loss=loss, norm=norm, last_state=last_state)
        update(self.optimizer, norm=norm, clip=config.optimizer.clip)
        model.spread()
        balance(
            model,
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
    watch: Watch,
) -> None:
    """Step, tell and checkpoint until the last step or a request to stop."""
    config, world, device = job.config, job.model.world, job.model.world.device
    spec = world.layout.spec
    rows = config.data.micro_batch * config.data.accumulation
    order = BatchOrder(folder, batch_size=rows, seed=config.seed, weights=config.data.weights)
    tokens_a_step = rows * folder.sequence_length
    # A causal sequence of S tokens attends to (S + 1) / 2 of them on average.
    flops = 3 * spec.flops_per_token((folder.sequence_length + 1) / 2) * tokens_a_step
    saved_step = job.step
    states = StateWriter(
        run.checkpoints,
        keep=config.checkpoint.keep,
        in_background=config.checkpoint.in_background,
        writers=world.writers,
    )
    with states, _telling(job, run) as metrics:
        peak = _peak(config, run, world)
        if job.step == 0 and wants_similarity(config, spec, 0):
            _add_similarity(job, metrics)
        is_stopped = stop.is_asked()
        while job.step < config.steps and not is_stopped:
            begin = time.perf_counter()
            done = job.take_step(order, last_state=_last_state(saved_step))
            seconds = time.perf_counter() - begin
            job.seconds += seconds
            watch.progress(job.step)
            if metrics is not None:
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
            _tell_of_ranks(job, metrics, seconds)
            if wants_similarity(config, spec, job.step):
                _add_similarity(job, metrics)
            every = config.checkpoint.every
            is_due = every > 0 and job.step % every == 0
            is_last = job.step == config.steps
            is_stopped = stop.is_asked()
            if is_due or is_last or is_stopped:
                # First the lines, then the state: a state never stands without its lines.
                if metrics is not None:
                    metrics.sync()
                if is_due or not is_last or config.checkpoint.at_end or world.everyone.size > 1:
                    watch.progress(job.step, "writing a checkpoint")
                    _save(job, states, facts=facts, toml=toml)
                    saved_step = job.step
                    watch.progress(job.step)


def _tell_of_ranks(job: _Job, metrics: Metrics | None, seconds: float) -> None:
    """Say what each rank did in the step, now and then; nothing in a world of one rank."""
    world, every = job.model.world, job.config.metrics.log_every
    if world.everyone.size == 1 or (job.step % every and job.step not in (1, job.config.steps)):
        return
    place = world.place
    record = RankRecord(
        rank=world.rank,
        pp=place.pp,
        dp=place.dp,
        tp=place.tp,
        stages=world.stages,
        peak_memory_bytes=peak_memory_bytes(world.device),
        compute_seconds=job.model.compute_seconds,
        tokens_received=job.model.rows_computed,
    )
    records = world.everyone.objects(record)
    if metrics is not None:
        metrics.add_ranks(rank_line(job.step, seconds, records))


@contextmanager
def _telling(job: _Job, run: RunFolder) -> Iterator[Metrics | None]:
    """The run's metrics on the first rank; None on the others."""
    if not job.model.world.is_first:
        yield None
        return
    metrics = Metrics(
        run,
        job.config.metrics,
        layers=job.model.spec.moe_layers,
        last_step=job.step if job.step else -1,
        steps=job.config.steps,
    )
    try:
        yield metrics
    finally:
        metrics.close()


def _peak(config: TrainConfig, run: RunFolder, world: World) -> float:
    """Operations a second that all ranks together could do."""
    dtype = getattr(torch, config.compute_dtype)
    each = config.metrics.peak_flops or first_does(
        world.everyone, lambda: peak_flops(run, world.device, dtype)
    )
    return each * world.everyone.size


def _add_similarity(job: _Job, metrics: Metrics | None) -> None:
    """Measure the experts of each MoE layer, which the ranks bring together one by one."""
    similarity = []
    for layer in job.model.spec.moe_layers:
        weights = job.model.whole_experts(layer)
        if metrics is not None:
            similarity.append(expert_similarity(*weights))
    if metrics is not None:
        metrics.add_similarity(job.step, similarity)


def _save(job: _Job, states: StateWriter, *, facts: Mapping[str, Any], toml: str) -> None:
    states.save(
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


def _finish(
    job: _Job,
    run: RunFolder,
    *,
    state: TrainingState | None,
    identity: Mapping[str, Any],
    stop: _StopRequest,
) -> dict[str, Any]:
    """Leave the model folder, if all steps are done, and say what happened."""
    config, world = job.config, job.model.world
    is_finished = job.step == config.steps
    if is_finished:
        first_does(world.writers, lambda: _write_model(job, run))
    elif world.is_first:
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
        "peak_memory_bytes": peak_memory_bytes(world.device),
        "save_dtype": config.save_dtype,
        "identity": dict(identity),
    }
    if is_finished:
        text = json.dumps(summary, indent=1) + "\n"
        first_does(world.everyone, lambda: write_text_atomic(run.summary, text))
    return summary


def _write_model(job: _Job, run: RunFolder) -> None:
    """The model folder, from what this rank holds, or where that is not all, from the state."""
    config, world = job.config, job.model.world
    dtype = getattr(torch, config.save_dtype)
    if world.everyone.size == 1:
        (stage,) = job.model.stages
        save_model(stage.model, run.model, like=config.model, dtype=dtype, overwrite=True)
        return
    state = run.checkpoints / f"step-{job.step:08d}"
    export_state(
        state, world.layout.spec, run.model, like=config.model, dtype=dtype, overwrite=True
    )


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


def recompute_choices(config: TrainConfig, layout: Layout) -> dict[int | str, Recompute]:
    """What of each layer is computed again in the backward pass: the recipe's word or the plan's.

    Raises:
        ConfigError: The model has no such layer, or not so many; or both say something.
    """
    wanted, num_layers = config.recompute, layout.spec.num_layers
    if layout.plan.recompute:
        if wanted != "none":
            raise ConfigError(
                f"recompute is {wanted}, but {config.plan} says itself what is recomputed. "
                f"Leave it out."
            )
        return dict(layout.plan.recompute)
    if wanted == "none":
        return {}
    if wanted == "all":
        return dict.fromkeys(range(num_layers), "full")
    assert not isinstance(wanted, str), f"{wanted=}"
    layers = range(wanted) if isinstance(wanted, int) else wanted
    beyond = [layer for layer in layers if not 0 <= layer < num_layers]
    if beyond or (isinstance(wanted, int) and wanted < 0):
        raise ConfigError(
            f"recompute is {wanted}, but the model has {num_layers} layers, 0 to {num_layers - 1}."
        )
    return dict.fromkeys(layers, "full")


def with_plan(config: TrainConfig, layout: Layout) -> TrainConfig:
    """The config with the plan's micro-batch, if it states one; a step keeps its rows.

    Raises:
        PlanError: A step's rows or micro-batches cannot be dealt out so.
    """
    data, plan = config.data, layout.plan
    if plan.micro_batch is not None and plan.micro_batch != data.micro_batch:
        rows = data.micro_batch * data.accumulation
        if rows % plan.micro_batch:
            raise PlanError(
                f"The plan's micro_batch is {plan.micro_batch}, which does not divide the "
                f"{rows} sequences of a step (data.micro_batch {data.micro_batch} x "
                f"data.accumulation {data.accumulation}). Change either."
            )
        data = replace(data, micro_batch=plan.micro_batch, accumulation=rows // plan.micro_batch)
        note(f"The plan's micro_batch holds: {data.accumulation} of {data.micro_batch} a step.")
    if data.accumulation % plan.dp:
        raise PlanError(
            f"A step has {data.accumulation} micro-batches, which {plan.dp} data-parallel ranks "
            f"cannot share equally. Make data.accumulation a multiple of dp."
        )
    check_micro_batches(
        plan.schedule, data.accumulation // plan.dp, ranks=plan.pp, stages=len(layout.stages)
    )
    return replace(config, data=data)


def _plan(config: TrainConfig) -> TrainPlan:
    return TrainPlan() if config.plan is None else TrainPlan.load(config.plan)


def _device(config: TrainConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch finds no GPU. Use device auto or cpu.")
    wants_gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    # In a world of several ranks each has been given a GPU of its own.
    return torch.device("cuda", torch.cuda.current_device()) if wants_gpu else torch.device("cpu")


def _last_state(step: int) -> str:
    return f"The last checkpoint is that of step {step}." if step else "There is no checkpoint yet."


class _StopRequest:
    """Turns the first SIGINT or SIGTERM into a request, and leaves the second alone."""

    def __init__(self, world: World) -> None:
        self.signal: str | None = None
        self._world = world
        self._before: dict[signal.Signals, Any] = {}

    def is_asked(self) -> bool:
        """Whether any rank was asked to stop; every rank calls this alike and gets one answer."""
        mine = torch.tensor(float(self.signal is not None), device=self._world.device)
        is_asked = bool(self._world.everyone.sum_(mine))
        if is_asked and self.signal is None:
            self.signal = "a signal to another rank"
        return is_asked

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
        if self._world.is_first:
            note(f"{self.signal}: finishing this step, then writing a checkpoint.")
        self.__exit__(None, None, None)
