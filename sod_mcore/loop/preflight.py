"""Everything that can be known to be wrong before anything expensive starts.

Each check raises :class:`ConfigError` with one line: the field, its value, what is allowed, the
mend. Rank 0 does them all; the other ranks only check the layout, which needs no file.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from sod_mcore.algorithm.weighting import find_rule
from sod_mcore.chat.template import ChatTemplateError
from sod_mcore.config import (
    HUB_PREFIX,
    AlgorithmConfig,
    ConfigError,
    SodConfig,
    serving_field,
)
from sod_mcore.data.errors import DataError
from sod_mcore.data.overlap import OverlapError
from sod_mcore.loop.run_prompts import (
    RunPrompts,
    prompt_renderer,
    read_run_prompts,
    within_length,
)
from sod_mcore.loop.teacher_checks import check_teacher_lengths, check_teacher_settings
from sod_mcore.loop.training_examples import make_objective
from sod_mcore.ops.extension import extension_for
from sod_mcore.report.metrics import require_wandb
from sod_mcore.rollout.open_pool import check_pool
from sod_mcore.rollout.teacher import teacher_model
from sod_mcore.serving.client.json_http import EngineError
from sod_mcore.serving.cuda_ipc import Trainer, check_cuda_ipc, check_readers
from sod_mcore.serving.endpoints import Endpoints, FleetError, read_endpoints
from sod_mcore.serving.fleet.ray_room import check_engines_on
from sod_mcore.serving.fleet.state import wait_for_restarts
from sod_mcore.serving.placement import check_engines_can_sleep, check_placement
from sod_mcore.serving.weights.tensor_check import engine_shapes
from sod_mcore.serving.weights.transfer import WeightUpdateError
from sod_mcore.serving.weights.update import weight_versions
from sod_mcore.student.model_config import check_layout
from sod_mcore.tools import choose_sandbox_url, tool_schemas
from sod_mcore.tools.packages import package_folders

REACHABLE_TIMEOUT_SECONDS = 10.0
USER_ERRORS = (
    *(ChatTemplateError, DataError, OverlapError),
    *(EngineError, FleetError, WeightUpdateError),
)
"""What the user can mend; the message says how."""


def check_before_launch(config: SodConfig) -> RunPrompts:
    """Find what is wrong with the run.

    Returns:
        the prompts, on rank 0 of a run that does not replay; else none.

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
        if os.environ.get("RANK", "0") != "0":
            return RunPrompts()
        check_files(config)
        if config.run.replay is not None:
            return RunPrompts()
        check_pool(config.rollout)
        prompts = read_run_prompts(config)
        endpoints = check_engines(config, prompts)
        prompts = within_length(config, prompts)
        check_teacher_lengths(
            config, endpoints, prompt_renderer(config), tool_schemas(config.tools), prompts.train
        )
    except USER_ERRORS as error:
        raise ConfigError(str(error)) from error
    return prompts


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
    if config.reward.overlong_buffer > rollout.max_response_tokens:
        raise ConfigError(
            f"reward.overlong_buffer is {config.reward.overlong_buffer}; it counts from the end of "
            f"rollout.max_response_tokens={rollout.max_response_tokens}: give at most that, or 0"
        )
    if config.run.replay is None and config.serving is None:
        raise ConfigError("serving is missing; configure the engines, or give run.replay")
    if config.serving is not None:
        check_engines_on(config.serving)
    _check_signal(algorithm)
    _check_importance(algorithm)
    _check_staleness(config)
    check_placement(config)
    check_cuda_ipc(config)
    check_teacher_settings(config)
    tool_schemas(config.tools)
    choose_sandbox_url(config.tools.sandbox_url)
    package_folders(config.tools.packages, "tools.packages")
    find_rule(algorithm.weighting)
    _check_operations()
    try:
        make_objective(algorithm)
    except ValueError as error:
        raise ConfigError(f"algorithm: {error}") from error


def _check_signal(algorithm: AlgorithmConfig) -> None:
    if algorithm.distillation == "topk_loss" and algorithm.topk.k == 0:
        raise ConfigError(
            "algorithm.distillation is topk_loss, but algorithm.topk.k is 0; give the number of "
            "the teacher's candidates a token, 16 for instance"
        )
    if algorithm.distillation == "none" and algorithm.topk.k > 0:
        raise ConfigError(
            f"algorithm.topk.k is {algorithm.topk.k}, but algorithm.distillation is none; set that "
            "to topk_loss, or topk.k to 0"
        )


def _check_importance(algorithm: AlgorithmConfig) -> None:
    """Importance weights scale advantages, by the ratio to what sampled."""
    if algorithm.tis_cap is None:
        return
    if algorithm.old_logprobs == "rollout":
        raise ConfigError(
            f"algorithm.tis_cap is {algorithm.tis_cap:g}, but algorithm.old_logprobs is rollout: "
            "the policy that it compares with is the one that sampled, so that nothing would be "
            "weighed; leave tis_cap out, or set old_logprobs=recompute"
        )
    if algorithm.grpo_coefficient == 0 and algorithm.distillation != "advantage":
        raise ConfigError(
            f"algorithm.tis_cap is {algorithm.tis_cap:g}, but it scales advantages, and with "
            f"grpo_coefficient=0 and distillation={algorithm.distillation} there are none; leave "
            "it out, or give one of them"
        )


