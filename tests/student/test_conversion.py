"""Slicing and writing of Hugging Face tensors, without any model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sod_mcore.student.architecture import Architecture
from sod_mcore.student.conversion.layouts import (
    GateAndUp,
    Layout,
    QueryKeyValue,
    Replicated,
    SplitColumns,
    Vocabulary,
)
from sod_mcore.student.conversion.save import save_hf_folder

ARCHITECTURE = Architecture(
    name="Qwen3ForCausalLM",
    num_layers=1,
    hidden_size=6,
    ffn_hidden_size=8,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=3,
    vocab_size=130,
    max_position_embeddings=16,
    layernorm_epsilon=1e-6,
    rotary_base=1e6,
    tie_word_embeddings=True,
    qk_layernorm=True,
    add_qkv_bias=False,
)
LAYOUTS: tuple[Layout, ...] = (
    Replicated("hidden_size"),
    Vocabulary(),
    SplitColumns("num_attention_heads", "kv_channels"),
    GateAndUp(),
    QueryKeyValue(),
    QueryKeyValue(is_bias=True),
)


def numbered(layout: Layout) -> list[torch.Tensor]:
    """Hugging Face tensors in which every entry differs."""
    tensors, start = [], 0
    for shape in layout.shapes(ARCHITECTURE):
        count = torch.Size(shape).numel()
        tensors.append(torch.arange(start, start + count).reshape(shape))
        start += count
    return tensors


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: type(layout).__name__)
def test_shards_merge_to_what_they_were_cut_from(layout: Layout, size: int) -> None:
    tensors = numbered(layout)
    shards = [layout.shard(tensors, ARCHITECTURE, rank, size) for rank in range(size)]
    assert len({shard.shape for shard in shards}) == 1
    for ours, theirs in zip(layout.merge(shards, ARCHITECTURE), tensors, strict=True):
        assert torch.equal(ours, theirs)


def test_padding_rows_are_zero_and_may_fill_a_whole_shard() -> None:
    small = dataclasses.replace(ARCHITECTURE, vocab_size=100)
    weight = torch.ones(100, 6)
    shards = [Vocabulary().shard([weight], small, rank, 2) for rank in range(2)]
    assert [shard.shape for shard in shards] == [(128, 6), (128, 6)]
    assert shards[0].sum() == 600
    assert not shards[1].any()


def test_query_key_value_rows_are_interleaved_by_group() -> None:
    query, key, value = numbered(QueryKeyValue())
    second_of_four = QueryKeyValue().shard([query, key, value], ARCHITECTURE, 1, 4)
    assert torch.equal(second_of_four[:6], query[6:12])  # two heads of width 3
    assert torch.equal(second_of_four[6:9], key[3:6])
    assert torch.equal(second_of_four[9:], value[3:6])


def write_source(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"dtype": "float32", "vocab_size": 3}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "model.safetensors").write_bytes(b"old weights")
    return folder


def test_buckets_become_files_with_an_index(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    target = tmp_path / "target"
    first, second = torch.randn(3, 2), torch.randn(5)
    save_hf_folder([[("a", first)], [], [("b", second)]], source, target, dtype=torch.bfloat16)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
    }
    assert index["metadata"]["total_size"] == 2 * 11
    loaded = load_file(target / "model-00002-of-00002.safetensors")
    assert torch.equal(loaded["b"], second.bfloat16())
    assert json.loads((target / "config.json").read_text()) == {
        "dtype": "bfloat16",
        "vocab_size": 3,
    }
    assert (target / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (target / "model.safetensors").exists()


def test_a_folder_is_replaced_only_when_the_new_one_is_complete(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    target = tmp_path / "target"
    save_hf_folder([[("a", torch.zeros(2))]], source, target)

    def fails_half_way():  # type: ignore[no-untyped-def]
        yield [("a", torch.ones(2))]
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        save_hf_folder(fails_half_way(), source, target)
    assert torch.equal(load_file(target / "model.safetensors")["a"], torch.zeros(2))
    save_hf_folder([[("a", torch.ones(2))]], source, target)
    assert torch.equal(load_file(target / "model.safetensors")["a"], torch.ones(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
