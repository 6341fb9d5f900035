"""The queue: one slot a client, clients in turn, nothing for who has left."""

from __future__ import annotations

import random
import threading
import time

import pytest

from hypersd_jax.serving.desk import Client, Desk
from hypersd_jax.serving.limits import Rate


def clients(desk: Desk[str], count: int) -> list[Client[str]]:
    return [desk.join(lambda _found: None) for _ in range(count)]


def taken(desk: Desk[str]) -> tuple[int, str]:
    found = desk.take()
    assert found is not None
    return found[0].number, found[1]


def test_the_latest_request_wins_and_keeps_the_place() -> None:
    desk: Desk[str] = Desk()
    a, b = clients(desk, 2)
    desk.submit(a, "a1")
    desk.submit(b, "b1")
    desk.submit(a, "a2")
    desk.submit(a, "a3")
    assert desk.places() == {a: 1, b: 2}
    assert taken(desk) == (1, "a3")
    assert desk.places() == {a: 0, b: 1}
    desk.submit(a, "a4")
    assert desk.places() == {a: 0, b: 1}
    assert [taken(desk), taken(desk)] == [(2, "b1"), (1, "a4")]
    assert (a.replaced, b.replaced) == (2, 0)


def test_asking_often_gains_nothing() -> None:
    """One who asks after every image of anybody gets as many as those who wait."""
    desk: Desk[str] = Desk()
    everyone = clients(desk, 5)
    counts = dict.fromkeys(everyone, 0)
    for client in everyone:
        desk.submit(client, "first")
    for _ in range(100):
        found = desk.take()
        assert found is not None
        counts[found[0]] += 1
        desk.submit(found[0], "next")
        for _ in range(10):
            desk.submit(everyone[0], "again")
    assert set(counts.values()) == {20}


@pytest.mark.parametrize("seed", range(3))
def test_nobody_waits_for_longer_than_a_round(seed: int) -> None:
    """At random times of asking: between a request and its turn each other client has one turn at most."""
    rng, desk = random.Random(seed), Desk[int]()
    everyone = [desk.join(lambda _found: None) for _ in range(7)]
    asked: dict[Client[int], int] = {}
    for turn in range(500):
        for client in rng.sample(everyone, rng.randint(1, 4)):
            asked.setdefault(client, turn)
            desk.submit(client, turn)
        found = desk.take()
        assert found is not None
        assert turn - asked.pop(found[0]) < len(everyone)


def test_long_work_is_paid_back() -> None:
    """Work of three turns costs its client two rounds, but only while others wait."""
    desk: Desk[str] = Desk()
    a, b = clients(desk, 2)
    order = []
    desk.submit(a, "long", turns=3)
    desk.submit(b, "short")
    for _ in range(7):
        number, _work = taken(desk)
        order.append(number)
        desk.submit((a, b)[number - 1], "short")
    assert order == [1, 2, 2, 2, 1, 2, 1]
    desk.leave(b)
    desk.submit(a, "long", turns=9)
    assert taken(desk) == (1, "long")
    desk.submit(a, "short")
    assert taken(desk) == (1, "short")


def test_what_follows_never_replaces_what_was_asked_for() -> None:
    desk: Desk[str] = Desk()
    (a,) = clients(desk, 1)
    desk.submit(a, "newer")
    desk.follow(a, "teacher's")
    assert taken(desk) == (1, "newer")
    desk.follow(a, "teacher's")
    desk.submit(a, "newest")
    assert taken(desk) == (1, "newest")
    desk.follow(a, "teacher's")
    assert taken(desk) == (1, "teacher's")


def test_who_has_left_costs_nothing() -> None:
    desk: Desk[str] = Desk()
    a, b = clients(desk, 2)
    desk.submit(a, "a")
    desk.submit(b, "b")
    desk.leave(a)
    desk.submit(a, "late")
    desk.follow(a, "later")
    assert desk.places() == {b: 1}
    assert taken(desk) == (2, "b")
    assert not a.present
    assert a.slot is None


def test_the_worker_sleeps_until_somebody_asks() -> None:
    """It spends no processor time, wakes at once, and ends when the desk is closed."""
    desk: Desk[str] = Desk()
    (a,) = clients(desk, 1)
    found: list[object] = []
    spent: list[float] = []

    def work() -> None:
        before = time.thread_time()
        found.append(desk.take())
        spent.append(time.thread_time() - before)
        found.append(desk.take())

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.2)
    assert not found
    desk.submit(a, "go")
    for _ in range(500):
        if found:
            break
        time.sleep(0.01)
    desk.close()
    thread.join(5)
    assert found == [(a, "go"), None]
    assert spent[0] < 0.05
    desk.submit(a, "too late")
    assert desk.take() is None


def test_a_rate_allows_a_burst_and_then_its_share() -> None:
    rate = Rate(8.0, 3, now=100.0)
    assert [rate.allows(100.0) for _ in range(5)] == [True, True, True, False, False]
    assert [rate.allows(100.125), rate.allows(100.125)] == [True, False]
    assert [rate.allows(200.0) for _ in range(4)] == [True, True, True, False]
