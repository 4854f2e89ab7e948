#!/usr/bin/env bash
# Measures MODEL_PATH on GPQA-Diamond, with samples and results in SAVE_PATH/gpqa.
#   EVAL_DATA   the files, separated by commas; default data/gpqa_diamond.parquet
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate gpqa "${EVAL_DATA:-data/gpqa_diamond.parquet}" "$@"
