"""How hard a page is compressed: what was learnt of a site's values, and what the rate leaves time for."""

from __future__ import annotations

RAW, FAST, BEST = 0, 1, 2
TIER_NAMES = ("raw", "fast", "best")
"""Stored as it is; packed exponents; the codec's best. A codec may have fewer."""

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
        if not self._ratio:
            self._ratio = ratio
        elif abs(ratio / self._ratio - 1) > _DRIFT and self._pages >= _FIRST_INTERVAL:
            self._pages = self._interval


class Choices:
    """What was learnt of every dtype and site."""

    def __init__(self) -> None:
        self._choices: dict[tuple[str, int], Choice] = {}

    def of(self, dtype: str, site: int) -> Choice:
        return self._choices.setdefault((dtype, site), Choice())
