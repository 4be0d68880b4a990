"""Switching a model between its two variants while threads call it."""

from __future__ import annotations

import threading

import pytest
from waiting import until

from fx_instrument.graph.gate import Gate


def test_a_switch_gives_up_in_time() -> None:
    """A switch that may not wait leaves the gate open while a call of another thread is inside."""
    gate, inside, leave = Gate(), threading.Event(), threading.Event()

    def call() -> None:
        gate.enter()
        inside.set()
        leave.wait(60)
        gate.leave()

    thread = threading.Thread(target=call)
    thread.start()
    assert inside.wait(60)
    with pytest.raises(TimeoutError, match="in flight"), gate.switch(timeout_s=0.01):
        raise AssertionError("switched under a call")
    gate.enter()
    gate.leave()
    leave.set()
    thread.join(60)
    with gate.switch(timeout_s=0.01):
        pass


def test_a_call_that_waits_for_another_thread_s_call_ends_a_switch_s_wait() -> None:
    """Neither the call inside, nor the one that it waits for, nor the switch waits for ever."""
    gate, inside, switching, switched = Gate(), threading.Event(), threading.Event(), threading.Event()

    def inner() -> None:
        gate.enter()
        gate.leave()

    def outer() -> None:
        gate.enter()
        inside.set()
        assert switching.wait(60)
        for _ in range(2):
            thread = threading.Thread(target=inner, daemon=True)
            thread.start()
            thread.join()
        gate.leave()

    def switch() -> None:
        with gate.switch():
            switched.set()

    threads = [threading.Thread(target=target, daemon=True) for target in (outer, switch)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    until(lambda: gate.switching)
    switching.set()
    assert switched.wait(60)
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def test_threads_that_call_all_the_time_let_a_switch_through() -> None:
    """Calls of several threads overlap without end, each longer than a switch keeps the first ones waiting."""
    gate, enough, switched = Gate(), threading.Event(), threading.Event()

    def call_on() -> None:
        while not enough.is_set():
            gate.enter()
            threading.Event().wait(0.15)
            gate.leave()

    def switch() -> None:
        with gate.switch():
            switched.set()

    callers = [threading.Thread(target=call_on, daemon=True) for _ in range(6)]
    for offset, caller in enumerate(callers):
        caller.start()
        threading.Event().wait(0.025 * offset)
    threading.Thread(target=switch, daemon=True).start()
    try:
        assert switched.wait(20)
    finally:
        enough.set()
    for caller in callers:
        caller.join(60)


def test_an_interrupt_at_the_gate_leaves_nobody_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a call waits for a switch: the call counts as over."""
    gate = Gate()

    def interrupted(turn: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gate, "wait", interrupted)
    gate.switching = True
    with pytest.raises(KeyboardInterrupt):
        gate.enter()
    gate.switching = False
    assert gate.turn().depth == 0
