"""Builds the extension `sod_mcore.ops._C`; everything else about the package is in pyproject.toml.

pybind11, a C++17 compiler and, where there is one, nvcc are all that is used. Torch is not, so the
build works in pip's isolated environment and its product does not depend on the installed torch.
The CUDA runtime is linked in statically: a product with CUDA kernels loads without a driver too.

Environment variables:

    SOD_CUDA                auto (default): CUDA kernels if nvcc can compile them, else a warning
                            1: fail if it cannot; 0: no CUDA kernels
    SOD_NVCC                path of nvcc; default: the one on the PATH
    SOD_CUDA_ARCHITECTURES  such as 80,90; default: those of 80,90,100 that nvcc knows
    CC, CXX                 C and C++ compiler; nvcc's own host compiler is set by NVCC_CCBIN

Without a working C++ compiler the package is installed without the extension, and its operations
run in eager torch. `python -m sod_mcore.ops` tells what was built, and what is missing and why.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

CUDA_SOURCE = "csrc/cuda_kernels.cu"
DEFAULT_ARCHITECTURES = ("80", "90", "100")
# No -ffast-math: infinities and NaN have a meaning here. No -march=native: the kernels choose their
# instructions at run time, and a cluster's login and compute nodes may differ.
COMPILE_FLAGS = [
    "-O3",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-pthread",
]
PROBE = "#include <Python.h>\n#include <optional>\nstd::optional<int> probe;\n"


class Settings(NamedTuple):
    """What the environment asks for."""

    cuda: str  # auto, 0 or 1
    nvcc: str | None
    architectures: list[str]  # empty: the default ones


class CudaObject(NamedTuple):
    """The compiled CUDA kernels and what linking them takes."""

    path: Path
    runtime: Path
    version: str
    architectures: list[str]


class CudaUnavailableError(Exception):
    """Says why the CUDA kernels cannot be compiled."""


def main() -> None:
    """Check the settings and build."""
    read_settings(os.environ)
    setup(
        ext_modules=[
            Pybind11Extension(
                "sod_mcore.ops._C",
                sources=["csrc/bindings.cpp", "csrc/cpu_kernels.cpp"],
                include_dirs=["csrc"],
                cxx_std=17,
                extra_compile_args=COMPILE_FLAGS,
                extra_link_args=["-pthread"],
            )
        ],
        cmdclass={"build_ext": BuildExtension},
    )


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Settings from environment variables; an empty one counts as unset."""
    cuda = environment.get("SOD_CUDA") or "auto"
    if cuda not in ("auto", "0", "1"):
        refuse("SOD_CUDA", cuda, "auto, 0 or 1")
    architectures = environment.get("SOD_CUDA_ARCHITECTURES", "")
    if architectures and not re.fullmatch(r"\d{2,3}(,\d{2,3})*", architectures):
        refuse("SOD_CUDA_ARCHITECTURES", architectures, "numbers joined by commas, such as 80,90")
    nvcc = environment.get("SOD_NVCC", "")
    if nvcc and shutil.which(nvcc) is None:
        refuse("SOD_NVCC", nvcc, "the path of CUDA's nvcc, or unset to take the one on the PATH")
    return Settings(
        cuda=cuda,
        nvcc=shutil.which(nvcc or "nvcc"),
        architectures=sorted(set(re.findall(r"\d+", architectures)), key=int),
    )


