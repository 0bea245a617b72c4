"""Load a server with good clients and bad ones, and see that it stays as it was.

    python benchmarks/serving_load.py --model demo/trained/model [--seconds 180] [--streams 200]

Good clients hold `streams` answers open all the time and must get every token of each. Beside them
clients go away after a few tokens, send bodies that are wrong in every way, send prompts that are
too long, and one asks for much and never reads. At the end SIGTERM comes in the middle of answers,
which must all end well. The server checks its cache before it ends.

With `--ranks 2 --kill` a rank is killed in a server of several instead: no answer that comes may
differ from the one before, and the time until the next answer is measured. That runs in float32:
in bfloat16 the likeliest token may depend on which answers are computed beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil
from measuring_machine import machine, save

from moesaic.errors import ServingError
from moesaic.serving.client import client_of, stream

TIMEOUT_SECONDS = 300
SETTLED_SECONDS = 30
MEMORY_LIMIT = 50_000_000

WRONG_BODIES = {
    "no JSON": b"{",
    "no text": b"\xff\xfe\x00",
    "too deep": b"[" * 100_000,
    "no object": b"[1, 2]",
    "wrong types": b'{"model": "load", "prompt": {"a": 1}, "max_tokens": "many"}',
    "unknown field": b'{"model": "load", "prompt": "a", "tempreature": 1}',
    "half a surrogate pair": b'{"model": "load", "prompt": "\\ud800"}',
    "another model": b'{"model": "other", "prompt": "a"}',
    "a schema that is none": b'{"model": "load", "prompt": "a", "response_format": '
    b'{"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}}}',
}


class Load:
    """Clients of one server, and what came of each kind."""

    def __init__(self, url: str, *, tokens: int, context: int, seed: int = 0) -> None:
        self.url, self.tokens, self.context = url, tokens, context
        self.counts: Counter[str] = Counter()
        self.errors: list[str] = []
        """What good clients met."""
        self.first_seconds: list[float] = []
        self.is_over = False
        self._random = random.Random(seed)

    async def good(self, client: httpx.AsyncClient) -> None:
        """Ask again and again, and want every token."""
        while not self.is_over:
            await self.ask(client)

    async def ask(self, client: httpx.AsyncClient) -> None:
        """One answer, which must be whole."""
        began, first, usage = time.perf_counter(), None, None
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                async for chunk in stream(client, "completions", self._body()):
                    first = first or time.perf_counter()
                    usage = chunk.get("usage") or usage
        except (ServingError, TimeoutError) as error:
            self.errors.append(str(error) or type(error).__name__)
            self.counts["good, with an error"] += 1
            return
        if usage is None or usage["completion_tokens"] != self.tokens:
            self.errors.append(f"an answer has {usage} instead of {self.tokens} tokens")
        self.counts["good"] += 1
        self.first_seconds.append((first or began) - began)

    async def fickle(self, client: httpx.AsyncClient) -> None:
        """Go away after a few pieces, or before the first."""
        while not self.is_over:
            pieces = self._random.randint(0, 8)
            with contextlib.suppress(ServingError, TimeoutError):
                async with contextlib.aclosing(
                    stream(client, "completions", self._body())
                ) as chunks:
                    if pieces == 0:
                        async with asyncio.timeout(self._random.random()):
                            await anext(chunks)
                    async for _ in chunks:
                        pieces -= 1
                        if pieces <= 0:
                            break
            self.counts["went away"] += 1
            await asyncio.sleep(self._random.random() * 0.2)

    async def wrong(self, client: httpx.AsyncClient) -> None:
        """Send bodies and prompts that cannot be answered."""
        while not self.is_over:
            name, content = self._random.choice(list(WRONG_BODIES.items()))
            await self._refused(client, name, content)
            long = {"model": "load", "prompt": [5] * (self.context + 1), "max_tokens": 1}
            await self._refused(client, "a prompt beyond the context", json.dumps(long).encode())
            if self._random.random() < 0.1:
                large = {"model": "load", "prompt": "x" * (9 * 2**20)}
                await self._refused(client, "a body of 9 MiB", json.dumps(large).encode())
            await asyncio.sleep(0.3)

    async def _refused(self, client: httpx.AsyncClient, name: str, content: bytes) -> None:
        headers = {"Content-Type": "application/json"}
        try:
            response = await client.post("completions", content=content, headers=headers)
            self.counts[f"refused with {response.status_code}"] += 1
            if response.status_code not in (400, 404, 413):
                self.errors.append(f"{name} was answered {response.status_code}")
        except httpx.HTTPError as error:
            # A server may close the connection while a body that is too large still comes.
            if "9 MiB" not in name:
                self.errors.append(f"{name}: {error!r}")

    async def never_reads(self) -> None:
        """Ask for as much as there can be, and read nothing."""
        host, port = self.url.removeprefix("http://").split(":")
        body = {**self._body(), "n": 4, "logprobs": 20, "max_tokens": self.context - 8}
        text = json.dumps({**body, "prompt": [5, 6, 7], "stream": True}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        while not self.is_over:
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.connect((host, int(port)))
                client.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
                self.counts["never reads"] += 1
                for _ in range(20):
                    await asyncio.sleep(1)
                    if self.is_over:
                        return

    def _body(self) -> dict[str, object]:
        length = self._random.randint(4, min(64, self.context - self.tokens))
        return {
            "model": "load",
            "prompt": [self._random.randint(5, 250) for _ in range(length)],
            "max_tokens": self.tokens,
            "ignore_eos": True,
            "temperature": self._random.choice([0, 1]),
            "stream_options": {"include_usage": True},
        }


class Server:
    """`moesaic serve` as a process of its own."""

    def __init__(self, model: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "moesaic", "serve", str(model), "--name", "load"]
        command += ["--port", str(self.port), "--log", "none", "--json", *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait(self, seconds: float = 300) -> float:
        """Until it answers; seconds that took."""
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended: {self.process.communicate()[1]}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200:
                    return time.monotonic() - began
            time.sleep(0.05)
        raise SystemExit(f"the server did not answer within {seconds} s")

    def memory(self) -> int:
        """Bytes of all its processes that are its own."""
        tree = [
            psutil.Process(self.process.pid),
            *psutil.Process(self.process.pid).children(recursive=True),
        ]
        return sum(one.memory_info().rss for one in tree)

    def ranks(self) -> dict[int, int]:
        """The process of each rank."""
        found = {}
        for one in psutil.Process(self.process.pid).children():
            rank = one.environ().get("RANK")
            if rank is not None:
                found[int(rank)] = one.pid
        return found

    def blocks(self) -> dict[str, int]:
        """What the cache holds, as /metrics says."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30, trust_env=False).text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        names = ("blocks", "blocks_used", "blocks_cached", "blocks_free", "running", "waiting")
        return {name: int(float(values[f"moesaic_{name}"])) for name in names}

    def stop(self) -> tuple[int, dict[str, object], str]:
        """After SIGTERM: its status, what it says it did, and what it wrote on stderr."""
        self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, json.loads(out) if out.strip() else {}, err


