"""What ``test_backend.py`` runs in processes of their own: the student among stand-in packages.

Megatron-Core looks for its packages once a process, while it is imported, so every set of stand-ins
needs a process. Arguments: a folder with ``models``, and a scenario. The result is a ``torch.save``
file with the scenario's name.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from sod_mcore.platform.megatron import prepare_megatron
from tests.student import stand_ins


def main() -> None:
    """Install the scenario's packages, then look at what the student makes of them."""
    folder, scenario = Path(sys.argv[1]), sys.argv[2]
    if scenario != "apex":
        stand_ins.install_transformer_engine()
    stand_ins.install_apex()
    kernel_calls = stand_ins.install_weight_gradient_kernels()
    prepare_megatron(hide_gpu_packages=scenario == "no_cuda")

    # Imports Megatron, so not before this line.
    from tests.student import backend_checks

    results: dict[str, Any] = {"choices": backend_checks.choices(folder)}
    if scenario != "no_cuda":
        with backend_checks.one_rank(folder / f"{scenario}_store"):
            results["layers"] = backend_checks.layer_classes(folder)
            results["run"] = backend_checks.train_and_resume(folder, scenario)
            results["kernel_calls"] = set(kernel_calls)
            results["fusion"] = backend_checks.updates_with_and_without_fusion(folder)
            if scenario == "transformer_engine":
                results["gradients"] = backend_checks.gradients(folder)
    torch.save(results, folder / f"{scenario}.pt")


if __name__ == "__main__":
    main()
