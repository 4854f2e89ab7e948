"""Functions of the user's that settings name as ``package.module:function``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from sod_mcore.config import ConfigError


def import_function(setting: str, name: str, choices: str) -> Callable[..., Any]:
    """The function that a setting names.

    Args:
        setting: what to call the setting in an error, as "algorithm.weighting is".
        name: ``package.module:function``.
        choices: what the setting may be, in words.

    Raises:
        ConfigError: the name has another form, or it cannot be imported or called.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"{setting} {name!r}; it must be {choices}")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{setting} {name!r}, which cannot be imported ({error}); it must be {choices}, "
            "importable where the run starts: installed, or in a folder that PYTHONPATH names"
        ) from error
    if not callable(function):
        raise ConfigError(f"{setting} {name!r}, which is no plain function; it must be {choices}")
    found: Callable[..., Any] = function
    return found
