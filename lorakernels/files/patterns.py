"""Regular expressions over module names. They come from files too, and some take exponential time: all have an end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TypeVar

import regex

SECONDS_A_MATCH = 1.0
SECONDS_FOR_ALL = 30.0
# Patterns times modules; a million take 2 s, and a real adapter has under a tenth of that.
MAX_MATCHES = 4_000_000
T = TypeVar("T")


def fullmatch(pattern: str, name: str) -> bool:
    """Whether a pattern means all of a name; raises ValueError where it is none or takes too long."""
    return _means(_compiled(pattern), name)


def by_pattern(names: Iterable[str], patterns: Mapping[str, T], otherwise: T) -> dict[str, T]:
    """For each name the value of the first pattern that means it, whole or as a suffix (PEFT's rule for rank_pattern).

    Each pattern is compiled once: a converted file has one a module. Raises ValueError where a pattern is none, or
    where one or all of them take too long.
    """
    names = list(names)
    if len(names) * len(patterns) > MAX_MATCHES:
        most = f"expected at most {MAX_MATCHES:,} pairs"
        raise ValueError(f"{len(patterns):,} patterns for {len(names):,} modules; {most}")
    compiled = [(_compiled(rf"(.*\.)?({pattern})"), value) for pattern, value in patterns.items()]
    end, values = time.monotonic() + SECONDS_FOR_ALL, {}
    for name in names:
        values[name] = next((value for pattern, value in compiled if _means(pattern, name)), otherwise)
        if time.monotonic() > end:
            raise ValueError(f"it takes too long to look {len(names):,} modules up; expected simpler patterns")
    return values


def _compiled(pattern: str) -> regex.Pattern[str]:
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression ({error})") from error


def _means(pattern: regex.Pattern[str], name: str) -> bool:
    try:
        return pattern.fullmatch(name, timeout=SECONDS_A_MATCH) is not None
    except TimeoutError as error:
        seconds = f"it took over {SECONDS_A_MATCH} s on {name!r}"
        raise ValueError(f"{pattern.pattern!r} takes too long: {seconds}; expected a simpler pattern") from error
