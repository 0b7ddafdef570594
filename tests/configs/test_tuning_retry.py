"""A tuned config that turns out not to fit when it is launched: a warning once, and the next in line."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

import lorakernels as lk
from lorakernels.configs import table
from lorakernels.configs.config import KernelConfig
from lorakernels.configs.device import assume, example_of
from lorakernels.configs.heuristic import MULTI_OPERATIONS, heuristic
from lorakernels.configs.table import choose_with_source, clear, forced_configs, strike_out
from lorakernels.configs.table_file import Entry, Table, shipped_path, write_table
from lorakernels.kernels import multi_expand, multi_outer, multi_shrink, outer, shrink
from lorakernels.kernels.launch import launch, retried
from lorakernels.testing.budget import error

H100 = example_of("sm_90")
CPU = torch.device("cpu")
TUNED = KernelConfig(BLOCK_M=32, BLOCK_K=128, BLOCK_R=16, SPLIT=2, num_warps=4, num_stages=3)
SHRINK = Entry("shrink", 4096, 512, 512, 16, 2, TUNED)

pytestmark = pytest.mark.usefixtures("own_tables")


def ship(*entries: Entry) -> None:
    write_table(shipped_path(H100), Table("", H100.name, H100.arch, list(entries)))


def shrink_choice() -> table.Choice:
    return choose_with_source("shrink", 4096, 512, 512, 16, 2, CPU)


class Kernel:
    """Compiles as a kernel does that needs too much of a block with some configs."""

    fn, arg_names = None, ["x_ptr"]

    def __init__(self, name: str, refused: list[int]) -> None:
        self.name, self.refused, self.grids = name, refused, []

    def run(self, *, grid: tuple[int, ...], num_stages: int, **_: Any) -> None:
        self.grids.append(grid)
        if num_stages in self.refused:
            raise OutOfResources(300_000, 232_448, "shared memory")


def stages(count: int) -> KernelConfig:
    return dataclasses.replace(TUNED, num_stages=count)


def launcher(kernel: Kernel) -> Callable[[], str]:
    @retried("shrink")
    def run() -> str:
        config = shrink_choice().config
        launch(kernel, (config.BLOCK_M,), {"x_ptr": torch.empty(0)}, {}, config)
        return f"{config.num_stages} stages"

    return run


@pytest.fixture
def as_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launch on tensors of a CPU says of its device."""
    monkeypatch.setattr(table, "device_of", lambda device: H100)


def test_what_does_not_fit_when_it_is_launched_is_a_warning_once(as_h100: None) -> None:
    ship(SHRINK, dataclasses.replace(SHRINK, M=1, config=stages(5)))
    default = heuristic("shrink", 4096, 512, 512, 16, 2, "sm_90", False)
    kernel = Kernel("shrink", refused=[3])
    run = launcher(kernel)
    with pytest.warns(RuntimeWarning) as caught:
        assert [run(), run()] == ["5 stages"] * 2  # the next in line, another entry
        kernel.refused.append(5)
        assert [run(), run()] == ["4 stages"] * 2
    assert [message for w in caught if "shared memory, Required: 300000" in (message := str(w.message))]
    assert len(caught) == 2 and all("lorakernels tune" in str(w.message) for w in caught)
    assert shrink_choice() == (default, "heuristic") and default.num_stages == 4
    # The grid is that of the config which was launched.
    assert kernel.grids == [(32,)] * 4 + [(default.BLOCK_M,)] * 2
    kernel.refused.append(4)
    with pytest.raises(OutOfResources):  # nothing is left
        run()
    clear()
    assert shrink_choice().config == TUNED


def test_a_config_that_was_asked_for_is_not_replaced(as_h100: None) -> None:
    ship(SHRINK)
    kernel = Kernel("shrink", refused=[3])
    with forced_configs({"shrink": TUNED}), pytest.raises(OutOfResources):
        launcher(kernel)()
    assert len(kernel.grids) == 1 and not strike_out("shrink", stages(7), CPU, "not in a table")


