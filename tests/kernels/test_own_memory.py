"""Every address that a kernel loads from or stores to lies in one of its tensors: small odd shapes, every form."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

import lorakernels as lk
from lorakernels.configs import table
from lorakernels.configs.config import KernelConfig
from lorakernels.functional import multi_lora_embedding
from lorakernels.testing.cases import LinearCase, make_inputs
from lorakernels.testing.interpreter import only_own_memory
from lorakernels.testing.multi_cases import MultiCase, make_multi_inputs

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter's addresses: a GPU has its own tools"
)

TINY = KernelConfig(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, BLOCK_R=16, GROUP_M=2, SPLIT=2)


@triton.jit
def copy_kernel(to_ptr, from_ptr, num_from, num_to, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(to_ptr + offs, tl.load(from_ptr + offs, mask=offs < num_from), mask=offs < num_to)


@pytest.mark.parametrize(("num_from", "num_to", "what"), [(5, 5, None), (6, 5, "load of 1"), (5, 8, "store of 3")])
def test_what_lies_in_no_tensor_is_found(num_from: int, num_to: int, what: str | None) -> None:
    memory = torch.arange(32.0)
    to, of = memory[:5], memory[16:21]
    with only_own_memory():
        if what is None:
            copy_kernel[(1,)](to, of, num_from, num_to, BLOCK=8)
        else:
            with pytest.raises(InterpreterError, match=rf"copy_kernel, program \(0, 0, 0\): a {what} elements"):
                copy_kernel[(1,)](to, of, num_from, num_to, BLOCK=8)
    assert torch.equal(to, of if what is None else torch.arange(5.0))


@pytest.mark.parametrize("members", [1, 2])
@pytest.mark.parametrize("form", ["few", "general", "tma", "cublas"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_one_adapter(form: str, dropout_p: float, members: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "FEW_TOKENS", 1 << 30 if form == "few" else -1)
    K, N = (32, 16) if form == "tma" else (19, 23)
    case = LinearCase("odd", tokens=(17,), K=K, N=N, r=5, row_scale=dropout_p > 0 and members == 1)
    inputs = [make_inputs(case, torch.float32, seed=i) for i in range(members)]
    leaves = [{name: tensor.requires_grad_() for name, tensor in of.tensors().items()} for of in inputs]
    x, first = leaves[0].pop("x"), leaves[0]
    config = dataclasses.replace(TINY, tma=form == "tma", cublas=form == "cublas")
    forced = {"shrink": TINY, "outer": TINY, "linear_expand": config, "few_tokens": TINY}
    with table.forced_configs(forced), only_own_memory():
        if members == 1:
            ys = [lk.lora_linear(x, **first, dropout_p=dropout_p, impl="triton")]
        else:
            lists = ([of[name] for of in leaves] for name in ("weight", "lora_A", "lora_B"))
            ys = lk.lora_linear_group(x, *lists, dropout_p=dropout_p, impl="triton")
        torch.autograd.backward(ys, [of.dy for of in inputs])


@pytest.mark.parametrize(("height", "dropout_p"), [(1, 0.0), (16, 0.0), (16, 0.3)])
@pytest.mark.parametrize("paged", [False, True])
def test_many_adapters(height: int, dropout_p: float, paged: bool) -> None:
    """Tokens of the base, and of a slot of rank 0, are sent to a slot past the last."""
    case = MultiCase("odd", T=7, K=19, Ns=(17, 5), R=18, ranks=(0, 3, 18), paged=paged)
    inputs = make_multi_inputs(case, torch.float32)
    assert {-1, 0} <= set(inputs.token_slots.tolist())
    x, weight, A, B, plan = inputs.x, inputs.weight, inputs.lora_A, inputs.lora_B, inputs.plan
    by_height = dataclasses.replace(TINY, BLOCK_M=height)
    expand = dataclasses.replace(by_height, SPLIT=1)
    with table.forced_configs({"multi_shrink": by_height, "multi_expand": expand, "multi_outer": TINY}):
        with only_own_memory(), torch.no_grad():
            lk.lora_expand(lk.lora_shrink(x, A, plan, impl="triton"), B, plan, out=inputs.dys, impl="triton")
            ids = torch.arange(case.T) % case.K
            multi_lora_embedding(ids, weight[0].t().contiguous(), A[0], B[0], plan, impl="triton")
        for leaf in (x, *A, *B):
            leaf.requires_grad_()
        with only_own_memory():
            ys = lk.multi_lora_linear(x, weight, A, B, plan, dropout_p=dropout_p, impl="triton")
            torch.autograd.backward(ys, inputs.dys)
