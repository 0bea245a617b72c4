"""The cost model against counts by hand, its limits, measured tables, and published step times."""

import csv
import json
import math
from dataclasses import replace

import pytest

from moesaic.errors import PlanError
from moesaic.planning.cluster import read_cluster
from moesaic.planning.cost import (
    RECOMPUTE,
    Machine,
    default_stages,
    distinct_ranks,
    held_parameters,
    predict,
    step_costs,
    unit_costs,
    unit_names,
)
from moesaic.planning.job import Job, job_of
from moesaic.planning.measured import MeasuredTable
from moesaic.planning.plan import TrainPlan
from moesaic.planning.published_time import (
    NotModelledError,
    check_time,
    compare_time,
    read_rows,
    setting_of,
)
from moesaic.planning.shape import read_shape

SKYWORK = read_shape("skywork-moe-146b")
LLAMA = read_shape("llama3-70b")
A800S = read_cluster("192x8xA800")


def skywork_job(**changes):
    sizes = {"sequence": 8192, "global_batch": 4096, "pp": 12, "tp": 4, "dp": 32}
    return Job(**(sizes | changes))


def part(costs, name):
    return next(cost for cost in costs if cost.name == name)


def perfect(text):
    """A cluster without losses: products at their peak, links and memory at their bandwidth."""
    cluster = read_cluster(text)
    (node, count), *_ = cluster.nodes
    device = replace(
        node.device,
        matmul_efficiency=dict.fromkeys(node.device.matmul_flops, 1.0),
        sustained=1.0,
        memory_efficiency=1.0,
        flash_efficiency=(1.0, 1.0),
        units=0,
        launch_seconds=0.0,
    )
    return replace(cluster, nodes=((replace(node, device=device, link_efficiency=1.0), count),))


def test_units_stand_in_a_plan_s_order():
    assert unit_names(SKYWORK)[:3] == ["embedding", "0.attention", "0.feed_forward"]
    assert unit_names(SKYWORK)[-1] == "head"
    assert [cost.name for cost in unit_costs(SKYWORK, skywork_job(), A800S)] == unit_names(SKYWORK)


def test_a_perfect_device_needs_the_time_of_the_model_s_operations():
    job = Job(sequence=8192, global_batch=1)
    costs = unit_costs(LLAMA, job, perfect("1xH100"))
    products = sum(cost.parts.get("products", 0.0) for cost in costs)
    core = sum(cost.parts.get("attention", 0.0) for cost in costs)
    expected = LLAMA.flops_per_token(8192) * 8192 / 989.4e12
    # Deep products lose little to their depth, and fused attention computes scores twice backward.
    assert expected < products + core < 1.12 * expected


def test_every_part_of_skywork_s_layer_has_the_size_of_the_reference():
    costs = unit_costs(SKYWORK, skywork_job(framework="megatron"), A800S)
    attention, experts = part(costs, "0.attention"), part(costs, "0.feed_forward")
    # 57 MB each way and layer over 200 GB/s, 0.28 ms, dispatch and combine together.
    machine = Machine.of(perfect("192x8xA800"), skywork_job())
    one_way = machine.all_to_all(2048 * 2 * 2 * 4608, machine.experts)
    assert 2 * (one_way - machine.latency(machine.experts)) == pytest.approx(0.28e-3, rel=0.02)
    # About 12 ms of forward computation at half the peak: a bit less at what products reach.
    assert 0.006 < attention.forward + experts.forward < 0.012
    # The head is 0.65 of a layer.
    layer = attention.parts["products"] + attention.parts["attention"] + experts.parts["products"]
    assert part(costs, "head").parts["products"] / layer == pytest.approx(0.65, rel=0.15)


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_tensor_parallel_ranks_share_the_work_and_pay_for_exchanges(tp):
    job = Job(sequence=4096, global_batch=8)
    alone = unit_costs(LLAMA, job, perfect("8xH100"))
    split = unit_costs(LLAMA, job.replace(tp=tp), perfect("8xH100"))
    for name in ("0.feed_forward", "head"):
        assert part(split, name).parts["products"] == pytest.approx(
            part(alone, name).parts["products"] / tp, rel=0.1
        )
    # A gather and a sum forward, the same backward, each (t - 1) / t of the micro-batch.
    moved = 4 * 4096 * 8192 * 2 * (tp - 1) / tp
    exchanged = part(split, "0.feed_forward").parts["communication"]
    machine = Machine.of(perfect("8xH100"), job.replace(tp=tp))
    assert exchanged == pytest.approx(moved / 450e9 + 4 * machine.latency(machine.tensor))
    assert part(alone, "0.feed_forward").parts["communication"] == 0


