"""What can be known to be wrong with an evaluation before any engine starts, and what its samples
depend on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sod_mcore.chat import ChatRenderer
from sod_mcore.config import ConfigError, EvalConfig
from sod_mcore.data import split_by_length
from sod_mcore.evaluation.data_sets import DataSet
from sod_mcore.report import require_wandb
from sod_mcore.rollout.judge import check_verifiers
from sod_mcore.rollout.open_pool import check_pool
from sod_mcore.serving.endpoints import RESERVED_TOKENS
from sod_mcore.serving.fleet.model_folder import read_model_folder
from sod_mcore.tools import tool_schemas

MODEL_FILES = ("config.json", "tokenizer.json")
TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json")
_IDENTIFYING_FILES = ("*.safetensors", "*.bin", *MODEL_FILES, *TEMPLATE_FILES)
_FINGERPRINT_BYTES = 1 << 20
_WITHOUT_EFFECT = {
    "rollout": {
        *("temperature", "top_p", "concurrency", "attempts", "deadline_seconds"),
        *("max_dropped_fraction", "max_unscored_fraction"),
        *("pool", "ray_address", "ray_actors", "ray_actor_cpus"),
    },
    "tools": {"workers", "sandbox_url", "total_memory_mb"},
    "reward": {"workers", "code_workers"},
}
"""Fields of sections that change when a sample is there, and not what it is."""


def check_settings(config: EvalConfig) -> None:
    """Combinations that cannot work, and folders that are not there.

    Raises:
        ConfigError: one line, whatever it is.
    """
    benchmark = config.evaluation
    if benchmark.temperature == 0 and benchmark.samples > 1:
        raise ConfigError(
            f"evaluation.samples is {benchmark.samples} at evaluation.temperature=0, where all "
            "samples are alike; set evaluation.samples=1, or a temperature above 0"
        )
    if benchmark.temperature == 0 and len(benchmark.seeds) > 1:
        raise ConfigError(
            f"evaluation.seeds is {list(benchmark.seeds)} at evaluation.temperature=0, where "
            "repetitions are alike; give one, or a temperature above 0"
        )
    if benchmark.show_tests and benchmark.instructions == "none":
        raise ConfigError(
            "evaluation.show_tests is true, but evaluation.instructions is none, which leaves "
            "every question as it is; set one of them back"
        )
    if len(set(benchmark.seeds)) != len(benchmark.seeds) or not benchmark.seeds:
        raise ConfigError(
            f"evaluation.seeds is {list(benchmark.seeds)}; give at least one, and each once"
        )
    for name in ("temperature", "top_p"):
        if getattr(config.rollout, name) != 1.0:
            raise ConfigError(
                f"rollout.{name} is {getattr(config.rollout, name)}, which is training's; "
                f"evaluation samples with evaluation.{name}: set that, and leave this out"
            )
    require_wandb(config.report)
    check_pool(config.rollout)
    _check_one_ray(config)
    _check_model(config)


def _check_one_ray(config: EvalConfig) -> None:
    rollout, serving = config.rollout, config.serving
    are_both = rollout.pool == "ray" and serving.engines_on == "ray"
    if are_both and rollout.ray_address != serving.ray_address:
        raise ConfigError(
            f"rollout.ray_address is {rollout.ray_address}, but serving.ray_address is "
            f"{serving.ray_address}: an evaluation is one process, which can use one Ray; give "
            "the same in both"
        )


def check_prompts(config: EvalConfig, data_sets: Sequence[DataSet]) -> None:
    """Verifiers of every source, and the length of every prompt as the rollout renders it.

    Raises:
        ConfigError: one line, whatever it is.
    """
    prompts = [prompt for data_set in data_sets for prompt in data_set.prompts]
    check_verifiers(config.reward, prompts)
    renderer = ChatRenderer.from_folder(
        config.serving.student.model_path, enable_thinking=config.chat.enable_thinking
    )
    longest = config.evaluation.max_prompt_tokens
    _, too_long = split_by_length(prompts, renderer, tool_schemas(config.tools), longest)
    if too_long:
        prompt, length = too_long[0]
        raise ConfigError(
            f"evaluation.max_prompt_tokens is {longest}; {prompt.prompt_id} has {length} tokens "
            f"with the tool schemas, and {len(too_long)} problems are too long: raise it, or "
            "remove them"
        )


def check_context_length(config: EvalConfig, context_length: int) -> None:
    """Whether the longest conversation fits into the engine.

    Raises:
        ConfigError: it does not.
    """
    longest = config.evaluation.max_prompt_tokens + config.rollout.max_response_tokens
    room = context_length - RESERVED_TOKENS
    if room < longest:
        raise ConfigError(
            f"evaluation.max_prompt_tokens + rollout.max_response_tokens is {longest}; an engine "
            f"of {context_length} tokens takes {room}: lower them, or raise "
            "serving.student.context_length if the model was made for more"
        )


def sample_settings(config: EvalConfig, data_sets: Sequence[DataSet]) -> dict[str, Any]:
    """All that decides what a sample is, by dotted name; equal settings may share a folder."""
    benchmark = config.evaluation
    model = Path(config.serving.student.model_path)
    settings: dict[str, Any] = {
        "serving.student.model_path": str(model.resolve()),
        "fingerprint of serving.student.model_path": _fingerprint(model),
        "serving.student.dtype": config.serving.student.dtype,
        "serving.student.extra_args": config.serving.student.extra_args,
        **{
            f"evaluation.{name}": getattr(benchmark, name)
            for name in ("temperature", "top_p", "instructions", "show_tests")
        },
        "chat.enable_thinking": config.chat.enable_thinking,
    }
    for section, without_effect in _WITHOUT_EFFECT.items():
        fields: Mapping[str, Any] = dataclasses.asdict(getattr(config, section))
        settings |= {
            f"{section}.{name}": value
            for name, value in fields.items()
            if name not in without_effect
        }
    return settings | {f"fingerprint of {d.name} in evaluation.data": d.digest for d in data_sets}


def _check_model(config: EvalConfig) -> None:
    field, engine = "serving.student.model_path", config.serving.student
    folder = Path(engine.model_path)
    for name in MODEL_FILES:
        if not (folder / name).is_file():
            raise ConfigError(
                f"{field} is {folder}: it has no {name}; give a Hugging Face model folder"
            )
    model = read_model_folder(field, folder)
    if not engine.addresses:
        check_context_length(config, engine.context_length or model.context_length)


def _fingerprint(folder: Path) -> str:
    """Hash of name, size and last megabyte of each file that makes the model."""
    digest = hashlib.sha256()
    files = sorted({file for pattern in _IDENTIFYING_FILES for file in folder.glob(pattern)})
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            content.seek(max(0, size - _FINGERPRINT_BYTES))
            digest.update(content.read())
    return digest.hexdigest()
