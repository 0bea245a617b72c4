"""What the engine itself costs in a step: schedule, sample, turn into text, deliver.

    .venv/bin/python benchmarks/serving_engine.py

The executor costs nothing: it answers rows that were made before, over a vocabulary of 49,152 as
SmolLM2 has it. So what is measured is all that a step takes beside the model. Contexts are 500 to
700 tokens long; events are thrown away where they arrive. Times are medians over steps of the
engine thread's processor time, which counts no waiting for a processor that others use.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from moesaic.data.tokenizer import load_tokenizer
from moesaic.serving.config import EngineConfig, RequestConfig
from moesaic.serving.engine.engine import Engine
from moesaic.serving.execution.batch import Batch, StepResult
from moesaic.studies.tiny import tiny_folder

VOCAB = 49_152
WAYS = {
    "greedy": {},
    "temperature 0.8, top-p 0.95": {"temperature": 0.8, "top_p": 0.95, "seed": 1},
    "temperature 0.8, top-k 50": {"temperature": 0.8, "top_k": 50, "seed": 1},
    "temperature 1": {"temperature": 1.0, "seed": 1},
    "greedy, two penalties": {"repetition_penalty": 1.1, "frequency_penalty": 0.1},
    "greedy, 5 logprobs": {"logprobs": True, "top_logprobs": 5},
    "greedy, a regular expression": {"regex": "[a-z ]{3000}"},
}


class Rows:
    """An executor that answers the same rows in another order each time."""

    def __init__(self, spec: SimpleNamespace, rows: int) -> None:
        self.spec, self.block_tokens, self.num_blocks = spec, 16, 4096
        self.max_step_tokens = 4096
        self.rows_NV = torch.randn(rows, VOCAB) * 3
        self.rows_NV[:, 300:] -= 4  # the tiny tokenizer's tokens are the likely ones
        self.rows_NV[:, 0:3] = -50
        self.steps = 0

    def step(self, batch: Batch) -> StepResult:
        self.steps += 1
        shift = self.steps % len(self.rows_NV)
        rows_NV = torch.cat([self.rows_NV[shift:], self.rows_NV[:shift]])
        return StepResult(logits_NV=rows_NV[: batch.num_rows])

    def close(self) -> None:
        pass


def measure(batch: int, way: dict[str, object], tokenizer: object) -> list[float]:
    """Seconds of the engine in each step of decoding."""
    spec = SimpleNamespace(max_positions=8192, vocab_size=VOCAB)
    executor = Rows(spec, max(batch, 8))
    config = EngineConfig(model=Path("none"), max_sequences=batch, max_step_tokens=4096)
    seconds: list[float] = []
    with Engine(executor, tokenizer, config, eos_token_ids=[1]) as engine:  # type: ignore[arg-type]
        left = 0.0
        step = executor.step

        def timed(given: Batch) -> StepResult:
            nonlocal left
            if all(len(chunk.tokens) == 1 for chunk in given.chunks):
                seconds.append(time.thread_time() - left)
            result = step(given)
            left = time.thread_time()
            return result

        executor.step = timed  # type: ignore[method-assign]
        prompts = [[5 + (i * 7 + j) % 250 for j in range(500)] for i in range(batch)]
        sampling = RequestConfig(max_new_tokens=200, ignore_eos=True, **way)  # type: ignore[arg-type]
        engine.generate(prompts, sampling)
    return seconds[10:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(tiny_folder(Path(folder)))
    print(f"{'microseconds a step at batch':36}" + "".join(f"{b:>9}" for b in arguments.batches))
    for name, way in WAYS.items():
        times = [statistics.median(measure(b, way, tokenizer)) * 1e6 for b in arguments.batches]
        print(f"{name:36}" + "".join(f"{time:9.0f}" for time in times))


if __name__ == "__main__":
    main()