@pytest.mark.parametrize(
    ("over", "ep", "copies", "etp"), [("edp", None, 4, 1), ("ep", 16, 16, 1), ("etp", 8, 8, 4)]
)
def test_experts_exchange_what_the_reference_counts(over, ep, copies, etp):
    cluster = perfect("192x8xA800")
    job = skywork_job(experts_over=over, ep=ep, deduplicate=False)
    cost = part(unit_costs(SKYWORK, job, cluster), "0.feed_forward")
    machine = Machine.of(cluster, job)
    rows = 2048 * 2 * 4608 * 2
    one_way = machine.all_to_all(rows, machine.experts)
    expected = 4 * one_way
    if etp > 1:
        expected += 4 * machine.gather(rows * etp, machine.expert_columns)
    assert job.expert_ranks == copies
    assert cost.parts["communication"] == pytest.approx(expected)


def test_experts_across_nodes_cost_more_than_inside_one():
    inside = part(unit_costs(SKYWORK, skywork_job(), A800S), "0.feed_forward")
    across = part(
        unit_costs(SKYWORK, skywork_job(experts_over="ep", ep=16), A800S), "0.feed_forward"
    )
    # 3.0 ms over RoCE against 0.28 ms over NVLink, forward and as much backward.
    assert across.parts["communication"] > 6 * inside.parts["communication"]


def test_a_token_meets_the_distinct_ranks_that_drawing_counts():
    # Skywork: 16 experts on 4 ranks, 2 chosen.
    assert distinct_ranks(16, 2, 4) == pytest.approx(4 * (1 - 66 / 120))
    assert distinct_ranks(8, 2, 8) == pytest.approx(2)
    assert distinct_ranks(8, 8, 4) == 4
    assert distinct_ranks(8, 2, 1) == 1


def test_an_uneven_load_costs_the_fullest_rank_s_time():
    job = skywork_job()
    even = part(unit_costs(SKYWORK, job, A800S), "0.feed_forward")
    uneven = part(unit_costs(SKYWORK, job.replace(load_mean=1.5), A800S), "0.feed_forward")
    assert uneven.seconds == pytest.approx(1.5 * even.seconds, rel=0.12)
    capped = job.replace(load_mean=1.5, capacity_factor=1.0)
    assert part(unit_costs(SKYWORK, capped, A800S), "0.feed_forward").seconds == even.seconds


def test_recompute_costs_from_nothing_to_a_whole_forward_pass():
    for framework in ("moesaic", "megatron"):
        costs = unit_costs(SKYWORK, skywork_job(framework=framework), A800S)
        attention, experts = part(costs, "5.attention"), part(costs, "5.feed_forward")
        for cost in (attention, experts):
            assert cost.recompute["none"] == 0
            assert cost.recompute["full"] == cost.forward
        assert attention.recompute["moe_activations"] == experts.recompute["attention"] == 0
        assert 0 < experts.recompute["moe_activations"] < experts.forward
    # Megatron's selective recompute is the core alone, Moesaic's the whole half.
    assert attention.recompute["attention"] < attention.forward
    moesaic = unit_costs(SKYWORK, skywork_job(), A800S)
    assert (
        part(moesaic, "5.attention").recompute["attention"] == part(moesaic, "5.attention").forward
    )


