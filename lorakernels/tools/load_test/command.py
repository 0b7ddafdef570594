"""`lorakernels load-test`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lorakernels import __version__
from lorakernels.integrations.vllm_sources import installed_version
from lorakernels.tools.load_test import Found, load_test
from lorakernels.tools.load_test.report import draw, print_table
from lorakernels.tools.load_test.traffic import Traffic


def main(arguments: argparse.Namespace, own: Sequence[str]) -> int:
    """The exit status: 1 where requests have failed."""
    traffic = Traffic(**{field.name: getattr(arguments, field.name) for field in fields(Traffic)})
    found = load_test(
        traffic,
        url=arguments.url,
        model=arguments.model,
        adapters=arguments.adapter,
        random_adapters=arguments.adapters,
        ranks=arguments.ranks,
        max_adapters=arguments.max_adapters,
        beside=[name for name in arguments.beside.split(",") if name],
        concurrency=arguments.concurrency,
        cached=arguments.cached,
        dtype=arguments.dtype,
        own=own,
    )
    summaries = {name: each.summary for name, each in found.items()}
    print_table(summaries)
    if arguments.out:
        versions = {"lorakernels": __version__, "vllm": installed_version()}
        servers = {name: summaries[name] | {"answers": _rows(each)} for name, each in found.items()}
        text = json.dumps({"versions": versions, "traffic": asdict(traffic), "servers": servers}, indent=1)
        Path(arguments.out).write_text(text + "\n", encoding="utf-8")
    if arguments.plot:
        draw({name: each.answers for name, each in found.items()}, arguments.plot)
    return int(any(each["failed"] for each in summaries.values()))


def _rows(found: Found) -> list[dict[str, Any]]:
    pairs = zip(found.requests, found.answers, strict=True)
    return [asdict(request) | {"prompt": len(request.prompt)} | answer._asdict() for request, answer in pairs]
