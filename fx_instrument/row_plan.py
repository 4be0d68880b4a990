"""Which rows of a server's forward call are kept, for which request and which sites, before anything is copied."""

from __future__ import annotations

import json
import secrets
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .requests import Positions, Run, interval_of

POSITION_NAMES = ("all", "prompt", "last", "generated")
_OFF, _ON = ("none", "off", "false", "0"), ("all", "on", "true", "1")
# What a request may say is bounded: it comes from outside.
MAX_TEXT = 16384
MAX_ITEMS = 4096


@dataclass(frozen=True, slots=True)
class Choice:
    """What one request wants captured."""

    sites: frozenset[str] | None
    """Names of sites; None for all."""
    positions: Positions
    """"all", "prompt", "last" (the prompt's last token), "generated", or ascending token positions."""

    def within(self, begin: int, end: int, num_prompt_tokens: int) -> list[tuple[int, int]]:
        """The chosen positions of ``[begin, end)`` as intervals."""
        interval = interval_of(self.positions, num_prompt_tokens)
        if interval is not None:
            low, high = interval
            low, high = max(low, begin), end if high is None else min(high, end)
            return [(low, high)] if low < high else []
        listed = self.positions
        assert not isinstance(listed, str)
        found: list[tuple[int, int]] = []
        for position in listed[bisect_left(listed, begin) : bisect_left(listed, end)]:
            if found and found[-1][1] == position:
                found[-1] = (found[-1][0], position + 1)
            else:
                found.append((position, position + 1))
        return found


EVERYTHING = Choice(None, "all")


def parse_choice(value: Any, sites: Mapping[str, str]) -> Choice | None:
    """What a request's extra argument asks for; None for nothing.

    Args:
        value: ``True``, ``False``, one of "all", "none", "prompt", "last", "generated", or a dict (or its JSON text)
            with any of ``layers`` (numbers, or ranges such as "0-3"), ``roles``, ``sites`` (names) and
            ``positions`` (a name or a list of numbers).
        sites: name -> role of the sites that there are.

    Raises:
        ValueError: anything else, or a layer, role or site that there is not.
    """
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise ValueError(f"at most {MAX_TEXT} characters are taken, got {len(value)}")
        text = value.strip().lower()
        if text in _OFF:
            return None
        if text in _ON:
            return EVERYTHING
        if text in POSITION_NAMES:
            return Choice(None, text)
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(
                f"expected all, none, {', '.join(POSITION_NAMES[1:])} or JSON, got {value[:80]!r}"
            ) from None
    if isinstance(value, bool) or value in (0, 1):
        return EVERYTHING if value else None
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a truth value, a name or a dict, got {str(value)[:80]!r}")
    unknown = set(value) - {"layers", "roles", "sites", "positions"}
    if unknown:
        raise ValueError(
            f"unknown keys {sorted(map(str, unknown))[:5]}; layers, roles, sites, positions are known"
        )
    return Choice(_chosen_sites(value, sites), _positions(value.get("positions", "all")))


def _items(value: Any, what: str) -> list[Any]:
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(items) > MAX_ITEMS:
        raise ValueError(f"{what} may hold {MAX_ITEMS} items, got {len(items)}")
    return items


def _names(value: Any, what: str) -> set[str]:
    items = _items(value, what)
    for item in items:
        if not isinstance(item, str):
            raise ValueError(f"{what} are names, got one of type {type(item).__name__}")
    return set(items)


def _chosen_sites(value: Mapping[str, Any], sites: Mapping[str, str]) -> frozenset[str] | None:
    if not {"layers", "roles", "sites"} & set(value):
        return None
    chosen = set(sites)
    if "sites" in value:
        names = _names(value["sites"], "sites")
        if not names <= chosen:
            raise ValueError(f"no such site: {sorted(names - chosen)[:3]}; there are {len(chosen)}")
        chosen = names
    if "roles" in value:
        roles = _names(value["roles"], "roles")
        known = set(sites.values())
        if not roles <= known:
            raise ValueError(f"no site has the roles {sorted(roles - known)}; there are {sorted(known)}")
        chosen = {name for name in chosen if sites[name] in roles}
    if "layers" in value:
        layers = _layers(_items(value["layers"], "layers"))
        there = {layer_of(name) for name in sites}
        if not layers <= there:
            raise ValueError(f"no site lies in the layers {sorted(layers - there)[:5]}")
        chosen = {name for name in chosen if layer_of(name) in layers}
    return frozenset(chosen)