def test_fp8_is_faster_and_not_twice_as_fast():
    job = Job(sequence=8192, global_batch=8, tp=8)
    cluster = read_cluster("8xH100")
    slow, fast = (
        part(unit_costs(LLAMA, job.replace(dtype=dtype), cluster), "0.feed_forward").seconds
        for dtype in ("bf16", "fp8")
    )
    assert 0.5 < fast / slow < 0.9
    with pytest.raises(PlanError, match=r"A100 has no fp8 matrix products\. Use bf16 or fp32"):
        unit_costs(LLAMA, job.replace(dtype="fp8"), read_cluster("8xA100"))


def test_products_of_odd_sizes_waste_tiles_and_small_ones_do_not_fill_a_device():
    machine = Machine.of(read_cluster("1xH100"), Job(sequence=1, global_batch=1))

    def rate(rows, inputs, outputs):
        return 2 * rows * inputs * outputs / machine.product(rows, inputs, outputs)

    best = rate(8448, 8192, 8192)
    assert best / 989.4e12 == pytest.approx(0.803 * 0.78, rel=0.05)
    assert rate(8448, 256, 8192) < 0.8 * best
    assert rate(128, 8192, 1024) < 0.2 * best
    assert rate(129, 8192, 8192) < rate(256, 8192, 8192)
    # A few rows are bound by reading the weights, more or less.
    read = machine.moved(2 * 8192 * 8192)
    assert read <= machine.product(8, 8192, 8192) < 1.5 * read


def test_unfused_attention_costs_more():
    job = Job(sequence=2048, global_batch=1, micro_batch=1, framework="megatron")
    shape, cluster = read_shape("gpt3-175b"), read_cluster("8xA100")
    fused, unfused = (
        part(unit_costs(shape, job.replace(attention_core=core), cluster), "0.attention")
        for core in ("fused", "unfused")
    )
    assert unfused.parts["attention"] > 2 * fused.parts["attention"]


def test_context_parallel_ranks_share_the_positions():
    job = Job(sequence=131072, global_batch=1)
    cluster = read_cluster("8xH100")
    one = part(unit_costs(LLAMA, job, cluster), "0.attention").seconds
    eight = part(unit_costs(LLAMA, job.replace(cp=8), cluster), "0.attention").seconds
    assert one / 8 <= eight < 1.1 * one / 8


def test_ranks_hold_all_parameters_between_them():
    shape = read_shape("deepseek-v3")
    job = Job(sequence=4096, global_batch=64, tp=4, dp=16, experts_over="ep", ep=64)
    dense, experts = held_parameters(shape, job, (0, 2 * 61 + 2))
    assert 64 * experts == sum(
        layer.feed_forward.experts * layer.feed_forward.expert_parameters(7168)
        for layer in shape.layers[3:]
    )
    # Norms, routers and latents are on every rank.
    assert 4 * dense > shape.parameters() - 64 * experts
    assert 4 * dense == pytest.approx(shape.parameters() - 64 * experts, rel=0.15)


def test_the_price_of_edp_is_the_reference_s():
    """2.94 billion parameters a rank: 17.7 GB a step, 1.4 s at 12.5 GB/s."""
    job = skywork_job(framework="megatron")
    middle = (1 + 2 * 20, 1 + 2 * 20 + 2 * 4)
    dense, experts = held_parameters(SKYWORK, job, middle)
    per_layer = (dense + experts) / 4
    assert per_layer == pytest.approx(700.7e6, rel=0.01)
    cost = step_costs(SKYWORK, job, A800S, middle)
    moved = 6 * (dense + experts) * 31 / 32
    # Two ranks of the group are in a node, and both ports carry its ring.
    assert cost.reduce + cost.gather == pytest.approx(moved / (2 * 12.5e9 * 0.85), rel=0.03)


