"""Which asserting texts of data rows can be used."""

import json

import pytest

from sod_mcore.rewards.code.asserts import refusal
from sod_mcore.rewards.code.unit_tests import check_tests


@pytest.mark.parametrize(
    "text",
    [
        "assert f(1) == 2",
        "assert sorted(f([1])) == [1] and isinstance(f(1), int)",
        "assert list(map(f, [1, 2])) == [2, 3]",
        "assert sorted([1], key=f) == [1]",
        "import math\nassert math.isclose(f(1), 2.0)",
        "from collections import Counter as C\nassert C(f('a')) == C('a')",
        "assert [f(n) for n in range(3)] == [(lambda x: x)(n) for n in range(3)]",
        "class Own:\n    value = 5\nassert f(1) == Own().value == Own.value",
        "nums = [2, 1]\nf(nums)\nassert nums == [1, 2]",
        "try:\n    f(0)\nexcept ValueError as error:\n    assert error",
        "result = f('A')\nassert result.lower().strip() == 'a'\nassert f(1).items()",
        "import re\nfound = re.match('a', f(1))\nassert found.group() == 'a'",
        "def same(a, b, *rest, **more):\n    return a == b\nassert same(f(1), 2)",
        "from math import *\nassert isclose(f(1), pi)",
        "match f(1):\n    case {'a': x, **rest}: assert x\n    case [y, *z]: assert y",
        "assert f('\\d')",
    ],
)
@pytest.mark.filterwarnings("error")
def test_usable(text: str) -> None:
    assert refusal(text) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("assert f(1) == LIMIT", "it uses LIMIT without calling it"),
        ("assert math.isclose(f(1), 2.0)", "it uses math without calling it"),
        ("assert isinstance(f(1), Node)", "it uses Node without calling it"),
        ("try:\n    f(1)\nexcept EmptyError: pass", "it uses EmptyError without calling it"),
        ("class Mine(Base): pass", "it uses Base without calling it"),
        ("assert Stack.size == 1", "it uses Stack without calling it"),
        ("s = Stack()\ns.push(1)", "it uses the attribute push of what Stack returns"),
        ("assert Stack(5).peek() == 5", "it uses the attribute peek of what Stack returns"),
        ("assert f(", "it does not compile"),
        ("return 1", "it does not compile"),
        ("x = '\0'", "it does not compile"),
        ("(" * 5000, "it does not compile"),
    ],
)
def test_unusable(text: str, reason: str) -> None:
    row = {"inputs": [""], "outputs": [None], "assert_case": [text]}
    assert reason in str(refusal(text))
    with pytest.raises(ValueError, match=r"'assert_case'.*Give statements that call functions"):
        check_tests(json.dumps(row))
