"""Values on their way between the judge and the program."""

import json
from collections import Counter, OrderedDict, namedtuple
from enum import IntEnum
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sod_mcore.rewards.code.values import SOLUTION_MODULE, pack, unpack

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
KEYS = st.recursive(SCALARS, lambda inner: st.tuples(inner, inner), max_leaves=4)
VALUES = st.recursive(
    SCALARS | st.sets(KEYS) | st.frozensets(KEYS),
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=20,
)


def travel(value: object, names: dict[str, object] | None = None) -> Any:
    """Out of one process and into another."""
    return unpack(json.loads(json.dumps(pack(value))), names or {})


def types_of(value: object) -> object:
    """The types in a value, since `True == 1 == 1.0`."""
    if isinstance(value, (list, tuple)):
        return type(value), [types_of(element) for element in value]
    if isinstance(value, dict):
        return dict, [(types_of(key), types_of(value[key])) for key in value]
    return type(value)


@given(VALUES)
def test_plain_values_arrive_as_they_were(value: object) -> None:
    arrived = travel(value)
    assert arrived == value
    assert types_of(arrived) == types_of(value)


def test_subclasses_become_plain() -> None:
    class Equal(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    Point = namedtuple("Point", "x y")
    Color = IntEnum("Color", "RED GREEN")
    value = [Equal(3), Point(1, 2), Color.GREEN, Counter("aab"), OrderedDict(a=1)]
    arrived = travel(value)
    assert arrived == [3, (1, 2), 2, {"a": 2, "b": 1}, {"a": 1}]
    assert [type(element) for element in arrived] == [int, tuple, int, dict, dict]
    assert arrived[0] != 4


def test_circles_and_shared_parts() -> None:
    shared: list[object] = [1]
    circle: list[object] = [shared, shared]
    circle.append(circle)
    arrived = travel(circle)
    assert arrived[2] is arrived
    assert arrived[0] is arrived[1]


def test_a_long_chain_needs_no_recursion() -> None:
    chain: list[object] = []
    for _ in range(50_000):
        chain = [chain]
    arrived, depth = travel(chain), 0
    while arrived:
        arrived, depth = arrived[0], depth + 1
    assert depth == 50_000


NODE = "class Node:\n    def __init__(self, value, next=None):\n        raise RuntimeError\n"


def module_with(source: str) -> dict[str, Any]:
    """A namespace as both processes have it."""
    names = vars(ModuleType(SOLUTION_MODULE))
    exec(source, names)
    return names


def test_objects_change_class_by_its_name_and_no_constructor_is_called() -> None:
    here, there = module_with(NODE), module_with(NODE)
    node = object.__new__(here["Node"])
    node.value, node.next = 5, node
    arrived = travel(node, there)
    assert type(arrived) is there["Node"]
    assert arrived.value == 5
    assert arrived.next is arrived


@pytest.mark.parametrize("kind", ["Node", "Thread", "open", "missing"])
def test_only_classes_of_the_test_itself_are_made(kind: str) -> None:
    names = module_with("from threading import Thread")
    with pytest.raises(TypeError, match="cannot be compared"):
        unpack([[kind, []]], names)


def test_other_objects_do_not_travel() -> None:
    for value in (object(), len, iter([]), 1j, b"x"):
        with pytest.raises(TypeError, match="cannot be compared"):
            pack([value])
