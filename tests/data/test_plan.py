"""Mini-batches, balance and packing: properties that hold for any trajectories."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sod_mcore.data import MiniBatch, Plan, make_plan
from sod_mcore.data.plan import Packing

SETTINGS: dict[str, Any] = {
    "prompts_per_mini_batch": 2,
    "epochs": 1,
    "seed": 3,
    "data_parallel_size": 1,
    "micro_batch_tokens": 100,
    "packing": "packed",
}

Trajectories = list[tuple[int, int, str]]
"""Length, loss tokens, group."""


def trajectories() -> st.SearchStrategy[Trajectories]:
    length = st.integers(1, 60)
    return st.lists(
        st.tuples(length, st.integers(0, 20), st.sampled_from("abcdefg")), min_size=1, max_size=40
    )


def plan_of(items: Trajectories, **changes: Any) -> Plan:
    columns = list(zip(*items, strict=True)) or [(), (), ()]
    return make_plan(*columns, **{**SETTINGS, **changes})


def cost(micro_batch: tuple[int, ...], items: Trajectories, packing: Packing) -> int:
    lengths = [items[i][0] for i in micro_batch]
    return sum(lengths) if packing == "packed" else max(lengths, default=0) * len(lengths)


def replica_tokens(mini_batch: MiniBatch, items: Trajectories) -> list[int]:
    return [sum(items[i][0] for m in replica for i in m) for replica in mini_batch.replicas]


@settings(deadline=None)
@given(trajectories(), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))
def test_each_epoch_holds_every_trajectory_once(
    items: Trajectories, groups_each: int, epochs: int, replicas: int
) -> None:
    plan = plan_of(
        items, prompts_per_mini_batch=groups_each, epochs=epochs, data_parallel_size=replicas
    )
    num_groups = len({group for _, _, group in items})
    per_epoch = -(-num_groups // groups_each)
    assert len(plan.mini_batches) == per_epoch * epochs
    for epoch in range(epochs):
        batches = plan.mini_batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(i for b in batches for i in b.trajectories) == list(range(len(items)))


@settings(deadline=None)
@given(trajectories(), st.integers(1, 4))
def test_groups_are_whole_and_loss_tokens_are_counted(
    items: Trajectories, groups_each: int
) -> None:
    plan = plan_of(items, prompts_per_mini_batch=groups_each)
    homes = Counter(
        (items[i][2], number)
        for number, batch in enumerate(plan.mini_batches)
        for i in batch.trajectories
    )
    sizes = Counter(group for _, _, group in items)
    assert {group: count for (group, _), count in homes.items()} == dict(sizes)
    assert len(homes) == len(sizes), "no group is split"
    for batch in plan.mini_batches:
        assert batch.num_loss_tokens == sum(items[i][1] for i in batch.trajectories)
        assert len({items[i][2] for i in batch.trajectories}) <= groups_each


@settings(deadline=None)
@given(trajectories(), st.integers(0, 5), st.randoms(use_true_random=False))
def test_mini_batches_depend_neither_on_replicas_nor_on_arrival(
    items: Trajectories, seed: int, random: Any
) -> None:
    named = [(length, loss, group, i) for i, (length, loss, group) in enumerate(items)]
    shuffled = random.sample(named, len(named))

    def members(order: list[Any], replicas: int) -> list[set[int]]:
        plan = plan_of([t[:3] for t in order], seed=seed, data_parallel_size=replicas)
        return [{order[i][3] for i in batch.trajectories} for batch in plan.mini_batches]

    assert members(named, 1) == members(named, 3) == members(shuffled, 2)


@settings(deadline=None)
@given(
    trajectories(), st.integers(1, 5), st.integers(20, 200), st.sampled_from(["packed", "padded"])
)
def test_micro_batches_fit_and_replicas_have_equally_many(
    items: Trajectories, replicas: int, capacity: int, packing: Packing
) -> None:
    plan = plan_of(items, data_parallel_size=replicas, micro_batch_tokens=capacity, packing=packing)
    for batch in plan.mini_batches:
        assert len(batch.replicas) == replicas
        assert {len(replica) for replica in batch.replicas} == {batch.num_micro_batches}
        assert any(all(replica) for replica in batch.replicas), "no micro-batch is empty everywhere"
        for micro in (m for replica in batch.replicas for m in replica):
            assert cost(micro, items, packing) <= capacity or len(micro) == 1


@settings(deadline=None)
@given(trajectories(), st.integers(1, 5))
def test_replicas_differ_by_at_most_one_trajectory(items: Trajectories, replicas: int) -> None:
    for batch in plan_of(items, data_parallel_size=replicas).mini_batches:
        tokens = replica_tokens(batch, items)
        longest = max(items[i][0] for i in batch.trajectories)
        assert max(tokens) - min(tokens) <= longest


@settings(deadline=None)
@given(trajectories(), st.integers(20, 200))
def test_packing_is_at_most_one_half_empty_bin_from_full(
    items: Trajectories, capacity: int
) -> None:
    """First fit never opens a bin while two others could be merged."""
    for batch in plan_of(items, micro_batch_tokens=capacity).mini_batches:
        costs = sorted(cost(m, items, "packed") for m in batch.replicas[0])
        assert len(costs) < 2 or costs[0] + costs[1] > capacity


def test_known_packing() -> None:
    items: Trajectories = [(60, 1, "a"), (50, 1, "a"), (40, 1, "b"), (30, 1, "b"), (150, 1, "b")]
    assert plan_of(items).mini_batches[0].replicas == (((4,), (0, 2), (1, 3)),)
    assert plan_of(items, packing="padded").mini_batches[0].replicas == (
        ((4,), (0,), (1, 2), (3,)),
    )


def test_every_epoch_and_every_seed_draws_anew() -> None:
    items: Trajectories = [(10, 5, f"{i:02d}") for i in range(20)]
    plan = plan_of(items, epochs=2, prompts_per_mini_batch=10)
    drawn = [batch.trajectories for batch in plan.mini_batches]
    assert drawn[0] != drawn[2]
    for seed in (4, [3, 1]):
        assert (
            plan_of(items, seed=seed, prompts_per_mini_batch=10).mini_batches[0].trajectories
            != (drawn[0])
        )
    assert (
        plan_of(items, seed=[3], prompts_per_mini_batch=10).mini_batches[0].trajectories
        == (drawn[0])
    )


def test_nothing_to_plan() -> None:
    assert plan_of([]).mini_batches == ()


@pytest.mark.parametrize(
    "name", ["prompts_per_mini_batch", "epochs", "data_parallel_size", "micro_batch_tokens"]
)
def test_counts_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; at least 1"):
        plan_of([(1, 1, "a")], **{name: 0})


def test_columns_must_be_equally_long() -> None:
    with pytest.raises(ValueError, match="2 lengths, 1 num_loss_tokens and 2 group_ids"):
        make_plan([1, 2], [1], ["a", "b"], **SETTINGS)
