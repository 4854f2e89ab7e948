"""Everything that can be known to be wrong before anything expensive starts.

Each check raises :class:`ConfigError` with one line: the field, its value, what is allowed, the
mend. Rank 0 does them all; the other ranks only check the layout, which needs no file.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from sod_mcore.config import ConfigError, SodConfig
from sod_mcore.data.overlap import OverlapError, assert_disjoint
from sod_mcore.data.parquet import DataError
from sod_mcore.data.prompts import question_text, read_prompts
from sod_mcore.loop.training_examples import make_objective
from sod_mcore.report.metrics import require_wandb
from sod_mcore.serving.client import EngineError
from sod_mcore.serving.fleet import Endpoints, FleetError, read_endpoints
from sod_mcore.serving.weights import weight_versions
from sod_mcore.student.model_config import check_layout

REACHABLE_TIMEOUT_SECONDS = 10.0


def check_before_launch(config: SodConfig) -> str | None:
    """Return what is wrong with the run as one line, or None."""
    try:
        check_layout(
            config.student,
            int(os.environ.get("WORLD_SIZE", "1")),
            optimizer=config.optimizer,
            ddp=config.ddp,
        )
        check_settings(config)
        require_wandb(config.report)
        if os.environ.get("RANK", "0") == "0":
            check_files(config)
            check_data(config)
            check_engines(config)
    except (ConfigError, DataError, EngineError, FleetError, OverlapError) as error:
        return str(error)
    return None


def check_settings(config: SodConfig) -> None:
    """Combinations of settings that cannot work together."""
    algorithm, rollout = config.algorithm, config.rollout
    if algorithm.prompts_per_step % algorithm.prompts_per_mini_batch:
        raise ConfigError(
            f"algorithm.prompts_per_mini_batch is {algorithm.prompts_per_mini_batch}; it must "
            f"divide algorithm.prompts_per_step={algorithm.prompts_per_step}"
        )
    if config.needs_teacher and rollout.temperature != 1.0:
        raise ConfigError(
            f"rollout.temperature is {rollout.temperature}; with a teacher only 1.0 is allowed, "
            "since engines score inputs at temperature 1 (set it to 1.0, or "
            "algorithm.distillation=none and algorithm.topk.k=0)"
        )
    if config.run.replay is None and config.serving is None:
        raise ConfigError("serving is missing; configure the engines, or give run.replay")
    if config.run.replay is None and config.needs_teacher and not config.serving.teacher:  # type: ignore[union-attr]
        raise ConfigError(
            "serving.teacher is missing; configure it, or set algorithm.distillation=none and "
            "algorithm.topk.k=0"
        )
    try:
        make_objective(algorithm)
    except ValueError as error:
        raise ConfigError(f"algorithm: {error}") from error


def check_files(config: SodConfig) -> None:
    """Folders and files that must exist, and the tokenizers that must agree."""
    student = Path(config.student.model_path)
    _check_model_folder("student.model_path", student)
    if config.run.replay is not None:
        if not Path(config.run.replay).exists():
            raise ConfigError(
                f"run.replay is {config.run.replay}: no such file or folder; record one with "
                "--record DIR"
            )
        return
    _check_file("data.train", config.data.train)
    if config.evaluation.data is not None:
        _check_file("evaluation.data", config.evaluation.data)
    teacher = config.serving.teacher if config.serving is not None else None
    if teacher is not None:
        _check_model_folder("serving.teacher.model_path", Path(teacher.model_path))
        _check_same_tokenizer(student, Path(teacher.model_path))


def check_data(config: SodConfig) -> None:
    """Rows that do not parse, and questions shared between training and evaluation."""
    if config.run.replay is not None:
        return
    train = read_prompts(Path(config.data.train))
    if len(train) < config.algorithm.prompts_per_step:
        raise ConfigError(
            f"algorithm.prompts_per_step is {config.algorithm.prompts_per_step}; "
            f"data.train={config.data.train} has only {len(train)} prompts"
        )
    if config.evaluation.data is not None:
        held_out = read_prompts(Path(config.evaluation.data))
        assert_disjoint(
            {config.data.train: [question_text(p) for p in train]},
            [question_text(p) for p in held_out],
        )


def check_engines(config: SodConfig) -> None:
    """Engines that answer, with room for the longest trajectory."""
    if config.run.replay is not None:
        return
    endpoints = live_endpoints(config)
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    for name, model in endpoints.models.items():
        if model.context_length < longest:
            raise ConfigError(
                f"data.max_prompt_tokens + rollout.max_response_tokens is {longest}; the engine of "
                f"{name} takes {model.context_length} tokens: lower them, or raise "
                f"serving.{name}.context_length"
            )


def live_endpoints(config: SodConfig) -> Endpoints:
    """The running fleet.

    Raises:
        FleetError: it was not started.
        EngineError: an engine does not answer.
    """
    endpoints = read_endpoints(config.serving_directory)
    for name in endpoints.models:
        weight_versions(endpoints, name, REACHABLE_TIMEOUT_SECONDS)
    return endpoints


def _check_file(field_name: str, path: str) -> None:
    if not Path(path).is_file():
        raise ConfigError(f"{field_name} is {path}: no such file; create it or correct the path")


def _check_model_folder(field_name: str, folder: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ConfigError(
                f"{field_name} is {folder}: it has no {name}; give a Hugging Face model folder"
            )


def _check_same_tokenizer(student: Path, teacher: Path) -> None:
    if _vocabulary_hash(student) != _vocabulary_hash(teacher):
        raise ConfigError(
            f"serving.teacher.model_path is {teacher}: its tokenizer differs from that of "
            f"student.model_path={student}; distillation compares token by token, so both must "
            "have the same ids and special tokens"
        )


def _vocabulary_hash(folder: Path) -> str:
    """Hash of the id of every token, added and special ones included, and of the merges."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    parts = [tokenizer["model"], tokenizer.get("added_tokens"), tokenizer.get("pre_tokenizer")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
