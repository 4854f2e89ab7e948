"""Builds of the extension on machines that lack something, and what `python -m sod_mcore.ops` says.

The builds are real ones, each in a folder of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import setup as build_script
from sod_mcore.ops import extension

REPOSITORY = Path(__file__).parents[2]
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
NVCC = shutil.which("nvcc")
CPU = torch.device("cpu")
NO_COMPILER = {"CC": "false", "CXX": "false"}
PIP_INSTALL = ["-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]


def run(
    *arguments: str | Path, settings: dict[str, str] | None = None, cwd: Path = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    """Python with these arguments and no SOD_ variables but these; it sees no GPU by default."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SOD_")}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**inherited, "CUDA_VISIBLE_DEVICES": "", **(settings or {})},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    return result.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def broken_nvcc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An nvcc that answers questions but compiles nothing, like one whose host compiler is new."""
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "libcudart_static.a").touch()
    nvcc = folder / "nvcc"
    nvcc.write_text(
        '#!/bin/sh\ncase "$1" in\n'
        "--version) echo 'Cuda compilation tools, release 12.4, V12.4.131' ;;\n"
        "--list-gpu-arch) echo compute_80; echo compute_90 ;;\n"
        f"--dryrun) echo '#$ LIBRARIES=  \"-L{folder}\"' >&2 ;;\n"
        "*) echo 'error: unsupported GNU version!' >&2; exit 1 ;;\nesac\n"
    )
    nvcc.chmod(0o755)
    return nvcc


@pytest.fixture(scope="module")
def source_archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it would be published, from a copy: building one leaves files behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("sod_mcore", "csrc"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(REPOSITORY / name, source / name, ignore=ignore)
    for name in FILES:
        shutil.copy(REPOSITORY / name, source)
    result = run("-m", "build", "--sdist", "--no-isolation", source)
    assert result.returncode == 0, result.stderr
    [archive] = (source / "dist").glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def cpu_installation(
    source_archive: Path, broken_nvcc: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with the package, built where nvcc compiles nothing."""
    folder = tmp_path_factory.mktemp("cpu")
    settings = {"SOD_NVCC": str(broken_nvcc)}
    result = run(*PIP_INSTALL, "--target", folder, source_archive, settings=settings)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def installation_without_compiler(
    source_archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with the package, built where no compiler works."""
    folder = tmp_path_factory.mktemp("no-compiler")
    where = ("--verbose", "--target", folder, source_archive)
    result = run(*PIP_INSTALL, *where, settings=NO_COMPILER)
    assert result.returncode == 0, result.stderr
    [warning] = [line for line in result.stderr.splitlines() if "warning: sod_mcore" in line]
    assert "installing without the extension" in warning
    assert "apt-get install -y build-essential python3-dev" in warning
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"SOD_CUDA": "bogus"}, "SOD_CUDA=bogus must be auto, 0 or 1"),
        (
            {"SOD_CUDA": "1", "SOD_NVCC": "/nowhere/nvcc"},
            "SOD_NVCC=/nowhere/nvcc must be the path of CUDA's nvcc, or unset to take the one on "
            "the PATH",
        ),
        (
            {"SOD_CUDA_ARCHITECTURES": "sm_90"},
            "SOD_CUDA_ARCHITECTURES=sm_90 must be numbers joined by commas, such as 80,90",
        ),
    ],
    ids=["cuda", "nvcc", "architectures"],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, str], message: str) -> None:
    result = run("setup.py", "--version", settings=settings)
    assert result.returncode == 1
    assert result.stderr == f"error: sod_mcore: {message}\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"SOD_CUDA": "1"},
            "SOD_CUDA=1, but {nvcc} failed: error: unsupported GNU version!. Mend that, or set "
            "SOD_CUDA=0 to build for CPU only",
        ),
        (
            {"SOD_CUDA_ARCHITECTURES": "90,100"},
            "SOD_CUDA_ARCHITECTURES=90,100 must be among 80,90 with CUDA 12.4",
        ),
    ],
    ids=["kernels", "architectures"],
)
def test_what_nvcc_cannot_do_is_an_error_if_asked_for(
    settings: dict[str, str], message: str, broken_nvcc: Path, tmp_path: Path
) -> None:
    folders = ("--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib")
    settings = {"SOD_NVCC": str(broken_nvcc), **settings}
    result = run("setup.py", "build_ext", *folders, settings=settings)
    assert result.returncode == 1
    assert last_line(result) == "error: sod_mcore: " + message.format(nvcc=broken_nvcc)


def test_cuda_asked_for_without_a_compiler_is_an_error(tmp_path: Path) -> None:
    folders = ("--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib")
    settings = {"SOD_CUDA": "1", **NO_COMPILER}
    result = run("setup.py", "build_ext", *folders, settings=settings)
    assert result.returncode == 1
    assert "SOD_CUDA=1, but there is no C++17 compiler that works" in last_line(result)


def test_the_source_archive_holds_all_of_csrc(source_archive: Path) -> None:
    with tarfile.open(source_archive) as archive:
        packed = {Path(name).name for name in archive.getnames() if "/csrc/" in name}
    assert packed == {path.name for path in (REPOSITORY / "csrc").iterdir()}


def test_without_a_compiler_operations_are_eager(installation_without_compiler: Path) -> None:
    folder = installation_without_compiler
    assert not list(folder.rglob("*.so"))
    program = (
        "import torch; from sod_mcore import ops; "
        "print(ops.vocab_parallel_logprobs("
        "torch.zeros(1, 8), torch.tensor([3]), vocab_size=8)[1].exp().item())"
    )
    result = run("-c", program, settings={"PYTHONPATH": str(folder)}, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(8)


def test_the_report_without_a_compiler(installation_without_compiler: Path) -> None:
    folder = installation_without_compiler
    result = run("-m", "sod_mcore.ops", settings={"PYTHONPATH": str(folder)}, cwd=folder)
    assert result.returncode == 1, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "extension:     none"
    assert lines[-1].startswith(
        "cpu:           eager torch only: the extension sod_mcore.ops._C is not built"
    )
    assert "apt-get install -y build-essential python3-dev" in lines[-1]


def test_the_report_where_nvcc_compiles_nothing(cpu_installation: Path, broken_nvcc: Path) -> None:
    folder = cpu_installation
    result = run("-m", "sod_mcore.ops", "--check", settings={"PYTHONPATH": str(folder)}, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"extension:     {folder}")
    assert re.fullmatch(
        r"CPU kernels:   (x86-64-v4|x86-64-v3|baseline), chosen for this processor", lines[1]
    )
    fault = f"{broken_nvcc} failed: error: unsupported GNU version!"
    assert lines[2] == f"CUDA kernels:  none: {fault}"
    assert "cpu:           fused" in lines
    for dtype in ("float32", "bfloat16"):
        [check] = [line for line in lines if line.startswith(f"check cpu torch.{dtype}: ")]
        assert re.search(r": largest difference \d\.\de-\d\d, ", check)


def test_the_report_on_this_machine() -> None:
    """GPUs included, where there are some; the extension is the one that `make setup` built."""
    gpus = os.environ.get(
        "CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))
    )
    result = run("-m", "sod_mcore.ops", "--check", settings={"CUDA_VISIBLE_DEVICES": gpus})
    assert "\ncpu:           fused\n" in result.stdout, result.stdout + result.stderr
    if NVCC is not None:
        assert re.search(r"\nCUDA kernels:  sm_\d+.* by CUDA \d+\.\d+\n", result.stdout)
    if NVCC is not None or not torch.cuda.is_available():
        assert result.returncode == 0, result.stdout


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process, as if the extension were not built."""
    extension.missing_reason.cache_clear()
    extension.warn_once.cache_clear()
    monkeypatch.setattr(extension, "_import", lambda: (None, "it is not built; build it"))
    yield
    extension.missing_reason.cache_clear()
    extension.warn_once.cache_clear()


@pytest.mark.usefixtures("no_extension")
def test_eager_torch_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOD_OPS", raising=False)
    with pytest.warns(RuntimeWarning, match="slowly .* it is not built; build it") as warned:
        chosen = [extension.extension_for(CPU) for _ in range(3)]
    assert chosen == [None, None, None]
    assert len(warned) == 1


@pytest.mark.usefixtures("no_extension")
@pytest.mark.filterwarnings("error")
def test_eager_torch_may_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOD_OPS", "eager")
    assert extension.extension_for(CPU) is None


@pytest.mark.usefixtures("no_extension")
def test_the_extension_may_be_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOD_OPS", "fused")
    with pytest.raises(RuntimeError, match="SOD_OPS=fused, but it is not built; build it"):
        extension.extension_for(CPU)


def test_other_choices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOD_OPS", "fast")
    with pytest.raises(ValueError, match="SOD_OPS=fast must be one of auto, eager, fused"):
        extension.extension_for(CPU)


@pytest.mark.parametrize(
    ("capability", "is_covered"),
    [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 3), True)],
)
def test_gpus_that_kernels_cover(capability: tuple[int, int], is_covered: bool) -> None:
    """Kernels for 8.6 do not run on 8.0, but for all that is later."""
    assert extension.covers("80,90", capability) == is_covered
    assert not extension.covers("86,90", (8, 0))


