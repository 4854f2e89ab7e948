"""Values of a program under test as plain tables, and back: what passes between two processes.

Pickle would run code of the one in the other. The text of this file stands before that of
``code_driver.py`` in what is sent to a sandbox, so it holds nothing newer than Python 3.10 and
imports nothing; it can be imported as well, for its tests.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as in typing, which is not needed here otherwise
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

SCALARS = (type(None), bool, int, float, str)
CONTAINERS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
SOLUTION_MODULE = "solution"
"""Module of the program, and of what a test defines, in either process."""


def pack(value: object) -> list[Any]:
    """A value as a JSON-ready table: scalars stand for themselves, [place] for what is elsewhere.

    Shared and circular references are kept. An object is its class's name and its attributes.

    Raises:
        TypeError: a value of another kind.
    """
    queue: list[Any] = [value]
    places = {id(value): 0}

    def reference(item: object) -> object:
        if type(item) in SCALARS:
            return item
        if id(item) not in places:
            places[id(item)] = len(queue)
            queue.append(item)
        return [places[id(item)]]

    # The queue grows while it is read; being in it keeps every item's id taken.
    return [pack_one(item, reference) for item in queue]


def pack_one(item: Any, reference: Callable[[object], object]) -> list[Any]:
    """One row of the table: the kind of the value and its contents."""
    if type(item) in SCALARS:
        return ["scalar", item]
    if isinstance(item, dict):
        return ["dict", [[reference(key), reference(item[key])] for key in item]]
    for kind, container in CONTAINERS.items():
        if isinstance(item, container):
            return [kind, [reference(element) for element in item]]
    for scalar in (int, float, str):
        if isinstance(item, scalar):  # of a subclass, such as an enumeration's member
            return ["scalar", scalar(item)]
    if type(item).__module__ == SOLUTION_MODULE:
        attributes = vars(item)
        return [type(item).__name__, [[name, reference(attributes[name])] for name in attributes]]
    raise TypeError(f"a value of type {type(item).__name__} cannot be compared")


def unpack(table: list[Any], names: Mapping[str, object]) -> Any:
    """The value of a table. Objects become instances of the class that ``names`` has for them,
    without a call of its constructor, and only if it was made by the module of ``names``."""
    shells = [make_shell(kind, names) for kind, _ in table]

    def value_at(reference: Any) -> Any:
        return resolve(reference[0]) if isinstance(reference, list) else reference

    def resolve(place: int) -> Any:
        kind, content = table[place]
        if kind == "scalar":
            return content
        if kind in ("tuple", "frozenset"):
            return CONTAINERS[kind](value_at(element) for element in content)
        return shells[place]

    for (kind, content), shell in zip(table, shells, strict=True):
        if kind == "list":
            shell.extend(value_at(element) for element in content)
        elif kind == "set":
            shell.update(value_at(element) for element in content)
        elif kind == "dict":
            shell.update((value_at(key), value_at(value)) for key, value in content)
        elif shell is not None:
            vars(shell).update((name, value_at(value)) for name, value in content)
    return resolve(0)


def make_shell(kind: str, names: Mapping[str, object]) -> Any:
    """What is filled after all others exist, so that circles can close; None for the others."""
    if kind in ("scalar", "tuple", "frozenset"):
        return None
    if kind in ("list", "set"):
        return CONTAINERS[kind]()
    if kind == "dict":
        return {}
    found = names.get(kind)
    if not isinstance(found, type) or found.__module__ != SOLUTION_MODULE:
        raise TypeError(f"a value of type {kind} cannot be compared")
    return object.__new__(found)
