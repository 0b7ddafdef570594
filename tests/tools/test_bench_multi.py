"""Many adapters in one batch in `lorakernels bench`: the cases, what is right, the peers, the floor."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from lorakernels.backend import ENVIRONMENT, interpreter_on
from lorakernels.configs.data_sheet import data_sheet
from lorakernels.tools.bench import peers, run
from lorakernels.tools.bench.peer import Peer, Step, Tensors, by_formula, make_tensors
from lorakernels.tools.bench.peers import PEERS, choose_peers
from lorakernels.tools.bench.registry import Case, case_of

CASES = (
    Case(12, 24, 40, 4, dtype="float32", adapters=3),
    Case(12, 24, 40, 4, dtype="float32", adapters=6),
    Case(12, 24, 40, 32, dtype="float32", adapters=4, mixed=True),
    Case(1024, 24, 40, 4, adapters=8),
)
CPU = torch.device("cpu")
TORCH_PEERS = ("frozen", "ours-auto", "ours-torch", "ours-stacks", "loop", "bmm", "peft")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_run_of_many_adapters() -> None:
    rows = run.run(CASES, device=CPU, rounds=3)
    for case in CASES:
        own = {row["peer"]: row for row in rows if row["operation"] == "multi_lora_linear" and case_of(row) == case}
        assert list(own) == [peer.name for peer in choose_peers(None, True, CPU)]
        for name in TORCH_PEERS:
            row = own[name]
            assert row["status"] == "ok" and row["error_over_budget"] <= 1, row
            assert row["launches"] > 0 and row["bytes"] >= own["frozen"]["bytes"] > 0 and row["flops"] > 0
            assert row["share_of_memory_floor"] == pytest.approx(row["memory_floor"] / row["ratio"][1])
        assert own["vllm"]["status"] == "skipped" and "not installed" in own["vllm"]["reason"]
        assert own["ours-triton"]["status"] == "skipped" and own["frozen"]["memory_floor"] == 1.0
        assert f"memory floor {own['loop']['memory_floor']:.3f}" in run.line_of(own["loop"])
        assert own["ours-auto"]["adapter_bytes"] == case.paged_bytes()
        assert own["ours-stacks"]["adapter_bytes"] == own["vllm"]["adapter_bytes"] == case.padded_bytes()


def test_memory_floor() -> None:
    """4096 → 4096 in bfloat16 with r = 16: 64 tokens of so many adapters read so much more than the frozen layer."""
    floors = [Case(64, 4096, 4096, adapters=adapters).memory_floor for adapters in (1, 8, 16, 32, 64)]
    assert floors == pytest.approx([1.008, 1.06, 1.12, 1.24, 1.48], abs=0.01)
    decode, prefill = (Case(tokens, 4096, 4096, adapters=64) for tokens in (64, 8192))
    h200 = data_sheet("NVIDIA H200")
    assert decode.floor(h200) == decode.memory_floor
    operations_alone = 1 + prefill.low_rank_flops / prefill.frozen_flops
    assert prefill.floor(h200) == operations_alone == prefill.floor() == 1 + 16 / 2048


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tensors_of_many_adapters(case: Case) -> None:
    tensors = make_tensors(case, CPU, 0)
    stacks = tensors.stacks
    assert sum(stack.numel() * stack.element_size() for stack in stacks) == case.padded_bytes()
    table = tensors.plan(paged=True).tensors.pages
    assert table is not None
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*tensors.pages, table))
    assert held == case.paged_bytes() and case.adapter_bytes() <= case.paged_bytes()
    assert [A.shape[0] for A, _ in tensors.adapters] == list(case.ranks) and max(case.ranks) == case.r
    together = torch.cat([torch.arange(case.M)[tokens] for tokens in tensors.rows])
    assert together.sort().values.equal(torch.arange(case.M))
    assert all((tensors.slots[tokens] == slot).all() for slot, tokens in enumerate(tensors.rows))


@pytest.mark.parametrize("fault", ["another's adapter", "NaN", "no adapter", "half the scaling"])
def test_a_wrong_batch_gets_no_time(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Peer.make

    def make(peer: Peer, tensors: Tensors) -> Step:
        if peer.name != "loop":
            return right(peer, tensors)
        y, base = right(peer, tensors)()["y"], right(PEERS["frozen"], tensors)()["y"]
        if fault == "another's adapter":
            y = right(peer, dataclasses.replace(tensors, slots=tensors.slots.roll(1)))()["y"]
        wrong = {"another's adapter": y, "NaN": y / 0, "no adapter": base, "half the scaling": (y + base) / 2}[fault]
        return lambda: {"y": wrong}

    monkeypatch.setattr(Peer, "make", make)
    frozen, broken = run.run(CASES[:1], impl="loop", device=CPU, rounds=1)[:2]
    assert frozen["status"] == "ok" and "seconds" in frozen
    assert broken["status"] == "wrong" and broken["reason"].startswith("y: error")
    assert not {"seconds", "ratio", "share_of_memory_floor"} & set(broken)


def test_a_gather_has_its_limit() -> None:
    reason = PEERS["bmm"].why_not(Case(8192, 8192, 8192, 128, adapters=256), CPU)
    assert reason is not None and "32 GiB" in reason


def test_names_of_one_operation_only() -> None:
    """An implementation that only the other operation has is left out."""
    layer, many = (choose_peers("auto,eager,loop", many, CPU) for many in (False, True))
    assert [peer.name for peer in layer] == ["frozen", "ours-auto", "eager"]
    assert [peer.name for peer in many] == ["frozen", "ours-auto", "loop"]


def stand_in(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> ModuleType:
    """Modules by vLLM's names, whose `torch_ops` has these functions."""
    for name in ("vllm", "vllm.lora", "vllm.lora.ops", "vllm.lora.ops.torch_ops"):
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    vars(module).update(functions)
    return module


