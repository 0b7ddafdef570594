"""Requests as many clients send them, and how a server answers: when each token came, and which it was."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

PROMPTS = 2  # different ones of each length
VOCABULARY = range(10, 400)  # tokens that every model has


@dataclass(frozen=True)
class Request:
    """What one client asks, `arrives` seconds after the start."""

    model: str
    prompt: tuple[int, ...]
    tokens: int
    arrives: float = 0.0


class Answer(NamedTuple):
    """Of a request; times are seconds after it arrived."""

    tokens: tuple[Any, ...]  # their numbers, or characters from a server that tells none
    times: tuple[float, ...] = ()  # of each part that came
    counts: tuple[int, ...] = ()  # tokens in each part
    error: str | None = None


@dataclass(frozen=True)
class Traffic:
    """Popularity by Zipf's law (the k-th adapter as often as 1 / k^zipf), arrivals of a Poisson process."""

    requests: int = 200
    rate: float = 8.0  # a second; 0: all at once
    zipf: float = 1.0
    base_share: float = 0.1
    prompt_tokens: tuple[int, ...] = (64,)
    output_tokens: tuple[int, ...] = (16,)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (("requests", 1, 100_000), ("rate", 0, 1e6), ("zipf", 0, 10), ("base_share", 0, 1)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {least} … {most:g}")
        for name in ("prompt_tokens", "output_tokens"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected lengths of at least 1")

    def requests_to(self, base: str, adapters: Sequence[str]) -> list[Request]:
        """The same for the same seed, but for whose they are."""
        chance = random.Random(self.seed)
        prompts = [tuple(chance.choices(VOCABULARY, k=length)) for length in self.prompt_tokens for _ in range(PROMPTS)]
        own = adapters or [base]
        weights = [1 / k**self.zipf for k in range(1, len(own) + 1)]
        requests, now = [], 0.0
        for _ in range(self.requests):
            now += chance.expovariate(self.rate) if self.rate else 0.0
            [model] = chance.choices(own, weights)
            if chance.random() < self.base_share:
                model = base
            requests.append(Request(model, chance.choice(prompts), chance.choice(self.output_tokens), now))
        return requests


async def run(
    ask: Callable[[Request], Awaitable[Answer]],
    requests: Sequence[Request],
    *,
    concurrency: int,
    answered: Callable[[Answer], object] = lambda answer: None,
) -> list[Answer]:
    """The answers to all, sent as they arrive; who finds `concurrency` before him waits, and his time runs."""
    free, began = asyncio.Semaphore(concurrency), time.perf_counter()

    async def one(request: Request) -> Answer:
        await asyncio.sleep(began + request.arrives - time.perf_counter())
        arrived = time.perf_counter()
        async with free:
            waited = time.perf_counter() - arrived
            answer = await ask(request)
        answer = answer._replace(times=tuple(waited + each for each in answer.times))
        answered(answer)
        return answer

    return await asyncio.gather(*map(one, requests))


class Client:
    """A server, by OpenAI's client."""

    def __init__(self, url: str, *, cached: bool = False) -> None:
        """`cached`: an answer may come from the cache of another request's."""
        try:
            import openai
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("a load test needs OpenAI's client: pip install openai") from error
        self.errors: tuple[type[Exception], ...] = (openai.OpenAIError,)
        key = os.environ.get("OPENAI_API_KEY", "none")
        self.api: Any = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=600)
        self._cached, self._numbers = cached, itertools.count()

    async def models(self) -> tuple[str, list[str]]:
        """The base model's name, and those of the adapters."""
        parents = {each.id: getattr(each, "parent", None) for each in (await self.api.models.list()).data}
        bases = [name for name, parent in parents.items() if parent is None]
        if not bases:
            raise ValueError("the server names no base model")
        return bases[0], [name for name, parent in parents.items() if parent is not None]

    async def ask(self, request: Request) -> Answer:
        """As a stream; what goes wrong is the answer's error."""
        own: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True}
        if not self._cached:
            own["cache_salt"] = f"{os.getpid()}-{next(self._numbers)}"
        tokens: list[Any] = []
        times, counts, began = [], [], time.perf_counter()
        try:
            stream = await self.api.completions.create(
                model=request.model, prompt=list(request.prompt), max_tokens=request.tokens, temperature=0,
                stream=True, extra_body=own,
            )  # fmt: skip
            async for part in stream:
                for choice in part.choices:
                    numbers = getattr(choice, "token_ids", None)
                    if numbers or choice.text:
                        tokens += numbers or choice.text
                        times.append(time.perf_counter() - began)
                        counts.append(len(numbers or [choice.text]))
        except self.errors as error:
            return Answer(tuple(tokens), tuple(times), tuple(counts), str(error))
        return Answer(tuple(tokens), tuple(times), tuple(counts))
