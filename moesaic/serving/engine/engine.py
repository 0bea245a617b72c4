"""Answer many requests at once over one executor.

One thread does all that touches a request's state: it takes in what was submitted and cancelled,
asks the scheduler what to compute, has the executor compute it, samples, turns tokens into text
and delivers events. Other threads only leave things in its inbox.

    with Engine.load(EngineConfig(model=folder)) as engine:
        [answer] = engine.generate(["The capital of France is"], RequestConfig(max_new_tokens=8))
        async for event in engine.stream(prompt_ids, RequestConfig()): ...

A fault of one request, such as a grammar that cannot go on, ends that request. A fault of the
executor ends all of them: the engine is broken then, says so, and takes nothing any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import secrets
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from moesaic.console import note
from moesaic.data.tokenizer import load_tokenizer
from moesaic.errors import ConfigError, MoesaicError, ServingError, Unavailable
from moesaic.parallel.group import ALONE, Group
from moesaic.parallel.watch import Watch
from moesaic.serving.config import EngineConfig, RequestConfig
from moesaic.serving.engine.grammar import Grammar, Grammars
from moesaic.serving.engine.live import Job, Live
from moesaic.serving.engine.load import eos_token_ids, load_rank
from moesaic.serving.engine.request import (
    Completion,
    EngineStatistics,
    Event,
    FinishReason,
    OnEvent,
    Request,
)
from moesaic.serving.engine.sample import Scores, choose
from moesaic.serving.engine.scheduler import Answer, Scheduler, Work
from moesaic.serving.engine.text import TextStream, TokenTexts
from moesaic.serving.execution.batch import Batch, Chunk, StepResult

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from moesaic.serving.execution.batch import Executor


class Engine:
    """Answers requests until it is closed.

    Args:
        executor: The model; the engine closes it.
        tokenizer: Its tokenizer.
        config: Limits. What is about loading is not read here.
        eos_token_ids: Tokens that end an answer.

    Raises:
        ConfigError: The executor's steps are too short for so many sequences.
    """

    def __init__(
        self,
        executor: Executor,
        tokenizer: PreTrainedTokenizerFast,
        config: EngineConfig,
        *,
        eos_token_ids: Collection[int],
    ) -> None:
        spec = executor.spec
        step_tokens = min(config.max_step_tokens, executor.max_step_tokens)
        if step_tokens < config.max_sequences:
            raise ConfigError(
                f"max_sequences is {config.max_sequences}, but a step takes {step_tokens} tokens. "
                f"Lower max_sequences."
            )
        self.executor, self.tokenizer, self.config = executor, tokenizer, config
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_context = min(
            spec.max_positions,
            executor.num_blocks * executor.block_tokens,
            config.max_context or spec.max_positions,
        )
        """Tokens that prompt and answer may have together."""
        self._vocab_size = spec.vocab_size
        self._grammars = Grammars(
            tokenizer, vocab_size=spec.vocab_size, eos_token_ids=self.eos_token_ids
        )
        self._texts = TokenTexts(tokenizer)
        self._scheduler = Scheduler(
            executor.num_blocks,
            executor.block_tokens,
            max_sequences=config.max_sequences,
            max_step_tokens=step_tokens,
            # What the ledger of memory counts on: `max_rows`.
            max_step_rows=max(1, 256 - config.max_sequences),
            prefix_cache=config.prefix_cache,
        )
        # Touched by the engine's thread alone.
        self._lives: dict[Answer, Live] = {}
        self._counts = _Counts()
        self._outbox: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Event], Event]]] = {}
        # Guarded by the lock.
        self._lock = threading.Lock()
        self._inbox_filled = threading.Condition(self._lock)
        self._answer_ended = threading.Condition(self._lock)
        self._inbox: deque[Callable[[], None]] = deque()
        self._jobs: dict[str, Job] = {}
        self._num_answers = 0
        self._num_requests = 0
        self._is_draining = self._is_closing = self._has_ended = False
        self._broken: ServingError | None = None
        self._most_answers = config.max_sequences + config.max_waiting
        self._thread = threading.Thread(target=self._run, name="moesaic-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls, config: EngineConfig, *, group: Group = ALONE, watch: Watch | None = None
    ) -> Self:
        """Load model and tokenizer as the config says; of several ranks the first one calls this.

        The others call `load_rank` with the same config, and `follow` what it returns.

        Raises:
            MoesaicError: The folder, the plan, the device or the memory does not allow it.
        """
        tokenizer = load_tokenizer(config.model)
        executor = load_rank(config, group=group, watch=watch)
        try:
            return cls(executor, tokenizer, config, eos_token_ids=eos_token_ids(config.model))
        except BaseException:
            executor.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- what other threads call

    def submit(
        self,
        prompt_ids: Sequence[int],
        sampling: RequestConfig,
        *,
        request_id: str | None = None,
        on_event: OnEvent,
    ) -> Request:
        """Take a request; thread-safe, and returns at once unless there is a grammar to compile.

        Raises:
            ConfigError: The prompt is empty or, with max_new_tokens, too long; a token id is not
                of the vocabulary; the grammar cannot be used; the request id is in use.
            Unavailable: Too many wait already, or the engine is draining or closed.
            ServingError: The engine is broken.
        """
        request = self._request(prompt_ids, sampling, request_id, on_event)
        self._take(request, self._grammars.compile(sampling), wait=False)
        return request

    async def stream(
        self,
        prompt_ids: Sequence[int],
        sampling: RequestConfig,
        *,
        request_id: str | None = None,
    ) -> AsyncIterator[Event]:
        """The events of one request, as they come. Leaving the loop early cancels the request.

        Raises what `submit` raises, when the first event is asked for.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def on_event(event: Event) -> None:
            self._outbox.setdefault(loop, []).append((events, event))

        request = self._request(prompt_ids, sampling, request_id, on_event)
        has_grammar = sampling.regex is not None or sampling.json_schema is not None
        grammar = await asyncio.to_thread(self._grammars.compile, sampling) if has_grammar else None
        self._take(request, grammar, wait=False)
        try:
            while True:
                event = await events.get()
                yield event
                if event.is_last:
                    return
        finally:
            self.cancel(request.id)

    def generate(
        self, prompts: Sequence[str | Sequence[int]], sampling: RequestConfig
    ) -> list[Completion]:
        """Answer many prompts, texts as they stand or token ids: the n answers of the first first.

        Waits for room rather than raise `Unavailable` where too many would wait.

        Raises:
            ConfigError: As `submit`.
            ServingError: The engine broke.
        """
        asked: list[tuple[Request, queue.SimpleQueue[Event]]] = []
        try:
            for prompt in prompts:
                ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
                events: queue.SimpleQueue[Event] = queue.SimpleQueue()
                request = self._request(ids, sampling, None, events.put)
                self._take(request, self._grammars.compile(sampling), wait=True)
                asked.append((request, events))
            answers = [answer for one in asked for answer in completions(*one)]
        except BaseException:
            for request, _ in asked:
                self.cancel(request.id)
            raise
        if self._broken is not None:
            raise self._broken
        return answers

    def cancel(self, request_id: str) -> None:
        """End a request early: its answers finish as `cancelled`.

        Nothing happens if it has ended or never was.
        """
        with self._lock:
            if request_id in self._jobs:
                self._post(partial(self._cancel, request_id))

    def statistics(self) -> EngineStatistics:
        """As of the last step."""
        counts, pool = self._counts, self._scheduler.pool
        running = len(self._scheduler.running)
        free, cached = pool.num_free, pool.num_cached
        return EngineStatistics(
            running=running,
            waiting=max(0, self._num_answers - running),
            blocks=pool.num_blocks,
            blocks_used=pool.num_blocks - free - cached,
            blocks_cached=cached,
            blocks_free=free,
            requests=self._num_requests,
            finished=dict(counts.finished),
            prompt_tokens=counts.prompt_tokens,
            cached_tokens=counts.cached_tokens,
            computed_tokens=counts.computed_tokens,
            generated_tokens=counts.generated_tokens,
            preemptions=self._scheduler.num_preemptions,
            steps=counts.steps,
            last_step_seconds=counts.last_step_seconds,
            executor_seconds=counts.executor_seconds,
            engine_seconds=counts.engine_seconds,
            is_broken=self._broken is not None,
            is_draining=self._is_draining,
        )

    def check(self) -> None:
        """See that no block is lost: free + used + cached == all, and counts agree with tables.

        Waits for the step that runs.
        """
        done: Future[None] = Future()

        def look() -> None:
            try:
                self._scheduler.check()
                done.set_result(None)
            except AssertionError as error:
                done.set_exception(error)

        with self._lock:
            is_alone = self._has_ended or threading.current_thread() is self._thread
            if not is_alone:
                self._post(look)
        if is_alone:
            look()
        done.result()

    def drain(self, timeout: float | None = None) -> bool:
        """Take nothing new, and wait until what was taken is done; False if that took too long."""
        with self._lock:
            self._is_draining = True
            self._answer_ended.notify_all()
            return self._answer_ended.wait_for(lambda: not self._jobs, timeout)

    def close(self) -> None:
        """Cancel what is left, end the thread and close the executor. Twice does no harm."""
        with self._lock:
            self._is_draining = self._is_closing = True
            self._inbox_filled.notify_all()
            self._answer_ended.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # ---- taking a request

    def _request(
        self,
        prompt_ids: Sequence[int],
        sampling: RequestConfig,
        request_id: str | None,
        on_event: OnEvent,
    ) -> Request:
        prompt = tuple(prompt_ids)
        length = len(prompt) + (sampling.max_new_tokens if sampling.embedding == "none" else 0)
        if not prompt:
            raise ConfigError("The prompt is empty. Give at least one word.")
        if length > self.max_context:
            raise ConfigError(
                f"The prompt has {len(prompt)} tokens, and max_new_tokens is "
                f"{sampling.max_new_tokens}; together more than the {self._context_of} "
                f"{self.max_context}. Shorten the one or lower the other."
            )
        for name, tokens in (
            ("The prompt", prompt),
            ("logit_bias", sampling.logit_bias),
            ("stop_token_ids", sampling.stop_token_ids),
        ):
            wrong = [token for token in tokens if not 0 <= token < self._vocab_size]
            if wrong:
                raise ConfigError(
                    f"{name} has the token {wrong[0]}, but the vocabulary ends at "
                    f"{self._vocab_size - 1}."
                )
        if sampling.n > self._most_answers:
            raise ConfigError(
                f"n is {sampling.n}, but at most {self._most_answers} answers may run and wait."
            )
        seed = sampling.seed
        if seed is None and sampling.temperature > 0:
            seed = secrets.randbits(32)
        return Request(
            id=request_id if request_id is not None else secrets.token_hex(12),
            prompt_ids=prompt,
            sampling=sampling,
            seed=seed,
            on_event=on_event,
        )

    @property
    def _context_of(self) -> str:
        if self.max_context == self.executor.spec.max_positions:
            return "model's context of"
        return "context that this engine was given, of"

    def _take(self, request: Request, grammar: Grammar | None, *, wait: bool) -> None:
        count = request.sampling.n
        with self._lock:
            self._refuse_if_ended()
            while self._num_answers + count > self._most_answers:
                if not wait:
                    raise Unavailable(
                        f"{self._num_answers} answers run or wait already, of at most "
                        f"{self._most_answers}. Try again later."
                    )
                self._answer_ended.wait()
                self._refuse_if_ended()
            if request.id in self._jobs:
                raise ConfigError(f"The request id {request.id!r} is in use. Choose another.")
            job = Job(request=request, number=self._num_requests, unended=count)
            self._num_requests += 1
            self._num_answers += count
            self._jobs[request.id] = job
            self._post(partial(self._begin, job, grammar))

    def _refuse_if_ended(self) -> None:
        if self._broken is not None:
            raise self._broken
        if self._is_draining:
            raise Unavailable("The engine is ending and takes no more requests.")

    def _post(self, message: Callable[[], None]) -> None:
        self._inbox.append(message)
        self._inbox_filled.notify()

    # ---- the engine's thread

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._take_in():
                    self._step()
                    self._after_step()
            self._end_all("cancelled", "")
        except Exception as error:
            self._break(error)
        self._after_step()
        with contextlib.suppress(Exception):
            self.executor.close()
        while True:
            with self._lock:
                if not self._inbox:
                    self._has_ended = True
                    return
                message = self._inbox.popleft()
            message()

    def _take_in(self) -> bool:
        """Do what the inbox says; wait while there is nothing to do. False: it is time to end."""
        with self._lock:
            while not (self._inbox or self._lives or self._is_closing):
                self._inbox_filled.wait()
        self._empty_inbox()
        return not self._is_closing

    def _empty_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _begin(self, job: Job, grammar: Grammar | None) -> None:
        sampling = job.request.sampling
        job.lives = [
            Live(
                job,
                index,
                texts=self._texts,
                stream=TextStream(self.tokenizer, sampling.stop),
                grammar=grammar.copy() if grammar is not None and index else grammar,
                eos_token_ids=self.eos_token_ids,
            )
            for index in range(sampling.n)
        ]
        self._schedule(job.lives[0])
        job.held = job.lives[1:]

    def _schedule(self, live: Live) -> None:
        self._lives[live.answer] = live
        self._scheduler.add(live.answer)

    def _cancel(self, request_id: str) -> None:
        job = self._jobs.get(request_id)
        for live in job.lives if job is not None else ():
            if not live.has_ended:
                self._deliver(live, live.end("cancelled"))

    def _step(self) -> None:
        started = time.perf_counter()
        works = self._scheduler.schedule()
        if not works:
            # Else this would be called for ever.
            assert not self._lives, f"{len(self._lives)} answers, and nothing to do"
            return
        lives = [self._lives[work.answer] for work in works]
        batch = Batch(
            chunks=tuple(
                Chunk(tuple(answer.tokens[start:end]), start, answer.table, rows)
                for answer, start, end, rows in works
            ),
            experts=any(live.wants_experts for live in lives),
            hidden=works[0].answer.hidden,
        )
        asked = time.perf_counter()
        result = self.executor.step(batch)
        answered = time.perf_counter()
        for work in works:
            self._scheduler.done(work)
        counts = self._counts
        counts.steps += 1
        counts.computed_tokens += batch.num_tokens
        if batch.hidden:
            self._take_hidden(works, lives, result)
        else:
            self._take_scores(works, lives, result)
        ended = time.perf_counter()
        counts.last_step_seconds = ended - started
        counts.executor_seconds += answered - asked
        counts.engine_seconds += ended - started - (answered - asked)

    def _take_hidden(self, works: list[Work], lives: list[Live], result: StepResult) -> None:
        if result.hidden_ND is None:
            return
        row = 0
        for work, live in zip(works, lives, strict=True):
            live.add_hidden(result.hidden_ND[row : row + work.rows].numpy())
            row += work.rows
            if work.end == live.answer.num_prompt:
                self._deliver(live, live.embedding())

    def _take_scores(self, works: list[Work], lives: list[Live], result: StepResult) -> None:
        if result.logits_NV is None:
            return
        logits_NV = result.logits_NV.numpy()
        choosing: list[tuple[Live, Tensor | None]] = []
        chosen_rows: list[int] = []
        row = place = 0
        for work, live in zip(works, lives, strict=True):
            row += work.rows
            place += work.end - work.start
            if live.scores_prompt and work.rows:
                self._score_prompt(live, work.end - work.rows, logits_NV[row - work.rows : row])
            if work.end == len(live.answer.tokens) and not live.has_ended:
                experts = result.experts_LTK if live.wants_experts else None
                choosing.append((live, None if experts is None else experts[:, place - 1]))
                chosen_rows.append(row - 1)
        if len(chosen_rows) < len(logits_NV):
            logits_NV = logits_NV[chosen_rows]
        if choosing:
            self._choose(choosing, logits_NV)

    def _score_prompt(self, live: Live, start: int, logits_NV: Scores) -> None:
        event = live.score_prompt(start, logits_NV)
        if event is not None:
            self._deliver(live, event)
        if live.only_scores and start + len(logits_NV) == live.answer.num_prompt:
            self._deliver(live, live.end("length"))

    def _choose(self, choosing: list[tuple[Live, Tensor | None]], logits_NV: Scores) -> None:
        choosers = [live.chooser for live, _ in choosing]
        raw = [
            (logits_NV[row].copy() if live.chooser.changes_scores else logits_NV[row])
            if live.wants_scores
            else None
            for row, (live, _) in enumerate(choosing)
        ]
        tokens = choose(logits_NV, choosers)
        for (live, experts_LK), token, logits_V in zip(choosing, tokens, raw, strict=True):
            self._schedule_held(live.job)
            try:
                event = live.accept(token, logits_V, experts_LK)
            except Exception as error:  # whatever it is, it is this answer's
                event = live.end("error", error=f"{type(error).__name__}: {error}")
            self._counts.generated_tokens += 1
            self._deliver(live, event)

    def _schedule_held(self, job: Job) -> None:
        """The prompt is in the cache: the other answers to it can begin."""
        while job.held:
            self._schedule(job.held.pop(0))

    def _deliver(self, live: Live, event: Event) -> None:
        try:
            if event.finish_reason is not None:
                self._let_go(live, event.finish_reason)
        finally:  # whatever else went wrong, nobody may wait for the last event for ever
            self._hand_over(live.job, event)

    def _hand_over(self, job: Job, event: Event) -> None:
        if job.is_deaf and event.finish_reason is None:
            return
        try:
            job.request.on_event(event)
        except Exception as error:
            if job.is_deaf:
                return
            job.is_deaf = True
            note(f"request {job.request.id} did not take an event: {type(error).__name__}: {error}")
            self._inbox.append(partial(self._cancel, job.request.id))

    def _let_go(self, live: Live, reason: FinishReason) -> None:
        job = live.job
        if self._lives.pop(live.answer, None) is not None:
            self._scheduler.remove(live.answer)
        elif live in job.held:
            job.held.remove(live)
        if reason != "cancelled":
            self._schedule_held(job)
        counts = self._counts
        counts.finished[reason] += 1
        counts.prompt_tokens += live.answer.num_prompt
        counts.cached_tokens += live.answer.cached_tokens
        with self._lock:
            self._num_answers -= 1
            if job.unended == 0:
                self._jobs.pop(job.request.id, None)
            self._answer_ended.notify_all()

    def _after_step(self) -> None:
        """Hand events to the event loops that wait for them: one call a loop, not one an event."""
        for loop, events in self._outbox.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(_put_all, events)
        self._outbox.clear()

    def _break(self, error: Exception) -> None:
        reason = (
            str(error) if isinstance(error, MoesaicError) else f"{type(error).__name__}: {error}"
        )
        broken = ServingError(f"The engine stopped and answers no more: {' '.join(reason.split())}")
        broken.__cause__ = error
        if not isinstance(error, MoesaicError):
            note("".join(traceback.format_exception(error)))
        with self._lock:
            self._broken = broken
        self._empty_inbox()
        # Nothing is known about the scheduler's state any more, so it is left as it is.
        self._lives.clear()
        self._end_all("error", str(broken))

    def _end_all(self, reason: FinishReason, error: str) -> None:
        for job in list(self._jobs.values()):
            job.held = []
            for live in job.lives:
                if not live.has_ended:
                    self._deliver(live, live.end(reason, error=error))
        with self._lock:
            self._jobs.clear()
            self._answer_ended.notify_all()


