"""The solver of stages and recompute, held against brute force and against HiGHS."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from moesaic.errors import PlanError
from moesaic.planning import chain, choose
from moesaic.planning.halves import HalvedLayers
from moesaic.planning.interleave import EqualLayers
from moesaic.planning.row import Row
from moesaic.planning.solve import Choice, Problem, Solution, Unit, near_optimal, shortage, solve

NAMES = ("none", "moe_activations", "attention", "full")


# --- Random problems ---------------------------------------------------------------------------


def random_choices(rng: random.Random, count: int, *, scale: float, real: bool) -> tuple:
    """`none`, which keeps most, and others, most of which keep less and take time."""
    most = rng.randint(4, 30)
    choices = [Choice("none", 0, most)]
    for name in NAMES[1:count]:
        seconds = rng.uniform(0, scale) if real else rng.randint(0, int(scale))
        transient = rng.choice([0, 0, rng.randint(1, 20)])
        choices.append(Choice(name, seconds, rng.randint(0, most), transient))
    return tuple(choices)


def random_problem(
    seed: int, *, layers: int, choices: int, ranks: int, few_cuts: bool = True
) -> Problem:
    """Every layer another; a third of them are one unit, the others two that a cut may part."""
    rng = random.Random(seed)
    real = rng.random() < 0.5
    units: list[Unit] = []
    joint = {}

    def add(name: str, count: int) -> None:
        seconds = rng.uniform(1, 20) if real else rng.randint(1, 20)
        own = random_choices(rng, count, scale=10, real=real)
        units.append(Unit(name, seconds, rng.randint(0, 30), own))

    for layer in range(layers):
        if rng.random() < 1 / 3:
            add(f"unit{layer}", choices)
            continue
        joint[len(units)] = random_choices(rng, choices, scale=15, real=real)
        add(f"{layer}.attention", rng.randint(1, min(choices, 3)))
        add(f"{layer}.feed_forward", rng.randint(1, min(choices, 3)))
    possible = range(1, len(units))
    least = min(ranks, len(units)) - 1 if few_cuts else 3 * len(possible) // 4
    cuts = frozenset(rng.sample(possible, rng.randint(least, len(possible))))
    ranks = min(ranks, len(cuts) + 1)
    in_flight = rng.choice(
        [
            tuple(float(ranks - stage) for stage in range(ranks)),
            tuple(float(rng.randint(1, 6)) for _ in range(ranks)),
            tuple(rng.randint(2, 9) / 2 for _ in range(ranks)),
        ]
    )
    keep_all = sum(u.state_bytes + 1.5 * max(in_flight) * u.choices[0].kept_bytes for u in units)
    budget = int(keep_all / ranks * rng.uniform(0.25, 0.6)) + 10
    spread = rng.choice([0, 0.3])
    kinds = rng.choice([[1.0], [1.0], [0.5, 1.0]])
    return Problem(
        units=tuple(units),
        layers=joint,
        cuts=cuts,
        ranks=ranks,
        in_flight=in_flight,
        budgets=tuple(int(budget * rng.uniform(1 - spread, 1 + spread)) for _ in range(ranks)),
        speeds=tuple(rng.choice(kinds) for _ in range(ranks)),
    )


# --- Brute force -------------------------------------------------------------------------------


def items_of(problem: Problem, begin: int, end: int) -> list[tuple[str | int, tuple, float, float]]:
    """Key, choices, seconds and state of everything in a stage."""
    found, unit = [], begin
    while unit < end:
        one = problem.units[unit]
        if unit in problem.layers and unit + 1 < end:
            two = problem.units[unit + 1]
            key = int(one.name.split(".")[0])
            found.append(
                (
                    key,
                    problem.layers[unit],
                    one.seconds + two.seconds,
                    one.state_bytes + two.state_bytes,
                )
            )
            unit += 2
        else:
            found.append((one.name, one.choices, one.seconds, one.state_bytes))
            unit += 1
    return found


def stages_of(problem: Problem, rank: int) -> list[int]:
    """Stages of a rank: to and fro, or round and round."""
    if problem.v_shaped:
        return [rank, 2 * problem.ranks - 1 - rank]
    return [rank + problem.ranks * turn for turn in range(problem.interleave)]


def every_way(problem: Problem, spans: list[tuple[int, int]], in_flight: list[float]) -> tuple:
    """Seconds and bytes of a rank for every product of its choices."""
    seconds, held, transient = np.zeros(1), np.zeros(1), np.zeros(1)
    for (begin, end), number in zip(spans, in_flight, strict=True):
        for _, choices, base, state in items_of(problem, begin, end):
            extra = np.array([c.seconds for c in choices], float)
            kept = np.array([c.kept_bytes for c in choices], float)
            again = np.array([c.transient_bytes for c in choices], float)
            seconds = (seconds[:, None] + (base + extra)).ravel()
            held = (held[:, None] + (state + number * kept)).ravel()
            transient = np.maximum(transient[:, None], again).ravel()
    return seconds, held + transient


def brute_force(problem: Problem, *, only_none: bool = False) -> float:
    """Least seconds of the slowest rank over all cuts and all choices; infinite if nothing fits."""
    stages = problem.ranks * problem.interleave
    cache: dict[Any, float] = {}

    def rank_seconds(rank: int, spans: list[tuple[int, int]], in_flight: list[float]) -> float:
        key = rank, *spans
        if key not in cache:
            seconds, held = every_way(problem, spans, in_flight)
            if only_none:
                seconds, held = seconds[:1], held[:1]
            fits = seconds[held <= problem.budgets[rank]]
            cache[key] = float(fits.min()) / problem.speeds[rank] if len(fits) else math.inf
        return cache[key]

    best = math.inf
    for cuts in itertools.combinations(sorted(problem.cuts - {0}), stages - 1):
        edges = [0, *cuts, len(problem.units)]
        slowest = 0.0
        for rank in range(problem.ranks):
            mine = stages_of(problem, rank)
            spans = [(edges[s], edges[s + 1]) for s in mine]
            slowest = max(slowest, rank_seconds(rank, spans, [problem.in_flight[s] for s in mine]))
            if slowest >= best:
                break
        best = min(best, slowest)
    return best


def check_is_what_it_says(problem: Problem, solution: Solution) -> None:
    """The solution's stages and choices take the seconds and bytes it tells, and fit."""
    assert [begin for begin, _ in solution.stages] == [0, *(end for _, end in solution.stages[:-1])]
    assert solution.stages[-1][1] == len(problem.units)
    assert all(begin in problem.cuts for begin, _ in solution.stages[1:])
    assert all(begin < end for begin, end in solution.stages)
    told = dict(solution.recompute)
    for rank in range(problem.ranks):
        mine = stages_of(problem, rank)
        seconds, held, transient = 0.0, 0.0, 0.0
        for stage in mine:
            for key, choices, base, state in items_of(problem, *solution.stages[stage]):
                name = told.pop(key, "none")
                choice = next(c for c in choices if c.recompute == name)
                seconds += base + choice.seconds
                held += state + problem.in_flight[stage] * choice.kept_bytes
                transient = max(transient, choice.transient_bytes)
        assert solution.rank_seconds[rank] == pytest.approx(
            seconds / problem.speeds[rank], rel=1e-12
        )
        assert solution.rank_bytes[rank] == pytest.approx(held + transient, rel=1e-12)
        assert held + transient <= problem.budgets[rank]
    assert not told
    assert solution.bottleneck == max(solution.rank_seconds)


