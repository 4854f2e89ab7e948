"""Plays the interpreter of SGLang's environment: engines and routers that start in half a second.

Called with the command lines of ``serving/fleet/launch.py``. An engine's scores depend on the
file ``weights`` in its model's folder and on the ids, so that mixed-up models are noticed. Other
files there change its behaviour: ``die_at_start``, ``port_taken`` (the first start finds its port
in use), ``port_taken_stays`` (and does not end, as SGLang where the other one does not answer),
``inner_port_taken`` (a port that is not the one on which it listens),
``die_later``, ``never_ready``, ``ignores_sigterm``; and how it scores: ``unsteady``,
``heeds_temperature``, ``shifted`` (unless it scores from the first token on).
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import signal
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web


def run_engine(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    for name in ("--model-path", "--host", "--port"):
        parser.add_argument(name, required=True)
    options, _ = parser.parse_known_args(arguments)
    folder = Path(options.model_path)
    if (folder / "die_at_start").exists():
        sys.exit("not enough memory for this model")
    for name in ("port_taken", "port_taken_stays"):
        if (folder / name).exists():
            (folder / name).unlink()
            address = (options.host, int(options.port))
            print(f"[Errno 98] attempting to bind on {address}: address already in use", flush=True)
            time.sleep(600 if name == "port_taken_stays" else 0)
            sys.exit(1)
    if (folder / "inner_port_taken").exists():
        print("Port 8998 is already in use, trying port 8999", flush=True)
        print("[Errno 98] ('127.0.0.1', 8998): address already in use", flush=True)
        time.sleep(2)  # not ready at once
    # As SGLang has its scheduler: a child in the same process group.
    scheduler = multiprocessing.Process(target=time.sleep, args=(600,), daemon=True)
    scheduler.start()
    if (folder / "ignores_sigterm").exists():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    calls = itertools.count()

    async def health(request: web.Request) -> web.Response:
        if (folder / "die_later").exists():
            print("the device fell off the bus", flush=True)
            os._exit(3)
        return web.Response(status=503 if (folder / "never_ready").exists() else 200)

    async def generate(request: web.Request) -> web.Response:
        body = await request.json()
        ids, start = body["input_ids"], body["logprob_start_len"]
        weights = (folder / "weights").read_text()
        if (folder / "unsteady").exists():
            weights += str(next(calls))
        temperature = 1.0
        if (folder / "heeds_temperature").exists():
            temperature = body["sampling_params"]["temperature"]
        shift = 1 if (folder / "shifted").exists() and start > 0 else 0
        entries: list[list[Any]] = [[None, ids[start], None]]
        for position in range(start + 1, len(ids)):
            text = f"{weights} {ids[: position + 1 - shift]}"
            logprob = -(zlib.crc32(text.encode()) % 1000) / 100 / temperature
            entries.append([logprob, ids[position], None])
        meta = {"input_token_logprobs": entries, "weight_version": "0"}
        return web.json_response({"output_ids": [], "meta_info": meta})

    async def alive(request: web.Request) -> web.Response:
        return web.json_response({"weight_version": "0"})

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"max_model_len": 77}]})

    application = web.Application()
    application.router.add_get("/health", health)
    application.router.add_get("/server_info", alive)
    application.router.add_get("/model_info", alive)
    application.router.add_get("/v1/models", models)
    application.router.add_post("/generate", generate)
    web.run_app(
        application,
        host=options.host,
        port=int(options.port),
        print=None,
        handle_signals=not (folder / "ignores_sigterm").exists(),
    )


def run_router(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker-urls", nargs="+", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", required=True)
    options, _ = parser.parse_known_args(arguments)
    workers = itertools.cycle(options.worker_urls)

    async def ready(request: web.Request) -> web.Response:
        return web.Response()

    async def generate(request: web.Request) -> web.Response:
        body = await request.read()
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{next(workers)}/generate", data=body) as response,
        ):
            return web.json_response(await response.json())

    application = web.Application()
    application.router.add_get("/readiness", ready)
    application.router.add_post("/generate", generate)
    web.run_app(application, host=options.host, port=int(options.port), print=None)


if __name__ == "__main__":
    if "sglang.launch_server" in sys.argv:
        run_engine(sys.argv)
    else:
        run_router(sys.argv)
