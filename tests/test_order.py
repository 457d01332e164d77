"""The order of a training: a permutation without state, and every sample exactly once."""

import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffsynth_dagster.data.order import MicroBatch, StepOrder
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


@given(orders, st.integers(1, 4))
def test_micro_batches_do_not_depend_on_how_many_a_step_takes(
    args: tuple[list[int], int, int, int, int], others: int
) -> None:
    sizes, repeat, batch, slots, seed = args

    def epoch_of(slots: int) -> list[MicroBatch]:
        order = StepOrder(sizes, repeat, batch, slots, seed)
        steps = range(order.steps_per_epoch, 2 * order.steps_per_epoch)
        return [micro for step in steps for micro in order.step(step)]

    assert epoch_of(slots) == epoch_of(others)


def test_repeats_of_a_sample_are_no_neighbours_in_its_bucket() -> None:
    order = StepOrder([64], 5, 4, 1, seed=3)
    micros = [micro for step in range(order.steps_per_epoch) for micro in order.step(step)]
    assert all(len({visit.index for visit in micro}) == 4 for micro in micros)
    first = [[v.index for m in micros for v in m if v.visit == turn] for turn in range(5)]
    assert len({tuple(indices) for indices in first}) == 5


SOURCE = random.Random(5)
RANDOM_SIZES = Counter(
    (SOURCE.randint(640, 1600) // 64, SOURCE.randint(640, 1600) // 64) for _ in range(500)
)


@pytest.mark.parametrize(
    ("sizes", "repeat", "batch", "slots"),
    [
        pytest.param([1] * 30, 50, 1, 4, id="30 shapes, accumulation 4"),
        pytest.param([1] * 30, 50, 1, 8, id="30 shapes, 8 processes"),
        pytest.param([5, 8, 7, 4, 6], 50, 1, 8, id="5 shapes, 8 processes"),
        pytest.param(list(RANDOM_SIZES.values()), 4, 1, 16, id="random sizes"),
    ],
)
def test_a_step_mixes_samples_as_a_shuffled_order_does(
    sizes: list[int], repeat: int, batch: int, slots: int, show: Callable[[str], None]
) -> None:
    order = StepOrder(sizes, repeat, batch, slots, seed=1)
    steps = [[v for m in order.step(s) for v in m] for s in range(order.steps_per_epoch)]
    ours = mean(len({(v.bucket, v.index) for v in step}) for step in steps)
    source = random.Random(1)
    drawn = [sample for sample in range(sum(sizes)) for _ in range(repeat)]
    shuffled: list[int] = []
    for _ in range(20):
        source.shuffle(drawn)
        cuts = range(0, len(drawn), batch * slots)
        shuffled += [len(set(drawn[cut : cut + batch * slots])) for cut in cuts]
    show(f"different samples in a step: {ours:.2f}; in a shuffled order {mean(shuffled):.2f}")
    assert ours == pytest.approx(mean(shuffled), rel=0.05)


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 5)), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_buckets_are_taken_as_often_as_they_say(
    buckets: list[tuple[int, int]], repeat: int, batch: int, slots: int
) -> None:
    sizes, repeats = [size for size, _ in buckets], [often for _, often in buckets]
    order = StepOrder(sizes, repeat, batch, slots, 7, repeats)
    steps = range(order.steps_per_epoch, 2 * order.steps_per_epoch)
    visits = [visit for step in steps for micro in order.step(step) for visit in micro]
    expected = {
        (bucket, index, turn + repeats[bucket] * repeat)
        for bucket, size in enumerate(sizes)
        for index in range(size)
        for turn in range(repeats[bucket] * repeat)
    }
    assert len(visits) == len(expected) == order.samples_per_epoch
    assert {(v.bucket, v.index, v.visit) for v in visits} == expected


def test_repeats_of_one_change_nothing() -> None:
    plain, same = StepOrder([5, 3], 2, 2, 2, 1), StepOrder([5, 3], 2, 2, 2, 1, [1, 1])
    assert plain.key == same.key
    assert [plain.step(n) for n in range(9)] == [same.step(n) for n in range(9)]
