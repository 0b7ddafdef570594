"""Work on many items in several processes, where an item may take its process down."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

Answer = TypeVar("Answer")


def in_processes(work: Callable[[int], Answer], count: int, jobs: int) -> Iterator[tuple[int, Answer | None]]:
    """(index, work(index)) for each index below `count`, as they come; None where the process crashed.

    A crash costs its own item only: no pool of the standard library does that. What `work` raises is raised here. The
    processes are forked, for what `work` needs may not pickle; without fork, or with one job, it runs in this process.
    """
    jobs = min(jobs, count) if "fork" in multiprocessing.get_all_start_methods() else 1
    if jobs <= 1:
        for index in range(count):
            yield index, work(index)
        return
    fork: Any = multiprocessing.get_context("fork")

    def start() -> Connection:
        ours, theirs = fork.Pipe()
        fork.Process(target=_serve, args=(work, theirs), daemon=True).start()
        theirs.close()
        return ours

    waiting = iter(range(count))
    running: dict[Connection, int] = {}

    def give(connection: Connection) -> None:
        index = next(waiting, None)
        connection.send(index)
        if index is not None:
            running[connection] = index

    for _ in range(jobs):
        give(start())
    while running:
        ready: Any = wait(list(running))
        for connection in ready:
            index = running.pop(connection)
            try:
                answer = connection.recv()
            except EOFError:
                answer = None
                connection = start()
            if isinstance(answer, Exception):
                raise answer
            yield index, answer
            give(connection)


def _serve(work: Callable[[int], object], connection: Connection) -> None:
    for index in iter(connection.recv, None):
        try:
            connection.send(work(index))
        except Exception as error:
            connection.send(error)
