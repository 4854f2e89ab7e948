"""A configuration whose files exist, for the job files that are only written or played."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml


def write_small_config(folder: Path, **sections: dict[str, Any]) -> Path:
    """Write ``config.yaml`` in ``folder``; ``sections`` change the defaults below."""
    for name in ("student", "teacher"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text("{}")
    (folder / "train.parquet").touch()
    (folder / "python").touch()
    tree: dict[str, Any] = {
        "run": {"directory": "runs/mine"},
        "student": {"model_path": "student"},
        "data": {"train": "train.parquet"},
        "serving": {
            "python": "./python",
            "student": {"model_path": "student", "gpus": [6]},
            "teacher": {"model_path": "teacher", "gpus": [7]},
        },
    }
    for name, changes in copy.deepcopy(sections).items():
        for key, value in changes.items():
            if isinstance(value, dict):
                tree[name].setdefault(key, {}).update(value)
            else:
                tree[name][key] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
