"""Layers and links are timed as training runs them, and the planner goes by what was found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moesaic.cli.app import run
from moesaic.data.batches import Batch
from moesaic.data.tokenfolder import TokenFolder
from moesaic.errors import PlanError
from moesaic.measuring.config import MeasureConfig
from moesaic.measuring.links import Exchange, fit_line, measured_links, sizes
from moesaic.measuring.measure import measure, sorts_of_rows
from moesaic.measuring.rounds import Action, ProcessorTime, pooled, slowest, summary, time_rounds
from moesaic.measuring.units import Pass, Rows, Timed, Workload, distinct_units
from moesaic.moe.config import RoutingConfig
from moesaic.parallel.group import ALONE
from moesaic.parallel.world import World
from moesaic.planning.cluster import read_cluster
from moesaic.planning.cost import predict, step_costs
from moesaic.planning.job import Job
from moesaic.planning.layout import fit
from moesaic.planning.measured import MeasuredLink, MeasuredTable, MeasuredUnit
from moesaic.planning.plan import TrainPlan
from moesaic.planning.search import Question, search
from moesaic.planning.shape import read_shape, shape_of
from moesaic.training.sharded import ShardedModel
from moesaic.training.step import accumulate
from tests.ranks import run_ranks
from tests.tiny import LLAMA, TINY, VOCAB_SIZE, randomize, tiny_folder, token_ids
from tests.token_folders import write_token_folder

MOE = TINY["skywork moe"]
LENGTH, BATCH = 24, 2


class Fake:
    """A case whose actions say when they run."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def prepare(self):
        self.log.append(f"prepare {self.name}")

    def forward(self):
        return (Action("forward", lambda: self.log.append(f"forward {self.name}")),)

    def backward(self):
        return tuple(
            Action(part, lambda part=part: self.log.append(f"{part} {self.name}"))
            for part in ("first", "second")
        )


