"""Every collective against plain tensor operations on the parts of all ranks in one process."""

from __future__ import annotations

import types
import zlib
from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.moe.config import RoutingConfig
from moesaic.moe.layer import RoutingStep
from moesaic.parallel import collectives
from moesaic.parallel.collectives import Traffic
from moesaic.parallel.group import ALONE, Group
from moesaic.parallel.mailbox import Mailbox
from moesaic.parallel.world import World
from moesaic.planning.layout import fit
from moesaic.planning.plan import TrainPlan
from moesaic.planning.split import Split
from tests.ranks import run_ranks
from tests.tiny import TINY, tiny_model, token_ids
from tests.wire import received_bytes

SPLITS = {
    2: [(3, 3), (4, 1), (0, 3), (0, 0)],
    3: [(2, 2, 2), (3, 2, 2), (5, 0, 1)],
    4: [(1, 1, 1, 1), (3, 2, 2, 2), (3, 3, 3, 0), (0, 0, 7, 0)],
}
"""By number of ranks: even, uneven, with an idle rank, with nothing at all."""

OTHERS = {0: [(), (5,)], 1: [(2,), (2, 3)], 2: [(2, 3)]}
"""By the dimension that is cut: the dimensions before and after it, as one shape."""


WAYS = ("process group", "mailbox")
"""How the ranks of one machine may exchange tensors."""


def each_way(check: Callable[[], None]) -> None:
    for way in WAYS:
        world.way = way
        check()


def world() -> Group:
    size, rank, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD
    mailbox = Mailbox.open(size, rank, group) if world.way == "mailbox" else None
    assert (mailbox is None) == (world.way != "mailbox")
    return Group(size, rank, group, mailbox)


world.way = "process group"


def drawn(*shape: int, seed: object, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same values wherever it is called."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def shapes() -> list[tuple[tuple[int, ...], int, Split]]:
    """Shape of the whole, which dimension is cut, how."""
    return [
        ((*others[:dim], sum(sizes), *others[dim:]), dim, Split.from_counts(sizes))
        for sizes in SPLITS[dist.get_world_size()]
        for dim, shapes in OTHERS.items()
        for others in shapes
    ]


def resized(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])


def compare(
    ours: Callable[[Tensor], Tensor],
    everyones: Callable[[list[Tensor]], list[Tensor]],
    inputs: list[Tensor],
) -> None:
    """Hold a collective and its gradient against the same computed for all ranks here.

    Args:
        ours: The collective, on this rank's input.
        everyones: What each rank shall get, given the inputs of all.
        inputs: One a rank.
    """
    rank = dist.get_rank()
    mine = inputs[rank].clone().requires_grad_()
    leaves = [x.clone().requires_grad_() for x in inputs]
    y, expected = ours(mine), everyones(leaves)
    torch.testing.assert_close(y, expected[rank], rtol=0, atol=1e-14)
    weights = [drawn(*e.shape, seed=("weights", r)) for r, e in enumerate(expected)]
    (y * weights[rank]).sum().backward()
    sum((e * w).sum() for e, w in zip(expected, weights, strict=True)).backward()
    torch.testing.assert_close(mine.grad, leaves[rank].grad, rtol=0, atol=1e-14)


def check_gather() -> None:
    group = world()
    for shape, dim, split in shapes():
        compare(
            lambda x, split=split, dim=dim: collectives.gather(x, split, group, dim=dim),
            lambda xs, dim=dim: [torch.cat(xs, dim=dim)] * group.size,
            [
                drawn(*resized(shape, dim, size), seed=(shape, dim, rank))
                for rank, size in enumerate(split.sizes)
            ],
        )


def check_scatter_sum() -> None:
    group = world()
    for shape, dim, split in shapes():
        compare(
            lambda x, split=split, dim=dim: collectives.scatter_sum(x, split, group, dim=dim),
            lambda xs, split=split, dim=dim: list(sum(xs).split(list(split.sizes), dim)),
            [drawn(*shape, seed=(shape, dim, rank)) for rank in range(group.size)],
        )


def check_gather_same() -> None:
    group = world()
    for shape, dim, split in shapes():
        parts = [
            drawn(*resized(shape, dim, size), seed=(shape, dim, rank))
            for rank, size in enumerate(split.sizes)
        ]
        weights = drawn(*shape, seed="the same on every rank")
        mine = parts[group.rank].clone().requires_grad_()
        whole = torch.cat(parts, dim=dim).requires_grad_()
        y = collectives.gather_same(mine, split, group, dim=dim)
        assert torch.equal(y, whole)
        (y.sin() * weights).sum().backward()
        (whole.sin() * weights).sum().backward()
        own = whole.grad.split(list(split.sizes), dim)[group.rank]
        torch.testing.assert_close(mine.grad, own, rtol=0, atol=1e-14)