def test_gpus_that_kernels_do_not_run_on() -> None:
    module = ModuleType("_C")
    module.cuda_architectures, module.cuda_version = "80,90", "13.0"  # type: ignore[attr-defined]
    assert extension._gpu_fault(module, (9, 0), driver=13) is None
    assert extension._gpu_fault(module, (9, 0), driver=14) is None
    old_gpu = extension._gpu_fault(module, (7, 0), driver=13)
    assert old_gpu is not None
    assert "SOD_CUDA_ARCHITECTURES=70" in old_gpu
    old_driver = extension._gpu_fault(module, (9, 0), driver=12)
    assert old_driver is not None
    assert "SOD_NVCC set to an nvcc of CUDA 12" in old_driver


def test_other_devices_have_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOD_OPS", "fused")
    with pytest.raises(RuntimeError, match="no kernels for meta"):
        extension.extension_for(torch.device("meta"))


# Defined only where nvcc is, since a skipped test fails in `make test`.
if NVCC is not None:

    @pytest.mark.parametrize("architecture", build_script.DEFAULT_ARCHITECTURES)
    def test_kernels_keep_everything_in_registers(architecture: str, tmp_path: Path) -> None:
        """A register that is spilled costs memory traffic for every logit."""
        assert NVCC is not None
        command = build_script.nvcc_command(NVCC, [architecture])
        result = subprocess.run(
            [*command, "-Xptxas=-v", "-o", str(tmp_path / "kernels.o")],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        kernels = re.findall(
            r"Function properties for (\w+)\n\s+\d+ bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads",
            result.stdout + result.stderr,
        )
        assert kernels
        spilling = [kernel for kernel in kernels if kernel[1:] != ("0", "0")]
        assert not spilling
