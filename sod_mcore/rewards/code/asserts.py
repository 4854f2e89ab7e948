"""What the asserting texts of a data row may do with a program that lives in another process.

Its functions can be called there, and values come back. Its classes and constants cannot be used
from here, so a row whose text does that would call every program wrong.
"""

import ast
import builtins
import warnings
from collections.abc import Iterator

_PLAIN = (bool, int, float, str, list, tuple, set, frozenset, dict, type(None), Exception)
_METHODS = frozenset(name for kind in _PLAIN for name in dir(kind))
_TYPE_TESTS = ("isinstance", "issubclass")
_TOO_DEEP = (MemoryError, RecursionError)


def refusal(source: str) -> str | None:
    """Why asserting statements are unusable, or None.

    A name that they neither define nor import, and that is no built-in, is a function of the
    program. It may be called or handed to a call, and what it returns is a plain value.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
            compile(source, "<test>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, *_TOO_DEEP) as error:
        return f"it does not compile ({str(error) or type(error).__name__})"
    nodes = list(ast.walk(tree))
    if any(isinstance(node, ast.alias) and node.name == "*" for node in nodes):
        return None  # nobody knows what it names
    given = set(dir(builtins)) | {name for node in nodes for name in _bound(node)}
    free = [node for node in nodes if isinstance(node, ast.Name) and node.id not in given]
    called = {id(use) for node in nodes if isinstance(node, ast.Call) for use in _uses(node)}
    for name in free:
        if id(name) not in called:
            return f"it uses {name.id} without calling it"
    results = _results(nodes, {name.id for name in free})
    for node in nodes:
        if isinstance(node, ast.Attribute) and node.attr not in _METHODS:
            function = results.get(ast.unparse(node.value))
            if function is not None:
                return f"it uses the attribute {node.attr} of what {function} returns"
    return None


def _bound(node: ast.AST) -> Iterator[str]:
    """Names that a node gives a value."""
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        yield node.id
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.alias):
        yield (node.asname or node.name).split(".")[0]
    elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
        yield node.name
    elif isinstance(node, ast.MatchMapping) and node.rest:
        yield node.rest


def _uses(call: ast.Call) -> Iterator[ast.expr]:
    """The function of a call and its arguments, but for the classes of a test of types."""
    yield call.func
    if isinstance(call.func, ast.Name) and call.func.id in _TYPE_TESTS:
        return
    yield from call.args
    yield from (keyword.value for keyword in call.keywords)


def _results(nodes: list[ast.AST], functions: set[str]) -> dict[str, str]:
    """Expressions that hold what a function of the program returned, with the function."""
    found: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Call) and _name(node.func) in functions:
            found[ast.unparse(node)] = _name(node.func)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            for target in node.targets:
                if isinstance(target, ast.Name) and _name(node.value.func) in functions:
                    found[target.id] = _name(node.value.func)
    return found


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""
