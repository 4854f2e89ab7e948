"""Results as people and programs read them: Markdown, JSON lines, flat metrics."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sod_mcore.evaluation.results import Result
from sod_mcore.evaluation.statistics import Estimate

NOTES = """\
average@n is the share of right samples, with its standard error over problems, and over seeds where
there are several. pass@k is the unbiased estimate; maj@n the share of problems whose most frequent
answer is right. best@k and maj@n with "bootstrap" are the SOD reference's, drawn with replacement.
Truncated samples reached the token limit. Dropped ones were lost to infrastructure and are drawn
when the command is run again.
"""


def markdown(results: Sequence[Result], settings: Mapping[str, Any]) -> str:
    """The whole of ``results.md``."""
    shown = ", ".join(f"{name} {value}" for name, value in settings.items())
    sizes = sorted({k for result in results for k in result.pass_at})
    parts = [
        f"# Evaluation\n\n{shown}\n",
        _table(_main_columns(results)),
        _table(_size_columns(results, sizes)),
        NOTES,
    ]
    return "\n".join(parts)


def json_lines(results: Sequence[Result], settings: Mapping[str, Any]) -> str:
    """The whole of ``results.jsonl``: one line a result; what is not known is null."""
    lines = [{**_plain(dataclasses.asdict(result)), **settings} for result in results]
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)


def metrics(results: Sequence[Result]) -> dict[str, float]:
    """Flat metrics for W&B; those of whole data sets only."""
    flat: dict[str, float] = {}
    for result in results:
        if not result.data_source:
            flat |= {
                f"evaluation/{result.data_set}/{name}": value
                for name, value in _numbers(result).items()
                if not math.isnan(value)
            }
    return flat


def _numbers(result: Result) -> dict[str, float]:
    n = result.samples
    return {
        f"average_at_{n}": result.average.value,
        "standard_error": result.average.standard_error,
        "seed_standard_error": result.seed_error,
        **{f"pass_at_{k}": estimate.value for k, estimate in result.pass_at.items()},
        f"majority_at_{n}": result.majority.value,
        **{f"best_at_{k}_bootstrap": e.value for k, e in result.best_bootstrap.items()},
        f"majority_at_{n}_bootstrap": result.majority_bootstrap.value,
        "tool_calls": result.tool_calls,
        "failed_calls": result.failed_calls,
        "response_tokens": result.response_tokens,
        "truncated": result.truncated,
        "no_answer": result.no_answer,
        "dropped": float(result.dropped),
    }


def main_table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Names of the columns and the rows of the first Markdown table."""
    columns = _main_columns(results)
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _main_columns(results: Sequence[Result]) -> dict[str, list[str]]:
    n = "n" if len({result.samples for result in results}) > 1 else str(results[0].samples)
    return {
        "data": [_name(r) for r in results],
        "problems": [str(r.problems) for r in results],
        "samples": [f"{r.samples} x {r.seeds}" for r in results],
        f"average@{n}": [_with_error(r.average) for r in results],
        **_seed_column(results),
        f"pass@{n}": [_percent(r.pass_at[r.samples].value) for r in results],
        f"maj@{n}": [_percent(r.majority.value) for r in results],
        "tool calls": [_number(r.tool_calls, 2) for r in results],
        "failed calls": [_percent(r.failed_calls) for r in results],
        "response tokens": [_number(r.response_tokens, 0) for r in results],
        "truncated": [_percent(r.truncated) for r in results],
        "no answer": [_percent(r.no_answer) for r in results],
        "dropped": [str(r.dropped) for r in results],
    }


def _size_columns(results: Sequence[Result], sizes: Sequence[int]) -> dict[str, list[str]]:
    return {
        "data": [_name(r) for r in results],
        **{f"pass@{k}": [_of_size(r.pass_at, k) for r in results] for k in sizes},
        **{
            f"best@{k} (bootstrap)": [_of_size(r.best_bootstrap, k) for r in results]
            for k in sizes
            if k > 1
        },
        "maj@n (bootstrap)": [_percent(r.majority_bootstrap.value) for r in results],
    }


def _table(columns: Mapping[str, Sequence[str]]) -> str:
    rows = [list(columns), ["---", *["---:"] * (len(columns) - 1)]]
    rows += [list(row) for row in zip(*columns.values(), strict=True)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _name(result: Result) -> str:
    return f"- {result.data_source}" if result.data_source else result.data_set


def _seed_column(results: Sequence[Result]) -> dict[str, list[str]]:
    if all(math.isnan(result.seed_error) for result in results):
        return {}
    return {"over seeds": [_error(result.seed_error) for result in results]}


def _with_error(estimate: Estimate) -> str:
    return f"{_percent(estimate.value)} {_error(estimate.standard_error)}".rstrip()


def _error(value: float) -> str:
    return "" if math.isnan(value) else f"± {100 * value:.1f}"


def _of_size(estimates: Mapping[int, Estimate], k: int) -> str:
    return _percent(estimates[k].value) if k in estimates else ""


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.1f}%"


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _plain(value: Any) -> Any:
    """NaN becomes null, keys text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