def test_default_stages_count_the_ends_where_that_divides():
    assert [end - start for start, end in default_stages(LLAMA, 4)] == [41, 40, 40, 41]
    large = default_stages(read_shape("llama3-405b"), 16)
    assert [(end - start) / 2 for start, end in large] == [7.5, *[8] * 14, 7.5]
    layers = [round((end - start) / 2 - 0.1) for start, end in default_stages(SKYWORK, 12)]
    assert sorted(layers) == [4] * 8 + [5] * 4
    with pytest.raises(PlanError, match="Use fewer stages"):
        default_stages(SKYWORK, 53)


def test_a_step_of_skywork_takes_more_than_its_operations_and_less_than_twice():
    job = skywork_job()
    prediction = predict(SKYWORK, job, A800S)
    ideal = SKYWORK.flops_per_token(8192) * job.step_tokens / (1536 * 312e12)
    assert 1.8 * ideal < prediction.seconds < 3 * ideal
    assert not prediction.is_bound
    full = predict(SKYWORK, job, A800S, recompute="full")
    assert 1.2 < full.seconds / prediction.seconds < 1.4
    some = predict(SKYWORK, job, A800S, recompute={0: "full", "1.attention": "attention"})
    assert prediction.seconds < some.seconds < full.seconds


def test_hidden_communication_costs_less():
    job = skywork_job()
    hidden = predict(SKYWORK, job, A800S)
    shown = predict(SKYWORK, job.replace(overlap_gradients=False), A800S)
    assert 0 < hidden.communication < shown.communication
    assert shown.seconds - hidden.seconds == pytest.approx(
        shown.communication - hidden.communication
    )


def test_sharing_weights_costs_their_gathering():
    job = Job(sequence=4096, global_batch=64, dp=64)
    shape, cluster = read_shape("llama3-8b"), read_cluster("64xA800")
    times = [predict(shape, job.replace(zero=zero), cluster).seconds for zero in (1, 2, 3)]
    assert times[0] <= times[1] < times[2]


def test_a_stage_on_slower_devices_takes_longer():
    job = Job(sequence=4096, global_batch=32, pp=2, tp=4)
    shape = read_shape("skywork-13b")
    mixed = predict(shape, job, read_cluster("4xH100+4xA100"))
    fast, slow = mixed.stage_seconds
    assert slow.forward > 1.5 * fast.forward
    straddling = predict(shape, job, read_cluster("2xH100+6xA100"))
    assert straddling.stage_seconds[0].forward > 1.5 * fast.forward


def test_a_cluster_that_is_too_small_is_refused():
    with pytest.raises(PlanError, match="needs 1536 devices, but 8xA100 has 8"):
        predict(SKYWORK, skywork_job(), read_cluster("8xA100"))


def test_a_measured_table_takes_the_place_of_formulas(tmp_path):
    job = Job(sequence=128, global_batch=4, micro_batch=2)
    shape, cluster = read_shape("smollm2-135m"), read_cluster("cpu2")
    formulas = unit_costs(shape, job, cluster)
    raw = {
        "format": "moesaic-measured",
        "version": 1,
        "device": "this one",
        "units": [
            {
                "kind": "attention",
                "hidden": 576,
                "sequence": 128,
                "micro_batch": 2,
                "tp": 1,
                "dtype": "bf16",
                "forward": 0.25,
                "input_gradient": 0.5,
                "weight_gradient": 0.125,
                "recompute": {"attention": 0.25, "full": 0.3},
            },
            {
                "kind": "dense",
                "hidden": 576,
                "layers": [3],
                "forward": 1.0,
                "input_gradient": 1.0,
                "weight_gradient": 1.0,
            },
        ],
    }
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(raw))
    table = MeasuredTable.load(path)
    costs = unit_costs(shape, job, cluster, table=table)
    assert part(costs, "7.attention").seconds == 0.875
    assert part(costs, "7.attention").recompute == {
        "none": 0.0,
        "moe_activations": 0.0,
        "attention": 0.25,
        "full": 0.3,
    }
    assert part(costs, "3.feed_forward").seconds == 3.0
    assert part(costs, "4.feed_forward") == part(formulas, "4.feed_forward")
    assert part(costs, "head") == part(formulas, "head")
    # Other conditions, other seconds: the formulas again.
    other = unit_costs(shape, job.replace(micro_batch=1), cluster, table=table)
    assert part(other, "7.attention").seconds != 0.875
    path.write_text(json.dumps(table.to_json()))
    assert MeasuredTable.load(path) == table