def test_the_heuristics_own_config_is_tried_no_third_time(as_h100: None) -> None:
    default = heuristic("shrink", 4096, 512, 512, 16, 2, "sm_90", False)
    ship(dataclasses.replace(SHRINK, config=default))
    kernel = Kernel("shrink", refused=[default.num_stages])
    run = launcher(kernel)
    with pytest.warns(RuntimeWarning, match="out of resource"), pytest.raises(OutOfResources):
        run()
    assert len(kernel.grids) == 2


def test_threads_that_are_refused_at_once_both_go_on(as_h100: None) -> None:
    ship(SHRINK)
    both = threading.Barrier(2, timeout=60)

    class Together(Kernel):
        def run(self, *, num_stages: int, **arguments: Any) -> None:
            if num_stages in self.refused:
                both.wait()
            super().run(num_stages=num_stages, **arguments)

    run = launcher(Together("shrink", refused=[3]))
    with pytest.warns(RuntimeWarning, match="out of resource"), ThreadPoolExecutor(2) as pool:
        threads = [pool.submit(copy_context().run, run) for _ in range(2)]  # on the assumed H100
        assert [thread.result() for thread in threads] == ["4 stages"] * 2


def test_a_choice_made_while_its_config_is_struck_out_is_not_kept(
    as_h100: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship(SHRINK)

    def described(entry: Entry) -> str:  # the last that is asked for before the choice is kept
        assert strike_out("shrink", TUNED, CPU, "too much")
        return "entry"

    with monkeypatch.context() as patch:
        patch.setattr(Entry, "__str__", described)
        assert shrink_choice().config == TUNED
    with pytest.warns(RuntimeWarning, match="too much"):
        assert shrink_choice().source == "heuristic"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is assumed: for the interpreter")
@pytest.mark.parametrize("operation", ["shrink", "outer", *MULTI_OPERATIONS])
def test_launchers_take_the_heuristic_where_the_table_does_not_fit(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole path: the first launch raises, the second's grid, planes and form are the heuristic's."""
    odd = KernelConfig(64, 32, 32, 32, SPLIT=1, num_stages=5)
    slots = 2 if operation.startswith("multi") else 1
    ship(Entry(operation, 6, 40, 40, 8, 4, odd, {}, slots))
    name = f"{operation}_kernel"
    module = {"shrink": shrink, "outer": outer, "multi_shrink": multi_shrink, "multi_expand": multi_expand}
    module = module.get(operation, multi_outer)
    real, tried = getattr(module, name), []

    class Tight:
        fn, arg_names = real.fn, real.arg_names

        def run(self, *, num_stages: int, **arguments: Any) -> None:
            tried.append(num_stages)
            if num_stages == 5:
                raise OutOfResources(300_000, 232_448, "shared memory")
            real.run(num_stages=num_stages, **arguments)

    monkeypatch.setattr(module, name, Tight())
    x, weight = torch.randn(6, 40), torch.randn(40, 40) / 40**0.5
    A, B = (torch.randn(2, 8, 40) / 40**0.5).requires_grad_(), torch.randn(2, 40, 8, requires_grad=True)
    plan = lk.BatchPlan(2, 6, max_rank=8, device="cpu")
    plan.update([0, 1, 1, 0, 0, 1], [8, 8], [1.0, 1.0])

    def results(impl: str) -> list[torch.Tensor]:
        if operation == "outer":
            y = lk.lora_linear(x, weight, A[0], B[0], impl=impl)
        elif operation == "shrink":
            from lorakernels.kernels.shrink import shrink as launch_shrink

            return [x @ A[0].t() if impl == "torch" else launch_shrink(x, A[0])[0]]
        else:
            y = lk.multi_lora_linear(x, weight, A, B, plan, impl=impl)
        return [y, *torch.autograd.grad(y.sin().sum(), (A, B))]

    expected = results("torch")
    with assume("sm_90"), pytest.warns(RuntimeWarning, match=f"{operation}, entry M=6 .* is not used: out of resource"):
        ours = results("triton")
    assert tried[0] == 5 and tried.count(5) == 1 and len(tried) > 1
    for one, other in zip(ours, expected, strict=True):
        assert error(one.detach(), other.detach().double()) < 1e-5
