#!/usr/bin/env bash
# For a machine with an NVIDIA GPU and nvcc: builds the CUDA kernels into .venv, compares them with
# eager torch, looks for memory errors and races in them, tries handles of GPU memory between
# processes, and measures both. Ends at the first step that fails. Arguments go to the kernels'
# benchmark: `scripts/gpu_check.sh --repetitions 20`.
source "$(dirname "${BASH_SOURCE[0]}")/setup_lib.sh"

python=.venv/bin/python
command -v nvidia-smi >/dev/null || stop "no NVIDIA driver (nvidia-smi): this needs a GPU"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv

SOD_CUDA=1 scripts/setup_trainer.sh --dev
$python -m sod_mcore.ops --check
$python -m tests.ops.gpu_check

if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck; do
        say "compute-sanitizer --tool $tool"
        # Without torch's pool of memory, what lies beside a tensor belongs to nobody.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 1 \
            $python -m tests.ops.gpu_check --small
    done
else
    say "no compute-sanitizer on the PATH (it comes with the CUDA toolkit): not run"
fi

say "handles of CUDA memory (serving.weight_sync: cuda_ipc)"
$python -m tests.serving.weights.gpu_check

# Liger-Kernel and quack take part if they are in .venv (pip install liger-kernel quack-kernels).
$python -m benchmarks.fused_op --device cuda "$@"
$python -m benchmarks.output_head --device cuda