VERDICTS = ("fits", "must recompute", "nothing fits")


def check_is_best(problem: Problem) -> str:
    """Compare with brute force; whether all, some or no recompute fits."""
    expected = brute_force(problem)
    if expected == math.inf:
        with pytest.raises(PlanError, match="needs at least"):
            solve(problem)
        return "nothing fits"
    solution = solve(problem)
    check_is_what_it_says(problem, solution)
    assert solution.bottleneck == pytest.approx(expected, rel=1e-13)
    assert solution.bound == solution.bottleneck
    return "fits" if brute_force(problem, only_none=True) < math.inf else "must recompute"


def mixed(seed: int) -> Problem:
    layers, choices = ((7, 4), (12, 2), (5, 4), (9, 2), (3, 4))[seed % 5]
    return random_problem(seed, layers=layers, choices=choices, ranks=1 + seed // 5 % 4)


# --- One stage a rank --------------------------------------------------------------------------


def test_cuts_and_recompute_of_random_problems_equal_brute_force():
    verdicts = Counter(check_is_best(mixed(seed)) for seed in range(80))
    assert verdicts["must recompute"] >= 20
    assert verdicts["nothing fits"] >= 10
    assert verdicts["fits"] >= 10


@pytest.mark.slow
def test_cuts_and_recompute_of_500_random_problems_equal_brute_force():
    verdicts = Counter(check_is_best(mixed(seed)) for seed in range(500))
    assert verdicts["must recompute"] >= 150
    assert verdicts["nothing fits"] >= 75


def test_bounds_that_prune_choices_lose_no_optimum(monkeypatch):
    monkeypatch.setattr(choose, "FEW", 0)
    for seed in range(1000, 1060):
        check_is_best(mixed(seed))


def test_stages_without_a_short_number_equal_brute_force(monkeypatch):
    """As many different layers as make the code of a stage too long for an integer."""
    monkeypatch.setattr(chain, "LONGEST_CODE", 1)
    for seed in range(2000, 2030):
        check_is_best(mixed(seed))


# --- HiGHS -------------------------------------------------------------------------------------


def highs(problem: Problem) -> float:
    """Least seconds of the slowest rank: a column for each rank and stage, and for each choice."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    edges = sorted({0, *problem.cuts, len(problem.units)})
    spans = list(itertools.combinations(edges, 2))
    keys = {}
    for span in spans:
        for key, choices, _, _ in items_of(problem, *span):
            keys[key] = choices
    names: dict[tuple, int] = {}
    for rank in range(problem.ranks):
        for span in spans:
            names["stage", rank, span] = len(names)
        for key, choices in keys.items():
            for number in range(len(choices)):
                names["choice", rank, key, number] = len(names)
        names["transient", rank] = len(names)
    names["slowest",] = len(names)
    rows, low, high = [], [], []

    def constrain(terms: list[tuple[tuple, float]], least: float, most: float) -> None:
        row = np.zeros(len(names))
        for name, factor in terms:
            row[names[name]] += factor
        rows.append(row)
        low.append(least)
        high.append(most)

    for rank in range(problem.ranks):
        constrain([(("stage", rank, span), 1) for span in spans], 1, 1)
        for edge in edges:
            begins = [(("stage", rank, span), 1) for span in spans if span[0] == edge]
            if rank == 0 and edge > 0:
                constrain(begins, 0, 0)
            if rank > 0:
                ends = [(("stage", rank - 1, span), -1) for span in spans if span[1] == edge]
                constrain(begins + ends, 0, 0)
            if rank == problem.ranks - 1 and edge < len(problem.units):
                constrain([(("stage", rank, s), 1) for s in spans if s[1] == edge], 0, 0)
        held = [(("transient", rank), 1.0)]
        taken = [(("slowest",), -problem.speeds[rank])]
        for span in spans:
            items = items_of(problem, *span)
            held.append((("stage", rank, span), sum(state for *_, state in items)))
            taken.append((("stage", rank, span), sum(seconds for *_, seconds, _ in items)))
        for key, choices in keys.items():
            mine = [("choice", rank, key, number) for number in range(len(choices))]
            holders = [s for s in spans if any(key == item[0] for item in items_of(problem, *s))]
            constrain(
                [(name, 1) for name in mine] + [(("stage", rank, s), -1) for s in holders], 0, 0
            )
            constrain(
                [(("transient", rank), 1)]
                + [(n, -c.transient_bytes) for n, c in zip(mine, choices, strict=True)],
                0,
                np.inf,
            )
            for name, choice in zip(mine, choices, strict=True):
                held.append((name, problem.in_flight[rank] * choice.kept_bytes))
                taken.append((name, choice.seconds))
        constrain(held, -np.inf, problem.budgets[rank])
        constrain(taken, -np.inf, 0)
    integral = np.array([name[0] in ("stage", "choice") for name in names], float)
    result = milp(
        np.eye(1, len(names), len(names) - 1)[0],
        constraints=LinearConstraint(np.array(rows), low, high),
        integrality=integral,
        bounds=Bounds(0, np.where(integral, 1, np.inf)),
        options={"mip_rel_gap": 0},
    )
    assert result.status in (0, 2), result.message
    return float(result.fun) if result.status == 0 else math.inf


def check_equals_highs(seed: int, *, layers: tuple[int, int]) -> str:
    rng = random.Random(seed)
    problem = random_problem(
        seed,
        layers=rng.randint(*layers),
        choices=rng.choice([3, 4]),
        ranks=rng.randint(4, 7),
        few_cuts=False,
    )
    expected = highs(problem)
    if expected == math.inf:
        with pytest.raises(PlanError, match="needs at least"):
            solve(problem)
        return "nothing fits"
    solution = solve(problem)
    check_is_what_it_says(problem, solution)
    assert solution.bottleneck == pytest.approx(expected, rel=1e-6)
    return "must recompute" if solution.recompute else "keeps all"


def test_larger_problems_equal_highs():
    verdicts = Counter(check_equals_highs(seed, layers=(8, 10)) for seed in range(4))
    assert verdicts["must recompute"] >= 2


@pytest.mark.slow
def test_40_larger_problems_equal_highs():
    verdicts = Counter(check_equals_highs(seed, layers=(12, 18)) for seed in range(40))
    assert verdicts["must recompute"] >= 15


# --- Several stages a rank ---------------------------------------------------------------------


def equal_problem(seed: int, *, halves: bool) -> Problem:
    """Equal layers over 2 or 3 ranks with 2 or 3 stages each, some of them V-shaped."""
    rng = random.Random(seed)
    v_shaped = rng.random() < 0.3
    ranks, turns = rng.choice([(2, 2), (3, 2), (2, 3)][: 2 if v_shaped else 3])
    stages, real = ranks * turns, rng.random() < 0.5
    most = 6 if halves and turns == 3 else 7
    layers = rng.randint(stages if halves else max(1, stages - 2), most)
    one, two = (random_choices(rng, rng.randint(1, 3), scale=8, real=real) for _ in range(2))
    both = random_choices(rng, 3, scale=12, real=real)
    before, after = rng.choice([(True, True), (True, True), (False, True), (False, False)])
    alone = (Choice("none", 0, rng.randint(0, 9)),)
    state = rng.randint(0, 20), rng.randint(0, 40)
    units = [Unit("embedding", rng.randint(0, 3), rng.randint(0, 30), alone)] * before
    firsts = range(before, before + 2 * layers, 2)
    for layer in range(layers):
        units.append(Unit(f"{layer}.attention", 2, state[0], one))
        units.append(Unit(f"{layer}.feed_forward", 5.5 if real else 5, state[1], two))
    units += [Unit("head", rng.randint(0, 9), rng.randint(0, 30), alone)] * after
    cuts = range(1, len(units)) if halves else [*firsts, firsts[-1] + 2]
    in_flight = rng.choice(
        [
            tuple(float(stages - stage) for stage in range(stages)),
            tuple(float(rng.randint(1, 6)) for _ in range(stages)),
            (3.0,) * stages,
        ]
    )
    need = sum(u.state_bytes for u in units) + layers * 3.5 * both[0].kept_bytes
    budgets = tuple(int(need / ranks * rng.uniform(0.45, 1.3)) + 20 for _ in range(ranks))
    return Problem(
        units=tuple(units),
        layers=dict.fromkeys(firsts, both),
        cuts=frozenset(cut for cut in cuts if 0 < cut < len(units)),
        ranks=ranks,
        interleave=turns,
        v_shaped=v_shaped,
        in_flight=in_flight,
        budgets=budgets,
        speeds=tuple(rng.choice([1.0, 1.0, 0.5]) for _ in range(ranks)),
    )


def possible(make: Any, seeds: range, **kind: bool) -> Iterator[Problem]:
    """Problems that have as many units as stages."""
    for seed in seeds:
        with contextlib.suppress(PlanError):
            yield make(seed, **kind)


@pytest.mark.parametrize("halves", [False, True], ids=["whole layers", "half layers"])
def test_several_stages_a_rank_of_equal_layers_equal_brute_force(halves):
    verdicts = Counter(map(check_is_best, possible(equal_problem, range(20), halves=halves)))
    assert min(verdicts[verdict] for verdict in VERDICTS) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("halves", [False, True], ids=["whole layers", "half layers"])
def test_several_stages_a_rank_of_300_problems_equal_brute_force(halves):
    verdicts = Counter(map(check_is_best, possible(equal_problem, range(300), halves=halves)))
    assert min(verdicts[verdict] for verdict in VERDICTS) >= 25


def interleaved(seed: int) -> Problem:
    """Any units on 2 or 3 ranks with 2 stages each."""
    rng = random.Random(seed)
    ranks = rng.choice([2, 3])
    problem = random_problem(seed, layers=rng.randint(4, 6), choices=3, ranks=2 * ranks)
    return dataclasses.replace(
        problem,
        ranks=ranks,
        interleave=2,
        v_shaped=rng.random() < 0.5,
        budgets=tuple(2 * most for most in problem.budgets[:ranks]),
        speeds=problem.speeds[:ranks],
    )


def gaps_of(seeds: range) -> list[float]:
    """How far above the optimum answers are, where there is one; all above their bounds."""
    gaps, missed = [], 0
    for problem in possible(interleaved, seeds):
        best = brute_force(problem)
        try:
            solution = solve(problem)
        except PlanError:
            missed += best < math.inf
            continue
        check_is_what_it_says(problem, solution)
        assert solution.bound <= best * (1 + 1e-12)
        gaps.append(solution.bottleneck / best - 1)
    assert missed <= len(gaps) // 50
    assert min(gaps) > -1e-12
    return gaps


def test_where_it_is_not_exact_the_optimum_lies_between_bound_and_answer():
    gaps = gaps_of(range(20))
    assert len(gaps) >= 10
    assert sorted(gaps)[len(gaps) // 2] < 1e-12


@pytest.mark.slow
def test_where_it_is_not_exact_most_answers_are_the_best_there_is():
    gaps = gaps_of(range(300))
    assert len(gaps) >= 200
    assert sum(gap < 1e-12 for gap in gaps) >= 0.9 * len(gaps)
    assert sum(gaps) <= 0.01 * len(gaps)


# --- Models of real size -----------------------------------------------------------------------

WHOLE = (
    Choice("none", 0, 550e6),
    Choice("moe_activations", 0.4, 430e6, 120e6),
    Choice("attention", 0.9, 414e6, 136e6),
    Choice("full", 3.3, 34e6, 520e6),
)
ATTENTION = (Choice("none", 0, 170e6), Choice("attention", 0.9, 34e6, 136e6))
EXPERTS = (
    Choice("none", 0, 380e6),
    Choice("moe_activations", 0.4, 260e6, 120e6),
    Choice("full", 2.4, 30e6, 350e6),
)


def model(layers: int, *, ranks: int, budget: float, turns: int = 1, halves: bool) -> Problem:
    """Something like Skywork-MoE: bytes and milliseconds of one rank of a stage."""
    alone = (Choice("none", 0, 10e6),)
    units = [Unit("embedding", 0.1, 2e9, alone)]
    for layer in range(layers):
        units.append(Unit(f"{layer}.attention", 2.7, 140e6, ATTENTION))
        units.append(Unit(f"{layer}.feed_forward", 7.3, 4330e6, EXPERTS))
    units.append(Unit("head", 6.5, 2e9, alone))
    stages = ranks * turns
    return Problem(
        units=tuple(units),
        layers=dict.fromkeys(range(1, 2 * layers, 2), WHOLE),
        cuts=frozenset(range(1, len(units), 1 if halves else 2)),
        ranks=ranks,
        interleave=turns,
        in_flight=tuple((stages - s) / turns for s in range(stages)),
        budgets=(budget,) * ranks,
        speeds=(1.0,) * ranks,
    )


@pytest.mark.parametrize("halves", [False, True], ids=["whole layers", "half layers"])
@pytest.mark.parametrize("gigabytes", [34, 36, 40, 44, 52, 80])
def test_two_exact_ways_agree_on_52_layers_and_12_ranks(gigabytes, halves):
    problem = model(52, ranks=12, budget=gigabytes * 1e9, halves=halves)
    row = Row(problem)
    equal = EqualLayers.of(row)
    assert equal is not None
    expected = HalvedLayers(equal).best().slowest() if halves else equal.slowest()
    if expected == math.inf:
        with pytest.raises(PlanError, match="needs at least"):
            solve(problem)
        return
    solution = solve(problem)
    check_is_what_it_says(problem, solution)
    assert solution.bottleneck == pytest.approx(expected, rel=1e-12)


def test_half_layers_and_less_memory_change_the_bottleneck_as_they_must():
    def bottleneck(gigabytes: float, *, halves: bool) -> float:
        return solve(model(52, ranks=12, budget=gigabytes * 1e9, halves=halves)).bottleneck

    roomy, tight = bottleneck(80, halves=False), bottleneck(36, halves=False)
    assert roomy == 50
    assert tight > roomy
    assert bottleneck(80, halves=True) < roomy
    assert bottleneck(36, halves=True) <= tight


def test_a_large_model_with_four_stages_a_rank_is_solved_exactly():
    problem = model(128, ranks=16, turns=4, budget=60e9, halves=False)
    solution = solve(problem)
    check_is_what_it_says(problem, solution)
    assert solution.bound == solution.bottleneck


# --- What a solution is ------------------------------------------------------------------------


def example(*, budget: float, in_flight: float = 2, cut: bool = True) -> Problem:
    """One layer of two halves on one rank, or on two."""
    attention = (Choice("none", 0, 10), Choice("attention", 3, 2, 8))
    experts = (Choice("none", 0, 20), Choice("full", 5, 4, 16))
    both = (Choice("none", 0, 30), Choice("attention", 3, 22, 8), Choice("full", 8, 2, 24))
    return Problem(
        units=(Unit("0.attention", 10, 100, attention), Unit("0.feed_forward", 20, 200, experts)),
        layers={0: both},
        cuts=frozenset({1} if cut else ()),
        ranks=2 if cut else 1,
        in_flight=(in_flight,) * (2 if cut else 1),
        budgets=(budget,) * (2 if cut else 1),
        speeds=(1.0,) * (2 if cut else 1),
    )


def test_a_whole_layer_has_choices_of_its_own_and_goes_by_its_number():
    solution = solve(example(budget=352, cut=False))
    assert solution.recompute == {0: "attention"}
    assert solution.rank_bytes == (300 + 2 * 22 + 8,)
    assert solution.bottleneck == 33


def test_halves_of_a_cut_layer_have_their_choices_and_go_by_name():
    solution = solve(example(budget=224))
    assert solution.stages == ((0, 1), (1, 2))
    assert solution.recompute == {"0.feed_forward": "full"}
    assert solution.rank_seconds == (10, 25)
    assert solution.rank_bytes == (120, 224)


def test_only_the_largest_transient_counts():
    again = (Choice("none", 0, 10), Choice("full", 1, 0, 10))
    problem = Problem(
        units=tuple(Unit(f"unit{number}", 1, 0, again) for number in range(3)),
        layers={},
        cuts=frozenset(),
        ranks=1,
        in_flight=(1,),
        budgets=(10,),
        speeds=(1.0,),
    )
    solution = solve(problem)
    assert solution.rank_bytes == (10,)
    assert solution.bottleneck == 6
    with pytest.raises(
        PlanError, match=r"rank 0 of the pipeline needs at least 10 bytes .* 9 bytes"
    ):
        solve(dataclasses.replace(problem, budgets=(9,)))


def test_a_faster_rank_takes_more_and_a_smaller_one_keeps_less():
    choices = (Choice("none", 0, 10), Choice("full", 1, 1))
    problem = Problem(
        units=tuple(Unit(f"unit{number}", 4, 10, choices) for number in range(12)),
        layers={},
        cuts=frozenset(range(1, 12)),
        ranks=2,
        in_flight=(2, 1),
        budgets=(1000, 1000),
        speeds=(1.0, 3.0),
    )
    assert [end - begin for begin, end in solve(problem).stages] == [3, 9]
    small = dataclasses.replace(problem, budgets=(40, 1000))
    assert [end - begin for begin, end in solve(small).stages] == [2, 10]
    assert solve(small).recompute == {"unit0": "full", "unit1": "full"}


def test_units_that_take_no_bytes_and_no_time_can_be_cut():
    choices = (Choice("none", 0, 0), Choice("full", 0, 0))
    for turns in (1, 2):
        problem = Problem(
            units=tuple(Unit(f"unit{number}", 0, 0, choices) for number in range(6)),
            layers={},
            cuts=frozenset(range(1, 6)),
            ranks=2,
            interleave=turns,
            in_flight=(1,) * 2 * turns,
            budgets=(0, 0),
            speeds=(1.0, 1.0),
        )
        assert solve(problem).bottleneck == 0
        assert solve(problem).recompute == {}


def test_the_same_problem_has_the_same_solution():
    for problem in (mixed(11), mixed(13), interleaved(5)):
        copied = dataclasses.replace(
            problem,
            units=tuple(map(dataclasses.replace, problem.units)),
            layers=dict(reversed(problem.layers.items())),
        )
        assert solve(copied) == solve(problem)
        assert near_optimal(copied) == near_optimal(problem)


# --- Layouts that are about as good ------------------------------------------------------------


def all_near(problem: Problem, slack: float) -> dict[tuple, float]:
    """Every layout whose bottleneck, with its cheapest recompute, is little above the least."""
    found = {}
    for cuts in itertools.combinations(sorted(problem.cuts), problem.stages - 1):
        only = dataclasses.replace(problem, cuts=frozenset(cuts))
        edges = [0, *cuts, len(problem.units)]
        found[tuple(itertools.pairwise(edges))] = brute_force(only)
    least = min(found.values())
    return {stages: worst for stages, worst in found.items() if worst <= least * (1 + slack)}


def test_near_optimal_layouts_are_distinct_and_take_what_they_say():
    listed, possible_layouts = 0, 0
    for seed in range(40):
        problem = mixed(5 * seed + 2)
        if brute_force(problem) == math.inf:
            continue
        expected = all_near(problem, 0.1)
        solutions = near_optimal(problem, slack=0.1, limit=1000)
        for solution in solutions:
            check_is_what_it_says(problem, solution)
            assert solution.bottleneck == pytest.approx(expected[solution.stages], rel=1e-12)
        assert len({solution.stages for solution in solutions}) == len(solutions)
        assert [s.bottleneck for s in solutions] == sorted(s.bottleneck for s in solutions)
        assert solutions[0].bottleneck == solve(problem).bottleneck
        listed += len(solutions)
        possible_layouts += len(expected)
    assert listed >= 0.8 * possible_layouts


def test_no_more_layouts_are_listed_than_asked_for():
    problem = model(52, ranks=12, budget=80e9, halves=True)
    solutions = near_optimal(problem, slack=0.05, limit=20)
    assert len(solutions) == 20
    assert solutions[0] == solve(problem)


# --- What cannot be ----------------------------------------------------------------------------


def test_a_problem_that_does_not_fit_names_rank_and_bytes():
    problem = model(52, ranks=12, budget=20e9, halves=True)
    with pytest.raises(PlanError, match=r"rank \d+ of the pipeline needs at least .* GiB .* 18.63"):
        solve(problem)
    missing = shortage(problem)
    assert missing is not None
    assert missing.needed_bytes > missing.available_bytes == 20e9
    roomy = dataclasses.replace(problem, budgets=(missing.needed_bytes,) * 12)
    assert shortage(roomy) is None
    assert solve(roomy).bottleneck > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cuts": frozenset({3})}, "need 12 stages, but the model can be cut into 2"),
        ({"cuts": frozenset({400})}, "Cuts are unit numbers from 0 to 105"),
        ({"budgets": (1.0,)}, "budgets has 1 values; give 12"),
        ({"speeds": (0.0,) * 12}, "above 0"),
        ({"in_flight": (0,) * 12}, "above 0"),
        ({"v_shaped": True}, "V-shaped pipeline has 2 stages a rank, not 1"),
        ({"ranks": 0}, "0 ranks"),
        ({"layers": {1: WHOLE, 2: WHOLE}}, "Layers begin at units"),
        ({"layers": {1: ()}}, "at least one choice"),
        ({"layers": {1: (Choice("none", -1, 0),)}}, "negative"),
        ({"units": (Unit("unit", 1, 0, WHOLE),) * 106}, "same name"),
    ],
)
def test_what_contradicts_itself_is_refused(change, message):
    with pytest.raises(PlanError, match=message):
        dataclasses.replace(model(52, ranks=12, budget=40e9, halves=True), **change)


def test_the_solver_loads_neither_torch_nor_scipy():
    code = "import sys, moesaic.planning.solve; print(*{'torch', 'scipy'} & set(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == ""
