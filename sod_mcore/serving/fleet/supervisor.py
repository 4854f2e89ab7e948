"""Starts a fleet, shows that its routes are right, keeps it alive, and stops it without a trace."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import aiohttp

from sod_mcore.config import ConfigError, EngineConfig, ServingConfig, serving_field
from sod_mcore.serving.client.json_http import EngineError
from sod_mcore.serving.client.scoring import ScoringError
from sod_mcore.serving.endpoints import (
    Endpoints,
    FleetError,
    ModelEndpoints,
    endpoints_path,
    process_start_ticks,
    read_endpoints,
    write_endpoints,
)
from sod_mcore.serving.fleet import launch, probe
from sod_mcore.serving.fleet.children import Children
from sod_mcore.serving.fleet.front_door import FrontDoor
from sod_mcore.serving.fleet.launch import Address
from sod_mcore.serving.fleet.model_folder import ModelFolder, read_model_folder
from sod_mcore.serving.fleet.places import LocalPlace, Place
from sod_mcore.serving.fleet.ray_room import check_engines_on
from sod_mcore.serving.fleet.self_test import check_scoring
from sod_mcore.serving.fleet.server import Server, ServerSpec, answer_status, until_ready
from sod_mcore.serving.fleet.sleep_file import sleep_path
from sod_mcore.serving.fleet.state import FleetStateFile
from sod_mcore.tasks import all_or_first_error

if TYPE_CHECKING:
    from sod_mcore.serving.fleet.ray_nodes import RayNodes


class Fleet:
    """Engines and routers of all models, and the front door before them.

    Args:
        serving: what to serve.
        directory: receives ``serving/*.log``, ``serving/endpoints.json`` and
            ``serving/state.json``.
        say: receives one line of progress at a time.
    """

    def __init__(
        self, serving: ServingConfig, directory: Path, say: Callable[[str], None] = print
    ) -> None:
        self._serving = serving
        self._directory = directory
        self._say = say
        self._device = launch.resolve_device(serving.device)
        self._nodes: RayNodes | None = None
        self._front_door: FrontDoor | None = None
        self._servers: list[Server] = []
        self._engines: dict[str, list[Server]] = {}
        self._routers: dict[str, Server] = {}
        self._endpoints: Endpoints | None = None
        self._awaited: set[str] = set()
        self._states = FleetStateFile(directory)
        self.children = Children()

    async def start(self) -> Endpoints:
        """Start everything, probe every route and write the addresses.

        Raises:
            FleetError: a process died or did not become ready in time, or a route is wrong.
            ConfigError: a model folder cannot be served, or another fleet serves this run.
        """
        launch.host_address(self._serving.host)
        check_engines_on(self._serving)
        await self._refuse_second_fleet()
        sleep_path(self._directory).unlink(missing_ok=True)
        models = self._serving.models
        folders = {
            name: read_model_folder(f"{serving_field(name)}.model_path", Path(engine.model_path))
            for name, engine in models.items()
        }
        for name, engine in models.items():
            launch.check_context_length(serving_field(name), engine, folders[name])
        if self._serving.engines_on == "ray":
            await self._join_ray()
        timeout = self._serving.start_timeout_seconds
        try:
            async with asyncio.timeout(timeout):
                started = await all_or_first_error(
                    [self._start_model(name, models[name], folders[name]) for name in models]
                )
        except TimeoutError as error:
            raise FleetError(
                f"the engines were not ready within serving.start_timeout_seconds={timeout:g}; "
                f"{self._unanswered()}the last lines of their logs:\n{self._all_tails()}"
            ) from error
        self._front_door = FrontDoor(
            {model.name: model.route for model in started},
            host=self._serving.host,
            port=self._serving.port,
            timeout_seconds=self._serving.request_timeout_seconds,
        )
        endpoints = Endpoints(
            front_door=await self._open_front_door(self._front_door),
            models={model.name: model for model in started},
            pid=os.getpid(),
            process_start=process_start_ticks(os.getpid()) or 0,
            hostname=socket.gethostname(),
        )
        await self._probe(endpoints)
        write_endpoints(endpoints, self._directory)
        self._endpoints = endpoints
        return endpoints

    async def watch(self) -> None:
        """Start again what dies; return never.

        Raises:
            FleetError: an engine or router has died too often, or the Ray cluster is gone.
        """
        watched = [server.keep() for server in self._servers]
        if self._nodes is not None:
            watched.append(self._nodes.watch())
        await all_or_first_error(watched)
        await asyncio.Event().wait()  # nothing here is ours

    async def stop(self) -> None:
        """Remove the addresses and end every process."""
        if self._endpoints is not None:
            endpoints_path(self._directory).unlink(missing_ok=True)
            sleep_path(self._directory).unlink(missing_ok=True)
            self._endpoints = None
        self._states.remove()
        if self._front_door is not None:
            await self._front_door.stop()
        try:
            if self._nodes is not None:
                await self._nodes.close()
        finally:
            self.children.stop()

    async def _refuse_second_fleet(self) -> None:
        try:
            running = read_endpoints(self._directory)
        except FleetError:
            return
        if running.is_elsewhere and not await _front_door_answers(running):
            return  # a machine that was lost could not remove its file
        raise ConfigError(
            f"process {running.pid} on {running.hostname} already serves "
            f"from {self._directory}; stop it, or set run.directory or serving.directory"
        )

    async def _start_model(
        self, name: str, engine: EngineConfig, folder: ModelFolder
    ) -> ModelEndpoints:
        begin = time.monotonic()
        if engine.addresses:
            urls = list(engine.addresses)
            self._say(f"{name}: waiting for {', '.join(urls)}")
            await all_or_first_error([self._until_answered(url) for url in urls])
        else:
            self._say(
                f"{name}: starting {engine.engines} engine(s) on {self._device} "
                f"with {engine.model_path}"
            )
            engines = [self._engine(name, engine, folder, i) for i in range(engine.engines)]
            self._engines[name] = engines
            urls = await all_or_first_error([server.start() for server in engines])
        if len(urls) == 1 and engine.addresses:
            route = urls[0]
        else:
            route = await self._start_router(name, urls)
        context_length = min([await self._context_length(url) for url in urls])
        self._say(f"{name}: ready at {route} after {time.monotonic() - begin:.0f} s")
        return ModelEndpoints(
            name=name,
            route=route,
            engines=tuple(urls),
            model_path=engine.model_path,
            context_length=context_length,
            vocab_size=folder.vocab_size,
        )

    @property
    def _is_colocated(self) -> bool:
        return self._serving.placement == "colocated"

    async def _join_ray(self) -> None:
        from sod_mcore.serving.fleet.ray_nodes import RayNodes

        self._nodes = RayNodes(self._serving)
        self._device = await self._nodes.reserve()

    def _engine(self, name: str, engine: EngineConfig, folder: ModelFolder, index: int) -> Server:
        place = launch.EnginePlace(name, index, self._device)
        log_path = self._log_path(f"{name}_engine_{index}")
        visible_gpus = None
        if self._nodes is not None:
            start_at: Place = self._nodes.place(engine, folder, place, log_path)
        else:
            environment = launch.engine_environment(self._serving, engine, place)
            visible_gpus = environment.get(launch.VISIBLE_GPUS)
            start_at = LocalPlace(
                f"{name}_engine_{index}",
                host=self._serving.host,
                command=partial(launch.engine_command, self._serving, engine, folder, place),
                environment=environment,
                log_path=log_path,
                children=self.children,
                say=self._say,
            )
        spec = ServerSpec(
            f"{name}_engine_{index}", name, "engine", start_at, log_path, visible_gpus
        )
        return self._server(spec)

    async def _start_router(self, name: str, engine_urls: Sequence[str]) -> str:
        def command(address: Address) -> list[str]:
            urls = [server.url for server in self._engines.get(name, [])] or engine_urls
            prometheus_port = launch.free_port("127.0.0.1")
            return launch.router_command(
                self._serving, urls, port=address.port, prometheus_port=prometheus_port
            )

        log_path = self._log_path(f"{name}_router")
        place = LocalPlace(
            f"{name}_router",
            host=self._serving.host,
            command=command,
            environment=None,
            log_path=log_path,
            children=self.children,
            say=self._say,
        )
        router = self._server(ServerSpec(f"{name}_router", name, "router", place, log_path))
        self._routers[name] = router
        return await router.start()

    def _server(self, spec: ServerSpec) -> Server:
        sleeps_in = self._directory if self._is_colocated else None
        server = Server(spec, self._serving, self._states, self._say, self._note_move, sleeps_in)
        self._servers.append(server)
        return server

    def _note_move(self, moved: Server) -> None:
        """Write where an engine is now; clients look there for one that is gone."""
        name = moved.spec.model
        assert self._endpoints is not None
        urls = tuple(server.url for server in self._engines[name])
        model = dataclasses.replace(self._endpoints.model(name), engines=urls)
        models = {**self._endpoints.models, name: model}
        self._endpoints = dataclasses.replace(self._endpoints, models=models)
        write_endpoints(self._endpoints, self._directory)
        self._routers[name].renew(f"must hear that {moved.spec.name} is at {moved.url}")

    async def _until_answered(self, url: str) -> None:
        """Wait for an engine that somebody else runs."""
        self._awaited.add(url)
        await until_ready(f"{url}/health")
        self._awaited.discard(url)  # two models may have the same engine

    def _unanswered(self) -> str:
        urls = ", ".join(sorted(self._awaited))
        return f"nothing answered {urls} (/health) with 200; " if urls else ""

    def _log_path(self, name: str) -> Path:
        return self._directory / "serving" / f"{name}.log"

    async def _context_length(self, engine_url: str) -> int:
        """What the engine itself says; it may be shorter than the model's own."""
        timeout = aiohttp.ClientTimeout(total=30)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(f"{engine_url}/v1/models") as response,
        ):
            response.raise_for_status()
            models = await response.json()
        return int(models["data"][0]["max_model_len"])

    async def _open_front_door(self, front_door: FrontDoor) -> str:
        try:
            return await front_door.start()
        except OSError as error:
            raise FleetError(
                f"serving.port is {self._serving.port}, which cannot be opened: {error}; 0 picks a "
                "free port"
            ) from error

    async def _probe(self, endpoints: Endpoints) -> None:
        try:
            tolerance = self._serving.probe_tolerance or probe.DEFAULT_TOLERANCE
            timeout = self._serving.request_timeout_seconds
            await check_scoring(endpoints, tolerance=tolerance, timeout_seconds=timeout)
            await probe.check_routes(endpoints, tolerance=tolerance, timeout_seconds=timeout)
        except (EngineError, ScoringError) as error:
            raise FleetError(f"the probe failed: {error}\n{self._all_tails()}") from error

    def _all_tails(self) -> str:
        folder = self._directory / "serving"
        return "\n".join(
            f"--- {path}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-10:])
            for path in sorted(folder.glob("*.log"))
        )


async def _front_door_answers(endpoints: Endpoints) -> bool:
    """Whether a fleet of another machine is there; one on its own loopback counts as being so."""
    host = urlsplit(endpoints.front_door).hostname or ""
    if host == "localhost" or host.startswith("127."):
        return True
    async with aiohttp.ClientSession() as session:
        return await answer_status(session, f"{endpoints.front_door}/health", 30.0) == 200
