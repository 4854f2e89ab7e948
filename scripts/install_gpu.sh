#!/usr/bin/env bash
# UNTESTED: for a machine with NVIDIA GPUs, and never run on one. It does there what `make setup-dev`
# does on a machine without.
#
# Makes .venv (trainer: CUDA torch, Megatron-Core, this package) and .venv-sglang (SGLang with all its
# own requirements: its pins of torch, its CUDA kernels).
#
#   TORCH_INDEX              index of the CUDA build of torch; empty: whatever pip is configured with
#   WITH_TRANSFORMER_ENGINE  1 also installs Transformer Engine into .venv; it is compiled there.
#                            Nothing here uses it yet
source "$(dirname "${BASH_SOURCE[0]}")/setup_lib.sh"

choose_python
command -v nvidia-smi >/dev/null || stop "no NVIDIA driver (nvidia-smi): use make setup without a GPU"

scripts/setup_trainer.sh --dev
.venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    stop "torch in .venv sees no GPU: rm -r .venv, set TORCH_INDEX to a CUDA index, run this again"
if [ "${WITH_TRANSFORMER_ENGINE:-0}" = 1 ]; then
    command -v nvcc >/dev/null || stop "no nvcc: Transformer Engine is compiled by the CUDA toolkit"
    say ".venv: Transformer Engine (compiles for a long time)"
    .venv/bin/python -m pip install --no-build-isolation "transformer-engine[pytorch]"
fi

wanted=$(fingerprint requirements/sglang-gpu.txt)
if ! is_current .venv-sglang gpu "$wanted"; then
    rm -rf .venv-sglang # one that `make setup` made has packages for a machine without a GPU
    make_environment .venv-sglang
    say ".venv-sglang: sglang with its own requirements"
    .venv-sglang/bin/python -m pip install --quiet --requirement requirements/sglang-gpu.txt
    mark_current .venv-sglang gpu "$wanted"
fi
say ".venv and .venv-sglang are ready"
