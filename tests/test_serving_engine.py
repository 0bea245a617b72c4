"""The engine over an executor without a model: who is computed when, and that it never shows."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import random
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from moesaic.data.tokenizer import load_tokenizer
from moesaic.errors import ConfigError, ServingError, Unavailable
from moesaic.serving.config import EngineConfig, RequestConfig
from moesaic.serving.engine.engine import Engine, completions
from moesaic.serving.engine.grammar import Grammar
from moesaic.serving.engine.sample import Chooser, choose
from moesaic.serving.execution.batch import Batch, Chunk
from tests.fake_executor import FakeExecutor, experts, greedy, scores
from tests.tiny import EOS, tiny_tokenizer

PROMPT = [5, 40, 7, 200, 33]
OPEN_END = {"ignore_eos": True}
"""Scores of the fake executor choose the end token now and then."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def start(tokenizer):
    """Makes engines that are closed, checked and found empty afterwards."""
    with contextlib.ExitStack() as engines:

        def make(executor=None, **limits):
            limits = {"max_sequences": 4, "max_step_tokens": 16} | limits
            engine = Engine(
                executor or FakeExecutor(),
                tokenizer,
                EngineConfig(model=Path("none"), **limits),
                eos_token_ids=[EOS],
            )
            engines.callback(see_that_nothing_is_left, engine)
            engines.enter_context(engine)
            return engine

        yield make


def see_that_nothing_is_left(engine):
    if not engine.statistics().is_broken:
        engine.check()
        assert engine.statistics().blocks_used == 0
    assert engine.executor.is_closed


def ask(engine, prompt=PROMPT, **sampling):
    """Submit without waiting; the function that is returned waits for the answers."""
    events = queue.SimpleQueue()
    sampling = {"max_new_tokens": 10} | OPEN_END | sampling
    request = engine.submit(prompt, RequestConfig(**sampling), on_event=events.put)
    return request, lambda: completions(request, events)


def alone(prompt, sampling, *, seed=None, index=0):
    """Tokens of one answer, chosen one by one from the scores of all tokens before."""
    chooser = Chooser(sampling, prompt, seed=seed, index=index, logit_bias=sampling.logit_bias)
    tokens = list(prompt)
    for _ in range(sampling.max_new_tokens):
        [token] = choose(scores(tokens)[None], [chooser])
        if token in sampling.stop_token_ids or (token == EOS and not sampling.ignore_eos):
            break
        chooser.add(token)
        tokens.append(token)
    return tokens[len(prompt) :]


# ---- the fake can fail


def test_a_wrong_block_table_fails():
    executor = FakeExecutor(block_tokens=2)
    executor.step(Batch((Chunk((5, 6, 7), 0, (4, 2)),)))
    executor.step(Batch((Chunk((9, 9, 9), 0, (1, 3)),)))
    result = executor.step(Batch((Chunk((8,), 3, (4, 2)),)))
    assert np.array_equal(result.logits_NV[0], scores([5, 6, 7, 8]))
    # A foreign block whose positions fit gives other scores,
    result = executor.step(Batch((Chunk((8,), 3, (1, 2)),)))
    assert not np.array_equal(result.logits_NV[0], scores([5, 6, 7, 8]))
    # and one whose positions do not is noticed at once.
    with pytest.raises(AssertionError):
        executor.step(Batch((Chunk((8,), 3, (2, 4)),)))


# ---- any schedule


