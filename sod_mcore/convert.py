"""Convert a model between a Hugging Face folder and a Megatron distributed checkpoint.

    python -m sod_mcore.convert to-megatron HF_FOLDER OUT
    python -m sod_mcore.convert to-hf CHECKPOINT OUT --like HF_FOLDER

With --tensor-parallel or --pipeline-parallel, as many processes share the model: the command starts
them on this machine, or torchrun has started them on several. The checkpoint can be loaded with any
other layout.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from sod_mcore.config import ConfigError
from sod_mcore.config_file import fail
from sod_mcore.student.architecture import read_architecture
from sod_mcore.student.conversion.convert import hf_to_megatron, megatron_to_hf
from sod_mcore.student.conversion.megatron_checkpoint import find_checkpoint
from sod_mcore.student.model_config import ParallelSizes, check_divisibility
from sod_mcore.student.parallel_state import distributed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def main(arguments: Sequence[str] | None = None) -> None:
    """Check everything, then convert on as many processes as the layout has ranks."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    sizes = ParallelSizes(options.tensor_parallel, options.pipeline_parallel, 1, 1)
    num_ranks = sizes.tensor * sizes.pipeline
    try:
        _check(options, sizes)
        if num_ranks > 1 and not dist.is_torchelastic_launched():
            command = [sys.executable, *TORCHRUN, str(num_ranks), "-m", "sod_mcore.convert"]
            os.execv(sys.executable, [*command, *arguments])
        _convert(options, sizes)
    except (ConfigError, OSError) as error:
        _fail_once(str(error))


def _convert(options: argparse.Namespace, sizes: ParallelSizes) -> None:
    if not dist.is_torchelastic_launched():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with distributed(sizes, seed=0) as layout:
        if options.command == "to-megatron":
            hf_to_megatron(options.source, options.out, layout, dtype=options.dtype)
        else:
            megatron_to_hf(
                find_checkpoint(options.source),
                options.like,
                options.out,
                layout,
                bucket_bytes=options.max_file_mb << 20,
                dtype=options.dtype,
            )
        if layout.rank == 0:
            print(f"{options.source} -> {options.out}")


def _check(options: argparse.Namespace, sizes: ParallelSizes) -> None:
    """Refuse what cannot work before a second process starts or a weight is read."""
    if options.command == "to-megatron":
        architecture = read_architecture(options.source, field="HF_FOLDER")
    else:
        architecture = read_architecture(options.like, field="--like")
        find_checkpoint(options.source)
    check_divisibility(
        architecture, sizes, tensor_field="--tensor-parallel", pipeline_field="--pipeline-parallel"
    )
    num_ranks = sizes.tensor * sizes.pipeline
    if dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) != num_ranks:
        raise ConfigError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, but --tensor-parallel "
            f"{sizes.tensor} x --pipeline-parallel {sizes.pipeline} needs {num_ranks}"
        )
    out = options.out.resolve()
    if out in (options.source.resolve(), *options.source.resolve().parents):
        raise ConfigError(f"OUT is {options.out}, which holds what is converted; choose another")
    if out.exists() and not options.overwrite and (out.is_file() or any(out.iterdir())):
        raise ConfigError(f"OUT is {options.out}, which exists; choose another or add --overwrite")


def _fail_once(message: str) -> None:
    """One line from one rank: each finds the same fault."""
    if os.environ.get("RANK", "0") == "0":
        fail(message)
    raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sod_mcore.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    to_megatron = commands.add_parser("to-megatron", help="Hugging Face folder -> checkpoint")
    to_megatron.add_argument("source", type=Path, metavar="HF_FOLDER")
    to_hf = commands.add_parser("to-hf", help="checkpoint -> Hugging Face folder")
    to_hf.add_argument(
        "source",
        type=Path,
        metavar="CHECKPOINT",
        help="a torch_dist folder, Megatron-LM's --save folder, or checkpoints/ of a run",
    )
    to_hf.add_argument(
        "--like",
        type=Path,
        required=True,
        metavar="HF_FOLDER",
        help="configuration, tokenizer and chat template are copied from here",
    )
    to_hf.add_argument(
        "--max-file-mb",
        type=_at_least_one,
        default=1024,
        metavar="MB",
        help="largest weights file, which rank 0 holds beside its part of the model (1024)",
    )
    for command in (to_megatron, to_hf):
        command.add_argument("out", type=Path, metavar="OUT", help="a new folder")
        for name in ("tensor", "pipeline"):
            flag, default = f"--{name}-parallel", 1
            command.add_argument(flag, type=_at_least_one, default=default, metavar="N")
        command.add_argument(
            "--dtype",
            type=_dtype,
            metavar="|".join(DTYPES),
            help="dtype of what is written; left out: as it is stored",
        )
        command.add_argument("--overwrite", action="store_true", help="replace OUT")
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def _dtype(text: str) -> torch.dtype:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[text]


if __name__ == "__main__":
    main()
