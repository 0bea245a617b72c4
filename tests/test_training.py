from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import signal
import sys

import pytest
import torch

from moesaic.checkpoint.folder import WeightReader
from moesaic.checkpoint.pieces import parameter_names
from moesaic.checkpoint.training_state import newest
from moesaic.data.batches import Batch, BatchOrder
from moesaic.data.tokenfolder import TokenFolder
from moesaic.errors import ConfigError, FolderError, TrainingError
from moesaic.moe.balance import AdaptiveCoefficient
from moesaic.moe.config import RoutingConfig
from moesaic.moe.layer import MoELayer
from moesaic.parallel.gradients import gradient_norm, update
from moesaic.quantizing.config import QuantizeConfig
from moesaic.quantizing.quantize import quantize
from moesaic.spec import MoESpec
from moesaic.training import train as job
from moesaic.training.config import (
    CheckpointConfig,
    MetricsConfig,
    OptimizerConfig,
    TrainDataConfig,
)
from moesaic.training.optimizer import (
    build_optimizer,
    frozen_names,
    set_learning_rate,
)
from moesaic.training.schedule import ScheduleConfig
from moesaic.training.sharded import ShardedModel
from moesaic.training.step import accumulate, balance
from moesaic.training.train import train
from tests.faults import failure_of, fault
from tests.tiny import LLAMA, MIXTRAL, TINY, tiny_folder, tiny_model
from tests.tiny_run import lines, tiny_config, tiny_tokens

BALANCED = MIXTRAL.replace(
    family="skywork",
    moe=dataclasses.replace(MIXTRAL.moe, selection_bias=True, gate_norm_scale=1.0),
)

