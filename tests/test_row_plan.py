"""What requests ask for, and which rows of a forward call that comes to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fx_instrument.row_plan import EVERYTHING, Choice, RowPlanner, parse_choice

SITES = {
    f"model.layers.{i}.{kind}": role
    for i in range(4)
    for kind, role in (("attn", "attention"), ("mlp", "mlp"))
}


def _nested(depth: int) -> list[object]:
    nested: list[object] = []
    for _ in range(depth):
        nested = [nested]
    return nested


@pytest.mark.parametrize("wish", [True, 1, "all", "true", "on", {}, "{}"])
def test_everything(wish: object) -> None:
    """A request may ask for all there is in the words of Python, JSON and the shell."""
    assert parse_choice(wish, SITES) == EVERYTHING


@pytest.mark.parametrize("wish", [False, 0, "none", "off", "0", "false"])
def test_nothing(wish: object) -> None:
    """A request may ask for nothing."""
    assert parse_choice(wish, SITES) is None


def test_layers_roles_and_positions() -> None:
    """Layers, roles and positions narrow the choice together, as a dict or as JSON."""
    choice = parse_choice('{"layers": [0, "2-3"], "roles": ["mlp"], "positions": "last"}', SITES)
    names = {"model.layers.0.mlp", "model.layers.2.mlp", "model.layers.3.mlp"}
    assert choice == Choice(frozenset(names), "last")
    assert parse_choice("generated", SITES) == Choice(None, "generated")
    assert parse_choice({"positions": [5, 1, 5]}, SITES) == Choice(None, (1, 5))
    assert parse_choice({"sites": "model.layers.1.attn"}, SITES) == Choice(
        frozenset({"model.layers.1.attn"}), "all"
    )


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ("everything", "expected all"),
        ({"layer": 1}, "unknown keys"),
        ({"layers": ["a"]}, "numbers or ranges"),
        ({"layers": ["0-999999999"]}, "may name 4096 in all"),
        ({"layers": [f"{first}-{first + 4000}" for first in range(0, 40_000, 4001)]}, "may name 4096 in all"),
        ({"layers": ["0-4000"] * 4000}, "may name 4096 in all"),
        ({"layers": [7]}, "no site lies"),
        ({"roles": ["block"]}, "no site has"),
        ({"sites": ["nope"]}, "no such site"),
        ('{"sites": [["model.layers.0.mlp"]]}', "sites are names, got one of type list"),
        ({"roles": {"a": 1}}, "roles are names, got one of type dict"),
        ({"layers": [{}]}, "numbers or ranges"),
        ({"positions": "first"}, "positions are"),
        ({"positions": [-1]}, "positions are"),
        ({"positions": [1 << 63]}, "positions are"),
        ([1], "expected a truth value"),
        (2.5, "expected a truth value"),
        ("[" * 20000, "characters"),
        ({"positions": list(range(5000))}, "may hold"),
    ],
)
def test_bad_wishes_are_refused(wish: object, says: str) -> None:
    """Whatever a request says that can't be served is a ValueError that says what was expected."""
    with pytest.raises(ValueError, match=says):
        parse_choice(wish, SITES)
    with pytest.raises(ValueError, match=says):
        RowPlanner(SITES, None).begin("a", "a", 3, 0, wish)


@pytest.mark.parametrize(
    "wish", [{"layer": 1, 2: 3}, {(1, 2): 3}, {"sites": _nested(100_000)}, _nested(100_000)]
)
def test_wishes_that_are_no_json_are_refused(wish: object) -> None:
    """A wish from Python that JSON can't say is refused as any other: the engine lives on."""
    with pytest.raises(ValueError, match="expected what JSON can say"):
        RowPlanner(SITES, None).begin("a", "a", 3, 0, wish)


def test_mixed_batch() -> None:
    """Rows are told by their place in the batch; requests with equal sites share a group."""
    planner = RowPlanner(SITES, None)
    planner.begin("a", "a", 3, 0, "all")
    planner.begin("b", "b", 4, 0, None)
    planner.begin("c", "c", 2, 0, {"positions": "last"})
    assert planner.any_wanted([("a", 0, 3)])
    assert not planner.any_wanted([("b", 0, 4)])
    (group,) = planner.plan([("b", 0, 4), ("a", 0, 3), ("c", 0, 2)])
    assert group.rows().tolist() == [4, 5, 6, 8]
    a, c = group.new_requests
    assert (a["id"], c["id"]) == ("a", "c") and a["number"] != c["number"]
    assert group.runs == [(a["number"], 0, 3), (c["number"], 1, 1)]


def test_sites_of_their_own_are_a_group_of_their_own() -> None:
    """Requests with different sites are stored apart, so that neither pays for the other's."""
    planner = RowPlanner(SITES, EVERYTHING)
    planner.begin("a", "a", 1, 0, None)
    planner.begin("b", "b", 1, 0, {"layers": 1})
    groups = planner.plan([("a", 0, 1), ("b", 0, 1)])
    assert [(group.sites, group.rows().tolist()) for group in groups] == [
        (None, [0]),
        (frozenset({"model.layers.1.attn", "model.layers.1.mlp"}), [1]),
    ]


def test_sites_that_other_workers_capture() -> None:
    """A request may name sites of all workers; each stores its own, and numbers all requests as the others do."""
    layers = [{name: role for name, role in SITES.items() if f".{i}." in name} for i in (0, 1)]
    numbers: list[list[int]] = []
    for own in layers:
        planner = RowPlanner(own, None, first_number=5, elsewhere={**layers[0], **layers[1]})
        planner.begin("b", "b", 1, 0, {"layers": [0, 1], "roles": ["mlp"]})
        planner.begin("c", "c", 1, 0, {"layers": [1]})
        planner.begin("d", "d", 1, 0, {"sites": list(own)})
        with pytest.raises(ValueError, match="no site lies"):
            planner.begin("e", "e", 1, 0, {"layers": [2]})
        groups = planner.plan([("b", 0, 1), ("c", 0, 1), ("d", 0, 1), ("e", 0, 1)])
        assert all(group.sites and group.sites <= set(own) for group in groups)
        numbers.append(sorted(number for group in groups for number, _, _ in group.runs))
    assert numbers == [[5, 7], [5, 6, 7]]


