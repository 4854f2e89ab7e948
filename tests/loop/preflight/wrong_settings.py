"""What the tests of the preflight share: files of a run, and what is wrong with its settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from sod_mcore.config import ConfigError, SodConfig
from sod_mcore.loop.preflight import check_before_launch

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def model_folder(path: Path, tokens: list[str]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(QWEN3))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


def prompts(path: Path, questions: list[str], data_source: str = "reasoning_gym") -> Path:
    rows = [
        {
            "data_source": data_source,
            "prompt": [{"role": "user", "content": question}],
            "ability": "math",
            "reward_model": {"ground_truth": "4", "style": "rule"},
            "extra_info": {
                "index": i,
                "dataset": "chain_sum",
                "entry": json.dumps({"question": question, "answer": "4", "metadata": {}}),
            },
        }
        for i, question in enumerate(questions)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def problem(tree: dict[str, Any], **changes: Any) -> str:
    """What is wrong with ``tree`` after changes like ``run__steps=3``."""
    for name, value in changes.items():
        *parents, last = name.split("__")
        node = tree
        for parent in parents:
            node = node[parent]
        node[last] = value
    with pytest.raises(ConfigError) as found:
        check_before_launch(TypeAdapter(SodConfig).validate_python(tree))
    assert "\n" not in str(found.value)
    return str(found.value)
