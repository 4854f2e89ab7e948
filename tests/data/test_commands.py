"""The commands: check says of every row what is wrong with it, show draws its loss mask."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from scripts.make_data_samples import main as make_samples
from scripts.make_data_samples import sft_rows
from sod_mcore.chat import ChatRenderer, tokenize_conversation
from sod_mcore.data.__main__ import main
from sod_mcore.data.show import draw_tokens
from sod_mcore.tools.code_interpreter import code_interpreter_schema
from tests.chat.chat_tokenizers import (
    HYBRID_TEMPLATE,
    PLAIN_TEMPLATE,
    TOOLS,
    make_tokenizer,
    two_call_conversation,
)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    make_samples(["--output", str(tmp_path / "samples"), "--faulty"])
    return tmp_path / "samples"


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    make_tokenizer(PLAIN_TEMPLATE).save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_good_file_says_what_each_row_becomes(
    capsys: pytest.CaptureFixture[str], samples: Path, tokenizer: str
) -> None:
    path = samples / "rl_30k.parquet"
    code, output, _ = run(capsys, "check", path, "--tokenizer", tokenizer)
    assert code == 0
    blocks = re.split(r"\n(?=row \d|\d+ rows)", output)
    assert blocks[1].startswith("row 1  rl  train-math-deepscaler\n  prompt   Work through the")
    assert "  answer   3\n  verifier math\n  length   " in blocks[1]
    assert blocks[6].startswith("6 rows: 6 good, 0 wrong\n")
    assert "  train-code-taco-easy     2 good, 0 wrong" in blocks[6]


def test_the_verifier_looks_at_each_row(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [
        {"data_source": "mine", "problem": "1 + 2?", "answer": "3"},
        {"data_source": "math_dapo", "problem": "1 + 2?", "answer": "?"},
        {"data_source": "gpqa_diamond", "problem": "Which?", "answer": "the second"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, output, _ = run(capsys, "check", path)
    assert code == 1
    blocks = re.split(r"\n(?=row \d|\d+ rows)", output)
    assert "  verifier none built in: reward.verifiers must name one" in blocks[0]
    assert "WRONG" not in blocks[0]
    for block, name in zip(blocks[1:3], ("math", "choice"), strict=True):
        assert f"  verifier {name}\n" in block
        assert "  WRONG    " in block
    assert blocks[3].startswith("3 rows: 1 good, 2 wrong")


def test_lengths_are_those_of_the_rollout(
    capsys: pytest.CaptureFixture[str], samples: Path, tokenizer: str
) -> None:
    path = samples / "rl_30k.parquet"
    arguments = ("check", path, "--tokenizer", tokenizer, "--rows", "1", "--instructions", "none")
    messages = [{"role": "user", "content": "What is 1 + 2? Put the answer into a box."}]
    renderer = ChatRenderer.from_folder(tokenizer)
    length = len(renderer.render_prompt(messages, [code_interpreter_schema()]))
    schema = length - len(renderer.render_prompt(messages))
    _, output, _ = run(capsys, *arguments)
    assert f"  length   {length} tokens, {schema} of them tool schemas" in output
    assert run(capsys, *arguments, "--max-tokens", str(length))[0] == 0
    code, output, _ = run(capsys, *arguments, "--max-prompt-tokens", str(length - 1))
    assert code == 1
    assert f"WRONG    {length} tokens with the tool schemas, data.max_prompt_tokens is" in output


def test_other_tools_can_be_shown(
    capsys: pytest.CaptureFixture[str], samples: Path, tokenizer: str, tmp_path: Path
) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text("[]")
    path = samples / "aime2024.parquet"
    arguments = ("check", path, "--tokenizer", tokenizer, "--tools", tools)
    assert "tokens, 0 of them tool schemas" in run(capsys, *arguments)[1]
    tools.write_text('{"type": "function"}')
    assert "a JSON list of tool schemas is needed" in run(capsys, *arguments)[2]
    tools.write_text("[")
    assert "it is not JSON" in run(capsys, *arguments)[2]


def test_check_goes_on_after_a_wrong_row(
    capsys: pytest.CaptureFixture[str], samples: Path, tokenizer: str
) -> None:
    limits = ("--tokenizer", tokenizer, "--max-tokens", "1000", "--only-wrong")
    code, output, _ = run(capsys, "check", samples / "faulty_prompts.jsonl", *limits)
    assert code == 1
    assert [int(n) for n in re.findall(r"^row (\d+)", output, re.MULTILINE)] == list(range(1, 10))
    assert output.count("WRONG") == 9
    assert "10 rows: 1 good, 9 wrong" in output
    code, output, _ = run(capsys, "check", samples / "faulty_sft.jsonl", "--sft", *limits)
    assert code == 1
    assert "8 rows: 1 good, 7 wrong" in output


def test_conversations_are_rendered_as_each_row_says(
    capsys: pytest.CaptureFixture[str], samples: Path, tmp_path: Path
) -> None:
    make_tokenizer(HYBRID_TEMPLATE).save_pretrained(tmp_path / "hybrid")
    arguments = (samples / "sft_3k.parquet", "--sft", "--tokenizer", tmp_path / "hybrid")
    code, output, _ = run(capsys, "check", *arguments)
    assert code == 0
    assert "  enable_thinking=false    1 good, 0 wrong" in output
    assert "assistant turns: 3" in output
    _, drawn, _ = run(capsys, "show", *arguments)
    assert "<think>\n\n</think>\n\n[turn 0]«I calculate it." in drawn
    code, output, _ = run(capsys, "check", *arguments, "--enable-thinking", "true")
    assert code == 1
    assert "has enable_thinking = False, the run has chat.enable_thinking = True" in output


def test_a_conversation_without_loss_or_beyond_the_limit_is_wrong(
    capsys: pytest.CaptureFixture[str], tokenizer: str, tmp_path: Path
) -> None:
    row = sft_rows()[1]
    row["messages"][1]["loss"] = False
    path = tmp_path / "sft.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(sft_rows()[0]))
    limits = ("--tokenizer", tokenizer, "--max-tokens", "200")
    _, output, _ = run(capsys, "check", path, "--sft", *limits)
    first, second = output.split("row 1")
    assert 'WRONG    every turn says "loss": false' in first
    assert re.search(r"WRONG    \d+ tokens, the limit is 200", second)


def test_show_marks_what_the_loss_counts(
    capsys: pytest.CaptureFixture[str], samples: Path, tokenizer: str
) -> None:
    path = samples / "sft_3k.parquet"
    code, output, _ = run(capsys, "show", path, "--sft", "--tokenizer", tokenizer)
    assert code == 0
    row = sft_rows()[0]
    expected = tokenize_conversation(
        ChatRenderer.from_folder(tokenizer), row["messages"], row["tools"]
    )
    turns = re.findall(r"\[turn \d\]«(.*?)»", output, re.DOTALL)
    renderer = ChatRenderer.from_folder(tokenizer)
    for number, text in enumerate(turns):
        ids = expected.token_ids[expected.turn_index == number]
        assert text == renderer.tokenizer.decode(ids, skip_special_tokens=False)
    assert len(turns) == 3
    assert f"{int(expected.loss_mask.sum())} of them in the loss; assistant turns: 3" in output


def test_show_renders_a_prompt_as_the_rollout_does(
    capsys: pytest.CaptureFixture[str], samples: Path, tokenizer: str
) -> None:
    path = samples / "aime2025.parquet"
    _, output, _ = run(capsys, "show", path, "--row", "0", "--tokenizer", tokenizer)
    assert output.startswith("<|im_start|>system\n")
    assert "What is 7 times 10?\n\nYou may use the tool" in output
    assert "«" not in output
    assert "0 of them in the loss; assistant turns: 0" in output


def test_colors_style_exactly_the_loss() -> None:
    renderer = ChatRenderer(make_tokenizer(PLAIN_TEMPLATE))
    messages = two_call_conversation()
    messages[1]["loss"] = False
    tokens = tokenize_conversation(renderer, messages, TOOLS)
    drawn = draw_tokens(tokens, renderer.tokenizer, color=True)
    green = re.findall(r"\x1b\[1;32m(?:\x1b\[2m)?(.*?)\x1b\[0m", drawn)
    sampled = renderer.tokenizer.decode(tokens.token_ids[tokens.loss_mask])
    assert "".join(green) == sampled.replace("\n", "")
    assert "\x1b[7m[turn 0, no loss]\x1b[0m" in drawn
    assert "\x1b[2m<|im_start|>\x1b[0muser" in drawn
    without = re.sub(r"\x1b\[[0-9;]*m|\[turn \d(, no loss)?\]", "", drawn)
    assert without == renderer.tokenizer.decode(tokens.token_ids)


def test_text_of_the_data_does_not_steer_the_terminal() -> None:
    renderer = ChatRenderer(make_tokenizer(PLAIN_TEMPLATE))
    messages = [
        {"role": "user", "content": "a\x1b[2Jb\rc\td"},
        {"role": "assistant", "content": "é»"},
    ]
    tokens = tokenize_conversation(renderer, messages)
    assert "a\\x1b[2Jb\\rc\td" in draw_tokens(tokens, renderer.tokenizer, color=False)
    assert "«é»<|im_end|>»" in draw_tokens(tokens, renderer.tokenizer, color=False)


@pytest.mark.parametrize(
    ("environment", "flags", "is_colored"),
    [
        ({"FORCE_COLOR": "1"}, [], True),
        ({"FORCE_COLOR": "1"}, ["--no-color"], False),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, [], False),
        ({}, [], False),
    ],
)
def test_color_can_be_turned_off(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    samples: Path,
    tokenizer: str,
    environment: dict[str, str],
    flags: list[str],
    is_colored: bool,
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    path = samples / "sft_3k.parquet"
    _, output, _ = run(capsys, "show", path, "--sft", "--tokenizer", tokenizer, *flags)
    assert ("\x1b[" in output) == is_colored


def test_what_cannot_be_shown_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], samples: Path, tokenizer: str, tmp_path: Path
) -> None:
    faulty = samples / "faulty_prompts.jsonl"
    cases = [
        (("show", faulty, "--row", "1", "--tokenizer", tokenizer), "row 1, data_source: is None"),
        (("show", faulty, "--row", "10", "--tokenizer", tokenizer), "has no row 10; rows are"),
        (("show", faulty, "--tokenizer", tmp_path), "it has no tokenizer.json"),
        (("check", tmp_path / "none.parquet"), "no such file"),
    ]
    for arguments, message in cases:
        code, output, error = run(capsys, *arguments)
        assert code == 1
        assert output == ""
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "has no rows" in run(capsys, "check", tmp_path / "empty.jsonl")[2]


@pytest.mark.parametrize("number", ["-1", "x", "1.5"])
def test_a_number_that_is_none_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["data"])
    with pytest.raises(SystemExit):
        main(["show", "x.jsonl", "--tokenizer", "x", f"--row={number}"])
    assert "a whole number from 0 on is needed" in capsys.readouterr().err
