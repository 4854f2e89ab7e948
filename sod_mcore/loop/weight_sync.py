"""Brings the student's weights to its engines after every step, and proves that they arrived.

A teacher that is an average of the student's weights gets that average in the same way.

The weights travel as a Hugging Face folder or as tensors (``serving.weight_sync``). Either way the
engines report the version and score a fixed probe; the trainer scores the same probe. A difference
means that the rollouts would come from another model than the one that is trained, so the run
stops. An engine that dies meanwhile does not stop it: the others get the weights, and it does when
it is there again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from sod_mcore.config import ServingConfig
from sod_mcore.loop.engine_watch import EngineWatch
from sod_mcore.serving.client.json_http import EngineError
from sod_mcore.serving.endpoints import Endpoints
from sod_mcore.serving.fleet.state import NOTICED_SECONDS
from sod_mcore.serving.sleep import EngineSleep
from sod_mcore.serving.weights.disk_transfer import DiskTransfer
from sod_mcore.serving.weights.kept_groups import KeptGroups
from sod_mcore.serving.weights.transfer import WeightTransfer, WeightUpdateError
from sod_mcore.serving.weights.update import probe_logprobs, update_weights
from sod_mcore.serving.weights.ways import tensor_transfer
from sod_mcore.student.conversion.export import NamedTensors
from sod_mcore.student.examples import TrainingExample
from sod_mcore.student.exchange import wait_for_all
from sod_mcore.student.rank_zero import on_rank_zero
from sod_mcore.student.student import Student

PROBE_TOKENS = 64
KEPT_VERSIONS = 2
SEND_ATTEMPTS = 4
"""Tries of one version, of which all but the first follow the death of an engine."""


class WeightMismatchError(RuntimeError):
    """Trainer and engine disagree about the log-probs of the probe."""


@dataclass(frozen=True)
class _Update:
    """One try to send the weights.

    Attributes:
        endpoints: the fleet with the engines that get them.
        version: their number.
        averaged: whether it is their average, for the teacher.
        probe: the trainer's log-probs of the probe; None to compare nothing.
        is_last_try: whether an engine that dies ends the run.
    """

    endpoints: Endpoints
    version: int
    averaged: bool
    probe: NDArray[np.float32] | None
    is_last_try: bool


@dataclass(frozen=True)
class _Sent:
    """How one try to send the weights ended.

    Attributes:
        difference: the largest one on the probe, nats.
        problem: what became of an engine that died; None if all is well.
    """

    difference: float = 0.0
    problem: str | None = None


@dataclass(frozen=True)
class WeightSync:
    """Publishes weight versions; every rank takes part, only rank 0 talks to the engines.

    Attributes:
        endpoints: the fleet; None on ranks other than 0.
        watch: which of its engines are there; None on ranks other than 0.
        tolerance: largest difference on the probe, nats.
        directory: holds the newest versions as Hugging Face folders when they travel by disk.
        probe_ids: int32 ``[n]``, the token ids that engine and trainer both score.
        teacher_follows: the teacher's engines get the average of the weights. Only their version is
            confirmed: the trainer has no model with the average to score the probe.
        groups: process groups with the engines; None on ranks other than 0, and where
            ``serving.weight_sync`` needs none.
        sleep: puts colocated engines to sleep and wakes them; None on ranks other than 0, and where
            engines have GPUs of their own.
    """

    student: Student
    endpoints: Endpoints | None
    watch: EngineWatch | None
    serving: ServingConfig
    tolerance: float
    directory: Path
    probe_ids: NDArray[np.int32]
    group: dist.ProcessGroup
    teacher_follows: bool = False
    groups: KeptGroups | None = None
    sleep: EngineSleep | None = None

    def publish(self, version: int) -> float | None:
        """Send the current weights as ``version``.

        Returns:
            the largest difference between trainer's and engines' log-probs of the probe, nats; None
            if the run was asked to stop while no engine was there, so that nothing was sent.

        Raises:
            WeightUpdateError: an engine did not take the weights; all engines stay paused.
            WeightMismatchError: that difference exceeds the tolerance.
            FleetError: no engine was there in time.
        """
        ours = self._trainer_logprobs()
        if self._is_colocated:
            self._give_memory_back()
        difference = self._send(version, averaged=False, probe=ours)
        if difference is not None and self.teacher_follows:
            self._send(version, averaged=True, probe=None)
        if self._is_colocated:
            self._wake_others()
        return difference

    def let_engines_sleep(self) -> None:
        """Take the GPUs of colocated engines; they wake when weights are published.

        Raises:
            FleetError: an engine keeps its memory.
        """

        def sleep() -> None:
            assert self.sleep is not None
            self.sleep.sleep()

        timeout = self.serving.restart_timeout_seconds + 3 * self.serving.request_timeout_seconds
        on_rank_zero(sleep, self.group, timedelta(seconds=timeout))

    @property
    def _is_colocated(self) -> bool:
        return self.serving.placement == "colocated"

    def _free_what_was_gathered(self) -> None:
        """Before colocated engines take their caches; rank 0 frees tensors on the way there
        (``EngineSleep``)."""
        if self._is_colocated:
            torch.cuda.empty_cache()

    def _give_memory_back(self) -> None:
        """What every rank's allocator keeps in reserve is not free for the engines."""
        torch.cuda.empty_cache()
        wait_for_all(self.group)
        if self.sleep is not None:
            self.sleep.end_training()

    def _wake_others(self) -> None:
        def wake() -> None:
            assert self.sleep is not None
            self.sleep.wake_others()

        timeout = 4 * self.serving.request_timeout_seconds
        on_rank_zero(wake, self.group, timedelta(seconds=timeout))

    def _send(
        self, version: int, *, averaged: bool, probe: NDArray[np.float32] | None
    ) -> float | None:
        """The weights to the student's engines, or their average to the teacher's."""
        send = self._send_folder if self.serving.weight_sync == "disk" else self._send_tensors
        for tries_left in reversed(range(SEND_ATTEMPTS)):
            endpoints = self._wait_for_engines(version, averaged)
            if endpoints is None:
                return None
            sent = send(_Update(endpoints, version, averaged, probe, tries_left == 0))
            if sent.problem is None:
                return sent.difference
        raise AssertionError("unreachable: the last try returns or raises")

    def _wait_for_engines(self, version: int, averaged: bool) -> Endpoints | None:
        """The fleet with the engines that are there, on every rank; None if the run is to stop.

        On its own, so that no rank waits in a collective for an engine that is started again.
        """

        def wait() -> Endpoints | None:
            assert self.endpoints is not None
            assert self.watch is not None
            return self.watch.begin_update(self.endpoints, _model(averaged), version)

        seconds = self.serving.restart_timeout_seconds + self.serving.request_timeout_seconds
        return on_rank_zero(wait, self.group, timedelta(seconds=seconds))

    def _send_folder(self, update: _Update) -> _Sent:
        folder = self.directory / _folder_name(update.version, update.averaged)
        self.student.export_hf(folder, bucket_bytes=self._bucket_bytes, averaged=update.averaged)
        self._free_what_was_gathered()

        def load() -> _Sent:
            sent = self._update_engines(DiskTransfer(folder), update)
            self._delete_other_versions(update.version, update.averaged)
            return sent

        return on_rank_zero(load, self.group, self._engines_timeout)

    def _send_tensors(self, update: _Update) -> _Sent:
        buckets = self.student.hf_tensors(self._bucket_bytes, averaged=update.averaged)
        if self.student.layout.rank != 0:
            _consume(buckets)
            self._free_what_was_gathered()

        def load() -> _Sent:
            try:
                way, device = self.serving.weight_sync, self.student.layout.device
                transfer = tensor_transfer(way, buckets, device, self.groups)
                return self._update_engines(transfer, update)
            finally:
                # Gathering is collective: when sending fails, the other ranks are still in it.
                _consume(buckets)

        return on_rank_zero(load, self.group, self._engines_timeout)

    @property
    def _engines_timeout(self) -> timedelta:
        """Longest time that rank 0 talks to the engines; beyond it, the other ranks give up.

        Each answer has its own limit, and a failure there is to be told by rank 0, not cut off by
        the timeout of collectives. One after the other come: pause, load, flush, continue, and for
        each engine its version and its probe; one more answer's time is for what is done between
        them.
        Sent as tensors, there are for each engine its description and the beginning of its update
        as well, and a group's forming and farewell; the others wait for one bucket's answers at a
        time while they gather the next, which run.collective_timeout_seconds bounds.
        """
        models = self.serving.models.values()
        engines = max(len(model.addresses) or model.engines for model in models)
        answers = 5 + 2 * engines if self.serving.weight_sync == "disk" else 7 + 4 * engines
        answers += 2 if self._is_colocated else 0  # weights' memory, then the cache's
        return timedelta(seconds=self.serving.request_timeout_seconds * answers)

    @property
    def _bucket_bytes(self) -> int:
        return self.serving.weight_bucket_mb << 20

    def _trainer_logprobs(self) -> NDArray[np.float32] | None:
        mask = np.ones(len(self.probe_ids), np.bool_)
        mask[0] = False
        micro_batch = [TrainingExample(self.probe_ids, mask)]
        is_first_replica = self.student.layout.data_parallel_rank == 0
        values = self.student.compute_logprobs([micro_batch if is_first_replica else []])
        return values[0] if values is not None else None

    def _update_engines(self, transfer: WeightTransfer, update: _Update) -> _Sent:
        """Send the weights to the engines that are there, and compare the probe (rank 0)."""
        requests_in_flight = self.serving.requests_in_flight
        try:
            update_weights(
                update.endpoints,
                _model(update.averaged),
                transfer,
                update.version,
                self.serving.request_timeout_seconds,
                # A teacher's scores of one trajectory must all be of the same weights.
                running_requests="retract" if update.averaged else requests_in_flight,
                follows_student=self.teacher_follows,
                sleep=self.sleep,
            )
            if update.probe is None:
                return _Sent()
            return _Sent(self._check_probe(update.endpoints, update.version, update.probe))
        except (WeightUpdateError, EngineError) as error:
            if update.is_last_try or not self._has_died(error):
                raise
            time.sleep(NOTICED_SECONDS)
            return _Sent(problem=str(error))

    def _has_died(self, error: Exception) -> bool:
        """Whether an engine failed that may come back: it was not there, or did not answer."""
        cause = error.__cause__ if isinstance(error, WeightUpdateError) else error
        gave_no_answer = isinstance(cause, EngineError) and cause.status is None
        return gave_no_answer and self.serving.max_restarts > 0

    def _check_probe(self, endpoints: Endpoints, version: int, ours: NDArray[np.float32]) -> float:
        timeout = self.serving.request_timeout_seconds
        theirs = probe_logprobs(endpoints, "student", self.probe_ids, timeout)
        difference = max(float(np.abs(engine[1:] - ours[1:]).max()) for engine in theirs)
        if not difference <= self.tolerance:
            raise WeightMismatchError(
                f"after weight version {version} the student's engine and the trainer differ by "
                f"{difference:.3g} nats on the probe; serving.probe_tolerance allows "
                f"{self.tolerance:g}"
            )
        return difference

    def _delete_other_versions(self, version: int, averaged: bool) -> None:
        """Keep the newest versions up to this one; later ones are of a run that was given up."""
        kept = {_folder_name(version - age, averaged) for age in range(KEPT_VERSIONS)}
        for folder in self.directory.glob(f"{_folder_prefix(averaged)}_*"):
            if folder.name not in kept:
                shutil.rmtree(folder)


def _model(averaged: bool) -> str:
    return "teacher" if averaged else "student"


def _consume(buckets: Iterator[NamedTensors]) -> None:
    for _ in buckets:
        pass


def _folder_name(version: int, averaged: bool) -> str:
    return f"{_folder_prefix(averaged)}_{version:06d}"


def _folder_prefix(averaged: bool) -> str:
    return "average" if averaged else "version"


def probe_token_ids(vocab_size: int, seed: int = 0) -> NDArray[np.int32]:
    """A fixed sequence of ordinary-looking ids that both sides score; int32 ``[PROBE_TOKENS]``."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, vocab_size, PROBE_TOKENS).astype(np.int32)
