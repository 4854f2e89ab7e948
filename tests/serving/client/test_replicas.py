"""Which engine is chosen, against a model that looks at everything anew each time."""

from __future__ import annotations

import asyncio
import random
from contextlib import ExitStack

import pytest

from sod_mcore.serving.client.replicas import (
    GROUP_PATIENCE,
    KEY_PATIENCE,
    Affinity,
    Patience,
    Replica,
    Replicas,
)

URLS = ("a", "b", "c")


def down(replicas: Replicas, replica: Replica) -> None:
    replicas.mark_down(replica, "dead", reason="failed", now=0.0, pause=1.0)


def chosen(replicas: Replicas, tokens: int = 1, affinity: Affinity | None = None) -> Replica:
    replica = replicas.choose(tokens, affinity)
    assert replica is not None
    return replica


def near(load: int, least: int, tokens: int, patience: Patience) -> bool:
    return load <= patience.factor * least + patience.requests * tokens


class BruteForce:
    """Keeps the whole history, and says which engines may be chosen."""

    def __init__(self) -> None:
        self.history: list[tuple[Affinity, str]] = []

    def allowed(
        self, loads: dict[str, int], tokens: int, affinity: Affinity, last_chosen: dict[str, int]
    ) -> str:
        """``loads`` holds the engines that are up."""
        order = sorted(loads, key=lambda url: (loads[url], last_chosen[url]))
        least = loads[order[0]]
        of_key = [url for past, url in self.history if past.key == affinity.key][-1:]
        if of_key and of_key[0] in loads and near(loads[of_key[0]], least, tokens, KEY_PATIENCE):
            return of_key[0]
        if affinity.group is not None:
            of_group = {url for past, url in self.history if past.group == affinity.group}
            for url in order:
                if url in of_group and near(loads[url], least, tokens, GROUP_PATIENCE):
                    return url
        return order[0]


@pytest.mark.parametrize("seed", range(20))
def test_against_brute_force(seed: int) -> None:
    """Random requests that begin and end, keys that are forgotten, engines that come and go."""
    draw = random.Random(seed)
    replicas, brute, last_chosen = Replicas(URLS), BruteForce(), dict.fromkeys(URLS, 0)
    open_requests: list[tuple[ExitStack, str, int]] = []
    for step in range(1, 400):
        event = draw.random()
        if event < 0.25 and open_requests:
            open_requests.pop(draw.randrange(len(open_requests)))[0].close()
        elif event < 0.3:
            replica = draw.choice(replicas.all)
            down(replicas, replica) if draw.random() < 0.4 else replicas.mark_up(replica)
        elif event < 0.35:
            key = str(draw.randrange(12))
            replicas.forget(key)
            brute.history = [
                (Affinity("", past.group) if past.key == key else past, url)
                for past, url in brute.history
            ]
        else:
            tokens = draw.choice([1, 5, 40])
            affinity = Affinity(str(draw.randrange(12)), draw.choice([None, "g", "h", "i"]))
            loads = {
                r.url: sum(size for _, url, size in open_requests if url == r.url)
                for r in replicas.all
                if r.is_up
            }
            assert replicas.are_usable == bool(loads)
            replica_or_none = replicas.choose(tokens, affinity)
            if not loads:
                assert replica_or_none is None
                continue
            assert replica_or_none is not None
            assert replica_or_none.url == brute.allowed(loads, tokens, affinity, last_chosen)
            brute.history.append((affinity, replica_or_none.url))
            last_chosen[replica_or_none.url] = step
            stack = ExitStack()
            stack.enter_context(replicas.working(replica_or_none, tokens))
            open_requests.append((stack, replica_or_none.url, tokens))
    for stack, _, _ in open_requests:
        stack.close()
    assert [replica.outstanding_tokens for replica in replicas.all] == [0, 0, 0]


def test_idle_engines_take_turns() -> None:
    replicas = Replicas(URLS)
    assert [chosen(replicas).url for _ in range(7)] == ["a", "b", "c", "a", "b", "c", "a"]


def test_work_is_shared_by_its_size() -> None:
    replicas, loads = Replicas(URLS), dict.fromkeys(URLS, 0)
    draw = random.Random(1)
    with ExitStack() as stack:
        for _ in range(300):
            tokens = draw.randrange(1, 1000)
            replica = chosen(replicas, tokens)
            stack.enter_context(replicas.working(replica, tokens))
            loads[replica.url] += tokens
        assert max(loads.values()) - min(loads.values()) < 1000


