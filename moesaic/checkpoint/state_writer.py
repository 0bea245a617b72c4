"""Write training states beside the training.

The training waits only while what it is about to change is copied; a thread writes the copy. On
every rank that thread talks to its fellows over a group that nothing else uses meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moesaic.checkpoint.blocks import Share
from moesaic.checkpoint.pieces import Held
from moesaic.checkpoint.training_state import prune, write_share
from moesaic.parallel.agreement import first_does
from moesaic.parallel.group import ALONE, Group
from moesaic.parallel.watch import is_of_a_connection

LAST_WAIT_SECONDS = 60.0
"""How long a run that fails waits for the state that is under way."""


class StateWriter:
    """Saves the states of a run, one at a time, and keeps the newest.

    Used as a context manager. Leaving it waits for the state under way; after an error for a minute
    at most; not at all after Ctrl-C, nor where a rank is gone, without which none is completed.

    In the background, `save` copies the blocks that this rank writes into the CPU's memory before
    it returns, and the copy lives until the state is complete. It takes the bytes of the state,
    three times those of float32 weights, divided by the ranks that share in writing it. A process
    that dies meanwhile leaves the states before, or the new one as a whole.

    Every rank makes the same calls in the same order, so that an error, which all ranks
    meet together, is raised on all at the same call.

    Args:
        checkpoints: Folder that holds the states of a run, and that all ranks see.
        keep: States to keep, the newest.
        in_background: Whether training goes on while a state is written.
        writers: All ranks, on the CPU. While a state is under way, nothing else may use it.
    """

    def __init__(
        self, checkpoints: Path, *, keep: int, in_background: bool, writers: Group = ALONE
    ) -> None:
        self.saved: int | None = None
        """Step of the newest state that this writer has completed, as far as is known here."""
        self._checkpoints = checkpoints
        self._keep = keep
        self._in_background = in_background
        self._writers = writers
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, step: int, tensors: Mapping[str, Held], *, facts: Mapping[str, Any], config_toml: str
    ) -> None:
        """Save the state after `step` optimizer steps, or begin to, once the one before is there.

        The arguments are those of `save_state`. Tensors may change as soon as this returns.

        Raises:
            FolderError: This state could not be written, or in the background the one before.
        """
        self.wait()
        facts = dict(facts)
        share = Share.of(tensors, self._writers)
        if not self._in_background:
            self._write(step, share, facts, config_toml)
            return
        self._thread = threading.Thread(
            target=self._try_to_write,
            args=(step, share.snapshot(), facts, config_toml),
            name=f"write state {step}",
            # A run that fails must not stay for the sake of a rank that is gone.
            daemon=True,
        )
        self._thread.start()

    def wait(self) -> None:
        """Return once no state is under way.

        Raises:
            FolderError: The one that was could not be written. Earlier states are as they were.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.wait()
        elif self._thread is not None and isinstance(error, Exception):
            self._thread.join(0.0 if is_of_a_connection(error) else LAST_WAIT_SECONDS)

    def _try_to_write(self, *state: Any) -> None:
        try:
            self._write(*state)
        except BaseException as error:
            self._error = error

    def _write(self, step: int, share: Share, facts: Mapping[str, Any], config_toml: str) -> None:
        write_share(
            self._checkpoints,
            step,
            share,
            facts=facts,
            config_toml=config_toml,
            writers=self._writers,
        )
        self.saved = step
        first_does(self._writers, lambda: prune(self._checkpoints, keep=self._keep))
