# shellcheck shell=bash
# Shared by the set-up scripts (sourced, not run): what the machine must have, and virtual
# environments that are left alone when nothing they are made from has changed.
#
#   PYTHON       interpreter for the environments; default: python3.11, else python3
#   TORCH_INDEX  package index that torch alone comes from; empty: whatever pip is configured with

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { echo "setup: $*" >&2; }

stop() {
    echo "setup: error: $*" >&2
    exit 2
}

choose_python() {
    PYTHON=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
    [ -n "$PYTHON" ] || stop "no python3 found: apt-get install -y python3 python3-venv python3-dev"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        stop "$PYTHON is $("$PYTHON" --version); Python 3.11 or newer is needed: set PYTHON=/path/to/python3.11"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        stop "$PYTHON cannot make virtual environments: apt-get install -y python3-venv"
}

# A C++ compiler and Python's headers build csrc/; the rest comes from pip.
require_compiler() {
    command -v "${CXX:-c++}" >/dev/null ||
        stop "no C++ compiler (${CXX:-c++}): apt-get install -y build-essential"
    "$PYTHON" -c 'import os, sys, sysconfig
sys.exit(not os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        stop "Python.h of $PYTHON is missing: apt-get install -y python3-dev"
}

# fingerprint FILE...: one hash of the files' content and of the interpreter.
fingerprint() {
    { "$PYTHON" --version && cat "$@"; } | sha256sum | cut -d ' ' -f 1
}

# is_current ENVIRONMENT PART FINGERPRINT: whether that part was completed from the same inputs.
is_current() {
    [ -x "$1/bin/python" ] && "$1/bin/python" -c '' 2>/dev/null &&
        [ "$(cat "$1/.setup-$2" 2>/dev/null)" = "$3" ]
}

mark_current() { echo "$3" >"$1/.setup-$2"; }

# make_environment ENVIRONMENT: an existing one is kept if its interpreter still runs.
make_environment() {
    if ! "$1/bin/python" -c '' 2>/dev/null; then
        say "making $1 with $("$PYTHON" --version)"
        "$PYTHON" -m venv --clear "$1"
    fi
}

# pip_install ENVIRONMENT ARGUMENT...: quiet, by the tested versions.
pip_install() {
    local environment=$1
    shift
    "$environment/bin/python" -m pip install --quiet --constraint requirements/constraints.txt "$@"
}

# install_torch ENVIRONMENT: the only line that TORCH_INDEX applies to. That index need not hold the
# constrained versions of torch's own requirements; the lines after this one settle those.
install_torch() {
    say "$1: torch (from ${TORCH_INDEX:-the configured index})"
    "$1/bin/python" -m pip install --quiet ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
        --requirement requirements/torch.txt
}
