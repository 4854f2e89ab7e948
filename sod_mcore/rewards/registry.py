"""Chooses a verifier for each data row, by the row's own source.

A batch mixes sources; a choice made once by its first row would score the others by wrong rules.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from sod_mcore.rewards.interface import Verifier


@dataclass(frozen=True)
class VerifierRegistry:
    """Verifiers by prefix of `data_source`; the longest prefix that fits decides."""

    verifiers: Mapping[str, Verifier]

    def for_source(self, data_source: str) -> Verifier:
        """The verifier of a row.

        Raises:
            ValueError: no prefix fits; the message lists those that are known.
        """
        fitting = [prefix for prefix in self.verifiers if data_source.startswith(prefix)]
        if not fitting:
            known = ", ".join(repr(prefix) for prefix in sorted(self.verifiers)) or "none"
            raise ValueError(
                f"data_source = {data_source!r}: no verifier is registered for it. "
                f"Prefixes with a verifier: {known}. Rename it, or write one (CONTRIBUTING.md)"
            )
        return self.verifiers[max(fitting, key=len)]