ROWS = {
    2: [[[1, 2], [3, 1]], [[0, 4], [0, 2]], [[0, 0], [3, 0]], [[0, 0], [0, 0]]],
    3: [[[1, 1, 1]] * 3, [[0, 2, 1], [4, 0, 0], [0, 3, 0]], [[0, 0, 0], [2, 0, 1], [1, 0, 2]]],
    4: [[[r + s for r in range(4)] for s in range(4)], [[0, 0, 0, 5]] * 4],
}
"""By number of ranks: rows from each rank (outer) to each (inner)."""


def check_exchange() -> None:
    group = world()

    def everyones(xs: list[Tensor], rows: list[list[int]]) -> list[Tensor]:
        blocks = [x.split(counts) for x, counts in zip(xs, rows, strict=True)]
        return [torch.cat([sent[to] for sent in blocks]) for to in range(group.size)]

    for rows in ROWS[group.size]:
        for width in ((), (3,), (2, 3)):
            send, receive = rows[group.rank], [counts[group.rank] for counts in rows]
            assert group.exchange_counts(torch.tensor(send)).tolist() == receive
            compare(
                lambda x, s=send, r=receive: collectives.exchange(x, s, r, group),
                lambda xs, rows=rows: everyones(xs, rows),
                [drawn(sum(counts), *width, seed=(r, width)) for r, counts in enumerate(rows)],
            )


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    "check",
    [check_gather, check_scatter_sum, check_gather_same, check_exchange],
    ids=["gather", "scatter_sum", "gather_same", "exchange"],
)
def test_a_collective_and_its_gradient_are_what_one_process_computes(check, size):
    run_ranks(size, each_way, check)


def check_memory_layouts() -> None:
    """Inputs that are views, and gradients that are one number seen everywhere."""
    group = world()
    split = Split.from_counts([3, 2])
    whole = drawn(5, 4, seed="whole")
    part = whole.split([3, 2])[group.rank].t().contiguous().t()
    assert not part.is_contiguous()
    for run, x in (
        (lambda x: collectives.gather(x, split, group, dim=0), part),
        (lambda x: collectives.gather(x, split, group, dim=1), part.t()),
        (lambda x: collectives.scatter_sum(x, split, group, dim=0), whole.t().contiguous().t()),
        (lambda x: collectives.scatter_sum(x, split, group, dim=1), whole.t()),
        (lambda x: collectives.exchange(x, [2, 2], [2, 2], group), whole.t().contiguous().t()[:4]),
    ):
        seen = x.detach().requires_grad_()
        copied = x.contiguous().requires_grad_()
        for leaf in (seen, copied):
            run(leaf).sum().backward()
        assert torch.equal(run(seen), run(copied))
        assert torch.equal(seen.grad, copied.grad)
        assert bool((seen.grad > 0).all())


def test_views_and_expanded_gradients_travel_like_any_tensor():
    run_ranks(2, each_way, check_memory_layouts)


def check_dtypes() -> None:
    group = world()
    sizes = (2, 0, 1, 3)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool):
        parts = [(drawn(n, 3, seed=n) * 9).to(dtype) for n in sizes]
        assert torch.equal(group.gather(parts[group.rank], sizes), torch.cat(parts))
        sent = group.exchange(parts[1], [0] * group.size, [0] * group.size)
        assert sent.shape == (0, 3)
        assert sent.dtype == dtype
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        xs = [drawn(6, 3, seed=rank, dtype=dtype) for rank in range(group.size)]
        # Rounded once: the sum of a few float32 numbers, brought to the dtype.
        exact = sum(x.to(torch.float64) for x in xs).to(torch.float32).to(dtype)
        own = exact.split(sizes)[group.rank]
        y = group.scatter_sum(xs[group.rank], sizes)
        torch.testing.assert_close(y, own, rtol=1e-6 if dtype == torch.float32 else 0, atol=0)
        x = xs[group.rank].requires_grad_()
        split = Split.from_counts(sizes)
        collectives.scatter_sum(x, split, group, dim=0).sum().backward()
        assert x.grad.dtype == dtype
        assert bool((x.grad == 1).all())


def test_parts_of_any_dtype_are_joined_and_sums_are_rounded_once():
    run_ranks(4, each_way, check_dtypes)


