"""How hard a page is compressed: what was learnt of a site's values, and what the rate leaves time for."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence

RAW, FAST, BEST = 0, 1, 2
TIER_NAMES = ("raw", "fast", "best")
"""Stored as it is; packed exponents; the codec's best. A codec may have fewer."""

TIERS_OF_CODEC = {"none": (RAW,), "lz4": (RAW, BEST), "zstd": (RAW, FAST, BEST)}
"""In order of ratio; packed exponents are lz4's best."""

_FIRST_INTERVAL, _LAST_INTERVAL = 4, 64
_DRIFT = 0.05


class Choice:
    """The best method for the pages of one dtype and site, and when to look again.

    Looking again costs some three pages' time: after 4 pages, 8, 16, up to every 64th while the answer stays, and
    at once where a page's ratio drifts by 5 %. Threads share it: a lost update costs one look.
    """

    __slots__ = ("_interval", "_pages", "_ratio", "method")

    def __init__(self) -> None:
        self.method: str | None = None
        self._interval = _FIRST_INTERVAL
        self._pages = 0
        self._ratio = 0.0

    @property
    def probe(self) -> bool:
        return self.method is None or self._pages >= self._interval

    def learnt(self, method: str) -> None:
        same = method == self.method
        self._interval = min(2 * self._interval, _LAST_INTERVAL) if same else _FIRST_INTERVAL
        self._pages = 0
        self._ratio = 0.0
        self.method = method

    def stored(self, raw_bytes: int, payload_bytes: int) -> None:
        self._pages += 1
        ratio = raw_bytes / payload_bytes
        # Read once: another worker may set it to 0.
        last = self._ratio
        if not last:
            self._ratio = ratio
        elif abs(ratio / last - 1) > _DRIFT and self._pages >= _FIRST_INTERVAL:
            self._pages = self._interval


class Choices:
    """What was learnt of every dtype and site."""

    def __init__(self) -> None:
        self._choices: dict[tuple[str, int], Choice] = {}

    def of(self, dtype: str, site: int) -> Choice:
        return self._choices.setdefault((dtype, site), Choice())


_SECONDS_PER_BYTE = (0.3e-9, 0.8e-9, 1.0e-9)
_RATIOS = (1.0, 1.33, 1.45)
"""Of the tiers on bfloat16 activations on one core, until pages were measured; only their proportions matter."""
_RATE_S = 1.0
"""Arrivals are averaged over about so long, as a step delivers all of its values at once; and so is what was done."""
_DRAIN_S = 0.5
"""A backlog should take no longer than this to go."""
_FRESH_S = 5.0
"""A measured cost says less about a machine that others use than the proportions do once it is so old."""
_HEADROOM = 1.1
"""Over the target."""
_SHORTFALL = 2.0
"""What is needed is at most so many times more where pages take longer than their costs say."""
_GROWTH = 1.25
"""Over arrivals below the target: a producer that is held back arrives no faster than its pages are taken."""
_WEIGHT = 0.25
_TRY_EVERY = 24


class _Average:
    """A moving average of seconds a byte, and when it was last fed."""

    __slots__ = ("at_s", "value")

    def __init__(self, value: float, at_s: float = float("-inf")) -> None:
        self.value = value
        self.at_s = at_s

    def feed(self, value: float, now_s: float) -> None:
        fresh = now_s - self.at_s < _FRESH_S
        self.value = self.value + _WEIGHT * (value - self.value) if fresh else value
        self.at_s = now_s


class _Rate:
    """Bytes a second, averaged over about ``_RATE_S``."""

    def __init__(self) -> None:
        self._bytes = 0.0
        self._at_s = 0.0

    def add(self, num_bytes: int, now_s: float) -> None:
        self._bytes = self._decayed(now_s) + num_bytes
        self._at_s = now_s

    def per_s(self, now_s: float, known_s: float) -> float:
        """``known_s``: since when there was anything to add; the average knows nothing of the time before."""
        return self._decayed(now_s) / (_RATE_S * -math.expm1(-known_s / _RATE_S))

    def _decayed(self, now_s: float) -> float:
        return self._bytes * math.exp((self._at_s - now_s) / _RATE_S)


