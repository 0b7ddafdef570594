"""A bounded load on a server of this machine: how long its clients wait, and whether the answers are right."""

from __future__ import annotations

import asyncio
import ipaddress
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

from lorakernels.backend import BackendError
from lorakernels.tools import serve
from lorakernels.tools.load_test import report
from lorakernels.tools.load_test.servers import free_port, running, write_random_adapter
from lorakernels.tools.load_test.traffic import Answer, Client, Request, Traffic, run

BESIDE = ("none", "vllm")  # the same server without LoRA, and with vLLM's own


def check_is_here(url: str) -> None:
    """Raise ValueError unless the address is this machine's own."""
    host = urlsplit(url).hostname or ""
    try:
        here = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        here = False
    if not here:
        raise ValueError(f"--url {url} is not on this machine; expected http://127.0.0.1:PORT or http://localhost:PORT")


class Found(NamedTuple):
    """Of the load on one server."""

    requests: list[Request]
    answers: list[Answer]
    expected: dict[Any, Answer]  # by model and prompt, asked alone beforehand

    @property
    def summary(self) -> report.Row:
        return report.summary(*self)


async def measure(client: Client, name: str, traffic: Traffic, *, concurrency: int, adapted: bool = True) -> Found:
    """The load on one server, which is asked for each answer alone first.

    `adapted`: whether its adapters are asked for; else every request is the base model's.
    """
    base, adapters = await client.models()
    requests = traffic.requests_to(base, adapters)
    if not adapted:
        requests = [replace(each, model=base) for each in requests]
    longest = {(each.model, each.prompt): each for each in sorted(requests, key=lambda each: each.tokens)}
    expected = {}
    for key, request in tqdm(longest.items(), desc=f"{name}, each alone", unit="request"):
        expected[key] = await client.ask(request)
        if expected[key].error is not None:
            raise BackendError(f"{request.model} gives no answer alone: {expected[key].error}")
    with tqdm(total=len(requests), desc=f"{name}, the load", unit="request") as bar:
        answers = await run(client.ask, requests, concurrency=concurrency, answered=lambda _: bar.update())
    return Found(requests, answers, expected)


def load_test(
    traffic: Traffic,
    *,
    url: str | None = None,
    model: str | None = None,
    adapters: Sequence[str] = (),
    random_adapters: int = 8,
    ranks: Sequence[int] = (8, 16, 32, 64),
    max_adapters: int | None = None,
    beside: Sequence[str] = (),
    concurrency: int = 64,
    cached: bool = False,
    dtype: str | None = None,
    own: Sequence[str] = (),
) -> dict[str, Found]:
    """The load on a server that runs, or on one that is started for it, behind those that it is compared with.

    Args:
        url: of the server that runs; it is asked for all the adapters that it has.
        model: a folder, of which servers are started, without url.
        adapters: NAME=DIR each; if there are none, as many random ones are made.
        ranks: of the random ones, in turn.
        max_adapters: how many may be in one batch, as `serve` has it.
        beside: of BESIDE.
        concurrency: the most requests at once.
        cached: whether prefixes may come from the server's cache; what is asked alone beforehand then fills it.
        dtype, own: vLLM's.

    Raises:
        ModuleNotFoundError: there is no OpenAI client, or no vLLM to start.
        ValueError: what is asked for does not fit together, or the server is not on this machine.
        BackendError: a server does not start, or does not answer a request that is alone.
    """
    if (url is None) == (model is None):
        raise ValueError("a load test needs a server: expected either --url or --model")
    if unknown := set(beside) - set(BESIDE):
        raise ValueError(f"--beside {','.join(sorted(unknown))}; expected some of {','.join(BESIDE)}")
    if url is not None and beside:
        raise ValueError("--beside starts servers; expected --model with it, and no --url")
    if concurrency < 1:
        raise ValueError(f"--concurrency is {concurrency}; expected at least 1")

    def measured(name: str, url: str) -> Found:
        client = Client(url, cached=cached)
        return asyncio.run(measure(client, name, traffic, concurrency=concurrency, adapted=name != "none"))

    if url is not None:
        check_is_here(url)
        return {"server": measured("server", url.rstrip("/"))}
    assert model is not None
    found = {}
    with tempfile.TemporaryDirectory(prefix="lorakernels-load-test-") as folder:
        if not adapters:
            folders = [Path(folder, f"adapter-{i}") for i in range(random_adapters)]
            for i, each in enumerate(folders):
                write_random_adapter(Path(model), each, ranks[i % len(ranks)], seed=i)
            adapters = [f"{each.name}={each}" for each in folders]
        for name in (*(each for each in BESIDE if each in beside), "lorakernels"):
            port = free_port()
            server = serve.server(
                model,
                adapters,
                root=None,
                max_adapters=max_adapters,
                max_rank=None,
                options={"host": "127.0.0.1", "port": port, "dtype": dtype},
                own=own,
            )
            if name != "lorakernels":
                server.environment[serve.PLUGINS] = ""
            if name == "none":
                server = server._replace(command=server.without_lora)
            with running(server, port, Path(folder, f"{name}.log")) as url:
                found[name] = measured(name, url)
    return found
