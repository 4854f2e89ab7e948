#!/usr/bin/env bash
# Makes or updates .venv: torch, Megatron-Core, and this package with its extension built in place.
# With --dev, also what the tests and checks need. Quick when nothing has changed.
source "$(dirname "${BASH_SOURCE[0]}")/setup_lib.sh"

environment=.venv
choose_python
require_compiler

requirements=(requirements/torch.txt requirements/trainer-nodeps.txt requirements/trainer.txt
    requirements/constraints.txt)
wanted=$(fingerprint "${requirements[@]}")
if ! is_current $environment requirements "$wanted"; then
    make_environment $environment
    install_torch $environment
    say "$environment: requirements"
    pip_install $environment --requirement requirements/trainer.txt
    say "$environment: megatron-core"
    "$environment/bin/python" -m pip install --quiet --no-deps --ignore-requires-python \
        --requirement requirements/trainer-nodeps.txt
    mark_current $environment requirements "$wanted"
fi

mapfile -t sources < <(find csrc -type f | LC_ALL=C sort)
wanted="$(fingerprint pyproject.toml setup.py "${sources[@]}") CUDA ${SOD_CUDA:-auto} \
${SOD_CUDA_ARCHITECTURES:-default} ${SOD_NVCC:-$(command -v nvcc || echo none)}"
# A lost extension, or one that no compiler was there for, is tried again.
if ! is_current $environment package "$wanted" || ! compgen -G "sod_mcore/ops/_C*.so" >/dev/null; then
    say "$environment: this package (compiles csrc/)"
    "$environment/bin/python" -m pip install --quiet --no-deps --no-build-isolation --editable .
    # pip shows no warning of a build that went through: here is where CUDA kernels are missed.
    "$environment/bin/python" -m sod_mcore.ops >&2 ||
        say "operations on logits cannot be fused on every device here; the mend stands above"
    mark_current $environment package "$wanted"
fi

if [ "${1:-}" = "--dev" ]; then
    wanted=$(fingerprint requirements/dev.txt requirements/dev-nodeps.txt \
        requirements/constraints.txt)
    if ! is_current $environment dev "$wanted"; then
        say "$environment: test and check tools"
        pip_install $environment --requirement requirements/dev.txt
        pip_install $environment --no-deps --requirement requirements/dev-nodeps.txt
        mark_current $environment dev "$wanted"
    fi
fi
say "$environment is ready"
