"""Regular expressions over module names. They come from files too, and some take exponential time: all have an end."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping
from typing import TypeVar

import regex

# Of one pattern: its characters, its groups and sets, and what its counts ({3}, {1,8}) make together. A pattern within
# them compiles in 50 ms and 3 MB; `a{99999999}` would take 23 GB.
MAX_LENGTH = 10_000
MAX_GROUPS = 500
MAX_REPEATS = 10_000
SECONDS_A_MATCH = 1.0
SECONDS_FOR_ALL = 30.0
# Patterns times modules; a million take 2 s, and a real adapter has under a tenth of that.
MAX_MATCHES = 4_000_000
# A name as a pattern, dots escaped or not, is not compiled: a converted file has one a module, and 1,400 take 0.2 s.
_NAME = re.compile(r"\^?(?:\w|\\?[.-])*\$?")
_COUNT = re.compile(r"[{,]\s*(\d+)")
# A group called from elsewhere, or the whole pattern from inside: `(?R)` takes memory until its time is over.
_CALL = re.compile(r"\(\?(?:R|&|P>|[+-]?\d)")
T = TypeVar("T")


def check_pattern(pattern: str, name: str) -> None:
    """Raise ValueError, with `name`, where a pattern is no regular expression, or one past the bounds."""
    if len(pattern) > MAX_LENGTH or not _NAME.fullmatch(pattern):
        _compiled(pattern, name)


def fullmatch(pattern: str, name: str) -> bool:
    """Whether a pattern means all of a name; raises ValueError where it is none or takes too long."""
    return _means(_compiled(pattern), name)


def matches(name: str, patterns: str | Iterable[str]) -> bool:
    """Whether a full name is meant: by a regular expression for all of it, or by one of several suffixes."""
    if isinstance(patterns, str):
        return fullmatch(patterns, name)
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in patterns)


def by_pattern(names: Iterable[str], patterns: Mapping[str, T], otherwise: T) -> dict[str, T]:
    """For each name the value of the first pattern that means it, whole or as a suffix (PEFT's rule for rank_pattern).

    Each pattern is compiled once: a converted file has one a module. Raises ValueError where a pattern is none, or
    where one or all of them take too long.
    """
    names = list(names)
    if len(names) * len(patterns) > MAX_MATCHES:
        most = f"expected at most {MAX_MATCHES:,} pairs"
        raise ValueError(f"{len(patterns):,} patterns for {len(names):,} modules; {most}")
    end, compiled, values = time.monotonic() + SECONDS_FOR_ALL, [], {}
    for pattern, value in patterns.items():
        compiled.append((_compiled(pattern, around=r"(.*\.)?({})"), value))
        _check_time(end, f"compile {len(patterns):,} patterns")
    for name in names:
        values[name] = next((value for pattern, value in compiled if _means(pattern, name)), otherwise)
        _check_time(end, f"look {len(names):,} modules up")
    return values


def _check_time(end: float, what: str) -> None:
    if time.monotonic() > end:
        raise ValueError(f"it takes too long to {what}; expected fewer or simpler patterns")


def _compiled(pattern: str, name: str = "a pattern", around: str = "{}") -> regex.Pattern[str]:
    shown = f"{name} is {pattern[:80]!r}" + ("…" if len(pattern) > 80 else "")
    groups = pattern.count("(") + pattern.count("[")
    counts = (int(digits) if len(digits) < 10 else 10**9 for digits in _COUNT.findall(pattern))
    repeats = math.prod(max(count, 1) for count in counts) if len(pattern) <= MAX_LENGTH else 1
    bounds = {"characters": (len(pattern), MAX_LENGTH), "groups": (groups, MAX_GROUPS)}
    for what, (number, most) in {**bounds, "repetitions": (repeats, MAX_REPEATS)}.items():
        if number > most:
            raise ValueError(f"{shown}, with {what} past the {most:,} of a pattern; expected a simpler one")
    if _CALL.search(pattern):
        raise ValueError(f"{shown}, which calls a group; expected a pattern as Python's re has them")
    try:
        return regex.compile(around.format(pattern))
    except (regex.error, RecursionError) as error:
        raise ValueError(f"{shown}, which is not a regular expression ({error})") from error


def _means(pattern: regex.Pattern[str], name: str) -> bool:
    try:
        return pattern.fullmatch(name, timeout=SECONDS_A_MATCH) is not None
    except TimeoutError as error:
        seconds = f"it took over {SECONDS_A_MATCH} s on {name!r}"
        raise ValueError(f"{pattern.pattern!r} takes too long: {seconds}; expected a simpler pattern") from error
