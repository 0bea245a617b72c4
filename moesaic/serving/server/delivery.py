"""Carry events from the engine's thread to the server's, and never more than the server can hold.

The engine steps, and may have a piece of text for hundreds of answers at once. Each goes into the
inbox of its request, and the server's loop is woken once for all of them. An inbox that nobody
empties is closed, which ends its request: a client that never reads costs a bounded amount.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from moesaic.serving.engine.request import Event

MOST_UNREAD = 4096
"""Events that wait in one inbox. One that is read at all has a few."""


class Post:
    """Takes events on any thread and hands them out on the loop's."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._carried: deque[tuple[Inbox, int, Event]] = deque()
        self._is_called = False

    def put(self, inbox: Inbox, prompt: int, event: Event) -> None:
        """Called on the engine's thread."""
        self._carried.append((inbox, prompt, event))
        # First in, then looked: whoever hands out looks only after it has taken this back.
        if not self._is_called:
            self._is_called = True
            self._loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._is_called = False
        while self._carried:
            inbox, prompt, event = self._carried.popleft()
            inbox.receive(prompt, event)


class UnreadError(Exception):
    """An inbox is full. Raised to the engine, which then cancels the request."""


class Inbox:
    """Events of one HTTP request, which may be of several prompts."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self._events: deque[tuple[int, Event]] = deque()
        self._is_filled = asyncio.Event()
        self.is_overfull = False
        """Whether events were lost because nobody read them."""

    def address(self, prompt: int) -> Callable[[Event], None]:
        """Where the engine sends events of one of the prompts."""

        def on_event(event: Event) -> None:
            if len(self._events) > MOST_UNREAD and event.finish_reason is None:
                self.is_overfull = True
                raise UnreadError(f"{MOST_UNREAD} events are unread")
            self._post.put(self, prompt, event)

        return on_event

    def receive(self, prompt: int, event: Event) -> None:
        """Called on the loop's thread."""
        self._events.append((prompt, event))
        self._is_filled.set()

    async def take(self) -> list[tuple[int, Event]]:
        """All events that are there, each with the number of its prompt; at least one."""
        await self._is_filled.wait()
        self._is_filled.clear()
        events = list(self._events)
        self._events.clear()
        return events
