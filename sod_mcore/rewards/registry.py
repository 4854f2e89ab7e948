"""Chooses a verifier for each data row, by the row's own source.

A batch mixes sources; a choice made once by its first row would score the others by wrong rules.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from sod_mcore.config import ConfigError
from sod_mcore.rewards.interface import Grader, Verifier
from sod_mcore.rewards.user_grader import UserGrader, find_user_function

BUILT_IN_SOURCES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "AIME2024": "math",
        "AIME2025": "math",
        "HumanEval": "code",
        "LiveCodeBench_v6": "code",
        "gpqa_diamond": "choice",
        "humaneval": "code",
        "math_dapo": "math",
        "mega-science": "math",
        "reasoning_gym": "reasoning_gym",
        "train-code-leetcode-": "code",
        "train-code-taco-": "code",
        "train-math-": "math",
    }
)
"""Name of a verifier by prefix of ``data_source``, for the published data sets."""

CODE: Final = "code"
"""The verifier that is no grader: it runs programs in a sandbox."""

_GRADERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "choice": "sod_mcore.rewards.choice:choice",
        "math_verify": "sod_mcore.rewards.math_answers:math_verify_grader",
        "minerva": "sod_mcore.rewards.minerva:minerva",
        "reasoning_gym": "sod_mcore.rewards.reasoning_gym:ReasoningGymGrader",
        "strict_box": "sod_mcore.rewards.math_answers:strict_box",
    }
)
"""Imported when asked for: sympy takes a while, and reasoning-gym may not be installed."""


_ROW_CHECKS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "choice": "sod_mcore.rewards.choice:check_truth",
        "math_verify": "sod_mcore.rewards.math_truth:check_truth",
        "minerva": "sod_mcore.rewards.math_truth:check_text",
        "reasoning_gym": "sod_mcore.rewards.reasoning_gym:check_row",
        "strict_box": "sod_mcore.rewards.math_truth:check_text",
    }
)
"""Functions of the ground truth and extra_info that raise ValueError where a row is unusable."""


def find_grader(name: str, *, math: str = "math_verify") -> Grader:
    """The grader that ``reward.verifiers`` or the built-in table names.

    Args:
        name: "math", a built-in grader, or a user's function as ``package.module:function``.
        math: what "math" stands for, ``reward.math``.

    Raises:
        ConfigError: there is none of that name, or it cannot be imported.
    """
    name = math if name == "math" else name
    if name not in _GRADERS:
        if ":" not in name:
            choices = ", ".join(sorted({"math", CODE, *_GRADERS}))
            raise ConfigError(
                f"reward.verifiers names {name!r}; it must be one of {choices}, or a function of "
                "yours as package.module:function"
            )
        find_user_function(name)
        return UserGrader(name)
    module, _, attribute = _GRADERS[name].partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ConfigError(
            f"the verifier {name!r} cannot be imported ({error}); install the packages of "
            "requirements/trainer.txt, or name another one in reward.verifiers"
        ) from error
    grader: Grader = found() if isinstance(found, type) else found
    return grader


def check_row(
    name: str, ground_truth: str, extra_info: Mapping[str, object], *, math: str = "math_verify"
) -> None:
    """Refuse a data row without a usable right answer, before anything is sampled for it.

    Rows of a user's function are not checked.

    Args:
        name: of the row's verifier, as :meth:`SourceTable.name_for` gives it.
        ground_truth: the row's.
        extra_info: the row's.
        math: what "math" stands for, ``reward.math``.

    Raises:
        ValueError: in one line, what is wrong with the row.
    """
    if name == CODE:
        module = importlib.import_module("sod_mcore.rewards.code.unit_tests")
        module.check_tests(ground_truth)
        return
    place = _ROW_CHECKS.get(math if name == "math" else name)
    if place is not None:
        path, _, attribute = place.partition(":")
        getattr(importlib.import_module(path), attribute)(ground_truth, extra_info)


@dataclass(frozen=True)
class SourceTable:
    """Names of verifiers by prefix of ``data_source``; the longest prefix that fits decides.

    Attributes:
        user: ``reward.verifiers``. Where none of its prefixes fits, `BUILT_IN_SOURCES` is used.
    """

    user: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        """All names in both tables."""
        return frozenset([*self.user.values(), *BUILT_IN_SOURCES.values()])

    def name_for(self, data_source: str) -> str:
        """The name of a row's verifier.

        Raises:
            ValueError: no prefix fits; the message lists those that are known.
        """
        for table in (self.user, BUILT_IN_SOURCES):
            fitting = [prefix for prefix in table if data_source.startswith(prefix)]
            if fitting:
                return table[max(fitting, key=len)]
        known = ", ".join(repr(prefix) for prefix in sorted({*self.user, *BUILT_IN_SOURCES}))
        raise ValueError(
            f"data_source = {data_source!r}: no verifier is registered for it. Prefixes with a "
            f"verifier: {known}. Name one for it in reward.verifiers (docs/rewards.md)"
        )


@dataclass(frozen=True)
class VerifierRegistry:
    """The verifiers themselves.

    Attributes:
        table: their names by source.
        verifiers: by name, all of ``table.names``.
    """

    table: SourceTable
    verifiers: Mapping[str, Verifier]

    def for_source(self, data_source: str) -> Verifier:
        """The verifier of a row.

        Raises:
            ValueError: there is none; see :meth:`SourceTable.name_for`.
        """
        return self.verifiers[self.table.name_for(data_source)]
