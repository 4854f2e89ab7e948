"""Choice of verifiers by source, and of graders by name, a user's own among them."""

import dataclasses
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Mapping

import pytest

from sod_mcore.config import ConfigError
from sod_mcore.rewards import (
    SourceTable,
    Verdict,
    Verifier,
    VerifierRegistry,
    check_row,
    find_grader,
)
from sod_mcore.rewards.registry import BUILT_IN_SOURCES

OWN = "tests.rewards.misbehaving:share"


@pytest.mark.parametrize(
    ("data_source", "name"),
    [
        ("math_dapo", "math"),
        ("mega-science", "math"),
        ("train-math-skywork", "math"),
        ("AIME2024", "math"),
        ("AIME2025", "math"),
        ("gpqa_diamond", "choice"),
        ("train-code-taco-easy", "code"),
        ("train-code-leetcode-hard", "code"),
        ("LiveCodeBench_v6", "code"),
        ("humaneval", "code"),
        ("HumanEval/3", "code"),
        ("reasoning_gym/chain_sum", "reasoning_gym"),
    ],
)
def test_published_sources_are_known(data_source: str, name: str) -> None:
    assert SourceTable().name_for(data_source) == name


def test_the_longest_prefix_decides_and_the_users_table_comes_first() -> None:
    table = SourceTable({"math": "strict_box", "math_dapo/hard": OWN, "gpqa": "strict_box"})
    assert table.name_for("math_dapo") == "strict_box"
    assert table.name_for("math_dapo/hard/1") == OWN
    assert table.name_for("gpqa_diamond") == "strict_box"
    assert table.name_for("AIME2024") == "math"
    assert table.names == {"strict_box", OWN, *BUILT_IN_SOURCES.values()}


def test_an_unknown_source_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"data_source = 'mine'.*'AIME2024'.*'yours'.*verifiers"):
        SourceTable({"yours": "math"}).name_for("mine")


def test_rows_of_one_batch_get_their_own_verifiers() -> None:
    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        async def verify(self, text: str, truth: str, extra_info: Mapping[str, object]) -> Verdict:
            return Verdict("right", self.name)

    table = SourceTable()
    verifiers: dict[str, Verifier] = {name: Named(name) for name in table.names}
    registry = VerifierRegistry(table, verifiers)
    assert registry.for_source("gpqa_diamond") is verifiers["choice"]
    assert registry.for_source("math_dapo") is verifiers["math"]


@pytest.mark.parametrize(
    "name", ["choice", "math_verify", "minerva", "reasoning_gym", "strict_box"]
)
def test_built_in_graders_can_go_to_another_process(name: str) -> None:
    grader = pickle.loads(pickle.dumps(find_grader(name)))
    extra_info = {"dataset": "chain_sum", "entry": '{"answer": "1"}'}
    assert grader("nothing", "A", extra_info).category == "no_answer"