BAD_TABLES = {
    "text": ("no", "not readable JSON"),
    "format": ('{"format": "other"}', "does not say"),
    "version": ('{"format": "moesaic-measured", "version": 2}', "has version 2"),
    "units": ('{"format": "moesaic-measured", "version": 1, "units": [{}]}', "'forward'"),
}


@pytest.mark.parametrize(("text", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_damaged_table_is_refused(tmp_path, text, message):
    path = tmp_path / "measured.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        MeasuredTable.load(path)


def test_a_plan_becomes_a_job():
    plan = TrainPlan(pp=2, dp=2, tp=2, ep=2, schedule="zbv", micro_batch=3, zero=2)
    job = job_of(plan, sequence=64, global_batch=24)
    assert (job.stages, job.micro_batches, job.world_size) == (4, 4, 8)
    assert job.expert_data_ranks == plan.expert_data_ranks
    assert job_of(TrainPlan(), sequence=8, global_batch=6, micro_batch=2).micro_batches == 3


BAD_JOBS = {
    "batch": ({"global_batch": 100}, "Use a multiple of 32"),
    "zero": ({"pp": 0}, "pp is 0"),
    "experts": ({"experts_over": "ep", "ep": 48}, "must be a divisor"),
    "dtype": ({"dtype": "int8"}, "must be one of 'bf16', 'fp8', 'fp32'"),
    "load": ({"load_mean": 0.5}, "at least the mean"),
    "capacity": ({"capacity_factor": 0.0}, "above 0"),
    "shard": ({"shard": 5}, "must be a divisor"),
    "stages": ({"schedule": "zbv", "interleave": 3}, "2 stages on each"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_JOBS.values(), ids=BAD_JOBS)
def test_a_job_that_contradicts_itself_is_refused_in_one_line(changes, message):
    with pytest.raises(PlanError, match=message) as caught:
        skywork_job(**changes)
    assert "\n" not in str(caught.value)


ROW = {
    "id": "R1",
    "group": "made up",
    "source": "nobody",
    "model": "Llama-3-70B",
    "gpu": "H100",
    "n_gpus": "64",
    "precision": "BF16",
    "seq": "8192",
    "mbs": "1",
    "gbs": "128",
    "TP": "4",
    "PP": "4",
    "VPP": "5",
    "CP": "2",
    "recompute": "",
    "step_time_s": "15.0",
}


def test_a_published_row_is_a_job():
    setting = setting_of(ROW)
    assert setting.shape.parameters() == LLAMA.parameters()
    assert (setting.job.dp, setting.job.interleave, setting.job.micro_batches) == (2, 5, 64)
    assert setting.cluster.ranks == 64
    assert setting.seconds == 15.0
    assert setting_of(ROW).recompute["4.attention"] == "none"
    speed = ROW | {"step_time_s": "", "tok_s_gpu": "1000"}
    assert setting_of(speed).seconds == pytest.approx(128 * 8192 / 64 / 1000)


RECOMPUTED = {
    "full": ("full", "full", "full"),
    "none stated": ("none", "none", "none"),
    "selective (core_attn)": ("attention", "none", "attention"),
    "moe_act + layernorm": ("none", "moe_activations", "none"),
    "mla_up_proj, mlp": ("attention", "full", "attention"),
    "full, block, 2 layers": ("full", "full", "none"),
}


@pytest.mark.parametrize("text", RECOMPUTED)
def test_what_a_row_recomputes_is_read_by_unit(text):
    attention, network, third = RECOMPUTED[text]
    recompute = setting_of(ROW | {"recompute": text}).recompute
    # Layers 0 to 3 are a stage.
    assert recompute["0.attention"] == attention
    assert recompute["1.feed_forward"] == network
    assert recompute["2.attention"] == third


def test_a_model_without_a_preset_is_made_of_its_columns():
    columns = {"layers": "4", "hidden": "64", "ffn": "256", "heads": "4", "vocab": "100 (assumed)"}
    shape = setting_of(ROW | {"model": "GPT-tiny", "PP": "1", "VPP": ""} | columns).shape
    assert shape.parameters() == 4 * (4 * 64**2 + 2 * 64 * 256 + 4 * 64) + 2 * 100 * 64 + 2 * 64
    moe = columns | {"ffn": "96", "experts": "8", "topk": "2", "kv_heads": "2"}
    shape = setting_of(ROW | {"model": "Anything", "PP": "1", "VPP": ""} | moe).shape
    assert shape.layers[0].feed_forward.parameters(64) == 8 * 64 + 8 * 3 * 64 * 96


NOT_MODELLED = {
    "batch": ({"gbs": ""}, "lacks gbs"),
    "gpu": ({"gpu": "TPUv5"}, "no device that the planner knows"),
    "mesh": ({"TP": "3"}, "does not divide 64"),
    "model": ({"model": "Unheard-of"}, "no preset is like"),
    "mamba": (
        {"model": "Nemotron-H", "layers": "4", "hidden": "8", "ffn": "8", "heads": "1"}
        | {"vocab": "9"},
        "no attention",
    ),
    "fp4": ({"precision": "NVFP4"}, "products in NVFP4"),
    "offload": ({"recompute": "offload alpha=0.4"}, "offloaded"),
    "stages": ({"recompute": "some stages"}, "not stated by layer"),
    "secret": ({"recompute": "not published"}, "not published"),
}


@pytest.mark.parametrize(("changes", "message"), NOT_MODELLED.values(), ids=NOT_MODELLED)
def test_a_row_that_cannot_be_modelled_says_why(changes, message):
    with pytest.raises(NotModelledError, match=message):
        setting_of(ROW | changes)
    check = check_time([ROW | changes])
    assert message in check.not_modelled["R1"]


def test_errors_stand_beside_the_null_and_the_noise(tmp_path):
    path = tmp_path / "runs.csv"
    rows = [ROW | {"id": f"R{n}", "step_time_s": f"{14 + n}"} for n in range(3)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(ROW))
        writer.writeheader()
        writer.writerows(rows)
    check = check_time(read_rows(path))
    (error,) = check.by("group")
    assert error.rows == 3
    # The null is right at the median row, and off by 1/15 of its MFU at the others.
    assert error.null == pytest.approx((15 / 14 - 1 + 1 - 15 / 16) / 3)
    assert error.skill == pytest.approx(1 - error.mape / error.null)
    assert check.noise() == pytest.approx([1 / 14, 1 / 15])
    table = compare_time(path).table()
    assert "made up" in table
    assert "noise: 2 plans published again differ by 6.9% in the median, 7.1% at most" in table


def test_a_table_without_the_columns_is_refused(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("model,gpu\nA,B\n")
    with pytest.raises(PlanError, match="lacks columns: PP, TP, gbs, n_gpus, seq"):
        read_rows(path)
    with pytest.raises(PlanError, match="cannot be read"):
        read_rows(tmp_path / "none.csv")


def test_all_costs_are_finite_for_every_model_and_device():
    for model in ("deepseek-v3", "gpt-oss-120b", "grok-1", "qwen3-30b-a3b", "gpt3-175b"):
        shape = read_shape(model)
        for text in ("8x4090", "64xGB200", "cpu8", "8xMI300X"):
            job = Job(sequence=4096, global_batch=8, tp=2, dp=2)
            for cost in unit_costs(shape, job, read_cluster(text)):
                assert set(cost.recompute) == set(RECOMPUTE)
                for value in (cost.seconds, *cost.recompute.values()):
                    assert 0 <= value < math.inf
