# shellcheck shell=bash
# Sourced by the scripts beside it: where things are, and what they need. Variables:
#   MODEL_PATH          Hugging Face folder that is trained or measured
#   SAVE_PATH           folder of everything that is written
#   SIZE                recipes to use: 0.6b (default), 1.7b or 4b
# Further arguments of a script are settings, key=value.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
size=${SIZE:-0.6b}

# need NAME MEANING: ends the script unless the variable NAME is set.
need() {
    if [ -z "${!1:-}" ]; then
        echo "error: $1 is not set; it must be $2" >&2
        exit 2
    fi
}

# recipe NAME: the YAML file of a row; ends the script if there is none.
recipe() {
    local file="examples/qwen3/$size/$1.yaml"
    if [ ! -f "$file" ]; then
        echo "error: there is no recipe $file; SIZE must be one of 0.6b, 1.7b, 4b, and METHOD one of" \
            "$(find "examples/qwen3/$size" -name '*.yaml' -exec basename {} .yaml \; 2>/dev/null | LC_ALL=C sort | tr '\n' ' ')" >&2
        exit 2
    fi
    echo "$file"
}

# evaluate NAME FILE ARGUMENTS...: measures MODEL_PATH on the benchmark files of that name.
evaluate() {
    local name=$1 files=$2
    shift 2
    need MODEL_PATH "a Hugging Face folder to measure"
    need SAVE_PATH "a folder for samples and results"
    exec python -m sod_mcore.evaluation "$(recipe vanilla)" \
        "serving.student.model_path=$MODEL_PATH" \
        "evaluation.data=[$files]" \
        "evaluation.output=$SAVE_PATH/$name" \
        "$@"
}
