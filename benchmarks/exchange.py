"""The way of tokens to their experts and back: EDP, EP and ETP side by side, bytes and time.

One MoE layer, forward and backward, bfloat16 rows and float32 weights, on 2 x t ranks: two
data-parallel groups of t tensor-parallel ranks, which share each sequence's positions. Every
rank is a process with one thread, and all of them share this machine's cores. Each round runs
every layout once; seconds are from a barrier until the slowest rank has its gradients, the
median over rounds. The layouts differ in what travels, not in what is computed.

    payload     rows and their gradients that a rank received from others, mean over the ranks:
                what the random routing brought, each token going once to a rank
    formula     the same for balanced routing with every copy sent, as planning reckons it
    gradients   what a rank would then receive to sum its experts' float32 gradients over the
                data-parallel ranks that hold the same ones, once a step; reckoned, not timed

    python benchmarks/exchange.py [--rounds 21]
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from itertools import product

from measuring_machine import machine, save

TENSOR_RANKS, TOP_K = (2, 4), (1, 2, 4)
DATA_RANKS = 2
EXPERTS, HIDDEN_DIM, EXPERT_DIM = 8, 576, 384
BATCH, LENGTH = 2, 512
"""Sequences of each data-parallel group, and their positions."""
LAYOUTS = (
    ("edp", "all_to_all"),
    ("edp", "all_gather"),
    ("ep", "all_to_all"),
    ("etp", "all_to_all"),
)
WARMUP = 3
RESULT = "exchange"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=21, help=f"timed, after {WARMUP} that are not"
    )
    arguments = parser.parse_args()
    before = machine()  # its load before these ranks add theirs
    rows = [row for tp in TENSOR_RANKS for row in on_ranks(tp, arguments.rounds)]
    result = {
        "machine": before,
        "data_ranks": DATA_RANKS,
        "threads_a_rank": 1,
        "tokens_a_data_rank": BATCH * LENGTH,
        "hidden_dim": HIDDEN_DIM,
        "experts": EXPERTS,
        "expert_dim": EXPERT_DIM,
        "rounds": arguments.rounds,
        "layouts": rows,
    }
    report(result)
    save(RESULT, result)


def report(result: dict) -> None:
    """One table for people."""
    print(
        f"\none layer of {EXPERTS} experts, width {HIDDEN_DIM}; {result['tokens_a_data_rank']} "
        f"tokens in each of {DATA_RANKS} data ranks; every rank a process of one thread, on "
        f"{result['machine']['cores']} cores; MB that a rank receives, forward and backward"
    )
    print("ranks  tp  k  layout           payload  formula  gradients    ms")
    for row in result["layouts"]:
        sizes = (row[name] / 1e6 for name in ("payload", "formula", "gradients"))
        print(
            f"{row['ranks']:5} {row['tp']:3} {row['top_k']:2}  "
            f"{row['experts_over'] + ' ' + row['dispatch']:15}"
            + "{:9.3f}{:9.3f}{:11.3f}".format(*sizes)
            + f"{1e3 * row['seconds']:6.1f}"
        )


def on_ranks(tp: int, rounds: int) -> list[dict]:
    """Every top-k and layout on ranks of their own processes."""
    import socket

    import torch.multiprocessing

    size = DATA_RANKS * tp
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    torch.multiprocessing.spawn(rank_main, (tp, port, rounds, results), nprocs=size)
    return results.get()


def rank_main(rank: int, tp: int, port: int, rounds: int, results) -> None:  # noqa: ANN001
    """Take part; rank 0 gives the table's rows."""
    import torch
    import torch.distributed as dist

    from moesaic.memory import reused_memory

    torch.set_num_threads(1)
    size = DATA_RANKS * tp
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size
    )
    runs = build(tp)
    with reused_memory():  # as training does
        found = [measure(runs[k], rounds) for k in TOP_K]
    if rank == 0:
        results.put([row for rows in found for row in rows])
    dist.barrier()
    dist.destroy_process_group()