def test_a_trajectory_stays_until_its_engine_has_far_more_to_do() -> None:
    replicas, affinity = Replicas(URLS), Affinity("trajectory")
    home = chosen(replicas, 10, affinity)
    with ExitStack() as stack:
        for _ in range(KEY_PATIENCE.requests):
            stack.enter_context(replicas.working(home, 10))
        assert chosen(replicas, 10, affinity) is home
        stack.enter_context(replicas.working(home, 1))
        moved = chosen(replicas, 10, affinity)
        assert moved is not home
    assert chosen(replicas, 10, affinity) is moved, "its prefix is there now"


def test_a_trajectory_leaves_a_dead_engine() -> None:
    replicas, affinity = Replicas(URLS), Affinity("trajectory")
    home = chosen(replicas, 10, affinity)
    down(replicas, home)
    moved = chosen(replicas, 10, affinity)
    assert moved is not home
    replicas.mark_up(home)
    assert chosen(replicas, 10, affinity) is moved


def test_a_new_trajectory_joins_its_group_while_that_costs_little() -> None:
    replicas = Replicas(URLS)
    home = chosen(replicas, 10, Affinity("first", "group"))
    with ExitStack() as stack:
        for number in range(GROUP_PATIENCE.requests + 1):
            assert chosen(replicas, 10, Affinity(str(number), "group")) is home
            stack.enter_context(replicas.working(home, 10))
        other = chosen(replicas, 10, Affinity("last", "group"))
        assert other is not home
        assert chosen(replicas, 10, Affinity("one more", "group")) is other


def test_an_engine_may_be_left_out() -> None:
    replicas = Replicas(("a", "b"))
    first = chosen(replicas)
    second = replicas.choose(1, other_than=first)
    assert second is not None
    assert second is not first
    down(replicas, second)
    assert replicas.choose(1, other_than=first) is None


def test_memory_for_keys_is_bounded() -> None:
    replicas = Replicas(URLS, most_keys=3)
    homes = {}
    for number in range(100):
        affinity = Affinity(f"key {number}", f"group {number}")
        homes[number] = chosen(replicas, 1, affinity)
    assert len(replicas._by_key) == len(replicas._by_group) == 3
    for number in (97, 98, 99):
        assert chosen(replicas, 1, Affinity(f"key {number}")) is homes[number]


def test_what_is_used_is_kept() -> None:
    replicas = Replicas(URLS, most_keys=3)
    home = chosen(replicas, 1, Affinity("mine"))
    for number in range(100):
        chosen(replicas, 1, Affinity(str(number)))
        assert chosen(replicas, 1, Affinity("mine")) is home


def test_a_key_can_be_forgotten() -> None:
    replicas = Replicas(URLS)
    chosen(replicas, 1, Affinity("trajectory", "group"))
    replicas.forget("trajectory")
    replicas.forget("never seen")
    assert not replicas._by_key


def test_versions() -> None:
    replicas = Replicas(URLS)
    a, b, c = replicas.all
    a.weight_version, b.weight_version = 5, 4
    down(replicas, c)
    assert replicas.require_version(5) == [b, c]
    assert [replicas.has_required_version(replica) for replica in (a, b, c)] == [True, False, False]
    down(replicas, a)
    assert not replicas.has_required_version(a), "it may be another process when it comes back"


def test_waiting_for_an_engine() -> None:
    async def run() -> None:
        replicas = Replicas(("a", "b"))
        async with asyncio.timeout(10):
            await replicas.wait_until_usable()
            down(replicas, replicas.all[0])
            await replicas.wait_until_usable()
            down(replicas, replicas.all[1])
            waiting = asyncio.create_task(replicas.wait_until_usable())
            await asyncio.sleep(0)
            assert not waiting.done()
            replicas.mark_up(replicas.all[1])
            await waiting

    asyncio.run(run())
    replicas = Replicas(("a", "b"))
    down(replicas, replicas.all[0])
    assert replicas.problems() == "a: dead; b: not asked yet"


def test_requests_wait_until_all_engines_were_asked_for_their_version() -> None:
    """Else the first that answers would get all of them."""
    replicas = Replicas(("a", "b", "c"))
    down(replicas, replicas.all[2])
    for replica in replicas.require_version(5):
        assert replicas.mark_down(replica, "not asked", reason="unasked", now=0.0, pause=0.0)
    first, second, dead = replicas.all
    assert dead.down_reason == "failed", "to be asked again is no proof of health"
    replicas.mark_up(first)
    assert not replicas.are_usable
    replicas.keep_down(second, "is old", reason="stale", now=0.0, pause=1.0)
    assert replicas.are_usable
