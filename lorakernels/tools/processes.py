"""Work on many items in several processes, where an item may take its process down."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Answer = TypeVar("Answer")


def in_processes(work: Callable[[int], Answer], count: int, jobs: int) -> Iterator[tuple[int, Answer | None]]:
    """(index, work(index)) for each index below `count`, as they come; None where the process crashed.

    A crash costs its own item only: no pool of the standard library does that. What `work` raises is raised here. A
    process an item is forked, for what `work` needs may not pickle; without fork, or with one job, it runs in this one.
    """
    jobs = min(jobs, count) if "fork" in multiprocessing.get_all_start_methods() else 1
    if jobs <= 1:
        for index in range(count):
            yield index, work(index)
        return
    fork: Any = multiprocessing.get_context("fork")
    waiting, running = iter(range(count)), dict[Connection, int]()
    while True:
        while len(running) < jobs and (item := next(waiting, None)) is not None:
            ours, theirs = fork.Pipe(duplex=False)
            fork.Process(target=_answer, args=(work, item, theirs), daemon=True).start()
            theirs.close()
            running[ours] = item
        if not running:
            return
        ready: Any = wait(list(running))
        for connection in ready:
            try:
                answer = connection.recv()
            except EOFError:
                answer = None
            if isinstance(answer, Exception):
                raise answer
            yield running.pop(connection), answer


def _answer(work: Callable[[int], object], index: int, connection: Connection) -> None:
    try:
        connection.send(work(index))
    except Exception as error:
        connection.send(error)
