"""How far the planner's layouts are from the best there is, in simulated time.

The solver finds the least bottleneck; a step also fills and drains. Here every cut and every choice
of recompute of small random models is simulated, and what the planner would take (the simulator's
pick of the layouts whose bottleneck is nearly the least) is held against the best of them all.

    python benchmarks/planner_gap.py [--instances 60] [--units 7] [--ranks 3] [--micro-batches 12]
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Sequence

from measuring_machine import machine, save

from moesaic.errors import PlanError
from moesaic.planning.simulate import StageSeconds, simulate
from moesaic.planning.solve import Choice, Problem, Unit, near_optimal
from moesaic.planning.split import Span

RESULT = "planner_gap"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=int, default=60)
    parser.add_argument("--units", type=int, default=7)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--micro-batches", type=int, default=12)
    arguments = parser.parse_args()
    started = time.monotonic()
    gaps: list[float] = []
    seed = 0
    while len(gaps) < arguments.instances:
        seed += 1
        problem = drawn(random.Random(seed), arguments.units, arguments.ranks)
        best = best_of_all(problem, arguments.micro_batches)
        try:
            found = near_optimal(problem, slack=0.05)
        except PlanError:
            assert best is None, f"{seed=}"
            continue
        assert best is not None, f"{seed=}"
        ours = min(
            step(problem, one.stages, one.recompute, arguments.micro_batches) for one in found
        )
        gaps.append(ours / best - 1)
    result = {
        "machine": machine(),
        "instances": len(gaps),
        "units": arguments.units,
        "ranks": arguments.ranks,
        "micro_batches": arguments.micro_batches,
        "median_gap": statistics.median(gaps),
        "mean_gap": statistics.fmean(gaps),
        "largest_gap": max(gaps),
        "optimal": sum(gap < 1e-9 for gap in gaps),
    }
    print(
        f"{result['instances']} instances: {result['optimal']} optimal, gap mean "
        f"{result['mean_gap']:.2%}, median {result['median_gap']:.2%}, largest "
        f"{result['largest_gap']:.2%}; {time.monotonic() - started:.0f} s"
    )
    save(RESULT, result)


def drawn(rng: random.Random, units: int, ranks: int) -> Problem:
    """Units of different lengths, with too little memory to keep everything."""
    made = []
    for number in range(units):
        seconds, kept = rng.uniform(1, 3), rng.uniform(1, 3)
        choices = (
            Choice("none", 0.0, kept),
            Choice("full", seconds * rng.uniform(0.1, 0.35), kept * rng.uniform(0.1, 0.5)),
        )
        made.append(Unit(f"u{number}", seconds, rng.uniform(0.5, 2), choices))
    keep = sum(unit.choices[0].kept_bytes for unit in made)
    state = sum(unit.state_bytes for unit in made)
    budget = (state + keep * ranks * rng.uniform(0.35, 0.7)) / ranks
    return Problem(
        units=tuple(made),
        layers={},
        cuts=frozenset(range(1, units)),
        ranks=ranks,
        in_flight=tuple(float(ranks - place) for place in range(ranks)),
        budgets=(budget,) * ranks,
        speeds=(1.0,) * ranks,
    )


def step(
    problem: Problem, stages: Sequence[Span], recompute: dict[str, str], micro_batches: int
) -> float:
    """Simulated seconds under 1F1B; a third of a unit's time is its forward pass."""
    seconds = []
    for start, end in stages:
        units = problem.units[start:end]
        whole = sum(unit.seconds for unit in units)
        again = sum(unit.choices[1].seconds for unit in units if unit.name in recompute)
        seconds.append(StageSeconds(whole / 3, whole / 3, whole / 3, again))
    return simulate("1f1b", seconds, ranks=problem.ranks, micro_batches=micro_batches).seconds


def best_of_all(problem: Problem, micro_batches: int) -> float | None:
    """Every cut and choice that fits, simulated."""
    count, best = len(problem.units), None
    for cuts in itertools.combinations(range(1, count), problem.ranks - 1):
        stages = list(itertools.pairwise([0, *cuts, count]))
        for chosen in itertools.product((0, 1), repeat=count):
            fits = all(
                sum(
                    unit.state_bytes + problem.in_flight[place] * unit.choices[pick].kept_bytes
                    for unit, pick in zip(problem.units[start:end], chosen[start:end], strict=True)
                )
                <= problem.budgets[place]
                for place, (start, end) in enumerate(stages)
            )
            if fits:
                names = {
                    unit.name: "full"
                    for unit, pick in zip(problem.units, chosen, strict=True)
                    if pick
                }
                seconds = step(problem, stages, names, micro_batches)
                best = seconds if best is None else min(best, seconds)
    return best


if __name__ == "__main__":
    main()