class Ticks:
    """A clock on which everything takes as long as it is told."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __enter__(self):
        pass

    def __exit__(self, *error):
        pass


class Work(TorchDispatchMode):
    """Counts numbers that operations read and write, instead of seconds."""

    def __init__(self):
        super().__init__()
        self.seconds = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, y)) if isinstance(t, torch.Tensor)]
        if func._schema.name not in VIEWS:
            self.seconds += sum(t.numel() for t in tensors)
            if "mm" in func._schema.name:
                self.seconds += args[-2].numel() * args[-1].shape[-1]
        return y


VIEWS = ("aten::detach", "aten::view", "aten::t", "aten::transpose", "aten::_unsafe_view")


def logged(rounds, warmup=0):
    log = []
    cases = [Fake(name, log) for name in "abcde"]
    samples = time_rounds(
        cases, rounds=rounds, warmup_rounds=warmup, clock=lambda case: Ticks(1.0), seed=3
    )
    return log, samples


def test_a_round_goes_through_every_case_forwards_and_then_back_in_reverse():
    log, samples = logged(4)
    for start in range(0, len(log), 20):
        there = log[start : start + 5]
        back = log[start + 5 : start + 20]
        order = [line.split()[1] for line in there]
        assert sorted(order) == list("abcde")
        assert {line.split()[0] for line in there} == {"forward"}
        parts = ("prepare", "first", "second")
        assert back == [f"{part} {name}" for name in reversed(order) for part in parts]
    assert {key: len(found) for key, found in samples.items()} == {
        (name, action): 4 for name in "abcde" for action in ("forward", "first", "second")
    }


def test_each_round_has_an_order_of_its_own_and_every_rank_the_same():
    log, _ = logged(6)
    orders = {tuple(log[start : start + 5]) for start in range(0, len(log), 20)}
    assert len(orders) > 3
    assert logged(6)[0] == log


def test_warm_up_is_run_but_not_counted():
    log, samples = logged(2, warmup=3)
    assert len(log) == 5 * 20
    assert all(len(found) == 2 for found in samples.values())


def test_medians_are_between_quartiles():
    assert summary([4.0, 1.0, 2.0, 3.0, 100.0]) == (3.0, 2.0)
    assert summary([7.0]) == (7.0, 0.0)


def test_units_take_all_ranks_samples_and_exchanges_the_slowest():
    ranks = [{("a", "x"): [1.0, 5.0]}, {("a", "x"): [3.0, 4.0], ("b", "x"): [1.0, 2.0]}]
    assert pooled([ranks[0], {("a", "x"): [3.0, 4.0]}]) == {("a", "x"): [1.0, 5.0, 3.0, 4.0]}
    assert slowest(ranks) == {("a", "x"): [3.0, 5.0], ("b", "x"): [1.0, 2.0]}


def test_the_processor_s_clock_does_not_count_waiting():
    watch = ProcessorTime()
    with watch:
        time.sleep(0.2)
    assert watch.seconds < 0.1


# --- Units --------------------------------------------------------------------------------------


def alone(spec):
    return World.join(fit(TrainPlan(), spec), torch.device("cpu"))


def rows(share=1.0, documents=None):
    ids = token_ids(BATCH, LENGTH)
    return Rows(ids, ids.roll(-1, dims=1), documents, share)


def counted(spec, sorts=None):
    """Every kind of unit of a model, by the work that it does."""
    world = alone(spec)
    sizes = {"dtype": torch.float32, "routing": RoutingConfig()}
    timed = [Timed.of(unit, world, sorts or [rows()], **sizes) for unit in distinct_units(spec)]
    cases = [case for one in timed for case in one.cases]
    samples = time_rounds(cases, rounds=1, warmup_rounds=1, clock=lambda case: Work())
    return {one.unit.kind: one.measured(samples) for one in timed}


@pytest.fixture(scope="module")
def moe():
    return counted(MOE)


def test_a_model_has_one_unit_of_each_kind_and_size():
    assert [(unit.name, unit.kind) for unit in distinct_units(MOE)] == [
        ("embedding", "embedding"),
        ("0.attention", "attention"),
        ("0.feed_forward", "experts"),
        ("head", "head"),
    ]
    mixed = MOE.replace(moe_layers=(1,), sliding_window=6, sliding_layers=(0, 2))
    assert [(unit.name, unit.kind, unit.layers) for unit in distinct_units(mixed)] == [
        ("embedding", "embedding", ()),
        ("0.attention", "attention", (0, 2)),
        ("0.feed_forward", "dense", ()),
        ("1.attention", "attention", (1,)),
        ("1.feed_forward", "experts", ()),
        ("head", "head", ()),
    ]


def test_what_is_recomputed_costs_as_much_again(moe):
    attention, experts = moe["attention"], moe["experts"]
    for choice in ("attention", "full"):
        assert 0.5 * attention.forward < attention.recompute[choice] < 1.2 * attention.forward
    assert 0.1 * experts.forward < experts.recompute["moe_activations"] < experts.recompute["full"]
    assert experts.recompute["full"] < 1.2 * experts.forward
    dense = counted(LLAMA)["dense"]
    assert 0 < dense.recompute["moe_activations"] < dense.recompute["full"] < 1.2 * dense.forward


def test_a_backward_pass_in_two_parts_does_at_least_the_work_of_one(moe):
    for kind in ("attention", "experts", "head"):
        unit = moe[kind]
        both = unit.input_gradient + unit.weight_gradient
        assert 0.98 * unit.backward <= both < 1.6 * unit.backward
        assert min(unit.input_gradient, unit.weight_gradient) > 0
    assert moe["embedding"].input_gradient == 0
    assert moe["embedding"].weight_gradient == moe["embedding"].backward


def test_the_first_micro_batch_adds_to_no_gradient(moe):
    for kind, unit in moe.items():
        model = Workload(
            next(u for u in distinct_units(MOE) if u.kind == kind),
            alone(MOE),
            rows(),
            dtype=torch.float32,
            routing=RoutingConfig(),
        ).model
        weights = sum(parameter.numel() for parameter in model.parameters())
        # Two are read and one is written.
        assert unit.summing == pytest.approx(3 * weights, rel=0.01)


def test_units_together_do_the_work_of_a_step_of_training(moe):
    world = alone(MOE)
    model = ShardedModel.build(world)
    randomize(model.stages[0].model)
    batch = Batch(rows().tokens_BS, rows().targets_BS, torch.zeros(BATCH, LENGTH).long())
    with Work() as work:
        accumulate(
            model,
            [batch],
            routing=RoutingConfig(),
            coefficients_L=torch.full((MOE.num_layers,), 0.01),
        )
    counts = {"embedding": 1, "attention": MOE.num_layers, "experts": MOE.num_layers, "head": 1}
    units = sum(
        count * (moe[kind].forward + moe[kind].backward - moe[kind].summing)
        for kind, count in counts.items()
    )
    assert units == pytest.approx(work.seconds, rel=0.03)


def test_two_passes_find_the_gradients_of_one():
    unit = next(unit for unit in distinct_units(MOE) if unit.kind == "experts")
    work = Workload(unit, alone(MOE), rows(), dtype=torch.float32, routing=RoutingConfig())
    found = []
    for way in ("none", "split"):
        one = Pass(work, way, way)
        work.model.zero_grad(set_to_none=True)
        for actions in (one.forward, one.prepare, one.backward):
            for action in actions() or ():
                action.run()
        found.append({name: p.grad.clone() for name, p in work.model.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(found[1][name], gradient)


def test_micro_batches_of_several_documents_count_by_their_share():
    unit = distinct_units(MOE)[1]
    documents = (torch.arange(LENGTH) > 9).long().expand(BATCH, -1)
    sorts = [rows(0.75), rows(0.25, documents)]
    sizes = {"dtype": torch.float32, "routing": RoutingConfig()}
    one = Timed.of(unit, alone(MOE), sorts, **sizes)
    seconds = {label: 1.0 + 2.0 * number for number, label in enumerate(one.shares)}
    samples = {}
    for case in one.cases:
        label = case.name.rpartition(" ")[0]
        for action in (*case.forward(), *case.backward()):
            samples[case.name, action.name] = [seconds.get(label, 5.0)] * 3
    found = one.measured(samples)
    assert found.forward == found.backward == 0.75 * 1 + 0.25 * 3
    assert found.update == 5.0
    masks = {case.workload.mask is None for case in one.cases if isinstance(case, Pass)}
    assert masks == {True, False}


def test_rows_of_a_token_folder_are_taken_with_their_documents(tmp_path):
    # Eight rows: the third and the fourth have a document's end inside.
    documents = [[5] * 40, [6] * 17, [7] * 71]
    folder = write_token_folder(
        tmp_path / "tokens", {"a": documents}, sequence_length=16, vocab_size=VOCAB_SIZE
    )
    config = MeasureConfig(model="x", tokens=folder, micro_batch=1)
    sorts = sorts_of_rows(config, MOE, torch.device("cpu"))
    rows_in_all = TokenFolder(folder).num_sequences("train")
    assert [sort.share for sort in sorts] == [1 - 2 / rows_in_all, 2 / rows_in_all]
    assert [int(sort.documents_BS.unique().numel()) for sort in sorts] == [1, 2]


# --- Links --------------------------------------------------------------------------------------


def test_a_line_through_points_of_a_line_is_that_line():
    points = [(float(size), 2e-5 + size / 3e9) for size in sizes(2**24)]
    line = fit_line(points)
    assert line.latency == pytest.approx(2e-5)
    assert line.bandwidth == pytest.approx(3e9)
    assert line.largest_residual < 1e-9


def test_no_line_has_a_latency_below_nothing():
    line = fit_line([(1e3, 1e-6), (1e6, 2e-3), (1e7, 3e-2)])
    assert line.latency == 0.0
    assert line.bandwidth > 0
    assert 0 < line.residual <= line.largest_residual
    assert fit_line([(1e6, 1e-3)]).bandwidth == pytest.approx(1e9)


def test_exchanges_of_a_kind_make_one_line_and_repeats_are_divided_out():
    def exchange(moved, repeats):
        return Exchange("gather", ALONE, 1, moved, repeats, lambda: None, f"gather {moved}")

    found = [exchange(1000, 8), exchange(1_000_000, 1)]
    samples = {("gather 1000", "exchange"): [8e-3], ("gather 1000000", "exchange"): [2e-3]}
    (link,) = measured_links(found, samples)
    assert link.points == ((1000.0, 1e-3, 0.0), (1_000_000.0, 2e-3, 0.0))
    assert link.seconds(1000) == pytest.approx(1e-3)
    assert link.seconds(1_000_000, times=2) == pytest.approx(3e-3, rel=0.01)


def check_pass_on():
    import torch.distributed as dist

    from moesaic.parallel.group import Group

    rank = dist.get_rank()
    x = torch.full((3,), float(rank))
    took_part = Group(3, rank, dist.group.WORLD).pass_on(x)
    return took_part, x[0].item()


def test_a_rank_hands_on_to_the_next_and_one_without_a_partner_does_nothing():
    assert run_ranks(3, check_pass_on) == [(True, 0.0), (True, 0.0), (False, 2.0)]


def check_measure(folder, out, tp):
    config = MeasureConfig(
        model=str(folder),
        out=Path(out),
        sequence=LENGTH,
        micro_batch=BATCH,
        compute_dtype="float32",
        tp=tp,
        ranks=2,
        rounds=2,
        warmup_rounds=1,
        largest_message=2**14,
    )
    return measure(config)


@pytest.mark.parametrize("tp", [1, 2])
def test_two_ranks_measure_their_shares_and_every_exchange(tmp_path, tp):
    folder = tiny_folder(tmp_path / "model", MOE)
    out = tmp_path / "table.json"
    both = run_ranks(2, check_measure, str(folder), str(out), tp)
    assert both[0]["units"] == both[1]["units"]
    table = MeasuredTable.load(out)
    assert json.loads(json.dumps(table.to_json())) == json.loads(out.read_text())
    table.save(tmp_path / "again.json")
    assert MeasuredTable.load(tmp_path / "again.json") == table
    assert (table.ranks, table.about["ranks"]) == (2, 2)
    kinds = {link.kind: link for link in table.links}
    assert set(kinds) == {"gather", "scatter_sum", "all_to_all", "sum", "send"}
    assert {(link.ranks, link.near) for link in table.links} == {(2, 2)}
    assert all(link.bandwidth > 0 and len(link.points) == 2 for link in table.links)
    experts = next(unit for unit in table.units if unit.kind == "experts")
    assert (experts.conditions["tp"], experts.conditions["expert_ranks"]) == (tp, tp)
    # Found again by the job that it was measured for, and by no other.
    shape = shape_of(MOE)
    job = Job(
        sequence=LENGTH, micro_batch=BATCH, global_batch=4 * BATCH, tp=tp, dp=2 // tp, dtype="fp32"
    )
    assert table.find("1.feed_forward", shape, job) == experts
    assert table.find("1.feed_forward", shape, job.replace(micro_batch=1)) is None
    found = predict(shape, job, read_cluster("cpu2"), table=table)
    names = {"embedding", "attention", "experts", "head", "optimizer"}
    names |= {"sums of gradients", "gathers of weights"} if tp == 1 else set()
    assert set(found.measured) == names
    assert found.by_formulas == ()


# --- The planner --------------------------------------------------------------------------------


def table_of(spec, **fields):
    """Seconds that are easy to add up."""
    conditions = {"sequence": LENGTH, "micro_batch": BATCH, "tp": 1, "cp": 1, "dtype": "fp32"}
    units = tuple(
        MeasuredUnit(
            kind=unit.kind,
            conditions=conditions,
            hidden=spec.hidden_dim,
            shape=unit.shape,
            layers=unit.layers,
            forward=1.0,
            input_gradient=2.0 * (unit.kind != "embedding"),
            weight_gradient=3.0,
            backward=4.0,
            summing=1.0,
            recompute={"attention": 1.0, "full": 1.0},
            update=0.5,
        )
        for unit in distinct_units(spec)
    )
    return MeasuredTable(device="this one", units=units, **{"ranks": 2, **fields})


def job_of(**fields):
    sizes = {"sequence": LENGTH, "micro_batch": BATCH, "global_batch": 8, "dtype": "fp32"}
    return Job(**{**sizes, **fields})


def test_a_step_on_one_rank_is_the_sum_of_its_units():
    shape, cluster = shape_of(MOE), read_cluster("cpu2")
    found = predict(shape, job_of(), cluster, table=table_of(MOE))
    units = 2 * MOE.num_layers + 2
    # Four micro-batches, the first of which adds to nothing.
    assert found.pipeline == pytest.approx(units * (4 * (1 + 4) - 1))
    assert found.optimizer == pytest.approx(0.5 * units)
    assert set(found.measured) == {"embedding", "attention", "experts", "head", "optimizer"}
    again = predict(shape, job_of(), cluster, table=table_of(MOE), recompute="full")
    assert again.pipeline - found.pipeline == pytest.approx(4 * 2 * MOE.num_layers)


def test_only_schedules_that_split_backward_passes_pay_for_two():
    unit = table_of(MOE).units[1]
    assert sum(unit.in_step(job_of())) == pytest.approx(1 + 4 - 1 / 4)
    assert sum(unit.in_step(job_of(pp=2))) == pytest.approx(1 + 4 - 1 / 4)
    split = unit.in_step(job_of(pp=2, schedule="zb1p"))
    assert split == pytest.approx((1, 2, 3 - 1 / 4))


def test_links_that_were_measured_carry_messages_and_gradients():
    def link(kind, seconds):
        return MeasuredLink(kind=kind, ranks=2, near=2, latency=seconds, bandwidth=1e30)

    spec = MOE.replace(tied_embeddings=True)
    shape, cluster = shape_of(spec), read_cluster("cpu2")
    without = table_of(spec)
    links = (link("send", 0.25), link("sum", 7.0), link("scatter_sum", 5.0), link("gather", 3.0))
    table = table_of(spec, links=links)
    stages = ((0, 3), (3, 8))
    pair = [predict(shape, job_of(pp=2), cluster, stages=stages, table=t) for t in (table, without)]
    assert "sends to the next stage" in pair[0].measured
    assert "sends to the next stage" in pair[1].by_formulas
    # There and back once at least, and the tied table's gradients.
    assert pair[0].pipeline > pair[1].pipeline + 2 * 0.25 * 0.99
    assert pair[0].communication == pytest.approx(7.0)
    shared = step_costs(shape, job_of(dp=2), cluster, (0, 8), table=table)
    assert (shared.reduce, shared.gather) == (pytest.approx(10.0), pytest.approx(6.0))


def test_a_tied_table_is_updated_once_on_a_rank_with_both_ends():
    spec = MOE.replace(tied_embeddings=True)
    table, cluster = table_of(spec), read_cluster("cpu2")
    one = step_costs(shape_of(spec), job_of(), cluster, (0, 8), table=table)
    units = 2 * MOE.num_layers + 2
    assert 0.5 * (units - 1) < one.optimizer < 0.5 * (units - 1) + 0.1


def test_a_search_looks_only_at_micro_batches_that_were_measured():
    found = search(
        Question(
            shape=shape_of(MOE),
            cluster=read_cluster("cpu2"),
            sequence=LENGTH,
            global_batch=16,
            fixed={"dtype": "fp32", "tp": 1},
            table=table_of(MOE),
        ),
        count=8,
    )
    assert {answer.job.micro_batch for answer in found.answers} == {BATCH}
    assert all("attention" in answer.prediction.measured for answer in found.answers)


OTHERS = {
    "another model": ({"shape": shape_of(LLAMA)}, "attention with kv_heads 4, not 2"),
    "another width": ({"shape": read_shape("smollm2-135m")}, "hidden 32, not 576"),
    "another sequence": ({"sequence": 48}, "sequence 24, but sequence 48"),
    "another micro-batch": (
        {"fixed": {"dtype": "fp32", "micro_batch": 1}},
        "micro-batch 2, but micro-batch 1",
    ),
    "another dtype": ({"fixed": {}}, "dtype fp32, but dtype bf16"),
    "another sort of device": (
        {"cluster": read_cluster("2xH100")},
        "measured on this one, but a GPU is asked for",
    ),
    "another number of ranks": ({"cluster": read_cluster("cpu4")}, "by 2 ranks at once"),
}


@pytest.mark.parametrize(("changes", "says"), OTHERS.values(), ids=OTHERS)
def test_a_table_for_something_else_is_refused_with_what_differs(changes, says, tmp_path):
    table_of(MOE, about={"device_type": "cpu"}).save(tmp_path / "table.json")
    asked = {
        "shape": shape_of(MOE),
        "cluster": read_cluster("cpu2"),
        "sequence": LENGTH,
        "global_batch": 16,
        "fixed": {"dtype": "fp32"},
        "table": MeasuredTable.load(tmp_path / "table.json"),
    }
    Question(**asked)
    with pytest.raises(PlanError) as error:
        Question(**{**asked, **changes})
    assert says in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


GARBLED = {
    "a kind": ("kind", "norm", "kind, which is 'norm'"),
    "a time": ("forward", -1.0, "0 or more"),
    "a condition": ("micro_batch", [2], "micro_batch, which is"),
}


@pytest.mark.parametrize(("key", "value", "says"), GARBLED.values(), ids=GARBLED)
def test_a_garbled_table_is_refused(key, value, says, tmp_path):
    raw = table_of(MOE).to_json()
    raw["units"][1][key] = value
    path = tmp_path / "table.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(PlanError, match=says):
        MeasuredTable.load(path)


# --- The command --------------------------------------------------------------------------------


def command(folder, out, *words, rounds=2):
    sizes = ["--sequence", str(LENGTH), "--micro-batch", str(BATCH), "--rounds", str(rounds)]
    return ["measure", "--model", str(folder), "--out", str(out), *sizes, *words]


def test_the_command_s_table_is_what_the_planner_then_predicts_from(tmp_path, capsys):
    folder, out = tiny_folder(tmp_path / "model", MOE), tmp_path / "table.json"
    assert run(command(folder, out, "--compute-dtype", "float32")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "1 rank of" in lines[0]
    assert [line.split()[0] for line in lines[2:6]] == ["embedding", "attention", "experts", "head"]
    table = MeasuredTable.load(out)
    assert {"when", "torch", "threads_a_rank", "processors", "load_average"} <= set(table.about)
    words = ["--cluster", "cpu1", "--sequence", str(LENGTH), "--global-batch", "8"]
    words += ["--dtype", "fp32", "--measured", str(out)]
    assert run(["plan", "train", str(folder), *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["answer"]
    units = {unit.kind: unit for unit in table.units}
    counts = {"embedding": 1, "attention": 3, "experts": 3, "head": 1}
    step = sum(
        count * (4 * (units[kind].forward + units[kind].backward) - units[kind].summing)
        for kind, count in counts.items()
    )
    assert told["pipeline_seconds"] == pytest.approx(step)
    assert "experts" in told["measured"]["parts"]
    assert told["measured"]["by_formulas"] == []
    assert run(["plan", "train", str(folder), *words]) == 0
    assert "measured on " in capsys.readouterr().out
    assert run(["plan", "train", str(folder), *words, "--fix", "layers=3", "--json"]) == 0
    given = json.loads(capsys.readouterr().out)["answer"]
    assert given["pipeline_seconds"] == told["pipeline_seconds"]
    assert run(["plan", "train", str(folder), *words, "--fix", "microbatch=1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "micro-batch 2, but micro-batch 1 is asked for" in error


BAD = {
    "no model": (["--model", "nowhere"], "nowhere"),
    "no length": (["--sequence", "none"], "Say how long sequences are"),
    "no length at all": (["--sequence", "0"], "at least 1"),
    "ranks in groups": (["--ranks", "3", "--tp", "2"], "Make ranks a multiple of tp"),
    "one rank in groups": (["--tp", "2"], "Start a multiple of tp"),
    "no rounds": (["--rounds", "0"], "at least 1"),
    "no folder": (["--out", "nowhere/table.json"], "nowhere is no folder"),
    "a folder": (["--out", "."], "folder or a device"),
    "waiting": (["--clock", "processor", "--tp", "2", "--ranks", "2"], "counts no waiting"),
    "no GPU": (["--device", "cuda"], "finds no GPU"),
    "no tokens": (["--tokens", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize(("words", "says"), BAD.values(), ids=BAD)
def test_bad_input_gets_one_line(words, says, tmp_path, capsys):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is one")
    folder = tiny_folder(tmp_path / "model", MOE, tokenizer=False)
    flags = {"--model": str(folder), "--sequence": "16", "--out": str(tmp_path / "table.json")}
    flags |= dict(zip(words[::2], words[1::2], strict=True))
    assert run(["measure", *(word for flag in flags.items() for word in flag)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error
    assert not (tmp_path / "table.json").exists()


def test_an_interrupted_measurement_leaves_nothing(tmp_path):
    folder, out = tiny_folder(tmp_path / "model", MOE), tmp_path / "out" / "table.json"
    out.parent.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "moesaic", *command(folder, out, rounds=100_000)],
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    time.sleep(8)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip() == "moesaic: interrupted"
    assert list(out.parent.iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_measured_by_its_events(tmp_path):
    folder = tiny_folder(tmp_path / "model", MOE)
    found = measure(
        MeasureConfig(
            model=str(folder), out=tmp_path / "t.json", sequence=64, rounds=2, device="cuda"
        )
    )
    assert found["ranks"] is None
    assert all(unit["forward"] > 0 and unit["backward"] > 0 for unit in found["units"])


def test_the_page_about_the_file_names_every_key():
    page = (Path(__file__).parents[1] / "docs" / "measure.md").read_text()
    link = MeasuredLink(kind="sum", ranks=2, near=2, latency=0.0, bandwidth=1.0)
    raw = table_of(MOE, links=(link,)).to_json()
    for part in (raw, *raw["units"], *raw["links"]):
        for key in part:
            assert f"`{key}`" in page, key
