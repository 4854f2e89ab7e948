"""What each rank of ``test_megatron_loads.py`` runs: Megatron-LM's own ``load_checkpoint``.

Arguments, model, loading and saving are those of ``megatron.training``, as ``pretrain_gpt.py`` uses
them; only the process groups come from this package. Beside Megatron's options, ``--source`` names
the Hugging Face folder, and ``--results`` a folder that gets ``rank_N.pt``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import typing_extensions

from sod_mcore.platform.megatron_cpu import rebind_torch
from sod_mcore.student.architecture import read_architecture
from sod_mcore.student.conversion.convert import build_bare_model
from sod_mcore.student.conversion.megatron_checkpoint import find_checkpoint, read_weights
from sod_mcore.student.model import GPTModel, unwrap
from sod_mcore.student.model_config import ParallelSizes
from sod_mcore.student.parallel_state import ParallelLayout, distributed
from tests.convert.logits import gathered_logits
from tests.convert.models import TOKENS

SAVED_ITERATION = 7
BLACKWELL = 10


def main() -> None:
    """Load with Megatron-LM and with this package; then let Megatron-LM save what it loaded."""
    checkpointing = import_megatron_training()
    args = parse_arguments(checkpointing)
    sizes = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
    with distributed(ParallelSizes(*sizes, 1, 1), seed=args.seed) as layout:
        models = build_model(args)
        model = unwrap(models[0])
        fresh = parameters(model)
        loaded = checkpointing.load_checkpoint(models, None, None)
        vocab_size = read_architecture(args.source).vocab_size
        results = {
            "fresh": fresh,
            "megatron": parameters(model),
            "ours": our_parameters(args.source, Path(args.load), layout),
            "load_checkpoint": loaded,
            "checkpoint_version": checkpointing.get_checkpoint_version(),
            "logits": gathered_logits(model, vocab_size, layout, TOKENS),
        }
        torch.save(results, args.results / f"rank_{layout.rank}.pt")
        checkpointing.save_checkpoint(SAVED_ITERATION, models, None, None, 0)


def import_megatron_training() -> ModuleType:
    """``megatron.training.checkpointing``, able to run on Python 3.11 and without CUDA.

    Nothing else of this package uses ``megatron.training``, so what it lacks is mended here.
    """
    if sys.version_info < (3, 12):
        typing.override = typing_extensions.override  # type: ignore[attr-defined]
    checkpointing = importlib.import_module("megatron.training.checkpointing")
    arguments = importlib.import_module("megatron.training.arguments")
    importlib.import_module("megatron.training.models.gpt")
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.training"):
            rebind_torch(module)
    # It asks the GPU, to require an environment variable of older ones.
    arguments.get_device_arch_version = lambda: BLACKWELL  # type: ignore[attr-defined]
    return checkpointing


def parse_arguments(checkpointing: ModuleType) -> argparse.Namespace:
    """What Megatron-LM's ``parse_and_validate_args`` does, without a tokenizer."""
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import set_global_variables

    args = parse_args(add_own_options)
    checkpointing.load_args_from_checkpoint(args)
    validate_args(args)
    set_global_variables(args, build_tokenizer=False)
    return typing.cast(argparse.Namespace, args)


def add_own_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Options of this program among Megatron's."""
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    return parser


def build_model(args: argparse.Namespace) -> list[torch.nn.Module]:
    """This rank's part of the model, built from the arguments alone."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder

    builder = GPTModelBuilder(gpt_config_from_args(args))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    models: list[torch.nn.Module] = builder.build_distributed_models(groups, wrap_with_ddp=False)
    return models


def our_parameters(source: Path, converted: Path, layout: ParallelLayout) -> dict[str, Any]:
    """What this package's loader reads from the same checkpoint."""
    architecture = read_architecture(source)
    model = build_bare_model(source, architecture, layout, torch.float32)
    read_weights(model, architecture, find_checkpoint(converted))
    return parameters(model)


def parameters(model: GPTModel) -> dict[str, torch.Tensor]:
    """A copy of each parameter."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


if __name__ == "__main__":
    main()
