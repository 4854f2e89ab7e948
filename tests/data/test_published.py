"""The published data sets: every row is mapped by itself, whatever stands before it in its file."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from scripts.make_data_samples import evaluation_rows, human_eval_row, rl_rows, write_samples
from sod_mcore.data import DataError, question_text, read_prompts, read_questions
from sod_mcore.rewards.code.unit_tests import read_tests
from tests.data.files import write_lines

STEPS, TOOL, PLAN = "step by step.", "You may use the tool", "**Note: first analyse"
BOX, NUMBER, LETTER = r"give it as \boxed{...}", "no units", "capital letter"
CHECK = "check your program with the tool"
PIECES = (STEPS, TOOL, PLAN, BOX, NUMBER, LETTER, CHECK)

EXPECTED = {
    "math_dapo": {NUMBER},
    "mega-science": {NUMBER},
    "train-math-deepscaler": {STEPS, TOOL, PLAN, BOX, NUMBER},
    "train-code-taco-easy": {PLAN, CHECK},
    "train-code-leetcode-easy": {PLAN, CHECK},
    "AIME2024": {STEPS, TOOL, PLAN, BOX},
    "AIME2025": {STEPS, TOOL, PLAN, BOX},
    "gpqa_diamond": {STEPS, TOOL, PLAN, BOX, LETTER},
    "LiveCodeBench_v6": {PLAN, CHECK},
    "humaneval": {PLAN, CHECK},
}


def all_rows() -> list[dict[str, Any]]:
    evaluation = itertools.chain.from_iterable(evaluation_rows().values())
    return [*evaluation, human_eval_row(), *rl_rows()]


@pytest.mark.parametrize("backwards", [False, True])
def test_each_row_gets_the_instructions_of_its_own_source(tmp_path: Path, backwards: bool) -> None:
    rows = all_rows()[::-1] if backwards else all_rows()
    path = write_lines(tmp_path / "mixed.jsonl", rows)
    prompts, bare = read_prompts(path), read_questions(path)
    assert {prompt.data_source for prompt in prompts} == EXPECTED.keys()
    for prompt, question in zip(prompts, bare, strict=True):
        text = question_text(prompt)
        found = {piece for piece in PIECES if piece in text}
        assert found == EXPECTED[prompt.data_source], prompt.data_source
        assert question.strip() in text
        assert not any(piece in question for piece in PIECES)
        assert r"\boxed{'" not in text


def test_other_sources_and_instructions_none_leave_messages_alone(tmp_path: Path) -> None:
    rows = [{**row, "data_source": "reasoning_gym"} for row in rl_rows()]
    path = write_lines(tmp_path / "other.jsonl", rows)
    assert [list(p.messages) for p in read_prompts(path)] == [row["prompt"] for row in rows]
    path = write_lines(tmp_path / "rl.jsonl", rl_rows())
    messages = [list(p.messages) for p in read_prompts(path, instructions="none")]
    assert messages == [row["prompt"] for row in rl_rows()]


def test_only_the_last_user_message_is_changed(tmp_path: Path) -> None:
    before = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "a"},
    ]
    row = rl_rows()[0]
    row["prompt"] = [*before, *row["prompt"]]
    [prompt] = read_prompts(write_lines(tmp_path / "rl.jsonl", [row]))
    assert list(prompt.messages[:3]) == before
    assert NUMBER in prompt.messages[3]["content"]


def test_ground_truths_are_what_verifiers_read(tmp_path: Path) -> None:
    write_samples(tmp_path)
    names = ("aime2024", "aime2025", "gpqa_diamond")
    truths = [read_prompts(tmp_path / f"{name}.parquet")[0].ground_truth for name in names]
    assert truths == ["204", "70", "A"]
    [human_eval] = read_prompts(tmp_path / "humaneval.jsonl")
    wanted = {key: human_eval_row()[key] for key in ("prompt", "test", "entry_point")}
    assert json.loads(human_eval.ground_truth) == wanted
    programs = [
        human_eval,
        *read_prompts(tmp_path / "livecodebench_v6.parquet"),
        *read_prompts(tmp_path / "rl_30k.parquet")[3:],
    ]
    assert len(programs) == 6
    for prompt in programs:
        read_tests(prompt.ground_truth)


def test_a_program_is_told_how_it_is_called_and_no_scoring_test(tmp_path: Path) -> None:
    rows = evaluation_rows()["livecodebench_v6"]
    path = write_lines(tmp_path / "lcb.jsonl", rows)
    streams, function = map(question_text, read_prompts(path))
    assert "from stdin" in streams
    assert "`double`" in function
    assert "stdin" not in function
    assert "Example" not in streams + function
    shown = question_text(read_prompts(path, show_tests=True)[0])
    assert "Example input:\n1 2\n\nExample output:\n3\n" in shown


def test_a_science_problem_names_its_domain_and_the_letter_may_be_boxed(tmp_path: Path) -> None:
    row = {**evaluation_rows()["gpqa_diamond"][0], "solution": r"\boxed{C}"}
    [prompt] = read_prompts(write_lines(tmp_path / "gpqa.jsonl", [row]))
    assert question_text(prompt).startswith("Work through the following Chemistry problem")
    assert prompt.ground_truth == "C"


def test_a_row_of_any_schema_may_name_its_source(tmp_path: Path) -> None:
    row = {"problem": "What is 1 + 1?", "answer": 2.0, "data_source": "mine"}
    [prompt] = read_prompts(write_lines(tmp_path / "mine.jsonl", [row]))
    assert (prompt.data_source, prompt.ground_truth) == ("mine", "2")
    assert question_text(prompt) == "What is 1 + 1?"


def test_unit_tests_may_be_a_struct_or_a_python_literal(tmp_path: Path) -> None:
    tests = {"inputs": ["1\n"], "outputs": ["it's\n"], "fn_name": None}
    rows = [rl_rows()[3], rl_rows()[3]]
    rows[0]["reward_model"]["ground_truth"] = tests
    rows[1]["reward_model"]["ground_truth"] = str(tests)
    truths = [p.ground_truth for p in read_prompts(write_lines(tmp_path / "rl.jsonl", rows))]
    assert json.loads(truths[0]) == {"inputs": ["1\n"], "outputs": ["it's\n"]}
    assert json.loads(truths[1]) == tests


@pytest.mark.parametrize("source", ["humaneval", "HumanEval"])
def test_both_spellings_of_human_eval_are_checked_and_instructed(
    tmp_path: Path, source: str
) -> None:
    tests = {key: human_eval_row()[key] for key in ("prompt", "test", "entry_point")}
    row = {
        "data_source": source,
        "prompt": [{"role": "user", "content": tests["prompt"]}],
        "reward_model": {"ground_truth": tests},
    }
    rows = [{**human_eval_row(), "data_source": source}, row]
    for prompt in read_prompts(write_lines(tmp_path / "rows.jsonl", rows)):
        assert {piece for piece in PIECES if piece in question_text(prompt)} == {PLAN, CHECK}
        assert json.loads(prompt.ground_truth) == tests
    row["reward_model"] = {"ground_truth": "3 tests"}
    with pytest.raises(DataError, match="unit tests as JSON text are needed"):
        read_prompts(write_lines(tmp_path / "rows.jsonl", [row]))


def test_unit_tests_written_twice_as_json_are_kept_once(tmp_path: Path) -> None:
    tests = {"inputs": ["ü\n"], "outputs": ["2\n"]}
    texts = [json.dumps(json.dumps(tests)), json.dumps(str(tests)), repr(json.dumps(tests))]
    rows = [{**rl_rows()[3], "reward_model": {"ground_truth": text}} for text in texts]
    for prompt in read_prompts(write_lines(tmp_path / "rl.jsonl", rows)):
        assert json.loads(prompt.ground_truth) == tests
        read_tests(prompt.ground_truth)
    rows[0]["reward_model"]["ground_truth"] = json.dumps(texts[0])
    with pytest.raises(DataError, match="an object of unit tests is needed"):
        read_prompts(write_lines(tmp_path / "rl.jsonl", rows))


LCB = evaluation_rows()["livecodebench_v6"][0]
GPQA = evaluation_rows()["gpqa_diamond"][0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"Problem": "x", "Answer": None}, "Answer: is None; text or a number is needed"),
        ({"problem": "x", "answer": True}, "answer: is True; text or a number is needed"),
        ('{"problem": "x", "answer": NaN}', "answer: is nan, which no answer can equal; write"),
        ('{"problem": "x", "answer": 1e400}', "answer: is inf, which no answer can equal; write"),
        ({"problem": 3, "answer": "1"}, "problem: is 3; text is needed"),
        ({"problem": " ", "answer": "1"}, "problem: is ' '; write the question, or remove the row"),
        ({"Problem": "", "Answer": "1"}, "Problem: is ''; write the question"),
        ({**GPQA, "problem": ""}, "problem: is ''; write the question"),
        ({**LCB, "problem": "\n"}, r"problem: is '\\n'; write the question"),
        ({**human_eval_row(), "prompt": ""}, "prompt: is ''; write the question"),
        ({**GPQA, "solution": "K"}, "solution: is 'K'; the capital letter of an option, A to J"),
        ({**GPQA, "solution": "iron"}, "solution: is 'iron'; the capital letter of an option"),
        ({**GPQA, "domain": None}, "domain: is None; text is needed"),
        ({**LCB, "reward_model": "{"}, "reward_model: is '{'; a struct, or JSON text of one"),
        ({**LCB, "reward_model": "{}"}, r"reward_model: has the keys \[\]; {inputs, outputs} or"),
        (
            {**LCB, "reward_model": '{"ground_truth": {"inputs": ["1"], "outputs": []}}'},
            "reward_model.ground_truth.inputs and .outputs: have 1 and 0 cases",
        ),
        ({**LCB, "extra_info": "x"}, "extra_info: is 'x'; a struct, or JSON text of one"),
        (
            {**rl_rows()[3], "reward_model": {"ground_truth": "3 tests"}},
            "reward_model.ground_truth: is '3 tests'; unit tests as JSON text are needed",
        ),
        ({**human_eval_row(), "test": 1}, "test: is 1; text is needed"),
        ({"messages": []}, "this is a conversation for SFT; known schemas are rl: data_source"),
        ({"question": "x"}, r"columns: are \['question'\]; known schemas are rl: data_source"),
        (
            {**rl_rows()[0], "prompt": [{"role": "system", "content": "x"}]},
            "prompt: has no message of the user",
        ),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: dict[str, Any] | str, message: str) -> None:
    with pytest.raises(DataError, match=rf"row 1, .*{message}"):
        read_prompts(write_lines(tmp_path / "rows.jsonl", [rl_rows()[0], row]))
