"""Every sample of an evaluation, one JSON line each, written chunk by chunk, read on a restart.

A folder holds samples of one setting only; ``settings.json`` tells which. More samples, seeds and
data sets may be added to it.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sod_mcore.config import ConfigError
from sod_mcore.files import naming, write_text
from sod_mcore.trajectory import Message, Trajectory

SAMPLES_FILE = "samples.jsonl"
SETTINGS_FILE = "settings.json"
_BLOCK_BYTES = 1 << 20

Settings = Mapping[str, Any]
"""What the samples depend on, by dotted name."""


@dataclass(frozen=True)
class Sample:
    """One trajectory as evaluation keeps it; a line of ``samples.jsonl``.

    Attributes:
        data_set: name of the benchmark file.
        prompt_id: the problem.
        data_source: source of the problem's row.
        seed: the repetition.
        index: 0, 1, ... within problem and seed.
        temperature: of sampling.
        reward: as in training.
        is_correct: the verifier's verdict.
        category: the verdict in a word.
        prediction: the answer as the verifier extracted it.
        turns: assistant turns.
        tool_calls: calls made.
        failed_calls: those that failed.
        response_tokens: tokens after the prompt, observations included.
        end_reason: why the conversation ended.
        messages: the conversation; left out when samples are read for their numbers.
    """

    data_set: str
    prompt_id: str
    data_source: str
    seed: int
    index: int
    temperature: float
    reward: float
    is_correct: bool
    category: str
    prediction: str
    turns: int
    tool_calls: int
    failed_calls: int
    response_tokens: int
    end_reason: str
    messages: tuple[Message, ...] = ()


def sample_of(
    trajectory: Trajectory, *, data_set: str, seed: int, index: int, temperature: float
) -> Sample:
    """The line of one finished trajectory."""
    return Sample(
        data_set=data_set,
        prompt_id=trajectory.group_id,
        data_source=trajectory.data_source,
        seed=seed,
        index=index,
        temperature=temperature,
        reward=float(trajectory.reward),
        is_correct=bool(trajectory.is_correct),
        category=trajectory.category,
        prediction=trajectory.prediction,
        turns=trajectory.num_turns,
        tool_calls=len(trajectory.tool_succeeded),
        failed_calls=sum(not succeeded for succeeded in trajectory.tool_succeeded),
        response_tokens=len(trajectory) - trajectory.prompt_length,
        end_reason=trajectory.end_reason,
        messages=trajectory.messages,
    )


class SampleStore:
    """The samples of one folder; one process at a time may have it open."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        """Open or begin ``folder``; a last line that a crash cut short is removed.

        Raises:
            ConfigError: the folder was begun with other settings, is in use, or is damaged.
        """
        self.path = folder / SAMPLES_FILE
        folder.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            self._lock()
            _agree_on_settings(folder / SETTINGS_FILE, settings)
            self._cut_torn_line()
            self._taken: dict[tuple[int, str], set[int]] = {}
            for sample in read_samples(self.path):
                self._take(sample)
        except BaseException:
            self._file.close()
            raise

    def taken(self, seed: int, prompt_id: str) -> frozenset[int]:
        """Indices of the samples that are there."""
        return frozenset(self._taken.get((seed, prompt_id), ()))

    def append(self, samples: Sequence[Sample]) -> None:
        """Write samples; they are on disk on return."""
        lines = [json.dumps(dataclasses.asdict(s), ensure_ascii=False) + "\n" for s in samples]
        with naming(self.path):
            self._file.write("".join(lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        for sample in samples:
            self._take(sample)

    def close(self) -> None:
        """Let another process have the folder."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _take(self, sample: Sample) -> None:
        self._taken.setdefault((sample.seed, sample.prompt_id), set()).add(sample.index)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"evaluation.output is {self.path.parent}, where another evaluation runs; wait for "
                "it, or give another folder"
            ) from error

    def _cut_torn_line(self) -> None:
        """Truncate behind the last line break, looked for from the end: the file may be large."""
        end = self._file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _BLOCK_BYTES)
            self._file.seek(start)
            line_break = self._file.read(end - start).rfind(b"\n")
            if line_break >= 0:
                self._file.truncate(start + line_break + 1)
                return
            end = start
        self._file.truncate(0)


def read_samples(path: Path) -> Iterator[Sample]:
    """The samples of a file, without their messages.

    Raises:
        ConfigError: a line is not a sample.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                tree = json.loads(line)
                yield Sample(**{**tree, "messages": ()})
            except (ValueError, TypeError) as error:
                raise ConfigError(
                    f"{path}, line {number} is not a sample ({error}); remove the line, or give "
                    "another evaluation.output"
                ) from error


def _agree_on_settings(path: Path, settings: Settings) -> None:
    """Write the settings, or refuse where samples were drawn with another value of one of them."""
    is_empty = not (path.parent / SAMPLES_FILE).stat().st_size
    kept: dict[str, Any] = {} if is_empty or not path.exists() else json.loads(path.read_text())
    plain = json.loads(json.dumps(settings))
    for name, value in plain.items():
        if name in kept and kept[name] != value:
            raise ConfigError(
                f"{name} is {value!r}, but the samples in {path.parent} were drawn with "
                f"{kept[name]!r}; give another evaluation.output, or the old value"
            )
    write_text(path, json.dumps({**kept, **plain}, indent=2) + "\n")