def bgmv_shrink(x: Any, weights: Any, out: Any, slots: Any, scaling: float = 1.0) -> None:
    out.copy_(scaling * torch.einsum("tk,trk->tr", x, weights[slots]))


def bgmv_expand(x: Any, weights: Any, out: Any, slots: Any, add_inputs: bool = True) -> None:
    out.add_(torch.einsum("tr,tnr->tn", x.to(out.dtype), weights[slots]))


def test_vllm_as_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """With operators of its signatures; one that has changed makes a row that says so, and takes no other along."""
    stand_in(monkeypatch, bgmv_shrink=bgmv_shrink, bgmv_expand=bgmv_expand)
    _, row = run.run(CASES[2:3], impl="vllm", device=CPU, rounds=1)[:2]
    assert row["status"] == "ok" and row["launches"] is None and row["bytes"] is None, row
    stand_in(monkeypatch, bgmv_shrink=lambda x, weights: None)
    frozen, row = run.run(CASES[2:3], impl="vllm", device=CPU, rounds=1)[:2]
    assert frozen["status"] == "ok" and row["status"] == "error" and row["reason"].startswith("TypeError: ")


@pytest.mark.parametrize("newer", [False, True])
def test_vllm_on_a_gpu(newer: bool) -> None:
    """Its metadata is made for the batch, and handed to both operators before the scaling."""

    class Meta:
        def prepare_tensors(self, slots: torch.Tensor) -> None:
            assert slots.dtype is torch.int32
            self.slots = slots.long()

    class Older(Meta):
        def meta_args(self, token_nums: int) -> tuple[Any, ...]:
            return (self.slots[:token_nums], None)

    class Newer(Meta):
        def meta_args(self, token_nums: int, specialize_active_lora: bool) -> tuple[Any, ...]:
            return (self.slots[:token_nums], None)

    def lora_shrink(x: Any, weights: Any, out: Any, slots: Any, rest: Any, scaling: float) -> None:
        bgmv_shrink(x, weights[0], out[0], slots, scaling)

    def lora_expand(s: Any, weights: Any, out: Any, slots: Any, rest: Any, offset_start: int, add_inputs: bool) -> None:
        bgmv_expand(s[0], weights[0], out, slots)

    made = Newer() if newer else Older()
    ops: Any = SimpleNamespace(
        LoRAKernelMeta=SimpleNamespace(make=lambda max_loras, max_num_tokens, device: made),
        lora_shrink=lora_shrink,
        lora_expand=lora_expand,
    )
    case = CASES[2]
    tensors = make_tensors(case, CPU, 0)
    layer = peers._vllm_triton(ops, tensors)
    assert layer().allclose(by_formula(tensors, torch.float32)["y"], atol=1e-4)


@pytest.mark.skipif(not interpreter_on(), reason="the kernels are not interpreted here")
def test_kernels_of_many_adapters_as_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = dataclasses.replace(PEERS["ours-triton"], why_not=lambda case, device: None)
    monkeypatch.setitem(PEERS, "ours-triton", peer)
    _, row = run.run(CASES[2:3], impl="triton", device=CPU, rounds=1)[:2]
    assert row["status"] == "ok" and row["launches"] == 3, row
