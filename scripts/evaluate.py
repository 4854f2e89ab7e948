"""Evaluate a Hugging Face folder on a training run's engines, as the run itself evaluates.

    python scripts/evaluate.py CONFIG --weights FOLDER --output FILE [key=value ...]

The engines must run (python -m sod_mcore.serving CONFIG). The weights are loaded into the student's
engines first and stay there. Settings are those of ``pretrain_sod.py``; ``tools.enabled=false``
shows what the student solves without its tool. To measure a model on benchmarks, with many samples
and a restart: ``python -m sod_mcore.evaluation``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sod_mcore.config import ConfigError, SodConfig
from sod_mcore.config_file import fail, load_config
from sod_mcore.data.errors import DataError
from sod_mcore.data.overlap import OverlapError
from sod_mcore.evaluation.evaluate import evaluate_temperature
from sod_mcore.files import write_text
from sod_mcore.loop.opening import pool_settings
from sod_mcore.loop.preflight import live_endpoints
from sod_mcore.loop.run_prompts import read_run_prompts
from sod_mcore.rollout.open_pool import check_pool, open_pool
from sod_mcore.rollout.pool import RolloutError
from sod_mcore.serving.client.json_http import EngineError
from sod_mcore.serving.endpoints import FleetError
from sod_mcore.serving.weights.disk_transfer import DiskTransfer
from sod_mcore.serving.weights.transfer import WeightUpdateError
from sod_mcore.serving.weights.update import update_weights

USER_ERRORS = (
    *(ConfigError, DataError, OverlapError),
    *(EngineError, FleetError, RolloutError, WeightUpdateError),
)
VERSION = 1_000_000
"""Marks weights that no training step made; a run publishes its own version when it starts."""


def main() -> None:
    """Read the command line, evaluate, print, and write the metrics as JSON."""
    options = _read_options()
    try:
        config = load_config(SodConfig, options.config, options.overrides)
        metrics = evaluate_folder(config, options.weights)
    except USER_ERRORS as error:
        fail(str(error))
    write_text(options.output, json.dumps(metrics, indent=2) + "\n")
    for name, value in metrics.items():
        print(f"{name}: {value:.4f}")


def evaluate_folder(config: SodConfig, weights: Path) -> dict[str, float]:
    """Metrics of the model in ``weights`` on ``evaluation.data``.

    Raises:
        ConfigError: there is nothing to evaluate.
        DataError, OverlapError: the prompts cannot be read, or are in the training set.
        EngineError, FleetError, WeightUpdateError: the engines cannot be used.
        RolloutError: the rollouts failed.
    """
    if not config.evaluation.data_files or config.serving is None:
        raise ConfigError("evaluation.data and serving must be set to evaluate")
    check_pool(config.rollout)
    prompts = read_run_prompts(config)
    endpoints = live_endpoints(config)
    timeout = config.serving.request_timeout_seconds
    update_weights(endpoints, "student", DiskTransfer(weights), VERSION, timeout)
    with open_pool(pool_settings(config, prompts.sources)) as pool:
        results = [
            evaluate_temperature(
                pool,
                prompts.evaluation,
                temperature,
                config.evaluation,
                config.rollout,
                tools_enabled=config.tools.enabled,
            )
            for temperature in config.evaluation.temperatures
        ]
    return {name: value for result in results for name, value in result.metrics().items()}


def _read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG", help="YAML file of pretrain_sod.py")
    add("--weights", type=Path, required=True, metavar="FOLDER", help="Hugging Face folder")
    add("--output", type=Path, required=True, metavar="FILE", help="JSON file of the metrics")
    add("overrides", nargs="*", metavar="key=value", help="override one setting")
    return parser.parse_intermixed_args(sys.argv[1:])


if __name__ == "__main__":
    main()