class Visitors:
    """Random requests that come and go while the engine steps.

    It is called on the engine's thread before each step, so that the same seed gives the same
    schedule.
    """

    def __init__(self, seed: int, tokenizer) -> None:
        self.random = random.Random(seed)
        pick = self.random
        block_tokens = pick.randint(1, 6)
        self.longest = 40
        least = -(-self.longest // block_tokens)
        max_sequences = pick.randint(1, 6)
        self.executor = FakeExecutor(
            pick.randint(least, least * pick.choice([1, 2, 4])), block_tokens, max_step_tokens=64
        )
        self.executor.before_step = self.visit
        self.stems = [[pick.randrange(300) for _ in range(24)] for _ in range(2)]
        self.asked = []
        self.to_come = pick.randint(3, 12)
        self.engine = Engine(
            self.executor,
            tokenizer,
            EngineConfig(
                model=Path("none"),
                max_sequences=max_sequences,
                max_step_tokens=pick.choice([max_sequences, max_sequences + 3, 64]),
                prefix_cache=pick.random() < 0.7,
            ),
            eos_token_ids=[EOS],
        )

    def visit(self) -> None:
        while self.to_come and self.random.random() < 0.4:
            self.come()
        if self.asked and self.random.random() < 0.08:
            self.engine.cancel(self.random.choice(self.asked)[0].id)

    def come(self) -> None:
        self.to_come -= 1
        pick = self.random
        stem = pick.choice(self.stems)[: pick.randint(0, 24)]
        prompt = [*stem, *(pick.randrange(300) for _ in range(pick.randint(1, 4)))]
        wanted: dict = {"max_new_tokens": pick.randint(1, self.longest - len(prompt))}
        if pick.random() < 0.4:
            wanted |= {"temperature": 1.3, "seed": pick.randrange(99), "top_k": pick.choice([0, 5])}
        if pick.random() < 0.3:
            wanted |= {"presence_penalty": 1.0, "repetition_penalty": 1.2}
        kind = pick.random()
        if kind < 0.1:
            wanted |= {"embedding": pick.choice(["mean", "last"])}
        elif kind < 0.25:
            wanted |= {"prompt_logprobs": True}
        elif kind < 0.5:
            wanted |= {"n": 3}
        sampling = RequestConfig(**wanted, ignore_eos=pick.random() < 0.5)
        events = queue.SimpleQueue()
        request = self.engine.submit(prompt, sampling, on_event=events.put)
        self.asked.append((request, events))

    def run(self) -> None:
        """Until all have come and gone; then see that each was served as if it were alone."""
        with self.engine:
            self.come()
            done = 0
            while done < len(self.asked):  # others come while this one is answered
                self.check_answers(*self.asked[done])
                done += 1
            self.engine.check()
            assert self.engine.statistics().blocks_used == 0

    def check_answers(self, request, events) -> None:
        for answer in completions(request, events):
            sampling, index = request.sampling, answer.index
            if sampling.embedding != "none":
                assert answer.finish_reason in ("stop", "cancelled")
                if answer.finish_reason == "stop":
                    check_embedding(request.prompt_ids, sampling.embedding, answer.embedding_D)
                continue
            wanted = alone(request.prompt_ids, sampling, seed=request.seed, index=index)
            got = list(answer.token_ids)
            if answer.finish_reason == "cancelled":
                assert got == wanted[: len(got)]
                continue
            assert got == wanted
            is_full = len(wanted) == sampling.max_new_tokens
            assert answer.finish_reason == ("length" if is_full else "stop")
            if sampling.prompt_logprobs and index == 0:
                check_prompt_scores(request.prompt_ids, answer.prompt)


def check_embedding(prompt, kind, vector_D):
    rows = [scores(prompt[:end])[:8] for end in range(1, len(prompt) + 1)]
    wanted = np.mean(rows, axis=0) if kind == "mean" else rows[-1]
    np.testing.assert_allclose(vector_D.numpy(), wanted, rtol=1e-5, atol=1e-6)


def check_prompt_scores(prompt, tokens):
    assert [token.id for token in tokens] == list(prompt)
    assert tokens[0].logprob is None
    for end in range(1, len(prompt)):
        wanted = torch.from_numpy(scores(prompt[:end])).log_softmax(0)[prompt[end]]
        assert tokens[end].logprob == pytest.approx(float(wanted), abs=1e-4)


@pytest.mark.parametrize("part", range(4))
def test_every_answer_is_as_if_alone_under_any_schedule(part, tokenizer):
    preempted = cached = cancelled = 0
    for seed in range(part * 100, part * 100 + 100):
        visitors = Visitors(seed, tokenizer)
        visitors.run()
        statistics = visitors.engine.statistics()
        preempted += statistics.preemptions > 0
        cached += statistics.cached_tokens > 0
        cancelled += "cancelled" in statistics.finished
    # Else the schedules were too tame to show anything.
    assert min(preempted, cached, cancelled) > 10, f"{preempted=}, {cached=}, {cancelled=}"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_every_answer_is_as_if_alone_under_thousands_of_schedules(part, tokenizer):
    for seed in range(10_000 + part * 500, 10_500 + part * 500):
        Visitors(seed, tokenizer).run()


def test_threads_may_ask_and_cancel_all_at_once(start):
    engine = start(FakeExecutor(24, 4), max_waiting=500)
    wrong = []

    def visit(seed):
        pick = random.Random(seed)
        for _ in range(12):
            prompt = [pick.randrange(300) for _ in range(pick.randint(1, 12))]
            request, wait = ask(engine, prompt, max_new_tokens=pick.randint(1, 12))
            if pick.random() < 0.4:
                engine.cancel(request.id)
            [answer] = wait()
            wanted = greedy(prompt, request.sampling.max_new_tokens)
            got = list(answer.token_ids)
            if got != (wanted if answer.finish_reason == "length" else wanted[: len(got)]):
                wrong.append((prompt, got, wanted))

    threads = [threading.Thread(target=visit, args=[seed]) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


# ---- who is next


def rounds(engine):
    """For each step the number of tokens of each chunk."""
    return [[len(chunk.tokens) for chunk in batch.chunks] for batch in engine.executor.batches]


def test_a_long_prompt_goes_through_in_chunks_beside_answers_that_go_on(start):
    executor = FakeExecutor(64, 4)
    engine = start(executor, max_step_tokens=8, max_sequences=4)
    asked = [ask(engine, [9], max_new_tokens=30)]
    executor.before_step = lambda: (
        asked.append(ask(engine, list(range(5, 55)), max_new_tokens=2))
        if len(executor.batches) == 3
        else None
    )
    [first] = asked[0][1]()
    [second] = asked[1][1]()
    assert list(first.token_ids) == greedy([9], 30)
    assert list(second.token_ids) == greedy(list(range(5, 55)), 2)
    # Seven prompt tokens fit beside the one that is being answered, which never waits.
    assert rounds(engine)[4:12] == [[1, 7]] * 7 + [[1, 1]]
    assert max(map(sum, rounds(engine))) == 8


def test_the_newest_is_preempted_and_goes_on_where_it_was(start):
    # 6 blocks of 4: two answers of 16 tokens do not fit at once.
    engine = start(FakeExecutor(6, 4), prefix_cache=False)
    old, new = ask(engine, [5, 6, 7], max_new_tokens=13), ask(engine, [8, 9, 10], max_new_tokens=13)
    [first], [second] = old[1](), new[1]()
    assert list(first.token_ids) == greedy([5, 6, 7], 13)
    assert list(second.token_ids) == greedy([8, 9, 10], 13)
    assert engine.statistics().preemptions > 0
    # The older one was never kept waiting.
    steps = engine.executor.batches[:13]
    assert [batch.chunks[0].start for batch in steps] == [0, *range(3, 15)]
    assert all(
        batch.chunks[0].tokens == (token,)
        for batch, token in zip(steps[1:], first.token_ids[:-1], strict=True)
    )
    assert engine.statistics().computed_tokens > 2 * 15


def test_a_prompt_that_begins_like_another_takes_over_its_blocks(start):
    engine = start(FakeExecutor(64, 4))
    stem = list(range(20, 40))
    [first] = ask(engine, [*stem, 1])[1]()
    [second] = ask(engine, [*stem, 2])[1]()
    [again] = ask(engine, stem)[1]()
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == 20
    # Its last token is computed even where all are known: the scores after it are wanted.
    assert again.usage.cached_tokens == 16
    assert list(second.token_ids) == greedy([*stem, 2], 10)
    assert list(again.token_ids) == greedy(stem, 10)


def test_an_answer_is_known_when_the_conversation_goes_on(start):
    engine = start(FakeExecutor(64, 4))
    [first] = ask(engine, PROMPT, max_new_tokens=12)[1]()
    [second] = ask(engine, [*PROMPT, *first.token_ids, 77])[1]()
    assert second.usage.cached_tokens == 16


def test_without_a_prefix_cache_nothing_is_kept(start):
    engine = start(FakeExecutor(64, 4), prefix_cache=False)
    assert [ask(engine)[1]()[0].usage.cached_tokens for _ in range(2)] == [0, 0]
    assert engine.statistics().blocks_free == 64


def test_the_prompts_used_longest_ago_are_given_up_first(start):
    engine = start(FakeExecutor(8, 4))
    prompts = [[start] * 13 for start in (10, 20, 30)]  # four blocks each, three of them full

    def cached(number):
        [answer] = ask(engine, prompts[number], max_new_tokens=1)[1]()
        return answer.usage.cached_tokens

    assert [cached(number) for number in (0, 1, 0, 2)] == [0, 0, 12, 0]
    # The third took the two blocks that were free, and the last two of the second.
    assert [cached(number) for number in (0, 1)] == [12, 4]


def test_all_answers_to_a_prompt_share_its_blocks(start):
    engine = start(FakeExecutor(64, 4))
    prompt = list(range(20, 41))
    answers = ask(engine, prompt, n=4, temperature=1.0, seed=5)[1]()
    assert [answer.usage.cached_tokens for answer in answers] == [0, 20, 20, 20]
    assert len({answer.token_ids for answer in answers}) == 4
    [only] = ask(engine, prompt, temperature=1.0, seed=5)[1]()
    assert only.token_ids == answers[0].token_ids


# ---- what cannot be taken, and what fails


def test_who_comes_to_a_full_queue_is_sent_away(start):
    executor = FakeExecutor()
    is_full, go_on = threading.Event(), threading.Event()
    executor.before_step = lambda: (is_full.set(), go_on.wait(10))
    engine = start(executor, max_sequences=2, max_waiting=1)
    waits = [ask(engine)[1] for _ in range(3)]
    is_full.wait(10)
    with pytest.raises(Unavailable, match="3 answers run or wait already, of at most 3"):
        ask(engine)
    with pytest.raises(ConfigError, match="n is 4, but at most 3"):
        ask(engine, n=4)
    go_on.set()
    for wait in waits:
        assert [list(answer.token_ids) for answer in wait()] == [greedy(PROMPT, 10)]
    ask(engine)[1]()


def test_generate_waits_for_room_instead(start):
    engine = start(max_sequences=2, max_waiting=0)
    prompts = [[number, 7] for number in range(9)]
    answers = engine.generate(prompts, RequestConfig(max_new_tokens=4, **OPEN_END))
    assert [list(answer.token_ids) for answer in answers] == [greedy(p, 4) for p in prompts]


def test_a_broken_executor_ends_all_and_the_engine_says_so(start, capsys):
    executor = FakeExecutor()
    executor.fails_at = 3
    engine = start(executor)
    answers = [wait()[0] for wait in [ask(engine)[1], ask(engine, n=2)[1]]]
    for answer in answers:
        assert answer.finish_reason == "error"
        assert "stopped and answers no more: RuntimeError: the machine is on fire" in answer.error
        assert "\n" not in answer.error
    assert engine.statistics().is_broken
    with pytest.raises(ServingError, match="on fire"):
        ask(engine)
    with pytest.raises(ServingError, match="on fire"):
        engine.generate([PROMPT], RequestConfig(max_new_tokens=5))
    assert engine.drain(timeout=10)
    assert "RuntimeError" in capsys.readouterr().err


def test_a_fault_of_the_engine_itself_leaves_nobody_waiting(start, monkeypatch, capsys):
    engine = start()

    def fail(answer):
        raise AssertionError("blocks do not add up")

    monkeypatch.setattr(engine._scheduler, "remove", fail)
    waits = [ask(engine, max_new_tokens=length, n=2)[1] for length in (3, 40)]
    reasons = [{answer.finish_reason for answer in wait()} for wait in waits]
    assert reasons[1] == {"error"}
    assert engine.drain(timeout=10)
    with pytest.raises(ServingError, match="AssertionError: blocks do not add up"):
        ask(engine)
    assert "Traceback" in capsys.readouterr().err


def test_who_cannot_take_an_event_ends_alone(start, capsys):
    engine = start()
    others = [ask(engine, max_new_tokens=20)[1] for _ in range(2)]
    got = []

    def take(event):
        got.append(event)
        if len(got) == 2:
            raise ValueError("no more")

    engine.submit(PROMPT, RequestConfig(max_new_tokens=50, **OPEN_END), on_event=take)
    for wait in others:
        assert [list(answer.token_ids) for answer in wait()] == [greedy(PROMPT, 20)]
    assert engine.drain(timeout=10)
    assert [event.finish_reason for event in got] == [None, None, "cancelled"]
    assert "did not take an event: ValueError: no more" in capsys.readouterr().err


def test_scores_that_are_not_numbers_end_their_answer_alone(start):
    engine = start()
    others = ask(engine)[1]
    # Every other token is forbidden, this one is pushed beyond what float32 holds.
    bias = {5: float("nan")}
    sampling = RequestConfig(max_new_tokens=3)
    object.__setattr__(sampling, "logit_bias", bias)
    [answer] = engine.generate([PROMPT], sampling)
    assert (answer.finish_reason, answer.error) == ("error", "the model's scores are not numbers")
    assert [list(one.token_ids) for one in others()] == [greedy(PROMPT, 10)]


def test_draining_finishes_what_was_taken_and_takes_no_more(start):
    engine = start()
    waits = [ask(engine, max_new_tokens=30)[1] for _ in range(6)]
    assert engine.drain(timeout=30)
    assert [wait()[0].finish_reason for wait in waits] == ["length"] * 6
    with pytest.raises(Unavailable, match="takes no more"):
        ask(engine)


def test_closing_cancels_what_is_left(start):
    executor = FakeExecutor()
    engine = start(executor)
    executor.before_step = lambda: (
        threading.Thread(target=engine.close).start() if len(executor.batches) == 3 else None
    )
    waits = [ask(engine, max_new_tokens=200)[1] for _ in range(6)]
    answers = [answer for wait in waits for answer in wait()]
    assert {answer.finish_reason for answer in answers} == {"cancelled"}
    engine.close()
    assert executor.is_closed
    engine.check()


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], {}, "prompt is empty"),
        ([5] * 250, {"max_new_tokens": 10}, "model's context of 256"),
        ([5, 300], {}, "The prompt has the token 300"),
        ([5, -1], {}, "The prompt has the token -1"),
        ([5], {"logit_bias": {999: 1.0}}, "logit_bias has the token 999"),
        ([5], {"stop_token_ids": (300,)}, "stop_token_ids has the token 300"),
        ([5], {"regex": "("}, "The regex cannot be used"),
        ([5], {"json_schema": '{"type": "objec"}'}, "The json_schema cannot be used: Invalid"),
        ([5], {"json_schema": '{"not": {}}'}, "not"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_one_line_before_it_waits(start, prompt, sampling, message):
    engine = start()
    with pytest.raises(ConfigError, match=message) as error:
        ask(engine, prompt, **sampling)
    assert "\n" not in str(error.value)
    assert engine.statistics().requests == 0


def test_a_request_id_that_is_in_use_is_refused(start):
    executor = FakeExecutor()
    engine = start(executor)
    events = queue.SimpleQueue()
    refused = []

    def again():
        try:
            engine.submit(PROMPT, sampling, request_id="a", on_event=events.put)
        except ConfigError as error:
            refused.append(str(error))

    sampling = RequestConfig(max_new_tokens=2, **OPEN_END)
    executor.before_step = again
    completions(engine.submit(PROMPT, sampling, request_id="a", on_event=events.put), events)
    assert refused[0] == "The request id 'a' is in use. Choose another."


# ---- what a request may ask


def test_who_else_is_answered_does_not_change_a_text(start):
    engine = start(max_sequences=8, max_step_tokens=32)
    wanted = {"temperature": 1.2, "top_p": 0.9, "seed": 11, "max_new_tokens": 20}
    [by_itself] = ask(engine, **wanted)[1]()
    waits = [
        ask(engine, [seed, 9], temperature=0.7, seed=seed, max_new_tokens=25)[1]
        for seed in range(6)
    ]
    [among_others] = ask(engine, **wanted)[1]()
    for wait in waits:
        wait()
    assert among_others.text == by_itself.text
    assert among_others.seed == 11


def test_without_a_seed_one_is_drawn_and_told(start):
    engine = start()
    drawn = [ask(engine, temperature=1.0)[1]()[0] for _ in range(2)]
    assert drawn[0].token_ids != drawn[1].token_ids
    [again] = ask(engine, temperature=1.0, seed=drawn[0].seed)[1]()
    assert again.token_ids == drawn[0].token_ids


def test_log_probabilities_are_the_models_whatever_changes_its_scores(start):
    engine = start()
    [answer] = ask(engine, logprobs=True, top_logprobs=3, logit_bias={50: 100.0}, max_new_tokens=2)[
        1
    ]()
    assert answer.token_ids == (50, 50)
    for end, token in enumerate(answer.tokens):
        row = torch.from_numpy(scores([*PROMPT, *answer.token_ids[:end]])).log_softmax(0)
        assert token.logprob == pytest.approx(float(row[50]), abs=1e-4)
        values, ids = row.topk(3)
        assert [other.id for other in token.top] == ids.tolist()
        assert [other.logprob for other in token.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert (token.text, token.raw) == ("N", b"N")


def test_a_prompt_can_be_scored_without_an_answer(start):
    engine = start(max_step_tokens=4)
    prompt = list(range(30, 47))
    ask(engine, prompt)[1]()  # its blocks are known now, and must not be taken
    [answer] = ask(engine, prompt, prompt_logprobs=True, max_new_tokens=0)[1]()
    check_prompt_scores(prompt, answer.prompt)
    assert (answer.token_ids, answer.finish_reason) == ((), "length")


@pytest.mark.parametrize("kind", ["mean", "last"])
def test_embeddings_are_computed_beside_answers(start, kind):
    engine = start(max_step_tokens=4)
    beside = ask(engine, [9, 8], max_new_tokens=20)[1]
    prompt = list(range(30, 47))
    [answer] = ask(engine, prompt, embedding=kind)[1]()
    check_embedding(prompt, kind, answer.embedding_D)
    assert [list(one.token_ids) for one in beside()] == [greedy([9, 8], 20)]


def test_experts_are_those_that_worked_where_the_token_was_chosen(start):
    engine = start()
    beside = ask(engine, [9, 8], max_new_tokens=20)[1]
    [answer] = ask(engine, experts=True, max_new_tokens=5)[1]()
    fed = [PROMPT[-1], *answer.token_ids[:-1]]
    for token, before in zip(answer.tokens, fed, strict=True):
        wanted = experts(Batch((Chunk((before,), 0, (0,)),)))[:, 0].tolist()
        assert [list(layer) for layer in token.experts] == wanted
    assert beside()[0].tokens[0].experts is None


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(start):
    engine = start()
    sampling = {"temperature": 1.5, "seed": 3, "max_new_tokens": 60}
    [whole] = ask(engine, **sampling)[1]()
    stop = whole.text[6:9]
    [answer] = ask(engine, stop=("never this", stop), **sampling)[1]()
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert (answer.finish_reason, answer.stop) == ("stop", stop)


def test_end_tokens_and_stop_tokens_end_an_answer_unless_ignored(start):
    engine = start()
    to_the_end = {"logit_bias": {EOS: 100.0}}
    [answer] = ask(engine, ignore_eos=False, **to_the_end)[1]()
    assert (answer.token_ids, answer.finish_reason, answer.stop) == ((), "stop", None)
    assert answer.usage.completion_tokens == 1
    [answer] = ask(engine, ignore_eos=True, **to_the_end)[1]()
    assert answer.token_ids == (EOS,) * 10
    [answer] = ask(engine, stop_token_ids=(60,), logit_bias={60: 100.0})[1]()
    assert (answer.token_ids, answer.finish_reason, answer.stop) == ((), "stop", 60)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_follows_its_schema_beside_one_that_has_none(start, seed):
    engine = start()
    beside = ask(engine, max_new_tokens=40)[1]
    answers = ask(
        engine,
        json_schema=json.dumps(SCHEMA),
        temperature=1.0,
        seed=seed,
        n=2,
        max_new_tokens=200,
    )[1]()
    for answer in answers:
        assert answer.finish_reason == "stop"
        value = json.loads(answer.text)
        assert value.keys() == SCHEMA["properties"].keys()
        assert value["kind"] in ("cat", "dog")
        assert 0 <= value["age"] <= 120
    assert answers[0].text != answers[1].text
    assert [list(one.token_ids) for one in beside()] == [greedy(PROMPT, 40)]


def test_an_answer_matches_its_regular_expression(start):
    engine = start()
    [answer] = ask(engine, regex=r"[A-C]{2,4}-\d{3}é?", max_new_tokens=30)[1]()
    assert re.fullmatch(r"[A-C]{2,4}-\d{3}é?", answer.text)
    assert answer.finish_reason == "stop"


def test_a_grammar_that_cannot_go_on_ends_its_answer_alone(start, monkeypatch):
    engine = start()
    beside = ask(engine, max_new_tokens=30)[1]
    add = Grammar.add

    def add_what_does_not_fit(grammar, token):
        add(grammar, token)
        add(grammar, 5)  # "!"

    monkeypatch.setattr(Grammar, "add", add_what_does_not_fit)
    [answer] = ask(engine, regex="[a-z]+", max_new_tokens=20)[1]()
    assert answer.finish_reason == "error"
    assert "doesn't satisfy the grammar" in answer.error
    assert "\n" not in answer.error
    assert [list(one.token_ids) for one in beside()] == [greedy(PROMPT, 30)]


def test_a_grammar_that_takes_too_much_ends_its_answer_alone(start):
    engine = start()
    beside = ask(engine, max_new_tokens=30)[1]
    [answer] = ask(engine, regex="a{1000000000}", max_new_tokens=20)[1]()
    assert (answer.finish_reason, len(answer.tokens)) == ("error", 0)
    assert "too many expressions" in answer.error
    assert [list(one.token_ids) for one in beside()] == [greedy(PROMPT, 30)]


# ---- events


def test_events_join_to_the_answer(start):
    engine = start()
    events = queue.SimpleQueue()
    sampling = RequestConfig(n=3, temperature=1.0, seed=1, max_new_tokens=8, **OPEN_END)
    engine.submit(PROMPT, sampling, on_event=events.put)
    got = []
    while not (got and got[-1].is_last):
        got.append(events.get())
    for index in range(3):
        mine = [event for event in got if event.index == index]
        assert [event.finish_reason for event in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == "length"
        assert mine[-1].usage.completion_tokens == 8
        tokens = [token.id for event in mine for token in event.tokens]
        text = engine.tokenizer.decode(tokens, skip_special_tokens=True)
        assert "".join(event.text for event in mine) == text
    assert [event.is_last for event in got] == [False] * (len(got) - 1) + [True]
    assert [event.time for event in got] == sorted(event.time for event in got)


def test_a_stream_gives_events_as_they_come_and_leaving_it_cancels(start):
    executor = FakeExecutor()
    engine = start(executor)

    async def read():
        sampling = RequestConfig(max_new_tokens=200, **OPEN_END)
        whole = [event async for event in engine.stream(PROMPT, RequestConfig(**SHORT))]
        part = []
        stream = engine.stream(PROMPT, sampling)
        async for event in stream:
            part.append(event)
            if len(part) == 4:
                break
        await stream.aclose()
        with pytest.raises(ConfigError, match="empty"):
            await anext(engine.stream([], sampling))
        return whole, part

    SHORT = {"max_new_tokens": 12, "regex": "[ab]{20}"}
    whole, part = asyncio.run(read())
    assert re.fullmatch("[ab]+", "".join(event.text for event in whole))
    assert whole[-1].is_last
    assert [event.tokens[0].id for event in part] == greedy(PROMPT, 4)
    assert engine.drain(timeout=10)
    assert engine.statistics().finished == {"length": 1, "cancelled": 1}
    assert len(executor.batches) < 100


def test_statistics_add_up(start):
    engine = start(FakeExecutor(16, 4), max_sequences=3)
    waits = [ask(engine, [number] * 9, max_new_tokens=12)[1] for number in range(6)]
    for wait in waits:
        wait()
    ask(engine, [0] * 9)[1]()
    found = engine.statistics()
    assert found.blocks == 16 == found.blocks_used + found.blocks_cached + found.blocks_free
    assert (found.running, found.waiting, found.requests) == (0, 0, 7)
    assert found.finished == {"length": 7}
    assert found.generated_tokens == 6 * 12 + 10
    assert found.prompt_tokens == 7 * 9
    assert found.cached_tokens <= 8
    assert found.steps == len(engine.executor.batches)
    assert found.computed_tokens == sum(map(sum, rounds(engine)))
    assert 0 < found.last_step_seconds < found.executor_seconds + found.engine_seconds
