"""The reasoning-gym verifier against the package's own entries, and against hostile answers."""

import inspect
import json
import re
import sys
from pathlib import Path

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from sod_mcore.rewards import ReasoningGymVerifier
from sod_mcore.rewards.reasoning_gym import DATASETS_THAT_EVALUATE_ANSWERS


def row(dataset: str, index: int = 0, **options: object) -> tuple[str, dict[str, object]]:
    """Ground truth and extra_info of a data row."""
    entry = reasoning_gym.create_dataset(dataset, size=index + 1, seed=7, **options)[index]
    return str(entry["answer"]), {"dataset": dataset, "entry": json.dumps(entry)}


@pytest.mark.parametrize(
    "dataset",
    ["chain_sum", "basic_arithmetic", "products", "gcd", "decimal_arithmetic", "knights_knaves"],
)
def test_the_packages_own_answers_are_right(dataset: str) -> None:
    verifier = ReasoningGymVerifier()
    for index in range(5):
        answer, extra_info = row(dataset, index)
        result = verifier.score(f"It is \\boxed{{{answer}}}.", answer, extra_info)
        assert (result.reward, result.is_correct, result.prediction) == (1.0, True, answer)
        assert result.parts == {"reasoning_gym_score": 1.0, "scorer_error": 0.0}


def test_wrong_partial_and_missing_answers() -> None:
    answer, extra_info = row("chain_sum")
    verifier = ReasoningGymVerifier(correct_reward=2.0, wrong_reward=-0.5)
    assert verifier.score(f"\\boxed{{ {answer} }}", answer, extra_info).reward == 2.0
    for text in (
        "\\boxed{oops}",
        f"\\boxed{{{answer}}} no, \\boxed{{5 5}}",
        answer,
        "",
        "\\boxed{",
    ):
        result = verifier.score(text, answer, extra_info)
        assert (result.reward, result.is_correct) == (-0.5, False)
    partial = verifier.score(f"\\boxed{{{answer} or so}}", answer, extra_info)
    assert 0.0 < partial.parts["reasoning_gym_score"] < 1.0
    assert partial.reward == -0.5
    assert verifier.score("no box", answer, extra_info).prediction == ""


def test_options_of_the_dataset_reach_its_scorer() -> None:
    """decimal_arithmetic allows one unit in the last decimal place, three places by default."""
    options = {"min_num_decimal_places": 1, "max_num_decimal_places": 1}
    answer, extra_info = row("decimal_arithmetic", **options)
    close = f"\\boxed{{{float(answer) + 0.05:.3f}}}"
    assert not ReasoningGymVerifier().score(close, answer, extra_info).is_correct
    verifier = ReasoningGymVerifier(dataset_options={"decimal_arithmetic": options})
    assert verifier.score(close, answer, extra_info).is_correct


@pytest.mark.parametrize("options", [{"precision": 1}, {"no_such": 1}])
def test_wrong_options(options: dict[str, object]) -> None:
    answer, extra_info = row("decimal_arithmetic")
    verifier = ReasoningGymVerifier(dataset_options={"decimal_arithmetic": options})
    with pytest.raises(ValueError, match=r"dataset_options\['decimal_arithmetic'\]"):
        verifier.score(f"\\boxed{{{answer}}}", answer, extra_info)


def test_scorers_that_raise_give_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, extra_info = row("chain_sum")

    def fail(*_: object) -> float:
        raise KeyError("odd answer")

    monkeypatch.setattr(DATASETS["chain_sum"][0], "score_answer", fail)
    result = ReasoningGymVerifier().score(f"\\boxed{{{answer}}}", answer, extra_info)
    assert result.reward == -1.0
    assert result.parts == {"reasoning_gym_score": 0.0, "scorer_error": 1.0}


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
            ReasoningGymVerifier().score(
                attack, "", {"dataset": dataset, "entry": '{"answer": ""}'}
            )
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
        ReasoningGymVerifier().score(attack, "", extra_info)
        assert not target.exists(), dataset


@pytest.mark.parametrize(
    ("extra_info", "message"),
    [
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
        ReasoningGymVerifier().score("\\boxed{1}", "1", extra_info)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="pip install reasoning-gym"):
        ReasoningGymVerifier().score("", "", {"dataset": "chain_sum", "entry": '{"answer": "1"}'})
