#!/usr/bin/env bash
# Makes or updates .venv-sglang: SGLang on a machine without a GPU. It has an environment of its own
# because its pins are not the trainer's. Quick when nothing has changed.
source "$(dirname "${BASH_SOURCE[0]}")/setup_lib.sh"

environment=.venv-sglang
if [ -f $environment/.setup-gpu ]; then
    say "$environment was made by scripts/install_gpu.sh; left as it is"
    exit 0
fi
choose_python

requirements=(requirements/torch.txt requirements/sglang-cpu.txt
    requirements/sglang-cpu-nodeps.txt requirements/constraints.txt)
wanted=$(fingerprint "${requirements[@]}")
if ! is_current $environment requirements "$wanted"; then
    make_environment $environment
    install_torch $environment
    say "$environment: requirements"
    pip_install $environment --requirement requirements/sglang-cpu.txt
    say "$environment: sglang"
    pip_install $environment --no-deps --requirement requirements/sglang-cpu-nodeps.txt
    mark_current $environment requirements "$wanted"
fi
say "$environment is ready"
