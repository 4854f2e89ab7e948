"""Asks engines that are down whether they can be used again, with pauses that grow.

An engine that only lacks weights is asked for its weight version. One that failed is also asked for
its health: SGLang 0.5.23 answers /health with 200 once its scheduler has done something since, a
second later at the earliest, and with 503 after 20 s while it is paused for new weights.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass

from sod_mcore.serving.client.json_http import EngineError, JsonHttp
from sod_mcore.serving.client.messages import parse_weight_version
from sod_mcore.serving.client.replicas import DownReason, Replica, Replicas

logger = logging.getLogger(__name__)

VERSION_SECONDS = 10.0
"""Longest wait for an engine's weight version, which it has at hand."""
HEALTH_SECONDS = 30.0
"""Longest wait for an engine's own verdict, which takes it 20 s where it is bad."""


@dataclass(frozen=True)
class Backoff:
    """Pauses that double up to a limit; a random half of each is left out, so that clients do not
    come back in step.

    Attributes:
        first_seconds: the first pause before anything is left out.
        longest_seconds: the limit.
    """

    first_seconds: float
    longest_seconds: float

    def seconds(self, failures: int) -> float:
        """The pause after that many failures, counted from 1."""
        doubled = self.first_seconds * 2.0 ** min(failures - 1, 60)
        return min(doubled, self.longest_seconds) * random.uniform(0.5, 1.0)


class Recovery:
    """Marks engines down, and up again when they answer and have the weights that are required.

    Args:
        http: used for the questions.
        backoff: pauses between them.
        locate: says where an engine is now, which may be another address than before.
    """

    def __init__(
        self,
        http: JsonHttp,
        backoff: Backoff,
        locate: Callable[[Replica], str] = lambda replica: replica.url,
    ) -> None:
        self._http = http
        self._backoff = backoff
        self._locate = locate
        self._checks: dict[Replica, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """Ask no more."""
        checks = self._checks.values()
        for check in checks:
            check.cancel()
        await asyncio.gather(*checks, return_exceptions=True)

    def mark_down(
        self, replicas: Replicas, replica: Replica, problem: str, reason: DownReason
    ) -> None:
        """Do not use an engine until it has proved what ``reason`` demands.

        Args:
            problem: what it said or did.
        """
        now = asyncio.get_running_loop().time()
        pause = 0.0 if reason == "unasked" else self._backoff.seconds(1)
        if replicas.mark_down(replica, problem, reason=reason, now=now, pause=pause):
            if replica in self._checks:
                self._checks[replica].cancel()
            self._checks[replica] = asyncio.create_task(self._check_until_up(replicas, replica))

    async def _check_until_up(self, replicas: Replicas, replica: Replica) -> None:
        loop = asyncio.get_running_loop()
        while not replica.is_up:
            await asyncio.sleep(replica.next_check - loop.time())
            try:
                problem, reason = await self._ask(replicas, replica)
            except Exception as error:
                # The check must go on whatever an engine answers: nobody else would use it again.
                logger.exception("%s cannot be asked", replica.url)
                problem, reason = f"{replica.url}: {error!r}", "failed"
            if problem is None:
                replicas.mark_up(replica)
            else:
                pause = self._backoff.seconds(replica.failed_checks + 1)
                now = loop.time()
                replicas.keep_down(replica, problem, reason=reason, now=now, pause=pause)

    async def _ask(self, replicas: Replicas, replica: Replica) -> tuple[str | None, DownReason]:
        """Why an engine cannot be used now, and what it has to prove next; no problem if it can."""
        try:
            if replica.down_reason == "failed":
                replica.url = self._locate(replica)
                await self._http.get(f"{replica.url}/health", HEALTH_SECONDS)
            if replicas.required_version is not None:
                answer = await self._http.get(f"{replica.url}/model_info", VERSION_SECONDS)
                replica.weight_version = parse_weight_version(answer["weight_version"])
        except EngineError as error:
            return str(error), "failed"
        except (KeyError, TypeError) as error:
            return f"{replica.url}/model_info cannot be read: {error!r}", "failed"
        # Looked at last, for another version may have been required in the meantime.
        if not replicas.has_required_version(replica):
            wanted = replicas.required_version
            return f"has weight version {replica.weight_version}, not {wanted}", "stale"
        return None, "stale"
