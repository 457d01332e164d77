"""The order of a training: a permutation without state, and every sample exactly once."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffsynth_dagster.data.order import StepOrder
from diffsynth_dagster.data.permutation import Permutation


@given(st.integers(1, 3000), st.integers(0, 2**63))
def test_is_a_permutation(size: int, seed: int) -> None:
    order = Permutation(size, seed)
    assert sorted(order[i] for i in range(size)) == list(range(size))


def test_reaches_any_size_at_once() -> None:
    size = 10**12
    order = Permutation(size, 7)
    seen = {order[i] for i in range(1000)} | {order[size - 1 - i] for i in range(1000)}
    assert len(seen) == 2000
    assert max(seen) > size * 0.99
    assert min(seen) < size * 0.01


def test_keys_give_different_orders() -> None:
    first, second = Permutation(1000, 1), Permutation(1000, 2)
    assert sum(first[i] == second[i] for i in range(1000)) < 20


def test_looks_random() -> None:
    """Neighbours land far apart, and no position keeps its place more often than chance."""
    order = Permutation(10_000, 3)
    places = [order[i] for i in range(10_000)]
    gap = sum(abs(a - b) for a, b in pairwise(places)) / 9_999
    assert gap == pytest.approx(10_000 / 3, rel=0.05)
    assert sum(i == p for i, p in enumerate(places)) < 10


orders = st.tuples(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),  # bucket sizes
    st.integers(1, 3),  # repeat
    st.integers(1, 5),  # batch size
    st.integers(1, 4),  # slots
    st.integers(0, 99),  # seed
)


@given(orders)
def test_every_sample_once_per_epoch_and_repeat(args: tuple[list[int], int, int, int, int]) -> None:
    sizes, repeat, batch, slots, seed = args
    order = StepOrder(sizes, repeat, batch, slots, seed)
    for epoch in range(2):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        micros = [micro for step in steps for micro in order.step(step)]
        assert all(0 < len(micro) <= batch for micro in micros)
        assert all(len({visit.bucket for visit in micro}) == 1 for micro in micros)
        seen = Counter((v.bucket, v.index, v.visit) for micro in micros for v in micro)
        assert set(seen.values()) == {1}
        assert set(seen) == {
            (bucket, index, epoch * repeat + r)
            for bucket, size in enumerate(sizes)
            for index in range(size)
            for r in range(repeat)
        }


@given(st.integers(8, 60), st.integers(1, 3), st.sampled_from([(4, 1), (2, 2), (1, 4)]))
def test_full_steps_do_not_depend_on_how_they_are_split(
    size: int, repeat: int, split: tuple[int, int]
) -> None:
    whole = StepOrder([size], repeat, 4, 1, seed=5)
    cut = StepOrder([size], repeat, *split, seed=5)
    assert whole.steps_per_epoch == cut.steps_per_epoch
    for step in range(whole.steps_per_epoch):
        together = [v for micro in whole.step(step) for v in micro]
        apart = [v for micro in cut.step(step) for v in micro]
        key = lambda v: (v.index, v.visit)  # noqa: E731
        assert sorted(together, key=key) == sorted(apart, key=key)
