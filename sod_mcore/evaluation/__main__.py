"""Measures a model on benchmark files.

    python -m sod_mcore.evaluation CONFIG [key=value ...]
    python -m sod_mcore.evaluation --model FOLDER --data FILE --output DIR [key=value ...]

The model is a Hugging Face folder, which is served for the run, or engines that run already
(serving.student.addresses, or a serving.directory in which a fleet runs). Samples are kept chunk by
chunk: the same command continues after a crash, a signal or lost samples. Without CONFIG, and
where it says nothing else, the settings are those of the SOD paper.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sod_mcore.config import ConfigError, EvalConfig
from sod_mcore.config_file import fail, load_config
from sod_mcore.config_help import help_text
from sod_mcore.data import DataError
from sod_mcore.evaluation.benchmark import evaluate_benchmarks
from sod_mcore.outcome import EXIT_FAILED, EXIT_STOPPED
from sod_mcore.rollout.pool import RolloutError, RolloutInterruptedError
from sod_mcore.serving.endpoints import FleetError

PAPER = Path(__file__).with_name("paper.yaml")


def main(arguments: Sequence[str]) -> int:
    """Evaluate as the arguments say; returns the exit code."""
    try:
        config = read_config(arguments)
        results = evaluate_benchmarks(config, say=_say)
    except (ConfigError, DataError) as error:
        fail(str(error))
    except RolloutInterruptedError:
        _say("stopped; what was drawn is kept, the same command continues")
        return EXIT_STOPPED
    except (FleetError, RolloutError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    return EXIT_STOPPED if any(result.dropped for result in results) else 0


def read_config(arguments: Sequence[str]) -> EvalConfig:
    """The settings of a command line; options are short for overrides.

    Raises:
        ConfigError: a setting is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sod_mcore.evaluation",
        description=__doc__,
        epilog=help_text(EvalConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("settings", nargs="*", metavar="CONFIG key=value", help="a YAML file, and overrides")
    add("--model", metavar="FOLDER", help="short for serving.student.model_path")
    add(
        "--data", metavar="FILE", action="append", help="short for evaluation.data; may be repeated"
    )
    add("--output", metavar="DIR", help="short for evaluation.output")
    options = parser.parse_intermixed_args(arguments)
    files = [text for text in options.settings if "=" not in text]
    if len(files) > 1:
        raise ConfigError(f"there are {len(files)} files of settings, {files}; give one")
    shortcuts = {
        "serving.student.model_path": options.model,
        "evaluation.data": options.data,
        "evaluation.output": options.output,
    }
    overrides = [f"{k}={json.dumps(v)}" for k, v in shortcuts.items() if v is not None]
    overrides += [text for text in options.settings if "=" in text]
    return load_config(EvalConfig, Path(files[0]) if files else PAPER, overrides)


def _say(line: str) -> None:
    print(f"[evaluation] {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
