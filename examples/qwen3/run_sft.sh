#!/usr/bin/env bash
# The cold start: fine-tunes MODEL_PATH on the conversations of TRAIN_DATA, into SAVE_PATH/student.
#   RANKS    processes, one a GPU; default 8
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need MODEL_PATH "a Hugging Face folder, as models/Qwen3-0.6B"
need TRAIN_DATA "a file of conversations, as data/Open-AgentRL-SFT-3K.parquet"
need SAVE_PATH "a folder for checkpoints and the result"

exec torchrun --nproc-per-node "${RANKS:-8}" scripts/train_sft.py "$(recipe sft)" \
    "student.model_path=$MODEL_PATH" \
    "data.train=$TRAIN_DATA" \
    "sft.directory=$SAVE_PATH" \
    "sft.export=$SAVE_PATH/student" \
    "$@"