@dataclass(slots=True)
class _Counts:
    """What statistics add up."""

    finished: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    last_step_seconds: float = 0.0
    executor_seconds: float = 0.0
    engine_seconds: float = 0.0


def _put_all(events: list[tuple[asyncio.Queue[Event], Event]]) -> None:
    for waiting, event in events:
        waiting.put_nowait(event)


def completions(
    request: Request,
    events: queue.SimpleQueue[Event],
    *,
    on_event: Callable[[Event], None] = lambda event: None,
) -> list[Completion]:
    """Wait until a request has ended and put its events together, answer by answer.

    Args:
        request: What `submit` returned.
        events: Where it puts them.
        on_event: Called with each, on this thread.
    """
    parts: dict[int, list[Event]] = {index: [] for index in range(request.sampling.n)}
    while True:
        event = events.get()
        parts[event.index].append(event)
        on_event(event)
        if event.is_last:
            return [_completion(request, index, pieces) for index, pieces in parts.items()]


def _completion(request: Request, index: int, events: list[Event]) -> Completion:
    last = events[-1]
    assert last.finish_reason is not None, f"{last=}"
    assert last.usage is not None, f"{last=}"
    times = [event.time for event in events if event.tokens]
    return Completion(
        text="".join(event.text for event in events),
        tokens=tuple(token for event in events for token in event.tokens),
        finish_reason=last.finish_reason,
        index=index,
        usage=last.usage,
        seed=request.seed,
        error=last.error,
        stop=last.stop,
        prompt=tuple(token for event in events for token in event.prompt),
        embedding_D=last.embedding_D,
        first_token_seconds=times[0] - request.arrived if times else None,
        decode_seconds=times[-1] - times[0] if times else 0.0,
    )
