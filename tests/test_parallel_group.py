"""What ranks of a group do together: sums that are alike, and words from rank 0."""

import numpy as np
import pytest
import torch

from moesaic.parallel.group import ALONE, Group
from tests.ranks import run_ranks

SHAPES = {"a row": (1, 576), "uneven": (7, 13), "large": (257, 301), "nothing": (0, 4)}

DTYPES = (torch.float32, torch.bfloat16, torch.int64)


def own(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(rank))
    return (values * 1000**rank / 1000).to(dtype) if dtype.is_floating_point else values.to(dtype)


def group_of(shares_memory: bool) -> Group:
    group = Group.of_all()
    if not shares_memory:
        group._mailbox = None
    return group


def sums(shares_memory: bool) -> list[np.ndarray]:
    group = group_of(shares_memory)
    found = []
    for dtype in DTYPES:
        for shape in SHAPES.values():
            x = own(group.rank, shape, dtype)
            y = group.sum_(x)
            assert y is x
            found.append(y.double().numpy())
    return found


def in_order(size: int, shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
    wide = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
    total = own(0, shape, dtype).to(wide)
    for rank in range(1, size):
        total = total + own(rank, shape, dtype)
    return total.to(dtype).double().numpy()


@pytest.mark.parametrize(("size", "shares_memory"), [(2, True), (5, True), (3, False)])
def test_a_sum_is_the_same_on_every_rank_to_the_last_bit(size, shares_memory):
    first, *others = run_ranks(size, sums, shares_memory)
    for other in others:
        assert all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    if shares_memory:
        cases = [(shape, dtype) for dtype in DTYPES for shape in SHAPES.values()]
        for found, (shape, dtype) in zip(first, cases, strict=True):
            # In the order of ranks; large ones are added up by torch's own sum.
            np.testing.assert_allclose(found, in_order(size, shape, dtype), rtol=1e-6)


WORDS = [[], [7], list(range(511)), list(range(-600, 600)), [2**62, -(2**62)]]


def words(shares_memory: bool) -> list[list[int]]:
    group = group_of(shares_memory)
    return [group.tell(said if group.rank == 0 else None) for said in WORDS]


@pytest.mark.parametrize("shares_memory", [True, False])
def test_what_rank_0_says_is_heard_by_all(shares_memory):
    assert run_ranks(3, words, shares_memory) == [WORDS] * 3


def test_a_group_of_one_hears_itself_and_sums_nothing():
    assert ALONE.tell([3, 4]) == [3, 4]
    x = torch.randn(3)
    assert ALONE.sum_(x) is x
    assert ALONE.gather_on_first(x, [3]) is x


def parts(shares_memory: bool) -> list[list[float]] | None:
    group = group_of(shares_memory)
    mine = torch.full((2, group.rank * 2), float(group.rank))
    joined = group.gather_on_first(mine, [0, 2, 4], dim=1)
    return None if joined is None else joined.tolist()


@pytest.mark.parametrize("shares_memory", [True, False])
def test_rank_0_alone_gets_the_parts_of_all(shares_memory):
    joined, *others = run_ranks(3, parts, shares_memory)
    assert joined == [[1.0, 1, 2, 2, 2, 2]] * 2
    assert others == [None, None]
