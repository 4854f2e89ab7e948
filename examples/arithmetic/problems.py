"""Arithmetic problems from reasoning-gym, all in one frame of words.

The frame is fixed ("Calculate 57 + 87.") because a model of 200,000 parameters learns to copy an
expression into a call only if the distance between the two hardly varies. Expressions, answers and
the verifier are reasoning-gym's.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import reasoning_gym

from examples.arithmetic.settings import FamilyShares
from sod_mcore.data import normalized_question

_DATASETS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 3},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 3},
    # Two terms only: from three on, reasoning-gym 0.1.25 without parentheses computes from left to
    # right (2 + 3 * 4 = 20), which no Python tool confirms. No division: its quotients are floats.
    "basic_arithmetic": {
        "min_terms": 2,
        "max_terms": 2,
        "min_digits": 1,
        "max_digits": 2,
        "operators": ["+", "-", "*"],
        "allow_parentheses": False,
    },
}
_DEPENDENT_STEPS = {"two_step": 2, "three_step": 3}
"""Families of calls that need the result before, and their calls."""
_STREAM_SIZE = 10_000_000
_MAX_REPEATS_IN_A_ROW = 200


@dataclass(frozen=True)
class Problem:
    """A question whose answer takes one call of the code interpreter, or several that depend.

    Attributes:
        question: what the user asks.
        steps: the expression of each call; ``{}`` stands for the result of the call before.
        answer: the answer as text.
        family: a field of FamilyShares.
        dataset: the reasoning-gym dataset whose verifier scores answers.
        entry: the entry that this verifier reads.
    """

    question: str
    steps: tuple[str, ...]
    answer: str
    family: str
    dataset: str
    entry: dict[str, Any]

    @property
    def verifier_info(self) -> dict[str, str]:
        """What the reasoning-gym verifier needs, as it stands in ``extra_info``."""
        return {"dataset": self.dataset, "entry": json.dumps(self.entry)}


def problem_stream(seed: int, shares: FamilyShares) -> Iterator[Problem]:
    """Problems without end, no question twice. Equal seeds give equal problems.

    Raises:
        ValueError: the families have hardly any problem left that was not drawn yet.
    """
    rng = random.Random(seed)
    weights = asdict(shares)
    entries = {
        name: iter(_dataset(name, seed * len(_DATASETS) + number))
        for number, name in enumerate(_DATASETS)
    }
    seen: set[str] = set()
    repeats = 0
    while True:
        family = rng.choices(list(weights), list(weights.values()))[0]
        if family in _DEPENDENT_STEPS:
            problem = _dependent_steps(next(entries["chain_sum"]), family, rng)
        else:
            problem = _one_step(next(entries[family]), family)
        key = normalized_question(problem.question)
        repeats = repeats + 1 if key in seen else 0
        if repeats > _MAX_REPEATS_IN_A_ROW:
            raise ValueError(f"no new problem after {len(seen)}; ask for fewer, or other families")
        if repeats == 0:
            seen.add(key)
            yield problem


def _dataset(name: str, stream: int) -> Any:
    """A reasoning-gym dataset; entry i of seed s is drawn from s + i, so streams are far apart."""
    return reasoning_gym.create_dataset(
        name, size=_STREAM_SIZE, seed=stream * _STREAM_SIZE, **_DATASETS[name]
    )


def _one_step(entry: dict[str, Any], family: str) -> Problem:
    expression = entry["metadata"]["expression"]
    question = f"Calculate {expression}."
    return _problem(entry, question, (expression,), entry["answer"], family, family)


def _dependent_steps(entry: dict[str, Any], family: str, rng: random.Random) -> Problem:
    """A sum, then operations on the result before. One product at most keeps the results short:
    a small model must copy them."""
    first, result = entry["metadata"]["expression"], int(entry["answer"])
    steps, operators = [first], "+-*"
    for _ in range(_DEPENDENT_STEPS[family] - 1):
        operator, operand = rng.choice(operators), rng.randint(2, 99)
        result = {"+": result + operand, "-": result - operand, "*": result * operand}[operator]
        steps.append(f"{{}} {operator} {operand}")
        operators = operators.replace("*", "") if operator == "*" else operators
    question = "Calculate " + " and then".join(steps).replace("{}", "") + "."
    return _problem(entry, question, tuple(steps), str(result), family, "chain_sum")


def _problem(
    entry: dict[str, Any],
    question: str,
    steps: tuple[str, ...],
    answer: str,
    family: str,
    dataset: str,
) -> Problem:
    entry = {**entry, "question": question, "answer": answer}
    return Problem(question, steps, answer, family, dataset, entry)