class BuildExtension(build_ext):
    """Adds the CUDA kernels, and does without the extension where nothing can compile it."""

    def finalize_options(self) -> None:
        """What the environment asks for is in no file's date, so that nothing is up to date."""
        super().finalize_options()
        self.force = True

    def build_extension(self, extension: Any) -> None:
        """Called by setuptools with a compiler chosen."""
        settings = read_settings(os.environ)
        if not self._compiler_works():
            self._leave_out(extension, settings)
            return
        try:
            add_cuda(extension, compile_cuda(settings, Path(self.build_temp)))
        except CudaUnavailableError as fault:
            if settings.cuda == "1":
                fail(f"SOD_CUDA=1, but {fault}. Mend that, or set SOD_CUDA=0 to build for CPU only")
            if settings.cuda == "auto":
                warn(f"no CUDA kernels: {fault}")
            extension.define_macros.append(("SOD_CUDA_MISSING_REASON", c_string(str(fault))))
        try:
            super().build_extension(extension)
        except (CompileError, LinkError):
            fail(
                "csrc/ does not compile (see above). It is tested with GCC 12: set CC and CXX to "
                "such a compiler, or CXX=false to install without the extension"
            )

    def _compiler_works(self) -> bool:
        """Whether C++17 and Python's headers are at hand; what fails later is a fault of csrc/."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(PROBE)
            try:
                self.compiler.compile(
                    [str(source)],
                    output_dir=folder,
                    include_dirs=self.include_dirs,
                    extra_postargs=["-std=c++17"],
                )
            except CompileError:
                return False
        return True

    def _leave_out(self, extension: Any, settings: Settings) -> None:
        missing = (
            "no C++17 compiler that works, or no Python headers (Debian: apt-get install -y "
            "build-essential python3-dev)"
        )
        if settings.cuda == "1":
            fail(f"SOD_CUDA=1, but there is {missing}")
        warn(f"installing without the extension, so operations run in eager torch: {missing}")
        extension.optional = True
        # What an earlier build left would be taken for this build's.
        left = Path(self.get_ext_fullpath(extension.name))
        left.unlink(missing_ok=True)
        if self.editable_mode:
            Path(*extension.name.split(".")[:-1], left.name).unlink(missing_ok=True)


def compile_cuda(settings: Settings, folder: Path) -> CudaObject:
    """Compile the CUDA kernels to an object in the folder.

    Raises:
        CudaUnavailableError: if they are not wanted, or nvcc is missing or fails.
    """
    if settings.cuda == "0":
        raise CudaUnavailableError("the package was built with SOD_CUDA=0")
    if settings.nvcc is None:
        raise CudaUnavailableError("nvcc was not on the PATH, nor its path in SOD_NVCC")
    version = read_version(settings.nvcc)
    architectures = choose_architectures(settings, version)
    runtime = find_runtime(settings.nvcc)
    path = folder / "cuda_kernels.o"
    folder.mkdir(parents=True, exist_ok=True)
    print(f"compiling {CUDA_SOURCE} for sm_{', sm_'.join(architectures)}", flush=True)
    command = nvcc_command(settings.nvcc, architectures)
    sys.stderr.write(run_nvcc([*command, "-o", str(path)]))  # warnings
    return CudaObject(path, runtime, version, architectures)


def nvcc_command(nvcc: str, architectures: Sequence[str]) -> list[str]:
    """What compiles the CUDA kernels, but for the destination (run in this file's folder).

    Args:
        nvcc: path of the program.
        architectures: such as 80 and 90, ascending; the PTX of the last is for later ones.
    """
    newest = architectures[-1]
    return [
        nvcc,
        "-O3",
        "-std=c++17",
        "-DSOD_WITH_CUDA",
        "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
        *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures),
        f"-gencode=arch=compute_{newest},code=compute_{newest}",
        "-c",
        CUDA_SOURCE,
    ]


def read_version(nvcc: str) -> str:
    """CUDA's version, such as 13.0."""
    match = re.search(r"release (\d+\.\d+)", run_nvcc([nvcc, "--version"]))
    if match is None:
        raise CudaUnavailableError(f"{nvcc} --version names no CUDA release")
    return match[1]


def choose_architectures(settings: Settings, version: str) -> list[str]:
    """The wanted architectures, or of the default ones those that this nvcc can compile for."""
    assert settings.nvcc is not None
    listed = run_nvcc([settings.nvcc, "--list-gpu-arch"])
    known = sorted(re.findall(r"compute_(\d+)\b", listed), key=int)
    unknown = [number for number in settings.architectures if number not in known]
    if unknown:
        wanted = ",".join(settings.architectures)
        refuse("SOD_CUDA_ARCHITECTURES", wanted, f"among {','.join(known)} with CUDA {version}")
    chosen = settings.architectures or [n for n in DEFAULT_ARCHITECTURES if n in known]
    if not chosen:
        wanted = ",".join(DEFAULT_ARCHITECTURES)
        raise CudaUnavailableError(f"nvcc of CUDA {version} compiles for none of {wanted}")
    return chosen


def find_runtime(nvcc: str) -> Path:
    """The static CUDA runtime. Asked of nvcc, since nvcc on the PATH may be a script or a link."""
    output = run_nvcc([nvcc, "--dryrun", "-c", CUDA_SOURCE])
    line = next((line for line in output.splitlines() if line.startswith("#$ LIBRARIES=")), "")
    for folder in re.findall(r'"-L([^"]+)"', line):
        runtime = Path(folder, "libcudart_static.a")
        if runtime.is_file():
            return runtime.resolve()
    raise CudaUnavailableError(f"libcudart_static.a is not among the libraries of {nvcc}")


def run_nvcc(command: Sequence[str]) -> str:
    """Run nvcc; returns standard output and error together.

    Raises:
        CudaUnavailableError: with the first line of its errors; all of them go to standard error.
    """
    try:
        result = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    except OSError as fault:
        raise CudaUnavailableError(f"{command[0]} does not start: {fault}") from fault
    if result.returncode:
        sys.stderr.write(result.stdout)
        lines = [line.strip() for line in result.stdout.splitlines()]
        cause = next((line for line in lines if re.search("error|fatal", line)), "it says nothing")
        raise CudaUnavailableError(f"{command[0]} failed: {cause}")
    return result.stdout


def add_cuda(extension: Any, cuda: CudaObject) -> None:
    """Link the CUDA kernels into the extension."""
    extension.extra_objects += [str(cuda.path), str(cuda.runtime)]
    extension.extra_link_args += ["-ldl", "-lrt"]
    extension.define_macros += [
        ("SOD_WITH_CUDA", None),
        ("SOD_CUDA_ARCHITECTURES", c_string(",".join(cuda.architectures))),
        ("SOD_CUDA_VERSION", c_string(cuda.version)),
    ]


def c_string(text: str) -> str:
    """The text as a C string literal."""
    return json.dumps("".join(c for c in text if c.isascii() and c.isprintable()))


def warn(message: str) -> None:
    """One line; pip shows it with -v only, and `python -m sod_mcore.ops` tells the same later."""
    print(f"warning: sod_mcore: {message}", file=sys.stderr, flush=True)


def refuse(variable: str, value: str, allowed: str) -> NoReturn:
    """Stop because of an environment variable's value."""
    fail(f"{variable}={value} must be {allowed}")


def fail(message: str) -> NoReturn:
    """Stop with one line."""
    raise SystemExit(f"error: sod_mcore: {message}")


if __name__ == "__main__":
    main()
