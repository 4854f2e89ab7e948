"""The reasoning-gym grader against the package's own entries, and against hostile answers."""

import inspect
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from sod_mcore.rewards import Verdict
from sod_mcore.rewards.reasoning_gym import DATASETS_THAT_EVALUATE_ANSWERS, ReasoningGymGrader


def row(dataset: str, index: int = 0, **options: object) -> tuple[str, dict[str, object]]:
    """Ground truth and extra_info of a data row."""
    entry = reasoning_gym.create_dataset(dataset, size=index + 1, seed=7, **options)[index]
    return str(entry["answer"]), {"dataset": dataset, "entry": json.dumps(entry)}


PERTURBED = {
    "chain_sum": "{}1",
    "basic_arithmetic": "{}1",
    "products": "{}1",
    "gcd": "1{}",
    "lcm": "1{}",
    "decimal_arithmetic": "1{}",
    "prime_factorization": "{} × 2",
    "calendar_arithmetic": "{} or so",
    "caesar_cipher": "{} X",
    "letter_counting": "1{}",
    "number_sorting": "{} 1",
    "knights_knaves": "Nobody is a knave, {}",
}
"""By dataset, a wrong answer that looks like the right one."""


@pytest.mark.parametrize("dataset", PERTURBED)
def test_the_packages_own_answers_are_right_and_perturbed_ones_wrong(dataset: str) -> None:
    grader = pickle.loads(pickle.dumps(ReasoningGymGrader()))
    for index in range(5):
        answer, extra_info = row(dataset, index)
        verdict = grader(f"It is \\boxed{{{answer}}}.", answer, extra_info)
        assert verdict == Verdict("right", answer, parts={"reasoning_gym_score": 1.0})
        wrong = PERTURBED[dataset].format(answer)
        verdict = grader(f"It is \\boxed{{{wrong}}}.", answer, extra_info)
        assert verdict.category in ("wrong", "bad_format")
        assert verdict.parts["reasoning_gym_score"] < 1.0


@pytest.mark.parametrize(
    ("response", "category"),
    [
        ("\\boxed{ %s }", "right"),
        ("\\boxed{oops}", "wrong"),
        ("\\boxed{%s} no, \\boxed{5 5}", "wrong"),
        ("%s", "no_answer"),
        ("<think>\\boxed{%s}</think>It is %s.", "no_answer"),
        ("\\boxed{5 5}</think>\\boxed{%s}", "right"),
        ("\\boxed{}", "no_answer"),
        ("\\boxed{%s", "bad_format"),
    ],
)
def test_categories(response: str, category: str) -> None:
    answer, extra_info = row("chain_sum")
    grader = ReasoningGymGrader()
    assert grader(response.replace("%s", answer), answer, extra_info).category == category


def test_a_partly_right_answer_is_wrong() -> None:
    answer, extra_info = row("chain_sum")
    verdict = ReasoningGymGrader()(f"\\boxed{{{answer} or so}}", answer, extra_info)
    assert verdict.category == "wrong"
    assert 0.0 < verdict.parts["reasoning_gym_score"] < 1.0


def test_options_of_the_dataset_reach_its_scorer() -> None:
    """decimal_arithmetic allows one unit in the last decimal place, three places by default."""
    options = {"min_num_decimal_places": 1, "max_num_decimal_places": 1}
    answer, extra_info = row("decimal_arithmetic", **options)
    close = f"\\boxed{{{float(answer) + 0.05:.3f}}}"
    assert ReasoningGymGrader()(close, answer, extra_info).category == "wrong"
    grader = ReasoningGymGrader(dataset_options={"decimal_arithmetic": options})
    grader = pickle.loads(pickle.dumps(grader))
    assert grader(close, answer, extra_info).category == "right"


def test_unpickling_imports_the_package_before_an_answer_is_timed() -> None:
    program = (
        "import pickle, sys; "
        f"pickle.loads({pickle.dumps(ReasoningGymGrader())!r}); "
        "sys.exit('reasoning_gym' not in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=120, check=False).returncode == 0


@pytest.mark.parametrize("options", [{"precision": 1}, {"no_such": 1}])
def test_wrong_options(options: dict[str, object]) -> None:
    answer, extra_info = row("decimal_arithmetic")
    grader = ReasoningGymGrader(dataset_options={"decimal_arithmetic": options})
    with pytest.raises(ValueError, match=r"dataset_options\['decimal_arithmetic'\]"):
        grader(f"\\boxed{{{answer}}}", answer, extra_info)


def test_an_answer_on_which_the_scorer_raises_is_of_a_bad_format(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer, extra_info = row("chain_sum")

    def fail(*_: object) -> float:
        raise KeyError("odd answer")

    monkeypatch.setattr(DATASETS["chain_sum"][0], "score_answer", fail)
    verdict = ReasoningGymGrader()(f"\\boxed{{{answer}}}", answer, extra_info)
    assert verdict == Verdict("bad_format", answer, parts={"reasoning_gym_score": 0.0})


def test_list_of_evaluating_datasets_is_complete() -> None:
    """Every scorer whose source evaluates something it was given as the answer."""
    evaluating = set()
    for name, (dataset, _) in DATASETS.items():
        source = inspect.getsource(dataset.score_answer)
        if re.search(r"(?<!literal_)\beval\(|parse_expr\(|sympify\(|\bexec\(", source):
            evaluating.add(name)
    # number_sorting evaluates the entry, which is ours.
    assert evaluating - {"number_sorting"} == DATASETS_THAT_EVALUATE_ANSWERS


def test_code_in_a_box_is_not_run(tmp_path: Path) -> None:
    target = tmp_path / "written"
    attack = f"\\boxed{{open({str(target)!r}, 'w').close()}}"
    for dataset in sorted(DATASETS_THAT_EVALUATE_ANSWERS):
        with pytest.raises(ValueError, match=f"'{dataset}'.*evaluates"):
            ReasoningGymGrader()(attack, "", {"dataset": dataset, "entry": '{"answer": ""}'})
    # The same attack works on the package itself: the refusal is needed.
    entry = reasoning_gym.create_dataset("string_insertion", size=1)[0]
    reasoning_gym.get_score_answer_fn("string_insertion")(attack[7:-1], entry)
    assert target.exists()
    target.unlink()
    for dataset in sorted(set(DATASETS) - DATASETS_THAT_EVALUATE_ANSWERS - {"composite"}):
        try:
            extra_info = row(dataset)[1]
        except TypeError:
            continue  # an entry that JSON cannot hold is no data row
        ReasoningGymGrader()(attack, "", extra_info)
        assert not target.exists(), dataset


@pytest.mark.parametrize(
    ("extra_info", "message"),
    [
        ({"dataset": "composite", "entry": '{"answer": "1"}'}, "'composite'.*other datasets"),
        ({}, r"extra_info\['dataset'\] = None"),
        ({"dataset": "chain_sum"}, r"extra_info\['entry'\] = None"),
        ({"dataset": "chain_sum", "entry": {"answer": "1"}}, "needs a text"),
        ({"dataset": "chain_sum", "entry": "{"}, "not JSON"),
        ({"dataset": "chain_sum", "entry": "[1]"}, "JSON object"),
        (
            {"dataset": "no_such", "entry": '{"answer": "1"}'},
            "'no_such'.*no such dataset.*chain_sum",
        ),
    ],
)
def test_unusable_rows(extra_info: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReasoningGymGrader()("\\boxed{1}", "1", extra_info)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="pip install reasoning-gym"):
        ReasoningGymGrader()("", "", {"dataset": "chain_sum", "entry": '{"answer": "1"}'})
