"""Imports between parts go one way, so that each part can be read, tested and replaced alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sod_mcore"
FOR_ALL = {
    "config",
    "config_file",
    "config_help",
    "trajectory",
    "files",
    "outcome",
    "platform",
    "tasks",
    "timeline",
    "user_functions",
}
EVERYTHING = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith("_")}
MAY_IMPORT = {
    "algorithm": set(),
    "chat": set(),
    "cli": EVERYTHING,
    "config": set(),
    "config_file": set(),
    "config_help": set(),
    "convert": {"student"},
    "data": {"chat", "rewards", "tools"},
    "evaluation": {"chat", "rollout", "rewards", "data", "serving", "report", "tools"},
    "files": set(),
    "loop": EVERYTHING,
    "ops": {"algorithm"},
    "outcome": set(),
    "platform": set(),
    "ray_cluster": set(),
    "report": set(),
    "rewards": {"tools"},
    "rollout": {"chat", "ray_cluster", "serving", "tools", "rewards"},
    "serving": {"ray_cluster"},
    "slurm": set(),
    "student": {"ops", "algorithm"},
    "tools": set(),
    "tasks": set(),
    "timeline": set(),
    "trajectory": set(),
    "user_functions": set(),
}  # fmt: skip
"""The parts of the package and which other parts each may import, beside those for all."""

WITHOUT_TORCH = (
    *("config", "config_help", "report", "rewards"),
    *("slurm.command_line", "timeline", "tools", "trajectory"),
)


def parts() -> list[str]:
    """Sub-packages and modules of the package."""
    folders = [path.parent.name for path in PACKAGE.glob("*/__init__.py")]
    return sorted({*folders, *(p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__")})


@pytest.mark.parametrize("part", parts())
def test_a_part_imports_only_what_it_may(part: str) -> None:
    assert part in MAY_IMPORT, f"add {part} to the table of imports, here and in CONTRIBUTING.md"
    allowed = MAY_IMPORT[part] | FOR_ALL | {part}
    files = [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").is_file() else []
    for path in [*files, *(PACKAGE / part).rglob("*.py")]:
        for line, imported in _imported_parts(path):
            assert imported in allowed, f"{path.name}, line {line}: {part} imports {imported}"


def test_light_parts_do_not_load_torch() -> None:
    """Help, reports and tools start without the seconds that importing torch takes."""
    imports = ", ".join(f"sod_mcore.{part}" for part in WITHOUT_TORCH)
    program = f"import sys, {imports}; sys.exit('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, timeout=120, check=False
    )
    assert result.returncode == 0


def _imported_parts(path: Path) -> list[tuple[int, str]]:
    """(line, part) of each import of this package in a file, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "sod_mcore":
            modules = [f"sod_mcore.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules = [node.module]
        else:
            continue
        found += [(node.lineno, m.split(".")[1]) for m in modules if m.startswith("sod_mcore.")]
    return found
