"""The three scripts of the arithmetic example, run one after the other at a small size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.arithmetic import make_data, make_models, make_tokenizer
from examples.arithmetic.command_line import load_settings, make_parser
from examples.arithmetic.demonstrations import TOOL
from sod_mcore.chat import ChatRenderer
from sod_mcore.data import (
    OverlapError,
    question_text,
    read_conversations,
    read_prompts,
    tokenize_conversations,
)

SMALL = [
    "data.train_prompts=50",
    "data.eval_prompts=40",
    "data.copy_rows=600",
    "data.teacher.conversations=60",
    "data.student.conversations=400",
    "tokenizer.min_frequency=10",
]
SFT_FILES = ("sft_copy", "sft_teacher", "sft_student")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arithmetic")
    make_everything(folder)
    return folder


def make_everything(folder: Path) -> None:
    make_data.main(["--output", str(folder / "data"), *SMALL])
    data, tokenizer = str(folder / "data"), str(folder / "tokenizer")
    make_tokenizer.main(["--data", data, "--output", tokenizer, *SMALL])
    make_models.main(["--tokenizer", tokenizer, "--output", str(folder / "models"), *SMALL])


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_equal_seeds_give_equal_files(made: Path, tmp_path: Path) -> None:
    make_everything(tmp_path)
    first, second = files(made), files(tmp_path)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_what_exists_is_left_alone(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(made)
    make_everything(made)
    assert files(made) == before
    assert capsys.readouterr().out.count("exists; nothing to do") == 4


def test_prompts_can_be_read_and_have_what_the_verifier_needs(made: Path) -> None:
    prompts = read_prompts(made / "data" / "train.parquet")
    assert len(prompts) == 50
    assert {p.data_source for p in prompts} == {"reasoning_gym"}
    assert set(prompts[0].extra_info) == {"index", "family", "dataset", "entry", "hint"}


def test_evaluation_questions_are_in_no_other_file(made: Path) -> None:
    held_out = {question_text(p) for p in read_prompts(made / "data" / "eval.parquet")}
    assert len(held_out) == 40
    for name in SFT_FILES:
        for conversation in read_conversations(made / "data" / f"{name}.parquet"):
            assert conversation.messages[0]["content"] not in held_out
    assert held_out.isdisjoint(map(question_text, read_prompts(made / "data" / "train.parquet")))


def test_an_overlap_would_be_found(made: Path, tmp_path: Path) -> None:
    for name in ("train", *SFT_FILES):
        (tmp_path / f"{name}.parquet").write_bytes((made / "data" / f"{name}.parquet").read_bytes())
    (tmp_path / "eval.parquet").write_bytes((made / "data" / "train.parquet").read_bytes())
    with pytest.raises(OverlapError, match="50 of 50 evaluation questions"):
        make_data.check_disjoint(tmp_path)


@pytest.mark.parametrize("name", SFT_FILES)
def test_demonstrations_are_the_one_shot_rendering(made: Path, name: str) -> None:
    renderer = ChatRenderer.from_folder(made / "models" / "student")
    conversations = read_conversations(made / "data" / f"{name}.parquet")
    tools = () if name == "sft_copy" else (TOOL,)
    assert all(c.tools == tools for c in conversations)
    for conversation, tokenized in zip(
        conversations, tokenize_conversations(conversations, renderer, 512), strict=True
    ):
        text = renderer.tokenizer.apply_chat_template(
            list(conversation.messages), tools=list(conversation.tools) or None, tokenize=False
        )
        ids = renderer.tokenizer(text.rstrip("\n"), add_special_tokens=False)["input_ids"]
        assert tokenized.token_ids.tolist() == ids


def test_tools_are_listed_in_short(made: Path) -> None:
    renderer = ChatRenderer.from_folder(made / "tokenizer")
    ids = renderer.render_prompt([{"role": "user", "content": "Calculate 57 + 87."}], [TOOL])
    assert renderer.tokenizer.decode(ids) == (
        '<|im_start|>system\n<tools>\n{"name": "code_interpreter", "parameters": '
        '{"code": "string"}}\n</tools><|im_end|>'
        "\n<|im_start|>user\nCalculate 57 + 87.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    with_system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = renderer.tokenizer.decode(renderer.render_prompt(with_system, [TOOL]))
    assert text.startswith("<|im_start|>system\nBe brief.\n\n<tools>\n")
    assert text.count("<|im_start|>system") == 1


def test_numbers_and_operators_are_single_tokens(made: Path) -> None:
    tokenizer = ChatRenderer.from_folder(made / "tokenizer").tokenizer

    def tokens(text: str) -> list[str]:
        return [tokenizer.decode([i]) for i in tokenizer(text)["input_ids"]]

    for number in [*range(1000), "000", "007", "099"]:
        assert len(tokens(str(number))) == 1, number
    assert tokens("Calculate 57 + 870 - -5 * 1234.")[1:] == (
        ["57", " + ", "870", " - ", "-", "5", " * ", "123", "4", "."]
    )
    assert tokenizer.decode(tokenizer("é → \x00 7")["input_ids"]) == "é → \x00 7"


def test_models_are_tied_qwen3_with_the_documented_initialisation(made: Path) -> None:
    for name, width in (("teacher", 128), ("student", 64)):
        model = AutoModelForCausalLM.from_pretrained(made / "models" / name)
        weights = model.state_dict()
        assert model.config.model_type == "qwen3"
        assert model.config.tie_word_embeddings
        assert model.dtype == torch.float32
        assert weights["model.embed_tokens.weight"].std().item() == pytest.approx(
            10 / width, rel=0.02
        )
        down = weights["model.layers.0.mlp.down_proj.weight"]
        assert down.std().item() == pytest.approx(down.shape[1] ** -0.5, rel=0.05)
        assert (weights["model.norm.weight"] == 1).all()
        assert model.config.vocab_size == len(
            ChatRenderer.from_folder(made / "models" / name).tokenizer
        )


def test_weights_beside_the_tokenizer_are_not_copied(made: Path, tmp_path: Path) -> None:
    make_models.main(["--tokenizer", str(made / "models" / "teacher"), "--output", str(tmp_path)])
    assert files(tmp_path) == files(made / "models")


def _copying_loss(model: Any, batches: list[Any]) -> float:
    """Mean loss of the last ten of the given batches, one Adam step on each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    losses = []
    for batch in batches:
        length = max(len(c.token_ids) for c in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for row, c in enumerate(batch):
            ids[row, : len(c.token_ids)] = torch.from_numpy(c.token_ids.astype(np.int64))
            labels[row, : len(c.token_ids)] = torch.from_numpy(
                np.where(c.loss_mask, c.token_ids, -100).astype(np.int64)
            )
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


def test_the_initialisation_learns_to_copy_where_the_customary_one_does_not(made: Path) -> None:
    renderer = ChatRenderer.from_folder(made / "models" / "student")
    rows = tokenize_conversations(
        read_conversations(made / "data" / "sft_copy.parquet"), renderer, 512
    )
    batches = [rows[start : start + 60] for start in range(0, 600, 60)] * 10
    ours = AutoModelForCausalLM.from_pretrained(made / "models" / "student")
    torch.manual_seed(0)
    customary = type(ours)(ours.config)
    losses = _copying_loss(ours, batches), _copying_loss(customary, batches)
    assert losses[0] < 0.6 * losses[1]


def test_a_wrong_setting_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        make_data.main(["--output", str(tmp_path / "data"), "data.teacher.fails=2"])
    assert ended.value.code == 2
    assert "error: data.teacher.fails is 2" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_crash_leaves_nothing_that_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(folder: Path) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr(make_data, "check_disjoint", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        make_data.main(["--output", str(tmp_path / "data"), *SMALL])
    assert list(tmp_path.iterdir()) == []


def test_one_override_leaves_the_rest_of_its_section() -> None:
    options = make_parser("", "").parse_args(["--output", "x", "data.teacher.conversations=7"])
    teacher = load_settings(options).data.teacher
    assert (teacher.conversations, teacher.fails, teacher.learns_failing_calls) == (7, 0.35, False)