def _check_staleness(config: SodConfig) -> None:
    """Sampling ahead needs a correction, and a teacher that stays the same meanwhile."""
    staleness, algorithm = config.rollout.max_staleness, config.algorithm
    if staleness == 0:
        return
    if algorithm.tis_cap is None and algorithm.old_logprobs != "rollout":
        raise ConfigError(
            f"rollout.max_staleness is {staleness}, but nothing corrects for weights that are "
            "older; set algorithm.tis_cap (2.0 is usual), or algorithm.old_logprobs=rollout"
        )
    if config.needs_teacher and config.teacher.weights != "served":
        raise ConfigError(
            f"rollout.max_staleness is {staleness}, but teacher.weights is "
            f"{config.teacher.weights}: the teacher would change while it scores; set "
            "teacher.weights=served, or rollout.max_staleness=0"
        )


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
    if config.tools.search_documents is not None:
        _check_file("tools.search_documents", config.tools.search_documents)
    for path in config.evaluation.data_files:
        _check_file("evaluation.data", path)
    models = config.serving.models if config.serving is not None else {}
    for name, engine in models.items():
        if name != "student":
            field_name = f"{serving_field(name)}.model_path"
            _check_model_folder(field_name, Path(engine.model_path))
            _check_same_tokenizer(student, field_name, Path(engine.model_path))


def check_engines(config: SodConfig, prompts: RunPrompts) -> Endpoints:
    """Engines that answer, with room for the longest trajectory."""
    endpoints = live_endpoints(config)
    _check_served_models(endpoints, config, prompts)
    check_engines_can_sleep(config, endpoints, REACHABLE_TIMEOUT_SECONDS)
    if config.serving is not None and config.serving.weight_sync != "disk":
        engine_shapes(endpoints.model("student"))
        trainer = Trainer(torch.__version__, torch.cuda.is_available())
        check_readers(config, endpoints, trainer)
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    for name, model in endpoints.models.items():
        if model.longest_input < longest:
            raise ConfigError(
                f"data.max_prompt_tokens + rollout.max_response_tokens is {longest}; the engine of "
                f"{name} takes {model.longest_input} tokens: lower them, or raise "
                f"{serving_field(name)}.context_length"
            )
    return endpoints


def live_endpoints(config: SodConfig) -> Endpoints:
    """The running fleet; an engine that is being started again is waited for.

    Raises:
        FleetError: it was not started, or an engine is not ready again in time.
        EngineError: an engine does not answer.
    """
    assert config.serving is not None
    endpoints = read_endpoints(config.serving_directory)
    # Not so long that the other ranks give up meeting this one.
    patience = config.serving.restart_timeout_seconds, config.run.collective_timeout_seconds / 2
    wait_for_restarts(config.serving_directory, min(patience))
    for name in endpoints.models:
        weight_versions(endpoints, name, REACHABLE_TIMEOUT_SECONDS)
    return endpoints


def _check_served_models(endpoints: Endpoints, config: SodConfig, prompts: RunPrompts) -> None:
    """The engines may have been started by another configuration."""
    assert config.serving is not None
    endpoints.model("student")
    asked = {teacher_model(config.teacher, prompt.data_source) for prompt in prompts.train}
    for name in sorted(asked - {"student"}) if config.needs_teacher else ():
        _check_unchanged(endpoints, config, name)
        configured, served = config.serving.models[name], endpoints.model(name)
        if Path(served.model_path).resolve() != Path(configured.model_path).resolve():
            raise ConfigError(
                f"{serving_field(name)}.model_path is {configured.model_path}, but the running "
                f"engines serve {served.model_path}; start them again with this configuration"
            )


def _check_unchanged(endpoints: Endpoints, config: SodConfig, name: str) -> None:
    """A teacher's weights change only where it is the student's average."""
    if config.averages_weights:
        return
    newest = max(weight_versions(endpoints, name, REACHABLE_TIMEOUT_SECONDS))
    if newest > 0:
        raise ConfigError(
            f"the engines of {name} hold weight version {newest}, an average that another run left "
            f"there, and not {endpoints.model(name).model_path}; start the engines again"
        )


def _check_file(field_name: str, path: str) -> None:
    if not path.startswith(HUB_PREFIX) and not Path(path).is_file():
        raise ConfigError(f"{field_name} is {path}: no such file; create it or correct the path")


def _check_model_folder(field_name: str, folder: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ConfigError(
                f"{field_name} is {folder}: it has no {name}; give a Hugging Face model folder"
            )


def _check_same_tokenizer(student: Path, field_name: str, teacher: Path) -> None:
    if _vocabulary_hash(student) != _vocabulary_hash(teacher):
        raise ConfigError(
            f"{field_name} is {teacher}: its tokenizer differs from that of "
            f"student.model_path={student}; distillation compares token by token, so both must "
            "have the same ids and special tokens"
        )


def _vocabulary_hash(folder: Path) -> str:
    """Hash of the id of every token, added and special ones included, and of the merges."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    parts = [tokenizer["model"], tokenizer.get("added_tokens"), tokenizer.get("pre_tokenizer")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