def check_group() -> None:
    group = world()
    x = torch.tensor([float(group.rank), -float(group.rank)])
    assert group.sum_(x) is x
    assert x.tolist() == [3.0, -3.0]
    assert group.objects({"rank": group.rank}) == [{"rank": rank} for rank in range(3)]
    group.wait_for_all()


def test_sums_and_objects_reach_every_rank():
    run_ranks(3, check_group)


def check_traffic() -> None:
    group = world()
    split, rows = Split.from_counts((3, 0, 2)), [[0, 2, 1], [4, 0, 0], [0, 3, 0]]
    send, receive = rows[group.rank], [counts[group.rank] for counts in rows]
    own = split.sizes[group.rank]
    others = (5 - own) * 4 * 2
    """Bytes of rows of 4 bfloat16 numbers that others have; and, below, of their additions."""
    additions = 2 * own * 4 * 2
    expected = {"gather": (others, additions), "scatter_sum": (additions, others)}
    expected["exchange"] = tuple(
        (sum(counts) - counts[group.rank]) * 4 * 2 for counts in (receive, send)
    )
    for name, (forward, backward) in expected.items():
        length = {"gather": own, "scatter_sum": 5, "exchange": sum(send)}[name]
        x = torch.ones(length, 4, dtype=torch.bfloat16, requires_grad=True)
        traffic = Traffic()
        with received_bytes() as found:
            if name == "exchange":
                y = collectives.exchange(x, send, receive, group, traffic=traffic)
            else:
                y = getattr(collectives, name)(x, split, group, dim=0, traffic=traffic)
            assert traffic == Traffic(payload=forward)
            y.sum().backward()
        assert traffic == Traffic(payload=forward + backward)
        assert found == [forward, backward]


def test_traffic_is_what_the_calls_bring_from_other_ranks():
    run_ranks(3, each_way, check_traffic)


def silence() -> mock._patch_dict:
    """Every function of torch.distributed, replaced with one that fails."""

    def refuse(name: str) -> Callable[..., None]:
        def called(*_args: object, **_more: object) -> None:
            raise AssertionError(f"torch.distributed.{name} was called")

        return called

    functions = {
        name: refuse(name)
        for name, value in vars(dist).items()
        if type(value) is types.FunctionType
    }
    assert {"all_reduce", "all_to_all_single", "all_gather_single"} <= functions.keys()
    return mock.patch.dict(vars(dist), functions)


def use_every_operation(group: Group) -> None:
    x, split = torch.randn(3, 2, requires_grad=True), Split.from_counts([3])
    traffic = Traffic()
    assert collectives.gather(x, split, group, dim=0, traffic=traffic) is x
    assert collectives.scatter_sum(x, split, group, dim=0, traffic=traffic) is x
    assert collectives.gather_same(x, split, group, dim=0) is x
    assert collectives.exchange(x, [3], [3], group, traffic=traffic) is x
    assert collectives.own_part(x, split, group, dim=0) is x
    for run in (group.sum_, group.exchange_counts):
        assert run(x) is x
    assert group.gather(x, [3]) is group.scatter_sum(x, [3]) is group.exchange(x, [3], [3]) is x
    assert group.objects(x) == [x]
    group.wait_for_all()
    assert traffic == Traffic()


def test_a_group_of_one_returns_its_argument_and_calls_nothing():
    with silence():
        use_every_operation(ALONE)


def train_a_moment() -> None:
    model = tiny_model(TINY["qwen2_moe"])
    config = RoutingConfig(capacity_factor=1.0, z_loss_weight=0.1)
    steps = {
        layer: RoutingStep(config, torch.tensor(0.01)) for layer in range(model.spec.num_layers)
    }
    hidden, _ = model.hidden(token_ids(2, 9), routing=steps, recompute={0: "full"})
    model.loss(hidden, token_ids(2, 9)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_training_on_one_rank_calls_nothing_of_torch_distributed():
    train_a_moment()  # the first use of a checkpoint imports what asks whether ranks exist
    with silence():
        train_a_moment()


def check_data_parallel_groups() -> None:
    world = World.join(fit(TrainPlan(dp=2), TINY["mixtral"]), torch.device("cpu"))
    train_a_moment()
    with silence():
        for group in (world.groups.tp, world.groups.ep, world.groups.etp, world.pipeline):
            use_every_operation(group)
        train_a_moment()


def test_groups_of_one_in_a_world_of_two_call_nothing():
    run_ranks(2, check_data_parallel_groups)