async def loaded(server: Server, load: Load, *, streams: int, seconds: float) -> dict[str, object]:
    """Load the server, and end it in the middle."""
    memory: list[tuple[float, int]] = []
    client = client_of(server.url, None, timeout_seconds=TIMEOUT_SECONDS)
    async with client, asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(load.good(client))
        for _ in range(max(1, streams // 20)):
            group.create_task(load.fickle(client))
            group.create_task(load.wrong(client))
        group.create_task(load.never_reads())
        began = time.monotonic()
        while (now := time.monotonic() - began) < seconds:
            memory.append((now, await asyncio.to_thread(server.memory)))
            await asyncio.sleep(min(5.0, seconds / 10))
        load.is_over = True
    memory.append((time.monotonic() - began, server.memory()))
    for _ in range(600):
        blocks = await asyncio.to_thread(server.blocks)
        if not (blocks["blocks_used"] or blocks["running"] or blocks["waiting"]):
            break
        await asyncio.sleep(0.1)
    settled = min(SETTLED_SECONDS, seconds / 2)
    at_first = next(size for when, size in memory if when >= settled)
    return {"blocks": blocks, "memory_settled": at_first, "memory_end": memory[-1][1]}


async def drained(server: Server, load: Load, *, count: int) -> tuple[int, dict[str, object], str]:
    """Begin answers, then ask the server to stop: they must all be whole."""
    client = client_of(server.url, None, timeout_seconds=TIMEOUT_SECONDS)
    async with client:
        asked = [asyncio.create_task(load.ask(client)) for _ in range(count)]
        while (await asyncio.to_thread(server.blocks))["running"] == 0:
            await asyncio.sleep(0.02)
        ended = await asyncio.to_thread(server.stop)
        await asyncio.gather(*asked)
    return ended


async def killed(server: Server, load: Load) -> dict[str, object]:
    """Kill a rank in the middle of answers, and compare those that come with those from before."""
    client = client_of(server.url, None, timeout_seconds=TIMEOUT_SECONDS)
    outcomes: Counter[str] = Counter()

    async def text(number: int) -> str:
        body = {"model": "load", "prompt": [5 + number, 9, 40], "max_tokens": load.tokens}
        chunks = stream(client, "completions", {**body, "temperature": 0, "ignore_eos": True})
        return "".join([c["choices"][0]["text"] async for c in chunks if c["choices"]])

    async with client:
        right = [await text(number) for number in range(8)]

        async def again(number: int) -> None:
            while not load.is_over:
                try:
                    outcomes["right" if await text(number) == right[number] else "wrong"] += 1
                except ServingError:
                    outcomes["broken off"] += 1
                    await asyncio.sleep(0.1)

        asking = [asyncio.create_task(again(number)) for number in range(8)]
        await asyncio.sleep(2)
        os.kill(server.ranks()[1], signal.SIGKILL)
        began = time.monotonic()
        await asyncio.sleep(0.5)
        await asyncio.to_thread(server.wait)
        seconds = time.monotonic() - began
        await asyncio.sleep(2)
        load.is_over = True
        await asyncio.gather(*asking)
    return {"seconds_until_it_answers_again": round(seconds, 2), "outcomes": dict(outcomes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--context", type=int, default=512, help="most tokens of one request")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--kill", action="store_true", help="kill a rank instead")
    parser.add_argument("--keep", action="store_true", help="keep the result beside the others")
    parser.add_argument("options", nargs="*", help="more for `moesaic serve`, after --")
    given = parser.parse_args()
    described = machine()
    options = ["--max-context", str(given.context), "--write-seconds", "10", *given.options]
    if given.kill:
        options += ["--dtype", "float32"]
    server = Server(given.model, "--ranks", str(given.ranks), *options)
    try:
        ready = server.wait()
        load = Load(server.url, tokens=given.tokens, context=given.context)
        result: dict[str, object] = {"machine": described, "model": given.model.resolve().name}
        result |= {"ranks": given.ranks, "seconds_until_ready": round(ready, 2)}
        if given.kill:
            result |= asyncio.run(killed(server, load))
            status, done, said = server.stop()
            lost = "was ended by SIGKILL" in said
            is_good = lost and status == 0 and not result["outcomes"].get("wrong")
            print(f"{result['outcomes']}, back after {result['seconds_until_it_answers_again']} s")
        else:
            result |= asyncio.run(
                loaded(server, load, streams=given.streams, seconds=given.seconds)
            )
            load.is_over = False
            status, done, said = asyncio.run(drained(server, load, count=given.streams))
            grown = result["memory_end"] - result["memory_settled"]
            blocks = result["blocks"]
            is_good = (
                not load.errors
                and status == 0
                and bool(done.get("drained"))
                and blocks["blocks_used"] == 0
                and blocks["blocks_cached"] + blocks["blocks_free"] == blocks["blocks"]
                and grown <= MEMORY_LIMIT
            )
            firsts = sorted(load.first_seconds)
            result |= {
                "streams": given.streams,
                "seconds": given.seconds,
                "counts": dict(load.counts),
                "errors": load.errors[:20],
                "memory_grown": grown,
                "first_token_seconds_median": round(firsts[len(firsts) // 2], 2)
                if firsts
                else None,
                "exit_status": status,
                "server": done,
            }
            print(
                f"{dict(load.counts)}; {len(load.errors)} errors; memory grew "
                f"{grown / 1e6:+.1f} MB (limit {MEMORY_LIMIT / 1e6:.0f}); {blocks}; "
                f"drained {done.get('drained')}, status {status}"
            )
            for error in load.errors[:5]:
                print(f"  {error}")
        if said.strip():
            print(said.strip())
        if given.keep:
            save("serving_load_killed" if given.kill else "serving_load", result)
    finally:
        if server.process.poll() is None:
            server.process.kill()
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
