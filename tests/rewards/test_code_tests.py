"""The forms of ground truths."""

import json
from typing import Any

import pytest

from sod_mcore.rewards.code.cases import (
    AssertCase,
    CallCase,
    CheckCase,
    ExpectedValue,
    Inspection,
    StdinCase,
)
from sod_mcore.rewards.code.unit_tests import CALL_PRELUDE, check_tests, read_tests

INSPECTION = Inspection(reading=0, tests=2, broken=None)


def cases(row: object, inspection: Inspection = INSPECTION) -> list[Any]:
    """The tests of the program "P"."""
    tests = read_tests(json.dumps(row))
    return list(tests.cases(tests.readings("P")[0], inspection))


def test_stdin() -> None:
    row = {"inputs": ["1\n2\n", ["3", "4"], ""], "outputs": ["3", ["7", ""], None], "fn_name": None}
    assert cases(row) == [
        StdinCase("P", "1\n2\n", "3"),
        StdinCase("P", "3\n4", "7\n"),
        StdinCase("P", "", None),
    ]


def test_calls_as_in_livecodebench() -> None:
    row = {"inputs": ['[1, 2]\n"a"', "5\n"], "outputs": ["[null, true]", "x y"], "fn_name": "f"}
    sources = [CALL_PRELUDE, "P"]
    assert cases(row) == [
        CallCase(sources, "f", [[1, 2], "a"], ExpectedValue([None, True], "[null, true]")),
        CallCase(sources, "f", [5], ExpectedValue("x y")),
    ]


def test_calls_as_in_taco() -> None:
    row = {"inputs": [[[1, 2], 3]], "outputs": [[4]], "fn_name": "f"}
    assert cases(row) == [
        CallCase([CALL_PRELUDE, "P"], "f", [[1, 2], 3], ExpectedValue([4], is_wrapped=True))
    ]


def test_asserts_beside_calls() -> None:
    row = {
        "inputs": ["", "1"],
        "outputs": [None, "2"],
        "fn_name": "f",
        "assert_case": ["assert f(1) == 2", ""],
    }
    sources = [CALL_PRELUDE, "P"]
    assert cases(row) == [
        AssertCase(sources, "f", "assert f(1) == 2"),
        CallCase(sources, "f", [1], ExpectedValue(2, "2")),
    ]


LEETCODE = {
    "entry_point": "Solution().f",
    "import_prefix": "import math",
    "test_code": "def check(candidate):\n  assert candidate(1) == 2\n  assert candidate(2) == 3",
}


def test_leetcode_has_one_test_an_assert() -> None:
    check = (["import math", "P"], "Solution().f", "import math", LEETCODE["test_code"])
    assert cases(LEETCODE) == [CheckCase(*check, only=0), CheckCase(*check, only=1)]
    whole = Inspection(reading=0, tests=0, broken=None)
    assert cases(LEETCODE, whole) == [CheckCase(*check, only=None)]


def test_human_eval_is_one_test_and_reads_an_answer_in_two_ways() -> None:
    row = {"entry_point": "f", "prompt": "def f():\n", "test": "def check(candidate): ..."}
    assert cases(row) == [CheckCase(["def f():\n", "P"], "f", "def f():\n", row["test"])]
    assert read_tests(json.dumps(row)).readings("    pass") == [
        ["def f():\n", "    pass"],
        ["def f():\n    pass"],
    ]


