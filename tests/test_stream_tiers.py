"""The controller of tiers: as much compression as the rate leaves time for."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stream_files import Sample, contents, floats, write

from fx_instrument.stream.reader import StreamReader
from fx_instrument.stream.tiers import BEST, FAST, RAW, TIERS_OF_CODEC, Choice, TierControl
from fx_instrument.stream.writer import StreamWriter

GB = 1_000_000_000
MB = 1_000_000
COSTS = {RAW: 0.3 / GB, FAST: 0.6 / GB, BEST: 1.2 / GB}
RATIOS = {RAW: 1.0, FAST: 1.33, BEST: 1.48}


class Machine:
    """A writer's pages on a machine of given speed, in its own time."""

    def __init__(
        self, *, target: float | None, workers: int = 1, disk: float = 100 * GB, slower: float = 1.0
    ):
        self.now = 0.0
        self.disk, self.slower, self.workers = disk, slower, workers
        self.control = TierControl(
            (RAW, FAST, BEST), target_bytes_per_s=target, num_workers=workers, clock=lambda: self.now
        )
        self.chosen: list[int] = []

    def page(self, num_bytes: int = 4 * MB) -> float:
        """Compress and write a page; the seconds that the pipeline takes for it."""
        tier = self.control.choose("bfloat16")
        self.chosen.append(tier)
        seconds = num_bytes * COSTS[tier] * self.slower
        stored = int(num_bytes / RATIOS[tier])
        self.control.encoded("bfloat16", tier, num_bytes, stored, seconds)
        self.control.written(stored, stored / self.disk)
        self.control.left(num_bytes)
        return max(seconds / self.workers, stored / self.disk)

    def run(self, rate: float, seconds: float, limit: int = 1 * GB) -> float:
        """Pages arrive at ``rate``, or as the buffer of ``limit`` bytes lets them; the rate that was kept."""
        page, due_s, waiting, done = 4 * MB, self.now, 0, 0
        start, end = self.now, self.now + seconds
        while self.now < end:
            while due_s <= self.now and (waiting + 1) * page <= limit:
                self.control.arrived(page)
                waiting += 1
                due_s += page / rate
            if waiting:
                self.now += self.page(page)
                waiting -= 1
                done += page
            else:
                self.now = due_s
        for _ in range(waiting):
            self.control.left(page)
        return done / (self.now - start)


def test_without_a_target_every_page_gets_the_best() -> None:
    """No target: no reason to compress less, whatever the backlog."""
    machine = Machine(target=None)
    machine.run(5 * GB, 1)
    assert set(machine.chosen) == {BEST}


def test_slow_arrivals_get_the_best_tier() -> None:
    """A capture that arrives slower than the best tier compresses is compressed best, page by page."""
    machine = Machine(target=2 * GB)
    machine.run(0.4 * GB, 5)
    assert machine.chosen.count(BEST) > 0.95 * len(machine.chosen)


@pytest.mark.parametrize(("target", "workers"), [(1.0, 1), (1.4, 1), (2.0, 1), (2.0, 2), (3.0, 2), (5.0, 2)])
def test_the_target_is_held_where_a_tier_can(target: float, workers: int) -> None:
    """Under an overload the target is kept with the tiers that can, and no less compression than that takes."""
    machine = Machine(target=target * GB, workers=workers)
    kept = machine.run(20 * GB, 6)
    assert kept >= 0.95 * target * GB
    if target * 1.2 < workers / (COSTS[FAST] * GB):
        assert machine.chosen.count(RAW) < 0.15 * len(machine.chosen)


@pytest.mark.parametrize(
    ("target", "slower", "faster"), [(1.2, BEST, FAST), (2.0, FAST, RAW), (2.5, FAST, RAW)]
)
def test_time_that_a_tier_leaves_goes_to_a_better_one(target: float, slower: int, faster: int) -> None:
    """Between what two tiers can take, pages go to both: the target is kept, and hardly more than that."""
    machine = Machine(target=target * GB)
    kept = machine.run(20 * GB, 6)
    assert target * GB <= kept <= 1.15 * target * GB
    assert min(machine.chosen.count(slower), machine.chosen.count(faster)) > 0.05 * len(machine.chosen)


