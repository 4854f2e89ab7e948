"""What every section of settings is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
"""Unknown keys are refused; attribute docstrings become the fields' documentation."""

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]


HUB_PREFIX = "hf:"
"""Begins the name of data that lie on the Hugging Face hub and not in a file."""


class ConfigError(Exception):
    """A setting that cannot work; the message names the field, the value and the mend."""
