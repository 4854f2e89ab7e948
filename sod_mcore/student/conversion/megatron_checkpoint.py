"""Weights in Megatron-LM's distributed checkpoints (torch_dist), of any layout.

Written as a ``release`` checkpoint: Megatron-LM's ``--load`` takes its weights, starts at iteration
0 and looks for no optimizer. The keys are those of Megatron's own models, whichever layer
specification they were built with; a padded vocabulary is cut or filled when it is read.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel

from sod_mcore.config import ConfigError
from sod_mcore.student.architecture import Architecture
from sod_mcore.student.exchange import agree_on_problem
from sod_mcore.student.model import load_parameters, sharded_parameters
from sod_mcore.student.model_config import padded_vocab_size

TRACKER = "latest_checkpointed_iteration.txt"
"""Tells Megatron-LM which of its folders to load."""
RELEASE = "release"
_EMBEDDING = "embedding.word_embeddings.weight"
_WEIGHTS = ("embedding.", "decoder.", "output_layer.")


def write_weights(model: GPTModel, architecture: Architecture, folder: Path) -> None:
    """Write the content of a ``release`` folder; collective over all ranks.

    Args:
        folder: exists, is empty, and is seen by all ranks.
    """
    config = model.config
    state = {
        "model": model.sharded_state_dict(metadata=_sharding_metadata({})),
        "args": _megatron_arguments(architecture, config.tensor_model_parallel_size),
        # Megatron reorders queries, keys and values of anything that it takes to be older.
        "checkpoint_version": 3.0,
        "iteration": 0,
    }
    # What Megatron-LM 0.19.2 itself writes; it builds the state to be loaded after this.
    content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    dist_checkpointing.save(state, str(folder), content_metadata=content)


def read_weights(model: GPTModel, architecture: Architecture, folder: Path) -> None:
    """Set this rank's parameters from a checkpoint of any layout; collective over all ranks.

    Raises:
        ConfigError: the checkpoint holds other parameters or shapes than the model.
    """
    content = dist_checkpointing.load_content_metadata(str(folder)) or {}
    state = sharded_parameters(model, _sharding_metadata(content))
    agree_on_problem(_first_difference(state, architecture, folder))
    loaded = dist_checkpointing.load({"model": state}, str(folder))
    load_parameters(model, loaded["model"])


def stored_dtype(folder: Path) -> torch.dtype:
    """Dtype of a checkpoint's weights.

    Raises:
        ConfigError: it holds no embedding.
    """
    stored = dist_checkpointing.load_tensors_metadata(str(folder))
    if _EMBEDDING not in stored:
        raise ConfigError(f"{folder} holds no {_EMBEDDING}; give a checkpoint of a whole GPTModel")
    dtype: torch.dtype = stored[_EMBEDDING].dtype
    return dtype


def find_checkpoint(path: Path) -> Path:
    """The torch_dist folder that ``path`` is or that its tracker file names.

    Args:
        path: a torch_dist folder, what was given to Megatron-LM as ``--save``, or the
            ``checkpoints`` folder of a run of this package.

    Raises:
        ConfigError: there is none.
    """
    if not path.is_dir():
        raise ConfigError(f"CHECKPOINT is {path}: no such folder; correct the path")
    if (path / TRACKER).is_file():
        name = (path / TRACKER).read_text().strip()
        folder = path / (name if name == RELEASE else f"iter_{int(name):07d}")
    elif (path / "latest").is_file():
        folder = path / (path / "latest").read_text().strip()
    else:
        folder = path
    if dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
        return folder
    raise ConfigError(
        f"{folder} is not a torch_dist checkpoint (it lacks metadata.json); give a folder that "
        "Megatron-LM wrote with --ckpt-format torch_dist, or one of this package"
    )


def _sharding_metadata(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}


def _megatron_arguments(architecture: Architecture, tensor_parallel_size: int) -> Namespace:
    """What ``--use-checkpoint-args`` reads, and ``--load`` compares with its own arguments.

    The pipeline size is left out: any size can load the checkpoint.
    """
    return Namespace(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        group_query_attention=architecture.num_query_groups != architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.kv_channels,
        max_position_embeddings=architecture.max_position_embeddings,
        add_position_embedding=True,
        position_embedding_type="rope",
        rotary_base=architecture.rotary_base,
        rotary_percent=1.0,
        rotary_interleaved=False,
        use_rope_scaling=architecture.rope_scaling_factor is not None,
        rope_scaling_factor=architecture.rope_scaling_factor or 8.0,
        swiglu=True,
        normalization="RMSNorm",
        norm_epsilon=architecture.layernorm_epsilon,
        qk_layernorm=architecture.qk_layernorm,
        add_bias_linear=False,
        add_qkv_bias=architecture.add_qkv_bias,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        untie_embeddings_and_output_weights=not architecture.tie_word_embeddings,
        padded_vocab_size=padded_vocab_size(architecture.vocab_size, tensor_parallel_size),
    )


def _first_difference(
    state: dict[str, Any], architecture: Architecture, folder: Path
) -> str | None:
    """The first parameter by which model and checkpoint differ; collective over all ranks."""
    stored = dist_checkpointing.load_tensors_metadata(str(folder))
    wanted = list(nested_values(state))
    keys: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(keys, {value.key for value in wanted})
    all_keys = set().union(*keys)
    for key in sorted(all_keys ^ {key for key in stored if key.startswith(_WEIGHTS)}):
        if not key.endswith("_extra_state"):
            where = "lacks" if key in all_keys else "also holds"
            return f"{folder} {where} {key}, so it is not a checkpoint of {architecture.name}"
    for value in wanted:
        if isinstance(value, ShardedTensor):
            problem = _shape_problem(value, tuple(stored[value.key].global_shape), architecture)
            if problem is not None:
                return f"{folder}: {problem}"
    return None


def _shape_problem(
    wanted: ShardedTensor, stored: tuple[int, ...], architecture: Architecture
) -> str | None:
    expected = tuple(wanted.global_shape)
    if wanted.allow_shape_mismatch:  # a vocabulary, padded for some tensor-parallel size
        if stored[0] >= architecture.vocab_size and stored[1:] == expected[1:]:
            return None
        expected = (architecture.vocab_size, *expected[1:])
    elif stored == expected:
        return None
    return (
        f"{wanted.key} has shape {list(stored)}, config.json implies {list(expected)}; the "
        "checkpoint belongs to another configuration"
    )