SMALLEST = TINY["skywork moe"].replace(
    num_layers=1,
    tied_embeddings=True,
    moe=MoESpec(num_experts=2, top_k=1, expert_dim=8, gate_norm_scale=1.0),
    moe_layers=(0,),
)
"""Few tensors, so that a run of it makes few writes."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    return {
        "dense": tiny_folder(root / "dense", LLAMA),
        "moe": tiny_folder(root / "moe", MIXTRAL),
        "skywork": tiny_folder(root / "skywork", TINY["skywork moe"]),
        "balanced": tiny_folder(root / "balanced", BALANCED),
        "smallest": tiny_folder(root / "smallest", SMALLEST),
        "tokens": tiny_tokens(root / "tokens"),
    }


@pytest.fixture
def start(folders, tmp_path):
    """Train a tiny model in a new run folder, with some fields of the config changed."""

    def run(model="moe", name="run", **changes):
        return train(tiny_config(folders[model], folders["tokens"], tmp_path / name, **changes))

    return run


def weights_hash(folder) -> str:
    digest = hashlib.sha256()
    with WeightReader(folder) as reader:
        for name in sorted(reader.entries):
            digest.update(name.encode())
            digest.update(reader.read(name).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weights(folder) -> dict[str, torch.Tensor]:
    with WeightReader(folder) as reader:
        return {name: reader.read(name).clone() for name in reader.entries}


def losses(run) -> list[float]:
    return [line["loss"] for line in lines(run / "metrics.jsonl")]


# Steps


def batch_of(folders, rows: int, *, step: int = 0) -> list[Batch]:
    order = BatchOrder(TokenFolder(folders["tokens"]), batch_size=8, seed=3)
    return [order.batch(step, micro, 8 // rows) for micro in range(8 // rows)]


def gradients(spec, batches, **changes):
    model = tiny_model(spec, dtype=torch.float64)
    routing = RoutingConfig(**{"balance_group": "sequence", "z_loss_weight": 0.1, **changes})
    coefficients = torch.full((len(spec.moe_layers),), 0.7, dtype=torch.float64)
    sharded = ShardedModel.alone(model)
    found = accumulate(sharded, batches, routing=routing, coefficients_L=coefficients)
    return found, {name: p.grad for name, p in sharded.parameters.items()}


@pytest.mark.parametrize("family", ["llama", "mixtral", "skywork moe", "qwen2_moe"])
def test_micro_batches_add_up_to_one_large_batch(folders, family):
    large, of_large = gradients(TINY[family], batch_of(folders, 8))
    small, of_small = gradients(TINY[family], batch_of(folders, 2))
    assert float(small.loss) == pytest.approx(float(large.loss), rel=1e-12)
    for name, gradient in of_large.items():
        # The linear cross entropy and the gates are float64 here, so only rounding differs.
        torch.testing.assert_close(of_small[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    for a, b in zip(small.statistics, large.statistics, strict=True):
        assert torch.equal(a.counts_E, b.counts_E)


def test_a_token_weighs_the_same_in_whichever_micro_batch_it_lies(folders):
    first, second = batch_of(folders, 4)
    second.targets_BS[:, 2:] = -100
    found, _ = gradients(LLAMA, [first, second])
    model = tiny_model(LLAMA, dtype=torch.float64)
    sums = [
        torch.nn.functional.cross_entropy(
            model(b.input_ids_BS, documents_BS=b.documents_BS).flatten(0, 1),
            b.targets_BS.flatten(),
            reduction="sum",
        )
        for b in (first, second)
    ]
    targets = sum(int((b.targets_BS != -100).sum()) for b in (first, second))
    assert found.loss.item() == pytest.approx(sum(sums).item() / targets, rel=1e-10)


def test_a_step_without_a_target_is_refused(folders):
    (batch,) = batch_of(folders, 8)
    batch.targets_BS.fill_(-100)
    with pytest.raises(TrainingError, match="predicted"):
        gradients(LLAMA, [batch])


def test_balance_moves_once_from_counts_of_all_micro_batches(folders):
    spec = BALANCED
    found, _ = gradients(spec, batch_of(folders, 2))
    model = tiny_model(spec, dtype=torch.float64)
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    before = [layer.gate.e_score_correction_bias.clone() for layer in layers]
    coefficient = AdaptiveCoefficient(len(layers))
    routing = RoutingConfig(bias_rate=0.5)
    balance(ShardedModel.alone(model), found.statistics, routing=routing, coefficient=coefficient)
    for number, (layer, statistics) in enumerate(zip(layers, found.statistics, strict=True)):
        share = statistics.counts_E / statistics.counts_E.sum()
        expected = before[number] + 0.5 * (0.25 - share)
        torch.testing.assert_close(layer.gate.e_score_correction_bias, expected.float())
        target = min(statistics.would_drop_rate / 5, 0.01)
        expected = 0.99 * 0.01 + 0.01 * target
        assert float(coefficient.values_L[number]) == pytest.approx(expected, rel=1e-12)


# Optimizer


def with_gradients(seed: int = 0):
    model = tiny_model(MIXTRAL)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("clip", [0.0, 1.0, 1e9])
def test_update_equals_adamw_written_out(clip):
    model = with_gradients()
    reference = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    moment1 = {name: torch.zeros_like(w) for name, w in reference.items()}
    moment2 = {name: torch.zeros_like(w) for name, w in reference.items()}
    config = OptimizerConfig(lr=0.01, clip=clip, expert_lr_multiplier=0.25)
    parameters = dict(model.named_parameters())
    optimizer = build_optimizer(parameters, config)
    for step in range(1, 4):
        model_grads = {n: p.grad for n, p in with_gradients(step).named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.grad = model_grads[name].clone()
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in model_grads.values()))
        set_learning_rate(optimizer, config.lr / step)
        assert gradient_norm(parameters) == pytest.approx(norm, rel=1e-6)
        update(optimizer, norm=gradient_norm(parameters), clip=clip)
        scale = min(1.0, clip / norm) if clip else 1.0
        for name, weight in reference.items():
            lr = config.lr / step * (0.25 if ".experts." in name else 1)
            gradient = model_grads[name].double() * scale
            moment1[name] = 0.9 * moment1[name] + 0.1 * gradient
            moment2[name] = 0.95 * moment2[name] + 0.05 * gradient**2
            if weight.ndim >= 2:
                weight *= 1 - lr * 0.1
            root = (moment2[name] / (1 - 0.95**step)).sqrt() + 1e-8
            weight -= lr * moment1[name] / (1 - 0.9**step) / root
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        torch.testing.assert_close(parameter.double(), reference[name], rtol=1e-4, atol=1e-6)


def test_freezing_stops_exactly_the_named_weights(folders, start, tmp_path):
    start(freeze=("*.self_attn.*", "model.embed_tokens.weight"), steps=2)
    before, after = weights(folders["moe"]), weights(tmp_path / "run" / "model")
    for name in before:
        is_frozen = ".self_attn." in name or "embed_tokens" in name
        assert torch.equal(before[name], after[name]) == is_frozen, name


@pytest.mark.parametrize(
    ("patterns", "message"), [(("*.mlp.*",), "no parameter"), (("*",), "nothing is left")]
)
def test_freezing_nothing_or_everything_is_refused(patterns, message):
    with pytest.raises(ConfigError, match=message):
        frozen_names(parameter_names(MIXTRAL), patterns)


# Runs


@pytest.mark.parametrize(
    ("model", "compute_dtype"),
    [("dense", "float32"), ("moe", "bfloat16"), ("skywork", "bfloat16"), ("balanced", "float32")],
)
def test_loss_falls_on_a_tiny_corpus(folders, start, tmp_path, model, compute_dtype):
    start(
        model,
        steps=20,
        data=TrainDataConfig(tokens=folders["tokens"], micro_batch=4),
        compute_dtype=compute_dtype,
        checkpoint=CheckpointConfig(every=0),
    )
    curve = losses(tmp_path / "run")
    assert sum(curve[-4:]) / 4 < sum(curve[:4]) / 4 - 1


def test_a_run_leaves_what_the_documents_say(start, tmp_path):
    summary = start(metrics=MetricsConfig(similarity_every=3, peak_flops=1e12))
    run = tmp_path / "run"
    assert json.loads((run / "summary.json").read_text()) == summary
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert set(lines(run / "metrics.jsonl")[0]) == {
        "step", "tokens", "loss", "gradient_norm", "learning_rate", "tokens_per_second", "mfu",
        "drop_rate", "coefficient", "seconds", "peak_memory_bytes",
    }  # fmt: skip
    routing = lines(run / "routing" / "routing.jsonl")
    assert set(routing[0]) == {
        "step", "layers", "load", "drop_rate", "coefficient", "entropy", "max1_over_max2",
        "max2_over_max3",
    }  # fmt: skip
    assert routing[0]["coefficient"] == [0.01] * 3
    assert all(sum(load) == pytest.approx(1) for line in routing for load in line["load"])
    assert [line["step"] for line in lines(run / "routing" / "similarity.jsonl")] == [0, 3, 6]
    states = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert states == ["step-00000004", "step-00000006"]
    assert len(list((run / "tensorboard").iterdir())) == 1


def test_tensorboard_reads_what_was_written_once_across_a_resume(start, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = MetricsConfig(similarity_every=0, peak_flops=1e12)
    start(steps=4, schedule=ScheduleConfig(shape="constant"), metrics=metrics)
    start(steps=6, schedule=ScheduleConfig(shape="constant"), metrics=metrics)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    written = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = list(enumerate(losses(tmp_path / "run"), start=1))
    assert [step for step, _ in written] == [step for step, _ in expected]
    assert [value for _, value in written] == pytest.approx([v for _, v in expected], rel=1e-6)
    assert "coefficient/layer_02" in events.Tags()["scalars"]


def test_mfu_is_what_its_formula_says(start, tmp_path):
    start("dense", steps=1)
    (line,) = lines(tmp_path / "run" / "metrics.jsonl")
    flops = 3 * LLAMA.flops_per_token((16 + 1) / 2)
    assert line["mfu"] == pytest.approx(flops * line["tokens_per_second"] / 1e12)


@pytest.mark.parametrize("recompute", ["all", 2, (1,)])
def test_recompute_changes_no_bit(start, tmp_path, recompute):
    start(name="kept", steps=3)
    start(name="again", steps=3, recompute=recompute)
    assert losses(tmp_path / "kept") == losses(tmp_path / "again")
    assert weights_hash(tmp_path / "kept" / "model") == weights_hash(tmp_path / "again" / "model")


@pytest.mark.parametrize("model", ["dense", "moe", "balanced"])
def test_a_stopped_run_goes_on_bit_for_bit(start, tmp_path, monkeypatch, model):
    changes = {"routing": RoutingConfig(bias_rate=0.01)} if model == "balanced" else {}
    start(model, name="whole", **changes)
    real = job.update

    def stop_in_step_3(optimizer, **kwargs):
        real(optimizer, **kwargs)
        if float(next(iter(optimizer.state.values()))["step"]) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(job, "update", stop_in_step_3)
        stopped = start(model, **changes)
    assert (stopped["step"], stopped["stopped_by"], stopped["model"]) == (3, "SIGTERM", None)
    resumed = start(model, **changes)
    assert (resumed["step"], resumed["resumed_from"]) == (6, 3)
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert losses(run) == losses(whole)
    assert weights_hash(run / "model") == weights_hash(whole / "model")
    for name in ("routing.jsonl", "similarity.jsonl"):
        assert (run / "routing" / name).read_bytes() == (whole / "routing" / name).read_bytes()


def test_a_finished_run_does_nothing_more(start, tmp_path):
    summary = start()
    before = (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns
    assert start() == summary
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_without_a_checkpoint_at_the_end_the_model_is_the_same(start, tmp_path):
    start(name="with")
    start(name="without", checkpoint=CheckpointConfig(every=0, at_end=False))
    assert list((tmp_path / "without" / "checkpoints").iterdir()) == []
    again = start(name="without", checkpoint=CheckpointConfig(every=0, at_end=False))
    assert again == json.loads((tmp_path / "without" / "summary.json").read_text())
    assert losses(tmp_path / "without") == losses(tmp_path / "with")
    assert weights_hash(tmp_path / "without" / "model") == weights_hash(tmp_path / "with" / "model")


def test_half_a_line_and_later_lines_are_cut_on_resume(start, tmp_path):
    constant = ScheduleConfig(shape="constant")
    start(name="whole", schedule=constant)
    start(steps=4, schedule=constant)
    metrics = tmp_path / "run" / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    start(schedule=constant)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_damaged_checkpoint_falls_back_to_the_one_before(start, tmp_path, capfd):
    start(name="whole")
    constant = {"checkpoint": CheckpointConfig(every=2, keep=3)}
    start(**constant)
    (tmp_path / "run" / "summary.json").unlink()
    state = tmp_path / "run" / "checkpoints" / "step-00000006" / "__0_0.distcp"
    content = bytearray(state.read_bytes())
    content[5000] ^= 4
    state.write_bytes(content)
    capfd.readouterr()
    assert start(**constant)["resumed_from"] == 4
    assert "step-00000006 is damaged" in capfd.readouterr().err
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("seed", {"seed": 1}),
        ("data.micro_batch", {"micro": 4}),
        ("data.accumulation", {"accumulation": 1}),
        ("model", {"model": "skywork"}),
        ("freeze", {"freeze": ("model.norm.weight",)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_resuming_with_another_model_or_order_is_refused(folders, start, field, changes):
    start(steps=2, schedule=ScheduleConfig(shape="constant"))
    data = TrainDataConfig(
        tokens=folders["tokens"],
        micro_batch=changes.pop("micro", 2),
        accumulation=changes.pop("accumulation", 2),
    )
    with pytest.raises(ConfigError, match=f"another {field} "):
        start(**{"data": data, **changes})


def test_a_changed_learning_rate_is_allowed_and_said(start, capfd):
    start(steps=2)
    capfd.readouterr()
    start(steps=3, optimizer=OptimizerConfig(lr=1e-3))
    said = capfd.readouterr().err
    assert "optimizer.lr = 0.001 (was 0.01)" in said
    assert "steps = 3 (was 2)" in said


def test_fewer_steps_than_were_done_are_refused(start):
    start(steps=3)
    with pytest.raises(ConfigError, match="already done 3"):
        start(steps=2)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_any_weight_moves(start, tmp_path, monkeypatch, bad):
    start(name="good", steps=3, checkpoint=CheckpointConfig(every=0))
    real = job.accumulate
    count = 0

    def spoil(model, *args, **kwargs):
        nonlocal count
        count += 1
        found = real(model, *args, **kwargs)
        if count == 4:
            target = found.loss if bad == "loss" else next(iter(model.parameters.values())).grad
            target.view(-1)[0] = math.nan
        return found

    monkeypatch.setattr(job, "accumulate", spoil)
    with pytest.raises(TrainingError, match=r"Step 4 has loss .* checkpoint is that of step 2"):
        start()
    state = newest(tmp_path / "run" / "checkpoints")
    assert state.step == 2
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    monkeypatch.setattr(job, "accumulate", real)
    assert start()["resumed_from"] == 2


def test_resume_never_refuses_a_folder_that_holds_anything(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(FolderError, match="resume is never"):
        start(resume="never")
    with pytest.raises(FolderError, match=r"no config\.toml"):
        start()
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_two_runs_in_one_folder_are_refused(start, tmp_path):
    with (
        job.RunFolder(tmp_path / "run", resume="auto"),
        pytest.raises(FolderError, match="Another process"),
    ):
        start()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "dense", "routing": RoutingConfig(bias_rate=0.1)}, "selection"),
        ({"recompute": (3,)}, "3 layers"),
        ({"recompute": 4}, "3 layers"),
    ],
    ids=["bias", "layer", "layers"],
)
def test_choices_that_do_not_fit_the_model_are_refused(start, changes, message):
    with pytest.raises(ConfigError, match=message):
        start(**changes)


def test_global_capacity_over_several_micro_batches_is_refused(start):
    with pytest.raises(ConfigError, match="global_batch"):
        start(routing=RoutingConfig(capacity_group="global_batch"))


def test_a_run_folder_that_holds_its_model_is_refused(folders, tmp_path):
    with pytest.raises(ConfigError, match="holds its input"):
        train(tiny_config(folders["moe"], folders["tokens"], folders["moe"].parent))


@pytest.fixture
def no_logs():
    """Torch logs each failure of a checkpoint at length, and pytest would keep it all."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


