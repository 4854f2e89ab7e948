"""A grader that is a function of the user's, named in ``reward.verifiers``."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sod_mcore.config import ConfigError
from sod_mcore.rewards.interface import Verdict, VerdictError, as_plain_number
from sod_mcore.user_functions import import_function

UserFunction = Callable[[str, str, Mapping[str, object]], float | bool | Verdict]
"""``function(response_text, ground_truth, extra_info)``."""


@dataclass(frozen=True)
class UserGrader:
    """Calls ``package.module:function``; holds its name only, so that any process can make one."""

    name: str

    def __reduce__(self) -> tuple[object, ...]:
        """Unpickled with its function imported, so that this takes no time from an answer."""
        return _import_and_make, (self.name,)

    def __call__(
        self, response_text: str, ground_truth: str, extra_info: Mapping[str, object]
    ) -> Verdict:
        """The function's verdict; its True is right, its False wrong, its number a share.

        Raises:
            ValueError: the function gave anything else, or raised this itself.
        """
        function = find_user_function(self.name)
        try:
            result = as_plain_number(function(response_text, ground_truth, extra_info))
        except VerdictError as error:
            raise ValueError(f"reward.verifiers: {self.name} made no verdict: {error}") from error
        if isinstance(result, Verdict):
            return self._with_plain_parts(result)
        if isinstance(result, bool):
            return Verdict("right" if result else "wrong")
        if isinstance(result, (int, float)) and 0.0 <= result <= 1.0:
            return Verdict("right" if result == 1.0 else "wrong", share=float(result))
        raise ValueError(
            f"reward.verifiers: {self.name} returned {result!r}; it must return True or False, a "
            "number from 0 to 1, or a Verdict"
        )

    def _with_plain_parts(self, verdict: Verdict) -> Verdict:
        parts = {}
        for key, value in verdict.parts.items():
            number = as_plain_number(value)
            if not isinstance(number, (int, float)):
                raise ValueError(
                    f"reward.verifiers: {self.name} returned a Verdict with parts[{key!r}] = "
                    f"{value!r}; give a number"
                )
            parts[str(key)] = float(number)
        return dataclasses.replace(verdict, parts=parts)


def _import_and_make(name: str) -> UserGrader:
    find_user_function(name)
    return UserGrader(name)


def find_user_function(name: str) -> UserFunction:
    """The function that ``package.module:function`` names.

    Raises:
        ConfigError: it cannot be imported, or cannot be called as a grader is.
    """
    choices = "the name of a verifier, or a function of yours as package.module:function"
    function = import_function("reward.verifiers names", name, choices)
    if inspect.iscoroutinefunction(function):
        raise ConfigError(
            f"reward.verifiers names {name!r}, which is no plain function; give a function of "
            "(response_text, ground_truth, extra_info)"
        )
    return function
