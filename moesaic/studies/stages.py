"""Do a list of stages once: what is finished and still wanted the same way is not done again.

A stage writes one folder or file. Beside it, in `stages/NAME.json`, stands what it was asked
for, the stages it used, what it returned, how long it took and how much memory. A stage is
skipped when that record says it was finished with the same question and the same inputs, and
what it made is still there. Otherwise what it made is removed and made again; a
training run that was interrupted is left to go on.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.console import note
from moesaic.errors import FolderError
from moesaic.files import write_text_atomic
from moesaic.version import __version__

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a study."""

    name: str
    title: str
    """What happens, for people."""
    makes: Path
    """The folder or file that is there once it is done."""
    asked: str
    """Everything its result depends on but its inputs, as text: the job's config."""
    needs: tuple[str, ...] = ()
    """Names of earlier stages whose results it reads."""
    is_resumable: bool = False
    """Whether what an interrupted attempt left is of use."""
    run: Callable[[], Mapping[str, Any]]
    """Does it; returns what happened, ready for JSON."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a finished stage left on record."""

    key: str
    """Changes when the stage, or anything it used, would come out differently."""
    result: dict[str, Any]
    seconds: float
    peak_memory_bytes: int | None
    """Largest resident memory of the process during the stage; None where it cannot be told."""
    was_skipped: bool


def run_stages(stages: Sequence[Stage], records: Path) -> dict[str, Done]:
    """Do every stage that is not done yet, in order.

    Args:
        stages: Each after those it needs.
        records: Folder of the records.

    Raises:
        FolderError: What a stage would make is there, but not by a record.
        MoesaicError: Whatever a stage raises. Those before it stay done.
    """
    done: dict[str, Done] = {}
    for number, stage in enumerate(stages, start=1):
        head = f"[{number}/{len(stages)}] {stage.title}"
        key = _key(stage, [done[name].key for name in stage.needs])
        record = records / f"{stage.name}.json"
        finished = _finished(stage, record, key)
        if finished is not None:
            note(f"{head}: there already")
            done[stage.name] = finished
            continue
        _make_room(stage, record, key)
        records.mkdir(parents=True, exist_ok=True)
        write_text_atomic(record, json.dumps({"key": key, "is_finished": False}) + "\n")
        note(head)
        done[stage.name] = _measured(stage, key)
        write_text_atomic(record, _as_json(done[stage.name]))
        note(f"    {_cost(done[stage.name])}")
    return done


def _key(stage: Stage, inputs: Sequence[str]) -> str:
    text = "\0".join([__version__, stage.name, str(stage.makes), stage.asked, *inputs])
    return hashlib.sha256(text.encode()).hexdigest()


def _read(record: Path) -> dict[str, Any]:
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _finished(stage: Stage, record: Path, key: str) -> Done | None:
    content = _read(record)
    if content.get("key") != key or not content.get("is_finished") or not stage.makes.exists():
        return None
    return Done(
        key=key,
        result=content["result"],
        seconds=content["seconds"],
        peak_memory_bytes=content["peak_memory_bytes"],
        was_skipped=True,
    )


def _make_room(stage: Stage, record: Path, key: str) -> None:
    if not stage.makes.exists():
        return
    content = _read(record)
    if not content:
        raise FolderError(
            f"{stage.makes} is there, but was not made here. Choose another folder, or remove it."
        )
    if stage.is_resumable and content.get("key") == key:
        return
    if stage.makes.is_dir():
        shutil.rmtree(stage.makes)
    else:
        stage.makes.unlink()


def _measured(stage: Stage, key: str) -> Done:
    gc.collect()  # the last stage's model must not count towards this one's memory
    is_reset = _reset_peak_memory()
    start = time.perf_counter()
    result = dict(stage.run())
    return Done(
        key=key,
        result=result,
        seconds=time.perf_counter() - start,
        peak_memory_bytes=_peak_memory_bytes() if is_reset else None,
        was_skipped=False,
    )


def _as_json(done: Done) -> str:
    content = {
        "key": done.key,
        "is_finished": True,
        "seconds": done.seconds,
        "peak_memory_bytes": done.peak_memory_bytes,
        "result": done.result,
    }
    return json.dumps(content, indent=1) + "\n"


def _cost(done: Done) -> str:
    memory = done.peak_memory_bytes
    peak = "" if memory is None else f", peak memory {memory / GIB:.1f} GiB"
    return f"{done.seconds:.1f} s{peak}"


def _reset_peak_memory() -> bool:
    """Begin a new peak (Linux, proc(5)); False where that is not to be had."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _peak_memory_bytes() -> int | None:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