def test_a_prompt_that_goes_on() -> None:
    """A session's client sends more: the file is told of the longer prompt; not so of a preempted request."""
    planner = RowPlanner(SITES, None)
    planner.begin("a", "a", 3, 0, "prompt")
    told = []
    for first, count, num_prompt_tokens in ((0, 3, 3), (0, 4, 3), (4, 4, 8)):
        planner.begin("a", "a", num_prompt_tokens, first, "prompt")
        for group in planner.plan([("a", first, count)]):
            lengths = [entry["prompt_tokens"] for entry in group.new_requests]
            told.append((lengths, [run[1:] for run in group.runs]))
    assert told == [([3], [(0, 3)]), ([8], [(4, 4)])]


def test_a_stop_token_that_was_run_before_it_was_known_as_one() -> None:
    """With asynchronous scheduling a session's stop token is run; the next turn's first token has its position."""
    planner = RowPlanner(SITES, EVERYTHING)
    planner.begin("a", "a", 5, 0, None)
    stored = []
    for first, count in ((0, 5), (5, 1), (6, 1)):
        stored += [run[1:] for group in planner.plan([("a", first, count)]) for run in group.runs]
    planner.begin("a", "a", 9, 6, None)
    stored += [run[1:] for group in planner.plan([("a", 6, 3)]) for run in group.runs]
    assert stored == [(0, 5), (5, 1), (6, 1), (6, 3)]


def test_recomputed_rows_are_stored_once() -> None:
    """What a preemption makes the engine compute again is not stored twice; what is new is."""
    planner = RowPlanner(SITES, EVERYTHING)
    planner.begin("a", "a", 4, 0, None)
    (first,) = planner.plan([("a", 0, 4)])
    planner.plan([("a", 4, 1)])
    assert not planner.any_wanted([("a", 0, 5)])
    (group,) = planner.plan([("a", 0, 7)])
    assert group.runs == [(first.new_requests[0]["number"], 5, 2)]
    assert group.rows().tolist() == [5, 6]


def test_unrecorded_requests_are_introduced_again() -> None:
    """A request whose first step was dropped is introduced with its next."""
    planner = RowPlanner(SITES, EVERYTHING)
    planner.begin("a", "a", 1, 0, None)
    (group,) = planner.plan([("a", 0, 1)])
    planner.announce_again(group)
    (later,) = planner.plan([("a", 1, 1)])
    assert [entry["id"] for entry in later.new_requests] == ["a"]
    planner.finish(["a"])
    assert planner.plan([("a", 2, 1)]) == []


def test_each_file_is_told_of_its_requests() -> None:
    """A request that goes on in the next file is introduced there again, once."""
    planner = RowPlanner(SITES, EVERYTHING)
    planner.begin("a", "a", 2, 0, None)
    planner.begin("b", "b", 2, 0, None)
    told = []
    for file, batch in (
        (0, [("a", 0, 2), ("b", 0, 1)]),
        (0, [("b", 1, 1)]),
        (1, [("a", 2, 1)]),
        (1, [("a", 3, 1)]),
    ):
        (group,) = planner.plan(batch, file)
        told.append([(entry["id"], entry["number"]) for entry in group.new_requests])
    (a, b) = told[0]
    assert (a[0], b[0]) == ("a", "b") and told[1:] == [[], [a], []]


wishes = st.sampled_from([None, "all", "none", "last", "generated", "prompt", {"positions": [0, 2, 3, 9]}])


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 8), wishes), min_size=1, max_size=5),
    st.lists(st.integers(1, 5), min_size=1, max_size=20),
)
def test_every_asked_position_once(requests: list[tuple[int, int, object]], chunks: list[int]) -> None:
    """Over any chunking, each asked position is stored exactly once and from the row that holds it."""
    planner = RowPlanner(SITES, EVERYTHING)
    for number, (prompt, _, wish) in enumerate(requests):
        planner.begin(str(number), str(number), prompt, 0, wish)
    done = [0] * len(requests)
    seen: dict[str, list[int]] = {}
    for turn in range(100):
        batch = []
        for number, (prompt, output, _) in enumerate(requests):
            count = min(chunks[(turn + number) % len(chunks)], prompt + output - done[number])
            if count:
                batch.append((str(number), done[number], count))
                done[number] += count
        row_of = [(name, first + index) for name, first, count in batch for index in range(count)]
        for group in planner.plan(batch):
            names = {entry["number"]: entry["id"] for entry in group.new_requests}
            seen.update({f"#{number}": [name] for number, name in names.items()})
            tokens = [
                (number, p)
                for number, position, count in group.runs
                for p in range(position, position + count)
            ]
            assert len(tokens) == group.num_rows
            for (number, position), row in zip(tokens, group.rows(), strict=True):
                name = seen[f"#{number}"][0]
                assert row_of[row] == (name, position)
                seen.setdefault(name, []).append(position)
    for number, (prompt, output, wish) in enumerate(requests):
        choice = EVERYTHING if wish is None else parse_choice(wish, SITES)
        intervals = choice.within(0, prompt + output, prompt) if choice else []
        asked = [position for begin, end in intervals for position in np.arange(begin, end).tolist()]
        assert seen.get(str(number), []) == asked
