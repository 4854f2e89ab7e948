"""Fill a split model from a Hugging Face folder; each rank reads only its own slices."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from safetensors import safe_open

from sod_mcore.config import ConfigError
from sod_mcore.student.architecture import Architecture
from sod_mcore.student.conversion.families import stage_parameters, tied_output_layer
from sod_mcore.student.parallel_state import ParallelLayout


def load_hf_weights(
    model: GPTModel, architecture: Architecture, layout: ParallelLayout, folder: str | Path
) -> None:
    """Set this rank's parameters from the safetensors files of ``folder``.

    Raises:
        ConfigError: a tensor is missing or has another shape than ``config.json`` says.
    """
    mappings = list(stage_parameters(architecture, model.config, layout.pipeline_parallel_rank))
    parameters = dict(model.named_parameters())
    copy = tied_output_layer(architecture)
    if architecture.tie_word_embeddings and copy.megatron_name in parameters:
        mappings.append(copy)
    _require_same_names(set(parameters), {mapping.megatron_name for mapping in mappings})
    with ExitStack() as stack, torch.no_grad():
        files = SafetensorsFolder(Path(folder), stack)
        for mapping in mappings:
            tensors = [
                files.slice(name, shape)
                for name, shape in zip(
                    mapping.hf_names, mapping.layout.shapes(architecture), strict=True
                )
            ]
            shard = mapping.layout.shard(
                tensors, architecture, layout.tensor_parallel_rank, layout.tensor_parallel_size
            )
            parameters[mapping.megatron_name].copy_(shard)


def _require_same_names(model: set[str], table: set[str]) -> None:
    if model != table:
        raise RuntimeError(
            f"the mapping table does not fit the model: only in the model "
            f"{sorted(model - table)}, only in the table {sorted(table - model)}"
        )


class SafetensorsFolder:
    """Lazy access to the tensors of a folder, whichever file each is in."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.stack = stack
        self.opened: dict[str, Any] = {}
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self.file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif (folder / "model.safetensors").is_file():
            names = self._open("model.safetensors").keys()
            self.file_of = dict.fromkeys(names, "model.safetensors")
        else:
            raise ConfigError(
                f"{folder} has neither model.safetensors nor model.safetensors.index.json; give a "
                "folder with safetensors weights"
            )

    def dtypes(self) -> dict[str, str]:
        """Tensor name -> its dtype as safetensors spells it, such as ``BF16``."""
        return {
            name: self._open(file).get_slice(name).get_dtype()
            for name, file in sorted(self.file_of.items())
        }

    def slice(self, name: str, shape: tuple[int, ...]) -> Any:
        """The tensor as a lazy slice, after a look at its shape."""
        if name not in self.file_of:
            raise ConfigError(f"{self.folder} lacks the tensor {name}, which config.json implies")
        lazy = self._open(self.file_of[name]).get_slice(name)
        if tuple(lazy.get_shape()) != shape:
            raise ConfigError(
                f"{self.folder}: {name} has shape {lazy.get_shape()}, config.json implies "
                f"{list(shape)}; the weights belong to another configuration"
            )
        return lazy

    def _open(self, file_name: str) -> Any:
        if file_name not in self.opened:
            file = safe_open(self.folder / file_name, framework="pt", device="cpu")
            self.opened[file_name] = self.stack.enter_context(file)
        return self.opened[file_name]
