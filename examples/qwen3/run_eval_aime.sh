#!/usr/bin/env bash
# Measures MODEL_PATH on AIME 2024 and 2025, with samples and results in SAVE_PATH/aime.
#   EVAL_DATA   the files, separated by commas; default data/aime2024.parquet, data/aime2025.parquet
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate aime "${EVAL_DATA:-data/aime2024.parquet, data/aime2025.parquet}" "$@"