def test_math_is_what_the_configuration_says() -> None:
    spaced = r"\boxed{ 12}"
    assert find_grader("math")(spaced, "12", {}).category == "right"
    assert find_grader("math", math="strict_box")(spaced, "12", {}).category == "wrong"
    assert find_grader("math", math="minerva")(spaced, "12", {}).category == "no_answer"


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("yes", Verdict("right")),
        ("no", Verdict("wrong")),
        ("half", Verdict("wrong", share=0.5)),
        ("all", Verdict("right", share=1.0)),
        ("verdict", Verdict("no_answer")),
        ("numpy yes", Verdict("right")),
        ("numpy half", Verdict("wrong", share=0.5)),
        ("numpy verdict", Verdict("wrong", share=0.5, parts={"n": 3.0})),
    ],
)
def test_a_function_of_the_users(response: str, verdict: Verdict) -> None:
    grader = pickle.loads(pickle.dumps(find_grader(OWN)))
    given = grader(response, "", {})
    assert given == verdict
    assert json.dumps(dataclasses.asdict(given)), "it can leave the grading process"


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ("category", "category = 'correct'.*right, wrong, no_answer"),
        ("share", r"share = 5\.0.*0 to 1"),
        ("parts", r"parts\['note'\] = 'long'.*number"),
    ],
)
def test_a_users_verdict_that_is_none(response: str, message: str) -> None:
    name = "tests.rewards.misbehaving:wrong_verdict"
    with pytest.raises(ValueError, match=rf"reward\.verifiers: {name} .*{message}") as caught:
        find_grader(name)(response, "", {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("response", ["percent", "nan", "text", "nothing", "numpy text", "array"])
def test_a_users_function_that_returns_something_else(response: str) -> None:
    with pytest.raises(ValueError, match=r"reward\.verifiers: .*share returned .*0 to 1"):
        find_grader(OWN)(response, "", {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", r"'maths'; it must be one of choice, code, math, .*package\.module:function"),
        ("no_such_package:grade", "cannot be imported .*no_such_package"),
        ("tests.rewards.misbehaving:no_such", "cannot be imported .*no_such"),
        ("tests.rewards.misbehaving:asynchronous", "no plain function"),
        ("tests.rewards.misbehaving:NOT_A_FUNCTION", "no plain function"),
        (":grade", "cannot be imported"),
    ],
)
def test_names_that_do_not_work_are_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"reward\.verifiers names .*{message}") as caught:
        find_grader(name)
    assert "\n" not in str(caught.value)


ENTRY = {"dataset": "chain_sum", "entry": '{"answer": "1"}'}


@pytest.mark.parametrize(
    ("name", "truth", "extra_info", "math"),
    [
        *(("math", truth, {}, "math_verify") for truth in ("12", r"\frac{1}{2}", "x", "[0,1)")),
        *(("math", truth, {}, "math_verify") for truth in ("tea", "5 m", r"\infty", "x" * 2000)),
        ("math", r"\frac{1}", {}, "strict_box"),
        ("minerva", "12", {}, "math_verify"),
        ("choice", "b", {}, "math_verify"),
        ("reasoning_gym", "", ENTRY, "math_verify"),
        (OWN, "", {}, "math_verify"),
    ],
)
def test_rows_with_an_answer(
    name: str, truth: str, extra_info: dict[str, object], math: str
) -> None:
    check_row(name, truth, extra_info, math=math)


@pytest.mark.parametrize(
    ("name", "truth", "extra_info", "message"),
    [
        *(("math", truth, {}, "ground_truth = .*mathematical") for truth in ("", "$ $", "...")),
        *(("math", truth, {}, "ground_truth = .*mathematical") for truth in (r"\boxed{}", "+")),
        *(("math", truth, {}, "ground_truth = .*mathematical") for truth in ("x^{2", "2}", "\n")),
        ("math", 21 * "{" + "1" + 21 * "}", {}, "ground_truth = .*mathematical"),
        ("strict_box", " ", {}, "ground_truth = ' '"),
        ("minerva", "", {}, "ground_truth = ''"),
        ("choice", "K", {}, "ground_truth = 'K'.*one letter"),
        ("choice", "", {}, "ground_truth = ''.*one letter"),
        ("reasoning_gym", "1", {}, r"extra_info\['dataset'\] = None"),
        ("reasoning_gym", "1", ENTRY | {"entry": "{\n"}, "not JSON"),
        ("reasoning_gym", "1", ENTRY | {"dataset": "countdown"}, "'countdown'.*evaluates"),
        ("reasoning_gym", "1", ENTRY | {"dataset": "no_such"}, "no such dataset"),
    ],
)
def test_rows_without_an_answer(
    name: str, truth: str, extra_info: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_row(name, truth, extra_info)
    assert "\n" not in str(caught.value)


def test_rows_of_programs_are_checked_by_their_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(ground_truth: str) -> None:
        raise ValueError(f"ground_truth = {ground_truth!r}: no tests")

    monkeypatch.setattr("sod_mcore.rewards.code.unit_tests.check_tests", refuse)
    with pytest.raises(ValueError, match=r"'\{\}': no tests"):
        check_row("code", "{}", {})


def test_thirty_thousand_rows_are_checked_in_seconds() -> None:
    truths = ["34", r"\frac{\sqrt{3}}{2}", "hydrogen bonding", "9.8 m/s^2", "x^2+1"] * 6000
    check_row("math", "1", {})
    began = time.process_time()
    for truth in truths:
        check_row("math", truth, {})
    assert time.process_time() - began < 15


def test_checking_rows_loads_no_sympy() -> None:
    program = (
        "import sys; from sod_mcore.rewards import check_row; "
        "check_row('math', 'x+1', {}); check_row('choice', 'A', {}); "
        "sys.exit('sympy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=120, check=False).returncode == 0


def test_the_package_loads_neither_torch_nor_sympy() -> None:
    """Grading processes start in a moment."""
    program = (
        "import sys, sod_mcore.rewards; sys.exit(bool({'torch', 'sympy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=120, check=False).returncode == 0
