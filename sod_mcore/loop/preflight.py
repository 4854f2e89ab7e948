"""Everything that can be known to be wrong before anything expensive starts.

Each check raises :class:`ConfigError` with one line: the field, its value, what is allowed, the
mend. Rank 0 does them all; the other ranks only check the layout, which needs no file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from sod_mcore.algorithm.weighting import find_rule
from sod_mcore.chat import ChatRenderer
from sod_mcore.config import ConfigError, RewardConfig, SodConfig
from sod_mcore.data.overlap import OverlapError, assert_disjoint
from sod_mcore.data.parquet import DataError
from sod_mcore.data.prompts import question_text, read_prompts
from sod_mcore.loop.training_examples import make_objective
from sod_mcore.ops.extension import extension_for
from sod_mcore.report.metrics import require_wandb
from sod_mcore.rollout.services import make_verifiers
from sod_mcore.serving.client import EngineError
from sod_mcore.serving.fleet import Endpoints, FleetError, read_endpoints
from sod_mcore.serving.tensor_check import engine_shapes
from sod_mcore.serving.weight_transfer import WeightUpdateError
from sod_mcore.serving.weights import weight_versions
from sod_mcore.student.model_config import check_layout
from sod_mcore.tools.code_interpreter import code_interpreter_schema
from sod_mcore.trajectory import Prompt

REACHABLE_TIMEOUT_SECONDS = 10.0


def check_before_launch(config: SodConfig) -> None:
    """Find what is wrong with the run.

    Raises:
        ConfigError: one line, whatever it is.
    """
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
            check_prompt_lengths(config)
    except (DataError, EngineError, FleetError, OverlapError, WeightUpdateError) as error:
        raise ConfigError(str(error)) from error


def check_settings(config: SodConfig) -> None:
    """Combinations of settings that cannot work together."""
    algorithm, rollout = config.algorithm, config.rollout
    if algorithm.prompts_per_step % algorithm.prompts_per_mini_batch:
        raise ConfigError(
            f"algorithm.prompts_per_mini_batch is {algorithm.prompts_per_mini_batch}; it must "
            f"divide algorithm.prompts_per_step={algorithm.prompts_per_step}"
        )
    if rollout.temperature != 1.0:
        raise ConfigError(
            f"rollout.temperature is {rollout.temperature}; only 1.0 is allowed, since the teacher "
            "scores at temperature 1 and the trainer takes its ratio there; set it to 1.0"
        )
    uses_rollout_logprobs = algorithm.tis_cap is not None or algorithm.old_logprobs == "rollout"
    if uses_rollout_logprobs and rollout.top_p != 1.0:
        raise ConfigError(
            f"rollout.top_p is {rollout.top_p}; the engine's log-probs are those before the "
            "nucleus is cut, so with algorithm.tis_cap or algorithm.old_logprobs=rollout only 1.0 "
            "is allowed"
        )
    if config.run.replay is None and config.serving is None:
        raise ConfigError("serving is missing; configure the engines, or give run.replay")
    if config.run.replay is None and config.needs_teacher and not config.serving.teacher:  # type: ignore[union-attr]
        raise ConfigError(
            "serving.teacher is missing; configure it, or set algorithm.distillation=none and "
            "algorithm.topk.k=0"
        )
    find_rule(algorithm.weighting)
    _check_operations()
    try:
        make_objective(algorithm)
    except ValueError as error:
        raise ConfigError(f"algorithm: {error}") from error


def _check_operations() -> None:
    """Whether the operations on logits can run as SOD_OPS asks, where this rank trains."""
    try:
        extension_for(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(str(error)) from error


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
            f"data.train={config.data.train} has only {len(train)} prompts: lower it, together "
            "with algorithm.prompts_per_mini_batch, or add prompts"
        )
    held_out: list[Prompt] = []
    if config.evaluation.data is not None:
        held_out = read_prompts(Path(config.evaluation.data))
        assert_disjoint(
            {config.data.train: [question_text(p) for p in train]},
            [question_text(p) for p in held_out],
        )
    _check_verifiers([*train, *held_out], config.reward)


def check_engines(config: SodConfig) -> None:
    """Engines that answer, with room for the longest trajectory."""
    if config.run.replay is not None:
        return
    endpoints = live_endpoints(config)
    _check_served_models(endpoints, config)
    if config.serving is not None and config.serving.weight_sync == "tensor":
        engine_shapes(endpoints.model("student"))
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


def _check_served_models(endpoints: Endpoints, config: SodConfig) -> None:
    """The engines may have been started by another configuration."""
    assert config.serving is not None
    endpoints.model("student")
    teacher = config.serving.teacher
    if not config.needs_teacher or teacher is None:
        return
    served = endpoints.model("teacher")
    if Path(served.model_path).resolve() != Path(teacher.model_path).resolve():
        raise ConfigError(
            f"serving.teacher.model_path is {teacher.model_path}, but the running engines serve "
            f"{served.model_path}; start them again with this configuration"
        )


def _check_verifiers(prompts: Sequence[Prompt], config: RewardConfig) -> None:
    verifiers = make_verifiers(config)
    for source in sorted({prompt.data_source for prompt in prompts}):
        try:
            verifiers.for_source(source)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def check_prompt_lengths(config: SodConfig) -> None:
    """Prompts that are too long, measured as the rollout renders them, tool schemas included."""
    if config.run.replay is not None:
        return
    files = [config.data.train, *([config.evaluation.data] if config.evaluation.data else [])]
    prompts = [prompt for file in files for prompt in read_prompts(Path(file))]
    renderer = ChatRenderer.from_folder(
        config.student.model_path, enable_thinking=config.chat.enable_thinking
    )
    for prompt in prompts:
        length = len(renderer.render_prompt(prompt.messages, [code_interpreter_schema()]))
        if length > config.data.max_prompt_tokens:
            raise ConfigError(
                f"data.max_prompt_tokens is {config.data.max_prompt_tokens}; {prompt.prompt_id} "
                f"has {length} tokens with the tool schema: raise it, or remove that prompt"
            )


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
