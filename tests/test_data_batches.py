from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from moesaic.data.batches import BatchOrder, mixture_pattern, shuffled
from moesaic.data.tokenfolder import TokenFolder
from moesaic.errors import ConfigError
from tests.token_folders import write_token_folder

PINNED = [
    ("web", 21),
    ("web", 0),
    ("code", 4),
    ("web", 14),
    ("web", 5),
    ("chat", 1),
    ("web", 13),
    ("web", 11),
    ("code", 5),
    ("web", 4),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> TokenFolder:
    """Sources of 23, 7 and 5 rows of 4 tokens, mixed 7 : 2 : 1; no two rows are alike."""
    path: Path = tmp_path_factory.mktemp("tokens")
    streams = {"web": range(100, 193), "code": range(300, 329), "chat": range(500, 521)}
    documents = {name: [list(tokens)] for name, tokens in streams.items()}
    weights = {"web": 7, "code": 2, "chat": 1}
    return TokenFolder(write_token_folder(path, documents, weights=weights, sequence_length=4))


@pytest.mark.parametrize("length", [1, 2, 3, 5, 63, 64, 65, 200, 1000])
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_shuffling_is_a_permutation(length, key):
    assert sorted(shuffled(i, length, key=key) for i in range(length)) == list(range(length))


@pytest.mark.parametrize("length", [2, 5, 8])
def test_shuffling_sends_every_place_everywhere_equally_often(length):
    tries = 2000
    counts = Counter(
        (i, shuffled(i, length, key=key)) for key in range(tries) for i in range(length)
    )
    expected = tries / length
    # Binomial: five standard deviations.
    allowed = 5 * math.sqrt(expected * (1 - 1 / length))
    for i in range(length):
        for j in range(length):
            assert abs(counts[i, j] - expected) < allowed


def test_shuffling_reaches_every_order():
    orders = {tuple(shuffled(i, 4, key=key) for i in range(4)) for key in range(300)}
    assert len(orders) == math.factorial(4)


WEIGHTS = {
    "one source": ["1"],
    "7:2:1": ["7", "2", "1"],
    "0.7:0.2:0.1": ["0.7", "0.2", "0.1"],
    "lopsided": ["97", "1", "1", "1"],
    "equal": ["1", "1", "1"],
    "fractions": ["0.35", "0.125", "2"],
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_a_block_holds_each_source_exactly_in_proportion(weights):
    shares = [Fraction(weight) for weight in weights]
    pattern = mixture_pattern(shares)
    for source, share in enumerate(shares):
        assert Fraction(pattern.count(source), len(pattern)) == share / sum(shares)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_a_mixture_is_never_a_whole_row_out_of_proportion(weights):
    shares = [Fraction(weight) for weight in weights]
    pattern = mixture_pattern(shares)
    for source, share in enumerate(shares):
        for n in range(len(pattern) + 1):
            assert abs(pattern[:n].count(source) - n * share / sum(shares)) < 1


def test_decimal_weights_mix_like_whole_ones():
    assert mixture_pattern([Fraction("0.7"), Fraction("0.2"), Fraction("0.1")]) == mixture_pattern(
        [Fraction(7), Fraction(2), Fraction(1)]
    )


def test_steps_hold_the_mixture_of_the_folder(folder):
    order = BatchOrder(folder, batch_size=10, seed=0)
    for step in range(20):
        sources = Counter(order.row(n)[0] for n in range(step * 10, step * 10 + 10))
        assert sources == {"web": 7, "code": 2, "chat": 1}


def test_every_epoch_reads_every_row_once_and_in_another_order(folder):
    order = BatchOrder(folder, batch_size=1, seed=0)
    for name in folder.sources:
        rows = [row for source, row in map(order.row, range(400)) if source == name]
        size = folder.num_sequences("train", name)
        epochs = [rows[at : at + size] for at in range(0, len(rows) - size, size)]
        assert len(epochs) >= 3
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert all(this != next_one for this, next_one in itertools.pairwise(epochs))


def test_the_order_is_what_it_always_was(folder):
    # Pinned: a run that resumes under another version must read on where it stopped.
    order = BatchOrder(folder, batch_size=1, seed=3)
    assert [order.row(n) for n in range(10)] == PINNED


def test_a_batch_holds_the_rows_of_its_step(folder):
    order = BatchOrder(folder, batch_size=3, seed=0)
    batch = order.batch(5)
    for place, n in enumerate(range(15, 18)):
        row = folder.row("train", *order.row(n))
        assert batch.input_ids_BS[place].tolist() == row.input_S.tolist()
        assert batch.targets_BS[place].tolist() == row.target_S.tolist()
        assert batch.documents_BS[place].tolist() == row.documents_S.tolist()
    assert batch.input_ids_BS.shape == (3, 4)
    assert {part.dtype for part in batch} == {torch.int64}


def test_resuming_from_any_step_reads_what_an_unbroken_run_would(folder):
    unbroken = BatchOrder(folder, batch_size=4, seed=5)
    steps = [unbroken.batch(step) for step in range(30)]
    for first in range(30):
        resumed = BatchOrder(TokenFolder(folder.path), batch_size=4, seed=5)
        for step in (first, 29):
            for ours, theirs in zip(resumed.batch(step), steps[step], strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("micros", [1, 2, 3, 5, 7])
def test_micro_batches_join_to_the_batch_even_or_not(folder, micros):
    order = BatchOrder(folder, batch_size=7, seed=1)
    parts = [order.batch(2, micro, micros) for micro in range(micros)]
    sizes = [len(part.input_ids_BS) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    for whole, cut in zip(order.batch(2), zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(cut), whole)


def test_another_seed_is_another_order(folder):
    orders = [BatchOrder(folder, batch_size=1, seed=seed) for seed in (0, 1)]
    assert [orders[0].row(n) for n in range(20)] != [orders[1].row(n) for n in range(20)]


def test_given_weights_replace_those_of_the_folder(folder):
    order = BatchOrder(folder, batch_size=1, seed=0, weights={"chat": 3, "web": 1, "code": 0})
    assert Counter(order.row(n)[0] for n in range(40)) == {"chat": 30, "web": 10}


def test_held_out_rows_can_be_read_in_order_too(folder):
    order = BatchOrder(folder, split="heldout", batch_size=5, seed=0, weights={"chat": 1})
    assert sorted(order.row(n)[1] for n in range(5)) == list(range(5))


BAD = {
    "unknown source": ({"weights": {"wbe": 1}}, "'wbe'"),
    "negative weight": ({"weights": {"web": -1}}, "-1"),
    "weight that is no number": ({"weights": {"web": math.nan}}, "nan"),
    "no weight": ({"weights": {"web": 0}}, "above 0"),
    "no weights at all": ({"weights": {}}, "above 0"),
    "weights never exact": ({"weights": {"web": 1, "code": 1e-7}}, "rounder"),
    "empty batch": ({"batch_size": 0}, "at least 1"),
}


@pytest.mark.parametrize(("changes", "says"), BAD.values(), ids=BAD.keys())
def test_what_makes_no_order_is_refused_in_one_line(folder, changes, says):
    with pytest.raises(ConfigError) as error:
        BatchOrder(folder, **{"batch_size": 4, "seed": 0, **changes})
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_source_without_rows_is_refused(tmp_path):
    documents = {"long": [[7] * 9], "short": [[7]]}
    folder = TokenFolder(write_token_folder(tmp_path, documents, sequence_length=4))
    with pytest.raises(ConfigError, match="no train rows of short"):
        BatchOrder(folder, batch_size=1, seed=0)
    assert BatchOrder(folder, batch_size=1, seed=0, weights={"long": 1}).row(0)[0] == "long"


@pytest.mark.parametrize(("step", "micro", "micros"), [(-1, 0, 1), (0, 1, 1), (0, 0, 5)])
def test_a_micro_batch_that_is_not_there_is_refused(folder, step, micro, micros):
    with pytest.raises(ConfigError, match="no micro-batch"):
        BatchOrder(folder, batch_size=4, seed=0).batch(step, micro, micros)
