"""The command itself: plain, with processes of its own, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sod_mcore.convert import main
from tests.convert.models import make_model

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the Hugging Face folder ``source`` and the checkpoint ``megatron`` made from it."""
    folder = tmp_path_factory.mktemp("convert")
    torch.manual_seed(0)
    model = make_model("llama_untied", vocab_size=130, tie_word_embeddings=False)
    model.to(torch.bfloat16).save_pretrained(folder / "source")
    main(["to-megatron", f"{folder / 'source'}", f"{folder / 'megatron'}"])
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on standard error."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error")]
    return line


def test_own_processes_give_what_one_process_was_given(folder: Path, tmp_path: Path) -> None:
    source, out = folder / "source", tmp_path / "back"
    command = [sys.executable, "-m", "sod_mcore.convert", "to-hf", f"{folder / 'megatron'}"]
    subprocess.run(
        [*command, f"{out}", "--like", f"{source}", "--tensor-parallel", "2"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=True,
    )
    expected = load_file(source / "model.safetensors")
    got = load_file(out / "model.safetensors")
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == torch.bfloat16
        assert torch.equal(got[name], tensor), name


def test_another_dtype_on_request(folder: Path, tmp_path: Path) -> None:
    source, out = folder / "source", tmp_path / "out"
    arguments = ["to-hf", f"{folder / 'megatron'}", f"{out}", "--like", f"{source}"]
    main([*arguments, "--dtype", "float32"])
    expected = load_file(source / "model.safetensors")
    got = load_file(out / "model.safetensors")
    assert all(torch.equal(got[name], tensor.float()) for name, tensor in expected.items())
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--tensor-parallel", "3"], ["--tensor-parallel is 3", "num_attention_heads = 8"]),
        (["--tensor-parallel", "8"], ["--tensor-parallel is 8", "num_query_groups = 4"]),
        (["--pipeline-parallel", "3"], ["--pipeline-parallel is 3", "num_layers = 4"]),
    ],
)
def test_layouts_that_do_not_divide(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    parts: list[str],
) -> None:
    line = refusal(capsys, "to-megatron", f"{folder / 'source'}", f"{tmp_path / 'out'}", *options)
    assert all(part in line for part in parts), line
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_stays(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"{folder / 'source'}"
    (tmp_path / "kept").write_text("mine")
    assert "--overwrite" in refusal(capsys, "to-megatron", source, f"{tmp_path}")
    assert (tmp_path / "kept").read_text() == "mine"
    assert "holds what is converted" in refusal(capsys, "to-megatron", source, f"{folder}")
    main(["to-megatron", source, f"{tmp_path}", "--overwrite"])
    assert (tmp_path / "release" / "metadata.json").is_file()
    assert not (tmp_path / "kept").exists()


def test_what_is_no_checkpoint(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    like = ["--like", f"{folder / 'source'}"]
    line = refusal(capsys, "to-hf", f"{folder / 'source'}", f"{tmp_path / 'out'}", *like)
    assert "not a torch_dist checkpoint" in line
    assert "--like is" in refusal(
        capsys, "to-hf", f"{folder / 'megatron'}", f"{tmp_path / 'out'}", "--like", "nowhere"
    )


@pytest.mark.parametrize(
    ("name", "changes", "part"),
    [
        ("llama_tied", {"tie_word_embeddings": True}, "also holds output_layer.weight"),
        ("qwen3_untied", {}, "lacks decoder.layers.self_attention.k_layernorm.weight"),
        ("llama_untied", {"num_hidden_layers": 2}, "config.json implies [2, "),
        ("llama_untied", {"vocab_size": 300}, "config.json implies [300, 64]"),
    ],
)
def test_a_checkpoint_of_another_model(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    changes: dict[str, object],
    part: str,
) -> None:
    shape = {"vocab_size": 130, "tie_word_embeddings": False, **changes}
    make_model(name, **shape).save_pretrained(tmp_path / "like")
    out = tmp_path / "out"
    line = refusal(
        capsys, "to-hf", f"{folder / 'megatron'}", f"{out}", "--like", f"{tmp_path / 'like'}"
    )
    assert part in line
    assert not out.exists()


def test_a_tensor_that_would_be_lost(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text((folder / "source" / "config.json").read_text())
    weights = load_file(folder / "source" / "model.safetensors")
    extra = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}
    save_file({**weights, **extra}, source / "model.safetensors")
    line = refusal(capsys, "to-megatron", f"{source}", f"{tmp_path / 'out'}")
    assert "q_proj.bias" in line
    weights.pop("model.norm.weight")
    save_file(weights, source / "model.safetensors")
    line = refusal(capsys, "to-megatron", f"{source}", f"{tmp_path / 'out'}")
    assert "lacks the tensor model.norm.weight" in line
    assert not (tmp_path / "out").exists()
