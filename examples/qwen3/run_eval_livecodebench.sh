#!/usr/bin/env bash
# Measures MODEL_PATH on LiveCodeBench v6, with samples and results in SAVE_PATH/livecodebench.
#   EVAL_DATA   the files, separated by commas; default data/lcb_v6.parquet
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate livecodebench "${EVAL_DATA:-data/lcb_v6.parquet}" "$@"
