"""What pipelines of sleeping stages take, beside what the planner's simulator says of them.

Every rank is a process that runs moesaic's own pipeline over gloo. A layer's forward pass sleeps
20 ms, its gradient of the input as long, and those of its weights as long again, so that more ranks
than cores do not get in each other's way. What is left is what the simulator is about: the order of
actions, and who waits for whom.

    measured     from the first rank's start to the last one's end: the fastest step, because other
                 work on the machine can only make ranks late
    action       what an action takes beside sleeping, the only thing that the simulator is told of
                 the machine: from steps, by turns with those of the case and in the same processes,
                 of 1F1B (for gpipe: of gpipe) over equal stages, whose time is known: F and B
                 (2 P + P - 1) times for P ranks
    simulated    with that; the error is against the measured time
    free         the error if actions took no longer than they sleep

    python benchmarks/pipeline_simulation.py [--steps 6] [--only 1f1b]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

from measuring_machine import machine, save

RESULT = "pipeline_simulation"
LIMIT = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6, help="timed, of each case")
    parser.add_argument("--only", default="", help="cases whose name begins like this")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.sleeping import CASES, UNIT

    cases = [case for case in CASES if case.name.startswith(arguments.only)]
    before = machine()
    found = measure(cases, steps=arguments.steps)
    worst = max(abs(row["error"]) for row in found)
    print(f"{len(found)} cases; the largest error is {worst:.2%}, and {LIMIT:.0%} the limit")
    if not arguments.only:
        save(
            RESULT,
            {
                "machine": before,
                "unit_seconds": UNIT,
                "steps": arguments.steps,
                "largest_error": worst,
                "median_error": statistics.median(abs(row["error"]) for row in found),
                "cases": found,
            },
        )


def measure(cases: list, *, steps: int) -> list[dict]:
    """Run the cases, those of equally many ranks together, and print a row of each."""
    from tests.sleeping import UNIT, compare

    print(f"{'measured':>9}{'simulated':>10}{'error':>8}{'free':>8}{'action':>9}  case")
    found = []
    for one in compare(cases, unit=UNIT, steps=steps):
        measured = min(one.measured)
        free = one.case.simulate(UNIT).seconds / measured - 1
        print(
            f"{measured:8.3f}s{one.simulated:9.3f}s{one.error:8.2%}{free:8.2%}"
            f"{one.action_seconds * 1e3:6.2f} ms  {one.case.name}",
            flush=True,
        )
        found.append(
            {
                "case": one.case.name,
                "measured_seconds": one.measured,
                "simulated_seconds": one.simulated,
                "error": one.error,
                "error_without_cost_of_actions": free,
                "action_seconds": one.action_seconds,
            }
        )
    return found


if __name__ == "__main__":
    main()