def test_what_the_costs_do_not_say_is_made_up_for() -> None:
    """Pages that take a fifth longer than was measured of them: the target is kept all the same."""
    machine = Machine(target=1.2 * GB)
    page = machine.page
    machine.page = lambda num_bytes=4 * MB: 1.2 * page(num_bytes)  # type: ignore[method-assign]
    assert machine.run(20 * GB, 8) >= 1.2 * GB
    assert machine.chosen.count(BEST) > 0.05 * len(machine.chosen)


def test_beyond_the_machine_it_takes_the_most_it_can() -> None:
    """A target that no tier can keep gets the tier that takes most, and the capacity says so."""
    machine = Machine(target=50 * GB)
    kept = machine.run(100 * GB, 3)
    capacity = machine.control.capacity_bytes_per_s("bfloat16")
    assert kept > 0.95 / COSTS[RAW]
    assert 0.9 / COSTS[RAW] < capacity < 1.1 / COSTS[RAW]


def test_a_slow_disk_keeps_compressing() -> None:
    """Where the disk is the bottleneck, storing raw would make it worse: pages stay compressed."""
    machine = Machine(target=2 * GB, workers=2, disk=0.3 * GB)
    kept = machine.run(5 * GB, 10)
    assert machine.chosen[20:].count(RAW) <= 0.02 * len(machine.chosen)
    assert kept > 0.9 * 0.3 * GB * RATIOS[BEST]


def test_a_machine_that_gets_slower_is_noticed() -> None:
    """When others take the cores, pages go to cheaper tiers; when they let go, back to the best."""
    machine = Machine(target=0.8 * GB)
    machine.run(0.6 * GB, 5)
    assert machine.chosen[-1] == BEST
    machine.slower = 2.5
    machine.chosen.clear()
    kept = machine.run(0.6 * GB, 5)
    assert machine.chosen.count(FAST) + machine.chosen.count(RAW) > 0.5 * len(machine.chosen)
    assert kept > 0.95 * 0.6 * GB
    machine.slower = 1.0
    machine.run(0.3 * GB, 15)
    machine.chosen.clear()
    machine.run(0.6 * GB, 5)
    assert machine.chosen.count(BEST) > 0.8 * len(machine.chosen)


@given(st.lists(st.tuples(st.floats(0.01, 10), st.floats(0.1, 3)), max_size=5), st.floats(0.1, 10))
def test_any_load_leaves_the_books_even(loads: list[tuple[float, float]], target: float) -> None:
    """Whatever arrives, the tiers chosen are ones there are, and every byte is accounted for."""
    machine = Machine(target=target * GB)
    for rate, seconds in loads:
        machine.run(rate * GB / 10, seconds / 10)
    assert set(machine.chosen) <= {RAW, FAST, BEST}
    assert sum(machine.control.raw_bytes.values()) == len(machine.chosen) * 4 * MB


def test_a_choice_is_looked_at_again_ever_more_seldom() -> None:
    """A method that stays the best is tried again after 4, 8, 16 pages ...; a drifting ratio is looked at at once."""
    choice = Choice()
    probes = []
    for page in range(200):
        if choice.probe:
            probes.append(page)
            choice.learnt("huffman")
        choice.stored(1000, 600)
    assert probes == [0, 4, 12, 28, 60, 124, 188]
    choice.stored(1000, 300)
    assert choice.probe


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_files_of_any_mix_of_tiers_read_back(tmp_path: Path, codec: str) -> None:
    """Pages of different tiers in one file read as one."""
    writer = StreamWriter(tmp_path / "a.stream", metadata={}, codec=codec, target_bytes_per_s=1)
    writer.abandon()
    tiers = iter(TIERS_OF_CODEC[codec] * 20)
    samples = [Sample("a", step, floats(5000, step), "bfloat16") for step in range(9)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TierControl, "choose", lambda self, dtype: next(tiers))
        path = write(tmp_path / "b.stream", samples, codec=codec, seal_every=1, num_workers=1)
    with StreamReader(path) as reader:
        assert contents(reader) == {s.key: s.data for s in samples}


def test_a_page_is_stored_while_another_thread_learns() -> None:
    """The other one forgets the ratio right after it was found to be there."""
    choice = Choice()
    choice.learnt("huffman")

    class Forgotten(float):
        def __bool__(self) -> bool:
            choice.learnt("zstd1")
            return True

    choice._ratio = Forgotten(1.5)
    choice.stored(300, 200)
    assert choice.method == "zstd1" and not choice.probe