def layer_of(name: str) -> int | None:
    """The number of the layer that a module lies in: the first number of its name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _layers(items: Iterable[Any]) -> set[int]:
    layers: set[int] = set()
    num_named = 0
    for item in items:
        first, dash, last = str(item).partition("-")
        if isinstance(item, bool) or not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"layers are numbers or ranges such as '0-3', got {item!r}")
        begin, end = int(first), int(last) if dash else int(first)
        # Before anything is made of them: a client says this, and the engine's next step waits for it.
        num_named += max(0, end + 1 - begin)
        if num_named > MAX_ITEMS:
            raise ValueError(f"layers and ranges of them may name {MAX_ITEMS} in all, got more with {item!r}")
        layers.update(range(begin, end + 1))
    return layers


def _positions(value: Any) -> Positions:
    if isinstance(value, str) and value in POSITION_NAMES:
        return value
    items = _items(value, "positions")
    if not all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 63 for item in items
    ):
        raise ValueError(
            f"positions are one of {', '.join(POSITION_NAMES)} or a list of numbers from 0, got {value!r}"
        )
    return tuple(sorted(set(items)))


def draw_number() -> int:
    """For the first request of an engine; not 0, since engines that go on in one folder must not share a number."""
    return secrets.randbits(62)


@dataclass(slots=True)
class _State:
    """A request that the engine works on."""

    number: int
    entry: dict[str, Any]
    choice: Choice
    num_prompt_tokens: int
    next_position: int
    """Positions before it are stored already: what a preemption makes the engine compute again is not stored twice."""
    announced_in: int | None = None
    """The number of the file that was told of it last."""


@dataclass(slots=True)
class Group:
    """The rows of one forward call that go to the same sites."""

    sites: frozenset[str] | None
    runs: list[Run] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    """Where the rows lie in the call's batch: first row, number of rows."""
    new_requests: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return sum(count for _, count in self.spans)

    def rows(self) -> npt.NDArray[np.int64]:
        """The rows' numbers within the call's batch, ascending."""
        return np.concatenate(
            [np.arange(first, first + count, dtype=np.int64) for first, count in self.spans]
        )