class TierControl:
    """Chooses for each page the tier of highest ratio that keeps the rate, and a better one with the time that leaves.

    A tier can take ``min(workers / seconds a byte, disk bytes a second * ratio)``. Needed is a quarter more than
    the rate of arrival, or what clears the backlog in half a second, and at most a tenth more than the target; still
    more as long as less than that is kept. Where one tier can take more than is needed and the next better one less,
    pages go to both, so that all of the time is used. Where no tier can, to the one that takes most. Every 24th page
    that is not compressed best tries the next better tier, so that its cost stays known. Without a target every page
    gets the best tier. Costs are measured as pages go by (wall time, so that other users of the cores count).
    """

    def __init__(
        self,
        tiers: Sequence[int],
        *,
        target_bytes_per_s: float | None,
        num_workers: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.tiers = tuple(tiers)
        self.target_bytes_per_s = target_bytes_per_s
        self.num_workers = num_workers
        self.raw_bytes = dict.fromkeys(TIER_NAMES, 0)
        """Bytes that went through each tier."""
        self._clock = clock
        self._lock = threading.Lock()
        self._costs: dict[tuple[str, int], _Average] = {}
        self._ratios: dict[tuple[str, int], _Average] = {}
        self._bytes_of: dict[str, int] = {}
        self._speed = _Average(1.0)
        """How much slower than ``_SECONDS_PER_BYTE`` pages were of late."""
        self._disk = _Average(0.0)
        self._arriving, self._kept = _Rate(), _Rate()
        self._first_s: float | None = None
        self._backlog_bytes = 0
        self._busy_s = 0.0
        """For so long pages were there to be done, until ``_counted_s``."""
        self._counted_s = 0.0
        self._pages = 0
        self._spare_s = 0.0
        """Seconds a byte that pages left over for better ones."""

    def arrived(self, num_bytes: int) -> None:
        """A page of raw bytes waits for a worker."""
        with self._lock:
            now_s = self._clock()
            self._arriving.add(num_bytes, now_s)
            if self._first_s is None:
                self._first_s = now_s
            if not self._backlog_bytes:
                self._counted_s = now_s
            self._backlog_bytes += num_bytes

    def left(self, num_bytes: int) -> None:
        """A page that had arrived is stored, or thrown away."""
        with self._lock:
            now_s = self._clock()
            self._busy_s += now_s - self._counted_s
            self._counted_s = now_s
            self._kept.add(num_bytes, self._busy_s)
            self._backlog_bytes -= num_bytes

    def encoded(
        self, dtype: str, tier: int, raw_bytes: int, stored_bytes: int, seconds: float | None
    ) -> None:
        """A page was compressed in so many seconds of a worker; None: in more than pages like it take."""
        if not raw_bytes:
            return
        with self._lock:
            now_s = self._clock()
            self.raw_bytes[TIER_NAMES[tier]] += raw_bytes
            self._bytes_of[dtype] = self._bytes_of.get(dtype, 0) + raw_bytes
            if seconds is not None:
                cost = seconds / raw_bytes
                self._costs.setdefault((dtype, tier), _Average(cost)).feed(cost, now_s)
                self._speed.feed(cost / _SECONDS_PER_BYTE[tier], now_s)
            ratio = raw_bytes / stored_bytes
            self._ratios.setdefault((dtype, tier), _Average(ratio)).feed(ratio, now_s)

    def written(self, num_bytes: int, seconds: float) -> None:
        """So many bytes went to the file in so many seconds."""
        if num_bytes:
            with self._lock:
                self._disk.feed(seconds / num_bytes, self._clock())

    def choose(self, dtype: str) -> int:
        """The tier for the next page of a dtype."""
        best = self.tiers[-1]
        if self.target_bytes_per_s is None or len(self.tiers) == 1:
            return best
        with self._lock:
            needed = self._needed()
            capacities = {tier: self._capacity(dtype, tier) for tier in self.tiers}
            keeping = [tier for tier in self.tiers if capacities[tier] >= needed]
            if best in keeping:
                return best
            if keeping:
                tier = max(keeping)
                better_s = 1 / capacities[self._better(tier)]
                self._spare_s = min(self._spare_s + 1 / needed, 2 * better_s)
                if self._spare_s >= better_s:
                    tier = self._better(tier)
            else:
                tier = max(self.tiers, key=lambda tier: (capacities[tier], tier))
                self._spare_s = 0.0
            self._pages += 1
            if tier != best and self._pages % _TRY_EVERY == 0:
                # What a better tier costs now is known by trying only.
                tier = self._better(tier)
            if keeping:
                self._spare_s -= 1 / capacities[tier]
            return tier

    def _better(self, tier: int) -> int:
        return self.tiers[self.tiers.index(tier) + 1]

    def capacity_bytes_per_s(self, dtype: str) -> float:
        """The most raw bytes a second that any tier can take of a dtype, as measured so far."""
        with self._lock:
            return max(self._capacity(dtype, tier) for tier in self.tiers)

    def forked(self) -> None:
        """In a forked process: who held the lock is not there."""
        self._lock = threading.Lock()

    def limit(self) -> tuple[float, str] | None:
        """``(raw bytes a second, "disk" or "cores")``: the most that was measured to go, and what limits it.

        Of the dtype that most bytes were of; None before any page was.
        """
        with self._lock:
            if not self._bytes_of:
                return None
            dtype = max(self._bytes_of, key=self._bytes_of.__getitem__)
            tier = max(self.tiers, key=lambda tier: self._capacity(dtype, tier))
            capacity = self._capacity(dtype, tier)
            ratio = self._ratios.get((dtype, tier))
            writing_s = self._disk.value / (ratio.value if ratio is not None else _RATIOS[tier])
        # Each worker writes what it compressed, so the disk is at work for this share of the time.
        return capacity, "disk" if writing_s * capacity > 0.5 else "cores"

    def _needed(self) -> float:
        limit = _HEADROOM * (self.target_bytes_per_s or 0.0)
        now_s = self._clock()
        known_s = 0.0 if self._first_s is None else now_s - self._first_s
        arriving = self._arriving.per_s(now_s, max(_DRAIN_S, known_s))
        needed = _GROWTH * max(arriving, self._backlog_bytes / _DRAIN_S)
        if needed < limit or self._busy_s < _DRAIN_S:
            return min(needed, limit)
        # Pages take more than their workers' time: what others use of the cores, and what is between two pages.
        kept = self._kept.per_s(self._busy_s, self._busy_s)
        return limit * min(max(1.0, limit / kept) ** 2, _SHORTFALL)

    def _capacity(self, dtype: str, tier: int) -> float:
        cost = self._costs.get((dtype, tier))
        if cost is not None and self._clock() - cost.at_s < _FRESH_S:
            seconds = cost.value
        else:
            seconds = _SECONDS_PER_BYTE[tier] * self._speed.value
        ratio = self._ratios.get((dtype, tier))
        stored_share = 1 / (ratio.value if ratio is not None else _RATIOS[tier])
        return 1 / max(seconds / self.num_workers, self._disk.value * stored_share, 1e-15)
