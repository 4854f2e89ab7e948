"""Values of a program under test as plain tables, and back: what passes between two processes.

Pickle would run code of the one in the other. The text of this file stands before that of
``driver.py`` in what is sent to a sandbox, so it holds nothing newer than Python 3.10 and
imports nothing; it can be imported as well, for its tests.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as in typing, which is not needed here otherwise
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
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
    return pack_items([value])


def pack_items(items: list[Any]) -> list[Any]:
    """The table of several values: theirs are the first rows. All else that they hold is added to
    ``items``, which then has the value of every row."""
    places: dict[int, int] = {}
    for place, item in enumerate(items):
        places.setdefault(id(item), place)

    def reference(item: object) -> object:
        if type(item) in SCALARS:
            return item
        if id(item) not in places:
            places[id(item)] = len(items)
            items.append(item)
        return [places[id(item)]]

    # The list grows while it is read; being in it keeps every item's id taken.
    return [pack_one(item, reference) for item in items]


def pack_one(item: Any, reference: Callable[[object], object]) -> list[Any]:
    """One row of the table: the kind of the value and its contents."""
    kind = kind_of(item)
    if kind == "scalar":
        return [kind, plain_scalar(item)]
    if kind == "dict":
        return [kind, [[reference(key), reference(item[key])] for key in item]]
    if kind in CONTAINERS:
        return [kind, [reference(element) for element in item]]
    attributes = vars(item)
    return [kind, [[name, reference(attributes[name])] for name in attributes]]


def kind_of(item: object) -> str:
    """The kind of a value: "scalar", a container's name, or the class of an object."""
    if type(item) in SCALARS:
        return "scalar"
    if isinstance(item, dict):
        return "dict"
    for kind, container in CONTAINERS.items():
        if isinstance(item, container):
            return kind
    if isinstance(item, (int, float, str)):  # of a subclass, such as an enumeration's member
        return "scalar"
    if type(item).__module__ == SOLUTION_MODULE:
        return type(item).__name__
    raise TypeError(f"a value of type {type(item).__name__} cannot be compared")


def plain_scalar(item: Any) -> Any:
    """A scalar without the subclass that it may be of."""
    if type(item) in SCALARS:
        return item
    return next(scalar(item) for scalar in (int, float, str) if isinstance(item, scalar))


def unpack(table: list[Any], names: Mapping[str, object]) -> Any:
    """The value of a table. Objects become instances of the class that ``names`` has for them,
    without a call of its constructor, and only if it was made by the module of ``names``."""
    return unpack_items(table, names)[0]


def unpack_items(
    table: list[Any], names: Mapping[str, object], known: Sequence[object] = ()
) -> list[Any]:
    """The values of all rows.

    The first rows may be those of objects that exist already, ``known``. They stay themselves and
    get the contents of their rows; a row of None leaves its object alone. Nothing else is changed.

    Raises:
        TypeError: a row is of another kind than its known object, or of a class not to be made.
    """
    first_new = len(known)
    for item, row in zip(known, table[:first_new], strict=True):
        if row is not None and row[0] != kind_of(item):
            raise TypeError(f"a {kind_of(item)} cannot become a {row[0]}")
    values = [*known, *(make_shell(kind, names) for kind, _ in table[first_new:])]

    def value_at(reference: Any) -> Any:
        return resolve(reference[0]) if isinstance(reference, list) else reference

    def resolve(place: int) -> Any:
        if values[place] is None and table[place] is not None:
            kind, content = table[place]
            if kind == "scalar":
                return content
            values[place] = CONTAINERS[kind](value_at(element) for element in content)
        return values[place]

    for value, row in zip(values, table, strict=True):
        if value is not None and row is not None:
            fill(value, row[0], row[1], value_at)
    return [resolve(place) for place in range(len(table))]


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


def fill(value: Any, kind: str, content: list[Any], value_at: Callable[[Any], Any]) -> None:
    """Replace the contents of a value in place; scalars, tuples and frozensets have to stay."""
    if kind == "list":
        value[:] = [value_at(element) for element in content]
    elif kind == "set":
        elements = [value_at(element) for element in content]
        value.clear()
        value.update(elements)
    elif kind == "dict":
        pairs = [(value_at(key), value_at(item)) for key, item in content]
        value.clear()
        for key, item in pairs:  # not update, which counts in a Counter
            value[key] = item
    elif kind not in ("scalar", "tuple", "frozenset"):
        attributes = {name: value_at(item) for name, item in content}
        vars(value).clear()
        vars(value).update(attributes)