def test_json_twice_and_python_literals_are_read_too() -> None:
    row = {"inputs": ["1"], "outputs": ["1"]}
    assert read_tests(json.dumps(json.dumps(row))) == read_tests(json.dumps(row))
    assert read_tests(str({**row, "fn_name": None})) == read_tests(json.dumps(row))
    calls = {"inputs": [[(1, 2)]], "outputs": [(3,)], "fn_name": "f"}
    assert read_tests(str(calls)) == read_tests(json.dumps(calls))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("no JSON", "ground_truth = 'no JSON': give a JSON object"),
        ([1], "ground_truth = '.1.': give a JSON object"),
        ({}, "ground_truth has the fields none: give inputs and outputs; or"),
        ({"answer": "5"}, "ground_truth has the fields answer: give inputs and outputs; or"),
        ({"inputs": [], "outputs": []}, "'inputs'. = ..: give at least one test"),
        ({"inputs": ["1"], "outputs": []}, "'outputs'. has 0 items, inputs has 1: give one"),
        ({"inputs": ["1"]}, "'outputs'. = None: give a list"),
        ({"inputs": ["1"], "outputs": [2]}, "'outputs'. = 2: without fn_name, give a text"),
        ({"inputs": ["x"], "outputs": ["1"], "fn_name": "f"}, "= 'x': with fn_name, give the JSON"),
        ({"inputs": [5], "outputs": ["1"], "fn_name": "f"}, "= 5: with fn_name, give a list"),
        ({"inputs": ["1"], "outputs": ["1"], "fn_name": 5}, "'fn_name'. = 5: give a text"),
        (
            {"inputs": ["1"], "outputs": ["1"], "assert_case": ["", ""]},
            "'assert_case'. has 2 items, inputs has 1: give one",
        ),
        (
            {"inputs": ["1"], "outputs": ["1"], "assert_case": [5]},
            "'assert_case'. = 5: give a text, or an empty one",
        ),
        (
            {"inputs": ["", "1"], "outputs": ["", "1"], "assert_case": ["assert f(1)", ""]},
            "'fn_name'. = None: give a text",
        ),
        (
            {"inputs": ["1"], "outputs": ["1"], "fn_name": "f("},
            "'fn_name'. = 'f.': give the name of a function, or an expression such as Solution",
        ),
        ("{'inputs': [[{1, 2}]], 'outputs': [[3]], 'fn_name': 'f'}", "give a JSON object"),
        ({"test_code": "", "entry_point": "f"}, "'import_prefix'. = None: give a text"),
        ({"test": "", "prompt": ""}, "'entry_point'. = None: give a text"),
    ],
)
def test_malformed_ground_truths_are_refused(row: object, message: str) -> None:
    text = row if isinstance(row, str) else json.dumps(row)
    with pytest.raises(ValueError, match=message):
        read_tests(text)


def test_a_test_that_does_not_compile_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'test_code'.*: invalid syntax. Give Python source"):
        cases(LEETCODE, Inspection(0, None, "invalid syntax"))
    with pytest.raises(ValueError, match=r"'test_code'.*: it defines no function check"):
        cases(LEETCODE, Inspection(0, None, None))


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(ValueError, match="ground_truth") as caught:
        read_tests("x" * 1_000_000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        (ExpectedValue(5, "5"), 5),
        (ExpectedValue(5, "5"), "5"),
        (ExpectedValue([5], is_wrapped=True), 5),
        (ExpectedValue([5], is_wrapped=True), [5]),
        (ExpectedValue([[5]], is_wrapped=True), [5]),
    ],
)
def test_accepted_values(expected: ExpectedValue, actual: object) -> None:
    assert expected.accepts(actual)


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        (ExpectedValue(5, "5"), "5 "),
        (ExpectedValue([5], "[5]"), 5),
        (ExpectedValue([5, 6], is_wrapped=True), 5),
        (ExpectedValue([], is_wrapped=True), None),
    ],
)
def test_refused_values(expected: ExpectedValue, actual: object) -> None:
    assert not expected.accepts(actual)


CALLS = {"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}
HUMAN_EVAL = {"entry_point": "f", "prompt": "def f():\n    ''", "test": "def check(candidate): ..."}


@pytest.mark.parametrize(
    "row",
    [
        {"inputs": ["1"], "outputs": ["1"]},
        CALLS,
        LEETCODE,
        HUMAN_EVAL,
        {**HUMAN_EVAL, "test": "def check(candidate):\n    assert candidate('\\d')"},
    ],
)
@pytest.mark.filterwarnings("error")
def test_good_rows_are_checked_without_a_run(row: object) -> None:
    check_tests(json.dumps(row))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"inputs": ["1"], "outputs": []}, "'outputs'. has 0 items"),
        ({**CALLS, "inputs": ["x"]}, "with fn_name, give the JSON"),
        (
            {**LEETCODE, "test_code": "def check(candidate):\nassert"},
            "'test_code'.*expected an ind",
        ),
        ({**LEETCODE, "test_code": "def test(candidate): ..."}, "'test_code'.*no function check"),
        ({**LEETCODE, "test_code": "x = '\0'"}, "'test_code'.*null bytes"),
        ({**LEETCODE, "test_code": "(" * 5000}, "'test_code'.*too many nested"),
        ({**LEETCODE, "test_code": "x = " + "-" * 200_000 + "1"}, "'test_code'"),
        ({**LEETCODE, "import_prefix": "return 1"}, "'test_code'.*outside function"),
        ({**HUMAN_EVAL, "prompt": "def f():\n"}, "'test'.*expected an indented block"),
        ({**HUMAN_EVAL, "entry_point": "f g"}, "'entry_point'. = 'f g': give the name of"),
    ],
    ids=lambda value: repr(value)[-40:],
)
def test_bad_rows_are_found_without_a_run(row: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_tests(json.dumps(row))
    assert "\n" not in str(caught.value)
