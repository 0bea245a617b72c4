"""A server in a thread of the test, for clients that speak HTTP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from moesaic.serving.config import ServeConfig
from moesaic.serving.serve import address_of, answer, listening
from moesaic.serving.server.gate import Gate, RequestLog


@dataclass
class Running:
    """A server that answers."""

    engine: Any
    url: str
    gate: Gate
    log: StringIO
    result: dict[str, Any] = field(default_factory=dict)


@contextmanager
def running(engine: Any, *, keys: tuple[str, ...] = (), **options: Any) -> Iterator[Running]:
    """Serve `engine` as the model `tiny` until the block ends; it must then have drained."""
    config = ServeConfig(model=Path("tiny"), port=0, log="json", **options)
    log = StringIO()
    is_ready = threading.Event()
    with listening(config) as listener:
        server = Running(engine, address_of(listener), None, log)  # type: ignore[arg-type]

        def on_ready(gate: Gate) -> None:
            server.gate = gate
            is_ready.set()

        def serve() -> None:
            server.result = answer(
                engine, config, listener, keys=keys, log=RequestLog("json", log), on_ready=on_ready
            )

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            assert is_ready.wait(20)
            yield server
        finally:
            if server.gate is not None:
                server.gate.ask_to_stop()
            thread.join(30)
            assert not thread.is_alive()
