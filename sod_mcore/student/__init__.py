"""The student: a Megatron-Core model that trains on trajectories, whatever its parallel layout.

Importing this package prepares Megatron-Core for the machine (see ``sod_mcore.platform.megatron``),
so ``megatron.core`` must not be imported before it.
"""

from sod_mcore.platform.megatron import prepare_megatron

prepare_megatron()