def build(tp: int) -> dict[int, list[dict]]:
    """By top-k, what to run: a layer of each layout with its input, and what is known of it."""
    import torch

    from moesaic.moe.config import RoutingConfig
    from moesaic.moe.layer import MoELayer, RoutingStep
    from moesaic.parallel.world import World
    from moesaic.planning.layout import fit
    from moesaic.planning.plan import TrainPlan
    from moesaic.planning.split import Split
    from moesaic.spec import ModelSpec, MoESpec

    def spec_of(top_k: int) -> ModelSpec:
        moe = MoESpec(num_experts=EXPERTS, top_k=top_k, expert_dim=EXPERT_DIM)
        return ModelSpec(
            family="mixtral",
            vocab_size=8,
            hidden_dim=HIDDEN_DIM,
            ffn_dim=EXPERT_DIM,
            num_layers=1,
            num_heads=8,
            num_kv_heads=8,
            head_dim=HIDDEN_DIM // 8,
            max_positions=LENGTH,
            moe=moe,
            moe_layers=(0,),
        )

    worlds = {
        over: World.join(
            fit(TrainPlan(dp=DATA_RANKS, tp=tp, experts_over=over), spec_of(1)),
            torch.device("cpu"),
        )
        for over in dict(LAYOUTS)
    }
    parts = Split.balanced(LENGTH, tp)
    runs: dict[int, list[dict]] = {}
    for top_k, (over, dispatch) in product(TOP_K, LAYOUTS):
        world = worlds[over]
        layout = fit(world.layout.plan, spec_of(top_k))
        shard = dataclasses.replace(layout.shard(world.rank), dispatch=dispatch)
        layer = MoELayer(layout.spec.moe, HIDDEN_DIM, shard=shard, groups=world.groups)
        generator = torch.Generator().manual_seed(0)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=HIDDEN_DIM**-0.5, generator=generator)
        generator.manual_seed(1 + world.place.dp)
        x_BSD = torch.randn(BATCH, LENGTH, HIDDEN_DIM, generator=generator)
        x = x_BSD[:, slice(*parts.spans[world.place.tp])].bfloat16().requires_grad_()
        copies = world.expert_data.size
        weights = sum(p.numel() for p in layer.experts.parameters())
        run = {
            "layer": layer,
            "input": (x, RoutingStep(RoutingConfig(), torch.tensor(0.01)), parts),
            "everyone": world.everyone,
            "known": {
                "ranks": layout.plan.world_size,
                "tp": tp,
                "top_k": top_k,
                "experts_over": over,
                "dispatch": dispatch,
                "formula": formula(over, dispatch, tp, top_k),
                "gradients": 2 * (copies - 1) / copies * weights * 4,
            },
        }
        runs.setdefault(top_k, []).append(run)
    return runs


def formula(over: str, dispatch: str, t: int, k: int) -> float:
    """Bytes a rank receives, forward and backward, in bfloat16."""
    T, h = BATCH * LENGTH, HIDDEN_DIM
    e = {"edp": t, "ep": DATA_RANKS * t, "etp": DATA_RANKS}[over]
    if dispatch == "all_gather":
        elements = 2 * (t - 1) / t * T * h
    else:
        elements = 2 * (T / t) * k * h * (e - 1) / e
    if over == "etp":
        elements += 2 * (t - 1) / t * T * k * h
    return 2 * 2 * elements


def measure(runs: list[dict], rounds: int) -> list[dict]:
    """Interleaved rounds; rows of the table."""
    from moesaic.parallel.collectives import Traffic

    everyone = runs[0]["everyone"]
    seconds: list[list[float]] = [[] for _ in runs]
    for number in range(WARMUP + rounds):
        for index in range(len(runs)):
            # Another layout goes first in every round.
            which = (index + number) % len(runs)
            run = runs[which]
            run["layer"].exchange.traffic = Traffic()
            run["layer"].zero_grad()
            everyone.wait_for_all()
            start = time.perf_counter()
            y, _ = run["layer"](*run["input"])
            y.backward(y.detach())
            seconds[which].append(time.perf_counter() - start)
    rows = []
    for run, own in zip(runs, seconds, strict=True):
        traffic = run["layer"].exchange.traffic
        every = everyone.objects((own[WARMUP:], traffic.payload, traffic.routing))
        slowest = [max(times) for times in zip(*(of for of, _, _ in every), strict=True)]
        quarters = statistics.quantiles(slowest, n=4) if len(slowest) > 1 else slowest * 3
        rows.append(
            {
                **run["known"],
                "payload": statistics.mean(payload for _, payload, _ in every),
                "largest_payload": max(payload for _, payload, _ in every),
                "routing": statistics.mean(routing for _, _, routing in every),
                "seconds": statistics.median(slowest),
                "seconds_quartiles": [quarters[0], quarters[2]],
            }
        )
    return rows


if __name__ == "__main__":
    main()
