"""`pytest` alone runs the tests in several processes; files named on the command line, and benchmarks, run in one."""

from __future__ import annotations

import os

import pytest

MOST = 4


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Before pytest-xdist, where it is installed, reads its options."""
    option = config.option
    if (
        "PYTEST_XDIST_WORKER" not in os.environ  # a worker that started workers would never end
        and config.pluginmanager.hasplugin("xdist")
        and config.args_source is pytest.Config.ArgsSource.TESTPATHS
        and option.numprocesses is None
        and not option.usepdb
        and not option.collectonly
    ):
        option.numprocesses = min(os.cpu_count() or 1, MOST)
        option.dist = "loadfile"  # what the tests of a file share is made once