TWO_STEPS = {"steps": 2, "checkpoint": CheckpointConfig(every=1)}


def lose_nothing(start, tmp_path, model, choose) -> None:
    """Fill the disk at chosen writes of a run, and let it go on: it ends as if it had not."""
    with fault(sys.maxsize) as faults:
        start(model, name="whole", **TWO_STEPS)
    expected = weights_hash(tmp_path / "whole" / "model")
    for number in choose(faults.count):
        run = tmp_path / str(number)
        attempt = functools.partial(start, model, name=run.name, **TWO_STEPS)
        with fault(number) as faults:
            failure_of(attempt)
        assert faults.has_struck
        newest(run / "checkpoints")  # every state that is there must be whole
        attempt()
        assert weights_hash(run / "model") == expected
        assert [line["step"] for line in lines(run / "metrics.jsonl")] == [1, 2]
        shutil.rmtree(run)


def test_a_full_disk_loses_no_step_at_some_writes(no_logs, start, tmp_path):
    # Most writes are small ones inside a checkpoint, each of which test_training_state has in turn.
    lose_nothing(
        start,
        tmp_path,
        "dense",
        lambda count: (*range(1, count, count // 8), *range(count - 3, count + 1)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_a_full_disk_loses_no_step_at_any_write(no_logs, start, tmp_path, part):
    lose_nothing(start, tmp_path, "smallest", lambda count: range(1 + part, count + 1, 8))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, as it compiles
def test_compiling_moves_a_loss_by_rounding_only(folders, tmp_path):
    one_layer = tiny_folder(tmp_path / "model", LLAMA.replace(num_layers=1))
    for name, is_compiled in (("plain", False), ("compiled", True)):
        run = tmp_path / name
        train(tiny_config(one_layer, folders["tokens"], run, steps=3, compile=is_compiled))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_training_from_fp8_weights_says_that_it_widens_them(folders, tmp_path, capsys):
    quantize(QuantizeConfig(model=folders["moe"], out=tmp_path / "fp8"))
    capsys.readouterr()
    train(tiny_config(tmp_path / "fp8", folders["tokens"], tmp_path / "run", steps=1))
    assert "fp8 is FP8: its weights are widened" in capsys.readouterr().err.replace("\n", " ")
