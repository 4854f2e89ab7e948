r"""Grader of rows made by the reasoning-gym package, which scores them by its own rules.

The answer is the content of the last `\boxed{...}`. Some of the package's scorers evaluate the
answer as Python (`eval`, sympy's `parse_expr`): a model could run code in this process by writing
it into a box, so these datasets are refused.
"""

import contextlib
import importlib
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from sod_mcore.rewards.boxed import read_boxed_answer
from sod_mcore.rewards.interface import Category, Verdict

logger = logging.getLogger(__name__)

# In reasoning-gym 0.1.25.
DATASETS_THAT_EVALUATE_ANSWERS = frozenset(
    {
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)

_Entry = dict[str, Any]
_Scorer = Callable[[str, _Entry], float]


class ReasoningGymGrader:
    """Right if and only if the dataset's own `score_answer` gives the full score of 1."""

    def __init__(self, dataset_options: Mapping[str, Mapping[str, object]] | None = None) -> None:
        """Scorers are made when first asked for.

        Args:
            dataset_options: by dataset, the options its rows were made with. Few scorers depend
                on them (such as the precision of decimal_arithmetic).
        """
        self._dataset_options = dict(dataset_options or {})
        self._scorers: dict[str, _Scorer] = {}

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled without its scorers; unpickled with reasoning-gym imported, so that this takes no
        time from an answer."""
        return _import_and_make, (self._dataset_options,)

    def __call__(
        self, response_text: str, ground_truth: str, extra_info: Mapping[str, object]
    ) -> Verdict:
        """Judge a response.

        Args:
            response_text: text of the final assistant turn.
            ground_truth: not used, the entry holds the answer with all that its scorer needs.
            extra_info: "dataset", the name of a reasoning-gym dataset, and "entry", its entry as
                JSON text.

        Returns:
            A verdict of category "bad_format" where the dataset's scorer raises on the answer. Its
            part "reasoning_gym_score" is what the dataset gives, partly right answers included.

        Raises:
            ValueError: the fields are missing or of the wrong kind, or the dataset is refused.
        """
        dataset = _text_field(extra_info, "dataset")
        entry = _parse_entry(_text_field(extra_info, "entry"))
        scorer = self._scorer(dataset)
        box = read_boxed_answer(response_text)
        if box.problem:
            return Verdict(box.problem, box.text, parts={"reasoning_gym_score": 0.0})
        try:
            score = float(scorer(box.text, entry))
        except Exception as error:
            # Scorers parse the answer in their own ways, and raise whatever they raise on an
            # answer that is not of the right form.
            logger.debug("%s could not score %r: %r", dataset, box.text, error)
            return Verdict("bad_format", box.text, parts={"reasoning_gym_score": 0.0})
        category: Category = "right" if score >= 1.0 else "wrong"
        return Verdict(category, box.text, parts={"reasoning_gym_score": score})

    def _scorer(self, dataset: str) -> _Scorer:
        if dataset not in self._scorers:
            self._scorers[dataset] = _make_scorer(dataset, self._dataset_options.get(dataset, {}))
        return self._scorers[dataset]


def _import_and_make(
    dataset_options: Mapping[str, Mapping[str, object]],
) -> ReasoningGymGrader:
    with contextlib.suppress(ImportError):  # told when a row asks for it
        importlib.import_module("reasoning_gym")
    return ReasoningGymGrader(dataset_options)


def check_row(ground_truth: str, extra_info: Mapping[str, object]) -> None:
    """Refuse a row that cannot be scored.

    Raises:
        ValueError: see :meth:`ReasoningGymGrader.__call__`.
    """
    dataset = _text_field(extra_info, "dataset")
    _parse_entry(_text_field(extra_info, "entry"))
    _refuse_unusable(dataset)


def _make_scorer(dataset: str, options: Mapping[str, object]) -> _Scorer:
    _refuse_unusable(dataset)
    import reasoning_gym

    try:
        scorer: _Scorer = reasoning_gym.create_dataset(dataset, **options).score_answer
    except (AssertionError, TypeError) as error:
        raise ValueError(f"dataset_options[{dataset!r}] = {dict(options)!r}: {error}") from error
    return scorer


def _refuse_unusable(dataset: str) -> None:
    """Raise ValueError unless the package is there and has a safe data set of this name."""
    try:
        from reasoning_gym import factory
    except ImportError as error:
        raise ValueError(
            "a data row is to be scored by reasoning-gym, which is not installed: "
            "pip install reasoning-gym"
        ) from error
    if dataset in DATASETS_THAT_EVALUATE_ANSWERS:
        raise ValueError(
            f"extra_info['dataset'] = {dataset!r}: reasoning-gym evaluates the answers to this "
            "dataset as Python code in this process. Choose another dataset, or give its rows a "
            "verifier that runs in a sandbox."
        )
    if dataset == "composite":
        raise ValueError(
            "extra_info['dataset'] = 'composite': it hands answers to other datasets, which may "
            "evaluate them. Name the dataset that each row comes from"
        )
    if dataset not in factory.DATASETS:
        raise ValueError(
            f"extra_info['dataset'] = {dataset!r}: reasoning-gym has no such dataset. "
            f"It has: {', '.join(sorted(factory.DATASETS))}"
        )


def _text_field(extra_info: Mapping[str, object], name: str) -> str:
    value = extra_info.get(name)
    if not isinstance(value, str):
        raise ValueError(
            f"extra_info[{name!r}] = {value!r}: the reasoning-gym grader needs a text here"
        )
    return value


def _parse_entry(text: str) -> _Entry:
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"extra_info['entry'] = {text!r}: not JSON ({error})") from error
    if not isinstance(entry, dict) or "answer" not in entry:
        raise ValueError(
            f"extra_info['entry'] = {text!r}: give an entry of a reasoning-gym dataset, a JSON "
            "object with an answer"
        )
    return entry
