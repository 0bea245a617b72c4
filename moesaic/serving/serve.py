"""The job behind `moesaic serve`: check, listen, load, answer until asked to stop, end in order.

What can be wrong is looked at first, in this order, and said in one line: flags, keys, plan, model,
memory, port. The port is taken before anything is loaded; who connects meanwhile is answered once
the model is there.

SIGTERM or Ctrl-C drains: new requests get 503 and when to come again, answers that were begun have
`drain_seconds` to end. A second one stops at once.

Over several ranks each holds its part of every layer, the first one speaks HTTP and the others
compute what it tells them. When one is lost the first closes its connections without an end, so
no client takes half an answer for a whole one, and all ranks end; `parallel.launch` starts them
again.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from moesaic.checkpoint.folder import read_spec
from moesaic.errors import ConfigError, FolderError, ServingError
from moesaic.parallel.group import Group
from moesaic.parallel.join import Needs, joined
from moesaic.planning.serving.layout import fit
from moesaic.planning.serving.plan import ServePlan
from moesaic.serving.config import ServeConfig
from moesaic.serving.engine.engine import Engine
from moesaic.serving.engine.load import device_of, load_rank, plan_of
from moesaic.serving.server.app import build_app
from moesaic.serving.server.gate import Gate, RequestLog

SEND_BUFFER_BYTES = 2**18
"""What the system holds of an answer that is not read yet. Its own choice grows to megabytes."""

WATCH_SECONDS = 0.25
"""A broken engine is noticed so soon."""

CLOSE_SECONDS = 5
"""Connections that are still open after draining are closed so late."""


def serve(config: ServeConfig) -> dict[str, Any]:
    """Serve a model until this process is asked to stop.

    Over several ranks each of them calls this, as `moesaic serve` sees to.

    Returns:
        What `answer` returns; nothing on ranks but the first.

    Raises:
        ConfigError: Flags contradict each other or the plan, or the port is not to be had.
        PlanError: The plan cannot be carried out, not with this model or not in this memory.
        FolderError: The model, its tokenizer or the keys cannot be read.
        ServingError: The engine broke.
    """
    keys, size = read_keys(config), check_plan(config)
    if size > 1 and config.plan is None:
        raise ConfigError(
            f"ranks is {size}, but only the command `moesaic serve` starts ranks for that. With "
            f"torchrun give each of them the same plan."
        )
    log = RequestLog(config.log)  # writes where this process does, not into a rank's log too
    needs = Needs(size, config.device if config.device != "auto" else device_of("auto").type)
    with joined(lambda: needs, config=config.launch) as watch:
        group = Group.of_all(device_of(config.device))
        if group.rank > 0:
            _ignore_signals()  # it ends when the first rank says so
            load_rank(config, group=group, watch=watch).follow()
            return {}
        with listening(config) as listener, Engine.load(config, group=group, watch=watch) as engine:
            memory = engine.executor.memory
            log.write(
                "loaded",
                weight_bytes=[one.weights for one in memory],
                kv_bytes=[one.kv_cache for one in memory],
                kv_tokens=engine.executor.num_blocks * engine.executor.block_tokens,
            )
            try:
                done = answer(engine, config, listener, keys=keys, log=log)
                engine.check()  # every block of the cache is accounted for
                return done
            except ServingError as error:
                if size == 1:
                    raise
                # The watch finds out which rank is lost and says so, and all start again.
                raise ConnectionError(f"The connection to another rank is lost: {error}") from error


def check(config: ServeConfig) -> int:
    """See that ranks would not start in vain, and say how many it takes.

    What a rank measures itself, such as its memory, it sees to before it loads anything.

    Raises:
        MoesaicError: As `serve`.
    """
    read_keys(config)
    size = check_plan(config)
    with listening(config):
        pass
    return size


def check_plan(config: ServeConfig) -> int:
    """See that the plan is one for this model, and say how many ranks it takes."""
    spec = read_spec(config.model)
    plan = shared_plan(config)
    fit(plan, spec)
    return plan.ranks


def shared_plan(config: ServeConfig) -> ServePlan:
    """The plan that the config names, or one that shares everything over `ranks` alike."""
    plan = plan_of(config)
    if config.ranks is None or config.ranks == plan.ranks:
        return plan
    if config.plan is not None:
        raise ConfigError(
            f"ranks is {config.ranks}, but the plan {config.plan} has {plan.ranks}. Leave ranks "
            f"out, or take another plan."
        )
    return replace(plan, ranks=config.ranks)


def _ignore_signals() -> None:
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)


def read_keys(config: ServeConfig) -> tuple[str, ...]:
    """The API keys that are let in.

    Raises:
        FolderError: Their file cannot be read.
        ConfigError: It holds none, or one that no header can carry.
    """
    if config.api_keys is None:
        return ()
    try:
        lines = config.api_keys.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FolderError(f"The keys in {config.api_keys} cannot be read: {error}.") from error
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise ConfigError(f"{config.api_keys} holds no key. Write one a line.")
    if any(not (key.isascii() and key.isprintable()) or " " in key for key in keys):
        raise ConfigError(f"A key in {config.api_keys} is not of printable ASCII without spaces.")
    return keys


@contextlib.contextmanager
def listening(config: ServeConfig) -> Iterator[socket.socket]:
    """A socket that takes connections from now on.

    Raises:
        ConfigError: The address is not of this machine, or is in use.
    """
    where = f"{config.host}:{config.port}"
    try:
        found = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise ConfigError(f"host {config.host!r} is not known: {error.strerror}.") from error
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # Connections inherit it: the system gives up a client that takes nothing, whatever
            # still waits to be sent.
            milliseconds = round(config.write_seconds * 1000)
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        try:
            listener.bind(address)
            listener.listen(2048)
        except OSError as error:
            raise ConfigError(
                f"Cannot listen on {where}: {error.strerror}. Choose another port, or end what "
                f"uses it."
            ) from error
        listener.setblocking(False)
        yield listener


def address_of(listener: socket.socket) -> str:
    """As a browser takes it."""
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}"


def answer(
    engine: Engine,
    config: ServeConfig,
    listener: socket.socket,
    *,
    keys: tuple[str, ...] = (),
    log: RequestLog | None = None,
    on_ready: Callable[[Gate], None] = lambda gate: None,
) -> dict[str, Any]:
    """Answer requests until this process is asked to stop.

    Args:
        engine: The model; closed by the caller.
        config: Limits.
        listener: Where clients connect.
        keys: API keys; none lets everyone in.
        log: Where requests are written.
        on_ready: Called once requests are answered.

    Returns:
        `seconds` that it answered for, `answers` by how they ended, and whether it was `drained`:
        nothing that was begun had to be cut short.

    Raises:
        ServingError: The engine broke.
    """
    log = log or RequestLog(config.log)
    gate = build_app(engine, config, keys=keys, log=log)
    began = time.monotonic()
    drained = asyncio.run(_answer(engine, config, listener, gate, log, on_ready))
    return {
        "seconds": time.monotonic() - began,
        "answers": engine.statistics().finished,
        "drained": drained,
    }


async def _answer(
    engine: Engine,
    config: ServeConfig,
    listener: socket.socket,
    gate: Gate,
    log: RequestLog,
    on_ready: Callable[[Gate], None],
) -> bool:
    server = _Server(
        uvicorn.Config(
            gate,
            http=_protocol(config.body_seconds),
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="critical",  # the gate writes what happens, and faults with their traceback
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
    )
    with _signals(gate):
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        name = config.name or config.model.resolve().name
        log.write("ready", url=address_of(listener), model=name, context=engine.max_context)
        on_ready(gate)
        while not serving.done() and not gate.stop_requests and not engine.statistics().is_broken:
            await asyncio.sleep(WATCH_SECONDS)
        drained = await _drain(engine, config, gate, log)
        server.should_exit = True
        server.force_exit = not drained  # else it would wait for what there is no time for
        await serving
    if engine.statistics().is_broken:
        raise ServingError("The engine broke; its requests were told so, and none is taken.")
    log.write("stopped", drained=drained)
    return drained


async def _drain(engine: Engine, config: ServeConfig, gate: Gate, log: RequestLog) -> bool:
    """Wait until what was begun has ended; False if it took too long or is not wanted."""
    gate.is_draining = True
    if gate.in_flight:
        log.write("draining", requests=gate.in_flight, seconds=config.drain_seconds)
    end = time.monotonic() + config.drain_seconds
    while gate.in_flight and time.monotonic() < end and gate.stop_requests < 2:
        if engine.statistics().is_broken:  # each has been told; let that be sent
            end = min(end, time.monotonic() + CLOSE_SECONDS)
        await asyncio.sleep(0.02)
    return not gate.in_flight


def _protocol(seconds: float) -> type[H11Protocol]:
    """uvicorn's HTTP, which gives up a connection on which no request comes for so long."""

    class Protocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.loop.call_later(seconds, self._give_up)

        def _give_up(self) -> None:
            if self.cycle is None and not self.transport.is_closing():
                self.transport.abort()

    return Protocol


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which would close the port instead of draining."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def _signals(gate: Gate) -> Iterator[None]:
    """SIGINT and SIGTERM ask the server to stop, if this is the main thread, which has them."""
    kinds = [signal.SIGINT, signal.SIGTERM]
    if threading.current_thread() is not threading.main_thread():
        kinds = []
    loop = asyncio.get_running_loop()
    for kind in kinds:
        loop.add_signal_handler(kind, gate.ask_to_stop)
    try:
        yield
    finally:
        for kind in kinds:
            loop.remove_signal_handler(kind)
