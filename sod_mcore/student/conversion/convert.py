"""Conversion of whole models between a Hugging Face folder and a Megatron checkpoint.

Every rank holds its own part of the model and nothing else: it reads its slices of the one side and
writes or sends them to the other. Hugging Face folders are written by rank 0 in buckets.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel

from sod_mcore.config import ConfigError, StudentConfig
from sod_mcore.files import make_empty, replace_folder, temporary_folder
from sod_mcore.student.architecture import Architecture, read_architecture
from sod_mcore.student.conversion.export import iterate_hf_tensors
from sod_mcore.student.conversion.families import all_hf_names
from sod_mcore.student.conversion.load import SafetensorsFolder, load_hf_weights
from sod_mcore.student.conversion.megatron_checkpoint import (
    RELEASE,
    TRACKER,
    read_weights,
    stored_dtype,
    write_weights,
)
from sod_mcore.student.conversion.save import save_hf_folder
from sod_mcore.student.exchange import agree_on_problem, wait_for_all
from sod_mcore.student.model import build_gpt_model
from sod_mcore.student.model_config import transformer_config
from sod_mcore.student.parallel_state import ParallelLayout

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes of weights by the names that safetensors gives them."""


def hf_to_megatron(
    source: Path, destination: Path, layout: ParallelLayout, *, dtype: torch.dtype | None = None
) -> None:
    """Write ``destination`` as Megatron-LM's ``--load`` wants it; collective over all ranks.

    Args:
        source: Hugging Face folder.
        destination: a folder that all ranks see; an existing one is replaced.
        dtype: dtype of the checkpoint; None keeps that of ``source``.

    Raises:
        ConfigError: the weights do not fit ``config.json``.
    """
    architecture = read_architecture(source, field="source")
    stored = _dtype_of_weights(source, architecture)
    if dtype is None and stored is None:
        raise ConfigError(
            f"{source} holds weights of several dtypes or of a rare one; give --dtype"
        )
    model = build_bare_model(source, architecture, layout, dtype or stored)
    problem = None
    try:
        load_hf_weights(model, architecture, layout, source)
    except ConfigError as error:  # a rank looks only at its own tensors
        problem = str(error)
    agree_on_problem(problem)
    temporary = temporary_folder(destination)
    is_first = layout.rank == 0
    try:
        if is_first:
            make_empty(temporary / RELEASE)
        wait_for_all(layout.world_group)
        write_weights(model, architecture, temporary / RELEASE)
        if is_first:
            (temporary / TRACKER).write_text(RELEASE + "\n")
            replace_folder(temporary, destination)
        wait_for_all(layout.world_group)
    finally:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)


def megatron_to_hf(
    checkpoint: Path,
    like: Path,
    destination: Path,
    layout: ParallelLayout,
    *,
    bucket_bytes: int,
    dtype: torch.dtype | None = None,
) -> None:
    """Write ``destination`` as a Hugging Face folder; collective over all ranks.

    Args:
        checkpoint: a torch_dist folder, from :func:`find_checkpoint`.
        like: Hugging Face folder whose configuration, tokenizer and chat template are copied.
        destination: an existing folder is replaced.
        bucket_bytes: largest size of a weights file, unless one parameter is larger.
        dtype: dtype of the written weights; None keeps that of the checkpoint.

    Raises:
        ConfigError: the checkpoint does not fit ``config.json`` of ``like``.
    """
    architecture = read_architecture(like, field="like")
    model = build_bare_model(like, architecture, layout, stored_dtype(checkpoint))
    read_weights(model, architecture, checkpoint)
    buckets = iterate_hf_tensors(model, architecture, layout, bucket_bytes)
    if layout.rank == 0:
        save_hf_folder(buckets, like, destination, dtype=dtype)
    else:
        for _ in buckets:
            pass
    wait_for_all(layout.world_group)


def _dtype_of_weights(source: Path, architecture: Architecture) -> torch.dtype | None:
    """The one dtype of a Hugging Face folder's weights; None if there are several or another one.

    Raises:
        ConfigError: the folder holds tensors that the family does not have.
    """
    with ExitStack() as stack:
        stored = SafetensorsFolder(source, stack).dtypes()
    known = all_hf_names(architecture)
    for name in stored.keys() - known:
        is_copy = architecture.tie_word_embeddings and name == "lm_head.weight"
        if not is_copy and not name.endswith("rotary_emb.inv_freq"):
            raise ConfigError(
                f"{source} holds {name}, which {architecture.name} with this config.json does not "
                "have; converting would lose it"
            )
    names = {stored[name] for name in known & stored.keys()}
    return DTYPES.get(names.pop()) if len(names) == 1 else None


def build_bare_model(
    folder: Path, architecture: Architecture, layout: ParallelLayout, dtype: torch.dtype | None
) -> GPTModel:
    """This rank's part of the model, with parameters in ``dtype`` and no gradients; not set yet."""
    sizes = {
        "tensor_model_parallel_size": layout.tensor_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_parallel_size,
    }
    student = StudentConfig(
        model_path=str(folder),
        precision="fp32",
        megatron={**sizes, "params_dtype": dtype, "pipeline_dtype": dtype},
    )
    model = build_gpt_model(transformer_config(student, architecture), architecture, layout)
    return model.requires_grad_(False)