class RowPlanner:
    """Follows the requests of an engine and says of each forward call which rows are kept.

    Args:
        sites: name -> role of the sites.
        default: what a request gets that says nothing.
        first_number: requests are numbered from here on, whether they are captured or not, so that all workers of an
            engine that are told of the same ones number them alike; None draws it.
        elsewhere: name -> role of the sites that other workers capture, which requests may name as well.
    """

    def __init__(
        self,
        sites: Mapping[str, str],
        default: Choice | None,
        first_number: int | None = None,
        elsewhere: Mapping[str, str] | None = None,
    ) -> None:
        self._own = frozenset(sites)
        self._sites = {**(elsewhere or {}), **sites}
        self._default = default
        self._states: dict[str, _State | None] = {}
        """By engine id; None for those that are not captured."""
        self._choices: dict[str, Choice | None] = {}
        self._next_number = draw_number() if first_number is None else first_number

    def begin(
        self, engine_id: str, request_id: str, num_prompt_tokens: int, num_cached_tokens: int, wish: Any
    ) -> None:
        """A request is scheduled for the first time; ``wish`` is its extra argument, None if it has none.

        Of one that is known already only a longer prompt counts, as of a session whose client sends more: it is what
        comes before the next token to generate. It may begin at a position that is stored already: that of a stop
        token which was run before it was known as one, and is no part of the prompt.

        Raises:
            ValueError: as ``parse_choice``; the request is not captured then.
        """
        if engine_id in self._states:
            self._goes_on(self._states[engine_id], num_prompt_tokens, num_cached_tokens)
            return
        number = self._next_number
        self._next_number += 1
        self._states[engine_id] = None
        choice = self._default if wish is None else self._parse(wish)
        if choice is not None and choice.sites is not None:
            choice = Choice(choice.sites & self._own, choice.positions)
        if choice is None or choice.sites == frozenset():
            return
        entry = {
            "number": number,
            "id": request_id,
            "engine_id": engine_id,
            "prompt_tokens": num_prompt_tokens,
            "cached_tokens": num_cached_tokens,
            "sites": None if choice.sites is None else sorted(choice.sites),
            "positions": choice.positions if isinstance(choice.positions, str) else list(choice.positions),
        }
        self._states[engine_id] = _State(number, entry, choice, num_prompt_tokens, 0)

    def _goes_on(self, state: _State | None, num_prompt_tokens: int, num_computed_tokens: int) -> None:
        if state is not None and num_prompt_tokens > state.num_prompt_tokens:
            state.next_position = min(state.next_position, num_computed_tokens)
            state.num_prompt_tokens = num_prompt_tokens
            state.entry = {**state.entry, "prompt_tokens": num_prompt_tokens}
            state.announced_in = None

    def finish(self, engine_ids: Iterable[str]) -> None:
        for engine_id in engine_ids:
            self._states.pop(engine_id, None)

    def any_wanted(self, scheduled: Iterable[tuple[str, int, int]]) -> bool:
        """Whether one of ``(engine id, first position, number of tokens)`` has a row to keep."""
        states = self._states
        if not states:
            return False
        for engine_id, first, count in scheduled:
            state = states.get(engine_id)
            if state is not None and _wanted(state, first, count):
                return True
        return False

    def plan(self, scheduled: Sequence[tuple[str, int, int]], file: int = 0) -> list[Group]:
        """The rows to keep of a call whose batch has ``(engine id, first position, tokens)`` in this order.

        Args:
            file: the number of the file that they go to: each is told of the requests that it has rows of.
        """
        groups: dict[frozenset[str] | None, Group] = {}
        offset = 0
        for engine_id, first, count in scheduled:
            state = self._states.get(engine_id)
            if state is not None:
                self._add(groups, state, first, count, offset, file)
            offset += count
        return list(groups.values())

    def announce_again(self, group: Group) -> None:
        """The step that introduced these requests was not recorded: introduce them with their next one."""
        numbers = {entry["number"] for entry in group.new_requests}
        for state in self._states.values():
            if state is not None and state.number in numbers:
                state.announced_in = None

    def _add(
        self,
        groups: dict[frozenset[str] | None, Group],
        state: _State,
        first: int,
        count: int,
        offset: int,
        file: int,
    ) -> None:
        wanted = _wanted(state, first, count)
        state.next_position = max(state.next_position, first + count)
        if not wanted:
            return
        group = groups.setdefault(state.choice.sites, Group(state.choice.sites))
        if state.announced_in != file:
            state.announced_in = file
            group.new_requests.append(state.entry)
        for begin, end in wanted:
            group.runs.append((state.number, begin, end - begin))
            group.spans.append((offset + begin - first, end - begin))

    def _parse(self, wish: Any) -> Choice | None:
        try:
            key = json.dumps(wish, sort_keys=True, default=str)
            if key not in self._choices:
                if len(self._choices) >= MAX_ITEMS:
                    self._choices.clear()
                self._choices[key] = parse_choice(wish, self._sites)
        except (TypeError, RecursionError) as error:
            # Keys of a dict that don't compare or are no JSON; lists in lists without end.
            raise ValueError(f"expected what JSON can say, got a {type(wish).__name__}: {error}") from None
        return self._choices[key]


def _wanted(state: _State, first: int, count: int) -> list[tuple[int, int]]:
    begin = max(first, state.next_position)
    return state.choice.within(begin, first + count, state.num_prompt_tokens)
