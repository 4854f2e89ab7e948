"""Builds the C++ extension; everything else about the package is in pyproject.toml.

Only pybind11 and a C++17 compiler are used, never torch or CUDA, so the build works in pip's
isolated environment and its product does not depend on the installed torch.
"""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

setup(
    ext_modules=[
        Pybind11Extension(
            "sod_mcore.ops._C",
            sources=["csrc/bindings.cpp"],
            include_dirs=["csrc"],
            depends=["csrc/row_statistics.h"],
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
        )
    ]
)
