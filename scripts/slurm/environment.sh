# shellcheck shell=bash
# Environment of trainer and engines in a job (sourced by the templates). A value that is set already
# is kept, so `FOO=1 sbatch job.sbatch` wins. Uses INTERFACE and ATTEMPT.

# default NAME VALUE: export NAME, with VALUE where it is not set.
default() { export "$1=${!1:-$2}"; }

# Logs appear line by line, also of a process that is killed later.
default PYTHONUNBUFFERED 1
# Models are local folders; a node without internet would wait for timeouts.
default HF_HUB_OFFLINE 1
# The pool forks after the tokenizer was used; its threads would not survive that, and it warns.
default TOKENIZERS_PARALLELISM false
# torchrun sets 1 with a warning; more helps only where the model runs on CPUs.
default OMP_NUM_THREADS 1

# Before Blackwell, tensor and sequence parallelism overlap communication with computation only if
# kernels reach the GPU in the order in which they were launched.
default CUDA_DEVICE_MAX_CONNECTIONS 1
# A lost rank or a collective past its timeout ends the others instead of leaving them to hang: 1, or
# torch's own 3, which leaves out the clean-up that can hang as well.
default TORCH_NCCL_ASYNC_ERROR_HANDLING 3
# Which collective each rank was in when one timed out: written into the attempt's folder.
default TORCH_NCCL_TRACE_BUFFER_SIZE 2000
default TORCH_NCCL_DUMP_ON_TIMEOUT 1
default TORCH_NCCL_DEBUG_INFO_TEMP_FILE "$ATTEMPT/nccl_trace_rank_"
# What SGLang sets for its engines unless told otherwise; ranks beside them do as they do.
default NCCL_CUMEM_ENABLE 0

# Nodes with several networks: NCCL and gloo may otherwise take one that leads nowhere.
if [ -n "$INTERFACE" ]; then
    default NCCL_SOCKET_IFNAME "$INTERFACE"
    default GLOO_SOCKET_IFNAME "$INTERFACE"
fi
# NCCL_IB_HCA chooses InfiniBand adapters, NCCL_NVLS_ENABLE=0 turns NVLink SHARP off; NCCL detects
# both, and what a cluster needs beyond that its own documentation says.

# Requests between nodes go straight, whatever proxy the login shell uses.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd , -)
export NO_PROXY="localhost,127.0.0.1,$nodes${NO_PROXY:+,$NO_PROXY}"
export no_proxy=$NO_PROXY

# A rollout holds hundreds of connections.
ulimit -Sn "$(ulimit -Hn)"

# For the trainer alone: less fragmentation, but SGLang's memory saver does not work with it.
# shellcheck disable=SC2034 # the templates use it
TRAINER_ENVIRONMENT=("PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}")
# For equal numbers in equal runs on GPUs, at a price in speed, add: CUBLAS_WORKSPACE_CONFIG=:4096:8
# NCCL_ALGO=Ring NVTE_ALLOW_NONDETERMINISTIC_ALGO=0
