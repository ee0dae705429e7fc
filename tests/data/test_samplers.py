"""Samplers: W processes share the batches of one process; evaluation covers every image exactly once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from vlprompt.data import EvalSampler, TrainSampler
from vlprompt.errors import ConfigError


def batches(sampler: TrainSampler) -> list[list[tuple[int, int]]]:
    keys, size = list(sampler), sampler.local_batch_size
    assert len(keys) == len(sampler)
    return [keys[first : first + size] for first in range(0, len(keys), size)]


@given(st.integers(0, 50), st.integers(1, 12))
def test_evaluation_covers_every_index_once(length: int, world: int) -> None:
    ranks = [EvalSampler(length, rank=rank, world_size=world) for rank in range(world)]
    seen = [index for sampler in ranks for _, index in sampler]
    assert sorted(seen) == list(range(length))
    assert [len(sampler) for sampler in ranks] == [len(list(sampler)) for sampler in ranks]
    assert max(len(sampler) for sampler in ranks) - min(len(sampler) for sampler in ranks) <= 1


@given(st.integers(0, 50), st.integers(1, 12), st.integers(0, 9))
def test_a_shuffled_evaluation_is_one_order_of_the_seed_for_any_number_of_processes(
    length: int, world: int, seed: int
) -> None:
    whole = [index for _, index in EvalSampler(length, order_seed=seed)]
    ranks = [[i for _, i in EvalSampler(length, order_seed=seed, rank=r, world_size=world)] for r in range(world)]
    assert sorted(whole) == list(range(length))
    assert [ranks[place % world][place // world] for place in range(length)] == whole
    if length > 20:
        assert whole != list(range(length)) != [index for _, index in EvalSampler(length, order_seed=seed + 10)]
        assert whole != [index for _, index in EvalSampler(length, order_seed=seed + 10)]


@pytest.mark.parametrize(("length", "world"), [(7, 2), (2465, 2), (2465, 4), (1, 3), (3, 8)])
def test_odd_and_tiny_evaluation_sets(length: int, world: int) -> None:
    indices = [[index for _, index in EvalSampler(length, rank=rank, world_size=world)] for rank in range(world)]
    assert sorted(sum(indices, [])) == list(range(length))


@given(st.integers(1, 70), st.integers(1, 5), st.integers(1, 6), st.integers(0, 9), st.integers(0, 4))
@settings(max_examples=120, deadline=None)
def test_processes_share_the_batches_of_one(length: int, share: int, world: int, seed: int, epoch: int) -> None:
    batch = share * world
    assume(length >= world)
    single = TrainSampler(length, batch, seed=seed)
    ranks = [TrainSampler(length, batch, seed=seed, rank=rank, world_size=world) for rank in range(world)]
    for sampler in (single, *ranks):
        sampler.set_epoch(epoch)
    whole, shares = batches(single), [batches(sampler) for sampler in ranks]
    assert {len(steps) for steps in shares} == {len(whole)} == {max(1, length // batch)}
    for step, expected in enumerate(whole):
        assert sum((steps[step] for steps in shares), []) == expected
        assert len(expected) == min(batch, length)
        assert all(steps[step] for steps in shares)
        # the mean over ranks of scale * local mean is the global mean
        scales = [sampler.scale() for sampler in ranks]
        mean = (
            sum(
                scale * sum(i for _, i in steps[step]) / len(steps[step])
                for scale, steps in zip(scales, shares, strict=True)
            )
            / world
        )
        assert mean == pytest.approx(sum(index for _, index in expected) / len(expected))
    used = [index for step in whole for _, index in step]
    assert len(set(used)) == len(used) and {key for step in whole for key, _ in step} == {epoch}


@given(st.integers(1, 70), st.integers(1, 5), st.integers(1, 6), st.integers(0, 4))
@settings(max_examples=120, deadline=None)
def test_processes_share_incomplete_batches(length: int, share: int, world: int, epoch: int) -> None:
    """Every sample is used once; a process without a share of the last batch repeats a sample with weight 0."""
    batch = share * world
    assume(length >= world)
    single = TrainSampler(length, batch, seed=1, drop_last=False)
    ranks = [TrainSampler(length, batch, seed=1, rank=rank, world_size=world, drop_last=False) for rank in range(world)]
    for sampler in (single, *ranks):
        sampler.set_epoch(epoch)
    whole, shares = batches(single), [batches(sampler) for sampler in ranks]
    assert sorted(index for step in whole for _, index in step) == list(range(length))
    assert {len(steps) for steps in shares} == {len(whole)} == {-(-length // batch)}
    for step, expected in enumerate(whole):
        scales = [sampler.scales().get(step, sampler.scale()) for sampler in ranks]
        used = [steps[step] for steps, scale in zip(shares, scales, strict=True) if scale]
        assert sum(used, []) == expected
        means = [sum(i for _, i in steps[step]) / len(steps[step]) for steps in shares]
        mean = sum(scale * value for scale, value in zip(scales, means, strict=True)) / world
        assert mean == pytest.approx(sum(index for _, index in expected) / len(expected))
    assert all(single.scales().get(step, single.scale()) == 1 for step in range(len(whole)))


def test_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[Any]:
        sampler = TrainSampler(40, 8, seed=seed)
        sampler.set_epoch(epoch)
        return [index for _, index in sampler]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_the_order_is_frozen() -> None:
    assert [index for _, index in TrainSampler(6, 2, seed=1)] == FROZEN


FROZEN = [0, 2, 3, 4, 5, 1]


def test_lightning_does_not_replace_them() -> None:
    # Lightning replaces every sampler that is not a DistributedSampler by one that pads.
    assert isinstance(TrainSampler(4, 2, seed=0), DistributedSampler)
    assert isinstance(EvalSampler(4), DistributedSampler)


@pytest.mark.parametrize(
    ("length", "batch", "world", "match"),
    [
        (100, 32, 3, "batch_size is 32.*3 processes cannot share.*--recipe.batch_size 30"),
        (1, 4, 2, "1 training images for 2"),
        (10, 0, 1, "batch_size is 0"),
        (0, 4, 1, "0 training images"),
        (10, 1, 2, "--recipe.batch_size 2"),
    ],
)
def test_refused(length: int, batch: int, world: int, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        TrainSampler(length, batch, seed=0, world_size=world)


def test_ranks_run_from_zero() -> None:
    with pytest.raises(ConfigError, match="ranks run from 0 to 1"):
        EvalSampler(4, rank=2, world_size=2)
