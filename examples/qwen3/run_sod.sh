#!/usr/bin/env bash
# Distils TEACHER_MODEL_PATH into MODEL_PATH, which is a cold start (run_sft.sh), on the prompts of
# TRAIN_DATA; the result is SAVE_PATH/student.
#   METHOD   row of the paper's tables: sod (default), opd, grpo, opsd_gt, opsd_hint, ...
#   RANKS    training processes, one a GPU from GPU 0 on; default 4
# SIZE=4b METHOD=teacher_grpo makes the teacher. Like grpo it needs no TEACHER_MODEL_PATH; the teacher of opsd_gt and opsd_hint is MODEL_PATH itself.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need MODEL_PATH "a Hugging Face folder of a cold start"
need TRAIN_DATA "a file of prompts, as data/Open-AgentRL-30K.parquet"
need SAVE_PATH "a folder for checkpoints, logs and the result"

method=${METHOD:-sod}
case $method in
    sft | vanilla)
        echo "error: METHOD is $method, which has no rollouts in training; see run_sft.sh and" \
            "run_eval_aime.sh" >&2
        exit 2
        ;;
    grpo | teacher_grpo) teacher=() ;;
    opsd_*) teacher=("serving.teacher.model_path=$MODEL_PATH") ;;
    *)
        need TEACHER_MODEL_PATH "a Hugging Face folder of the teacher, with the student's tokenizer"
        teacher=("serving.teacher.model_path=$TEACHER_MODEL_PATH")
        ;;
esac
config=$(recipe "$method")
settings=(
    "student.model_path=$MODEL_PATH"
    "serving.student.model_path=$MODEL_PATH"
    "${teacher[@]}"
    "data.train=$TRAIN_DATA"
    "run.directory=$SAVE_PATH"
    "run.export=$SAVE_PATH/student"
    "$@"
)
exec python -m sod_mcore.serving "$config" "${settings[@]}" -- \
    torchrun --nproc-per-node "${RANKS:-4}" pretrain_sod.py "$config" "${settings[@]}"
