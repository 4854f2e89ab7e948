"""Weights & Biases as a mirror of the run's own files, which must never stop the run.

After a missing package is refused at start, every failure in here is a warning. Offline is the
default: the files lie in the run's folder and ``wandb sync`` uploads them later.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sod_mcore.config import ConfigError, ReportConfig
from sod_mcore.files import write_text

logger = logging.getLogger(__name__)

INIT_TIMEOUT_SECONDS = 60.0
RUN_ID_FILE = "wandb_run_id"


def require_wandb(report: ReportConfig) -> None:
    """Refuse a configuration that asks for W&B where its package is not installed.

    Raises:
        ConfigError: ``report.wandb`` is not "disabled" and there is no package ``wandb``.
    """
    if report.wandb != "disabled" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"report.wandb is {report.wandb!r}, but the package wandb is not installed: "
            "pip install wandb, or set report.wandb=disabled"
        )


class WandbMirror:
    """One W&B run for all starts of a run folder; the id is kept there."""

    def __init__(
        self,
        directory: Path,
        report: ReportConfig,
        resolved_config: Mapping[str, Any],
        run_id: str | None,
    ) -> None:
        require_wandb(report)
        self._run: Any = None
        if report.wandb == "disabled":
            return
        self._run = _start(directory, report, dict(resolved_config), run_id, report.wandb)
        if self._run is None and report.wandb == "online":
            logger.warning("W&B could not be reached; its files are kept offline in %s", directory)
            self._run = _start(directory, report, dict(resolved_config), run_id, "offline")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send ``values``. W&B keeps the first values of a step that a resume trains again."""
        if self._run is None:
            return
        try:
            self._run.log(dict(values), step=step)
        except Exception as error:  # threads, files and network of W&B: none may end the run
            self._give_up("log", error)

    def log_table(
        self, step: int, name: str, columns: Sequence[str], data: Sequence[Sequence[Any]]
    ) -> None:
        """Send a table under ``name``."""
        if self._run is None:
            return
        try:
            import wandb

            table = wandb.Table(columns=list(columns), data=[list(row) for row in data])
            self._run.log({name: table}, step=step)
        except Exception as error:  # as in log()
            self._give_up("log_table", error)

    def close(self) -> None:
        """End the W&B run; what is still unsent is written out."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:  # as in log()
            self._give_up("finish", error)
        self._run = None

    def _give_up(self, what: str, error: Exception) -> None:
        logger.warning("W&B %s failed; the run goes on without W&B: %s", what, error)
        self._run = None


def _start(
    directory: Path,
    report: ReportConfig,
    resolved_config: dict[str, Any],
    run_id: str | None,
    mode: str,
) -> Any:
    """The W&B run, or None with a warning."""
    _keep_files_in(directory.resolve() / "wandb")
    try:
        import wandb

        return wandb.init(
            project=report.project,
            name=report.name or directory.resolve().name,
            id=_keep_run_id(directory, run_id or secrets.token_hex(4)),
            resume="allow" if mode == "online" else None,
            mode=mode,  # type: ignore[arg-type]
            dir=str(directory),
            config=resolved_config,
            settings=wandb.Settings(console="off", silent=True, init_timeout=INIT_TIMEOUT_SECONDS),
        )
    except Exception as error:  # WandbMirror's promise: a warning, never the end of the run
        logger.warning("W&B did not start (mode %s): %s", mode, error)
        return None


def _keep_files_in(folder: Path) -> None:
    """Tables wait in these folders for `wandb sync`; W&B would keep them in the home folder."""
    for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
        os.environ.setdefault(variable, str(folder))


def _keep_run_id(directory: Path, proposal: str) -> str:
    """The id that an earlier start left in ``directory``, else ``proposal``, now left there."""
    path = directory / RUN_ID_FILE
    if path.exists() and (kept := path.read_text().strip()):
        return kept
    write_text(path, proposal + "\n")
    return proposal
