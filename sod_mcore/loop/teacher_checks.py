"""What can be known to be wrong about the teachers before anything expensive starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sod_mcore.chat import ChatRenderer
from sod_mcore.config import ConfigError, ServingConfig, SodConfig, TeacherConfig, serving_field
from sod_mcore.rollout.teacher import teacher_messages, teacher_model
from sod_mcore.serving.endpoints import Endpoints
from sod_mcore.trajectory import Prompt


def check_teacher_settings(config: SodConfig) -> None:
    """Combinations of settings that cannot work together.

    Raises:
        ConfigError: one line, whatever it is.
    """
    teacher, serving = config.teacher, config.serving
    if config.run.replay is not None or serving is None:
        return
    if not config.needs_teacher:
        _check_nobody_is_told(teacher)
        return
    _check_privileged_text(teacher)
    if teacher.weights == "live":
        _check_live(teacher, serving)
        return
    _check_used(teacher, serving)
    if serving.teacher is None and not teacher.by_source:
        raise ConfigError(
            "serving.teacher is missing; configure it, or set algorithm.distillation=none"
        )
    for prefix, name in teacher.by_source.items():
        if name not in serving.models or name == "student":
            known = ", ".join(sorted(serving.models.keys() - {"student"})) or "none"
            raise ConfigError(
                f"teacher.by_source.{prefix} is {name!r}, which is no teacher; teachers in "
                f"serving: {known}. Add it under serving.teachers, or name one of these"
            )
    if teacher.weights == "average":
        _check_average(config, serving)


def check_teacher_prompts(config: SodConfig, prompts: Iterable[Prompt]) -> None:
    """Rows that no teacher can score.

    Raises:
        ConfigError: a source has no teacher, or a row lacks what the teacher is to be told.
    """
    if not config.needs_teacher or config.serving is None:
        return
    served = config.serving.models
    prompts = tuple(prompts)
    sources = {prompt.data_source for prompt in prompts}
    for prefix in config.teacher.by_source:
        if not any(source.startswith(prefix) for source in sources):
            raise ConfigError(
                f"teacher.by_source.{prefix}: no training prompt has a data_source that begins so; "
                f"there are: {', '.join(sorted(sources))}"
            )
    for prompt in prompts:
        name = teacher_model(config.teacher, prompt.data_source)
        if name not in served:
            raise ConfigError(
                f"data_source {prompt.data_source!r} of {prompt.prompt_id} has no teacher; add a "
                "prefix of it to teacher.by_source, or configure serving.teacher for all others"
            )
        try:
            teacher_messages(config.teacher, prompt)
        except ValueError as error:
            raise ConfigError(str(error)) from error


def check_teacher_lengths(
    config: SodConfig,
    endpoints: Endpoints,
    renderer: ChatRenderer,
    tool_schemas: Sequence[dict[str, Any]],
    prompts: Iterable[Prompt],
) -> None:
    """Prompts of the teacher's that leave no room for the longest response.

    Raises:
        ConfigError: names the prompt and both lengths.
    """
    if not config.needs_teacher or config.teacher.privileged == "none":
        return
    for prompt in prompts:
        model = endpoints.model(teacher_model(config.teacher, prompt.data_source))
        room = model.longest_input - config.rollout.max_response_tokens
        length = len(renderer.render_prompt(teacher_messages(config.teacher, prompt), tool_schemas))
        if length > room:
            raise ConfigError(
                f"{serving_field(model.name)}.context_length is {model.context_length}; with what "
                f"the teacher is told, {prompt.prompt_id} has {length} tokens, and "
                f"rollout.max_response_tokens={config.rollout.max_response_tokens} leaves {room}: "
                "raise it, lower teacher.privileged_max_characters, or remove that prompt"
            )


def _check_nobody_is_told(teacher: TeacherConfig) -> None:
    if teacher.weights != "served" or teacher.privileged != "none":
        raise ConfigError(
            f"teacher.weights is {teacher.weights} and teacher.privileged {teacher.privileged}, "
            "but algorithm.distillation is none, so no teacher is asked; leave the section out, or "
            "choose a distillation"
        )


def _check_used(teacher: TeacherConfig, serving: ServingConfig) -> None:
    """Engines that nobody would ask."""
    named = set(teacher.by_source.values())
    idle = sorted(serving.teachers.keys() - named)
    if idle:
        raise ConfigError(
            f"serving.teachers.{idle[0]} is served, but teacher.by_source names it for no source; "
            "name it there, or remove it"
        )


def _check_privileged_text(teacher: TeacherConfig) -> None:
    text, kind = teacher.privileged_text, teacher.privileged
    if text is None:
        return
    if kind == "none":
        raise ConfigError(
            f"teacher.privileged_text is {text!r}, but teacher.privileged is none; set that to "
            "ground_truth or hint, or leave the text out"
        )
    if f"{{{kind}}}" not in text:
        raise ConfigError(
            f"teacher.privileged_text is {text!r}; it must hold {{{kind}}}, where the privileged "
            "text goes"
        )


def _check_live(teacher: TeacherConfig, serving: ServingConfig) -> None:
    if teacher.privileged == "none":
        raise ConfigError(
            "teacher.weights is live, but teacher.privileged is none: the student would be its "
            "own teacher and learn nothing; set teacher.privileged=ground_truth or hint"
        )
    if teacher.by_source:
        raise ConfigError(
            f"teacher.by_source is {dict(teacher.by_source)}, but teacher.weights is live: the "
            "student's own engines score every source; remove it, or set teacher.weights=served"
        )
    idle = sorted(serving.models.keys() - {"student"})
    if idle:
        raise ConfigError(
            f"teacher.weights is live, but {serving_field(idle[0])} is configured, whose engines "
            f"would idle; set {serving_field(idle[0])}=null, or remove it"
        )


def _check_average(config: SodConfig, serving: ServingConfig) -> None:
    if serving.teacher is None or config.teacher.by_source:
        raise ConfigError(
            "teacher.weights is average: that is one teacher, whose engines are those of "
            "serving.teacher; configure it and leave teacher.by_source out"
        )
    path = Path(serving.teacher.model_path)
    if path.resolve() != Path(config.student.model_path).resolve():
        raise ConfigError(
            f"serving.teacher.model_path is {path}; with teacher.weights=average its engines hold "
            f"the student's weights: give student.model_path={config.student.model_path}"
        )
