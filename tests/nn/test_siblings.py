"""Projections of one x that are declared by their names: computed together, and never wrong."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lorakernels as lk
from lorakernels import functional
from lorakernels.nn import adapted as adapted_file
from lorakernels.nn import siblings
from lorakernels.ops import linear as ops_linear

KINDS = ("inject", "peft")
WIDTH = 16
EXACT = 1e-10


class Attention(nn.Module):
    """q, k and v of one h, and o of something else. `between` runs after q."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
        self.o = nn.Linear(WIDTH, WIDTH)
        self.between: Callable[[Any, torch.Tensor], Any] | None = None
        self.use = "qkv"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.layer_norm(x, (WIDTH,))
        q = self.q(h)
        k = self.between(self, h) if self.between else None
        k = self.k(h) if k is None else k
        v = self.v(h) if "v" in self.use else k
        return x + self.o(torch.tanh(q if self.use == "q" else q + torch.cat([k, v], -1)))


class Model(nn.Module):
    def __init__(self, checkpointing: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.checkpointing = checkpointing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) if self.checkpointing is None else self.checkpointing(block, x)
        return x


def adapted(kind: str, group: bool | None = True, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model: Any = Model().to(dtype)
    fields = {"r": 3, "lora_alpha": 5, "lora_dropout": dropout, "target_modules": ["q", "k", "v", "o"]}
    if kind == "inject":
        lk.inject(model, lk.LoRAConfig(**fields), group=group)
    else:
        peft = pytest.importorskip("peft")
        model = peft.inject_adapter_in_model(peft.LoraConfig(**fields), model)
        lk.accelerate(model, group=group)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


@pytest.fixture(autouse=True)
def groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many members each group had that was computed; layers of any size may make one."""
    monkeypatch.setattr(ops_linear, "SMALL", 0)
    sizes: list[int] = []
    real = functional.lora_linear_group

    def spy(x: torch.Tensor, weights: Any, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        sizes.append(len(weights))
        return real(x, weights, *args, **kwargs)

    monkeypatch.setattr(functional, "lora_linear_group", spy)
    yield sizes
    siblings._thread.scope = None


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, dtype=torch.float64).requires_grad_()


def values(model: Any, x: torch.Tensor, module: Any = None) -> dict[str, torch.Tensor]:
    """The output and every gradient of one step."""
    x, module = x.detach().requires_grad_(), model if module is None else module
    module.zero_grad()
    y = model(x)
    y.square().sum().backward()
    found = {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in module.named_parameters()}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = EXACT) -> None:
    """An output that nobody used may get zeros where it got nothing."""
    for name in ours.keys() | theirs.keys():
        one, other = (found.get(name) for found in (ours, theirs))
        one, other = torch.zeros_like(other) if one is None else one, torch.zeros_like(one) if other is None else other
        assert float((one - other).abs().max()) <= tolerance * max(1.0, float(other.abs().max())), name


def pair(kind: str, **fields: Any) -> tuple[Any, Any]:
    return adapted(kind, **fields), adapted(kind, group=False, **fields)


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same(kind: str, groups: list[int]) -> None:
    curves = []
    for model in pair(kind):
        generator = torch.Generator().manual_seed(1)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        losses = []
        for _ in range(12):
            x = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()
            loss = (model(x) - x.detach().cos()).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert groups == [3] * 2 * 12
    assert ((curves[0] - curves[1]).abs() < EXACT).all()
    assert curves[0][-1] < curves[0][0]


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients(kind: str, groups: list[int]) -> None:
    model, plain = pair(kind)
    with torch.no_grad():
        for tokens in (5, 3, 9):
            x = torch.randn(2, tokens, WIDTH, dtype=torch.float64)
            assert torch.allclose(model(x), plain(x), atol=EXACT)
    assert groups == [3] * 2 * 3
    assert siblings._thread.scope is None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_pass_is_as_the_others(
    kind: str, dropout: float, checkpointing: bool, x: torch.Tensor, groups: list[int]
) -> None:
    model = adapted(kind, dropout=dropout)
    model.checkpointing = regions(False) if checkpointing else None
    passes = []
    for _ in range(3):
        torch.manual_seed(1)
        passes.append(values(model, x))
    assert all(torch.equal(passes[0][name], later[name]) for later in passes[1:] for name in later)
    assert len(groups) == 3 * 2 * (1 + checkpointing)


def factor(layer: Any) -> Any:
    return layer.lora_B["default"]


def edit_factor(block: Any, h: torch.Tensor) -> None:
    with torch.no_grad():
        factor(block.k).weight.mul_(2)


def edit_base(block: Any, h: torch.Tensor) -> None:
    with torch.no_grad():
        block.k.base_layer.weight.mul_(2)


def replace_parameter(block: Any, h: torch.Tensor) -> None:
    factor(block.k).weight = nn.Parameter(factor(block.k).weight.detach() * 3)


def replace_data(block: Any, h: torch.Tensor) -> None:
    factor(block.k).weight.data = factor(block.k).weight.detach() * 3


def edit_x(block: Any, h: torch.Tensor) -> None:
    with torch.no_grad():
        h.mul_(1.5)


def without_grad(block: Any, h: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return block.k(h)


def under_autocast(block: Any, h: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return block.k(h.float()).double() if h.dtype is torch.float32 else block.k(h)


def of_another_tensor(block: Any, h: torch.Tensor) -> torch.Tensor:
    return block.k(h * 2)


def of_a_view(block: Any, h: torch.Tensor) -> torch.Tensor:
    return block.k(h.view_as(h))


def twice(block: Any, h: torch.Tensor) -> torch.Tensor:
    return block.k(h) + block.k(h)


def in_a_region(block: Any, h: torch.Tensor) -> torch.Tensor:
    return checkpoint(block.k, h, use_reentrant=False)


def freeze(block: Any, h: torch.Tensor) -> None:
    factor(block.k).weight.requires_grad_(False)


def add_hook(block: Any, h: torch.Tensor) -> None:
    block.k.register_forward_hook(lambda module, args, y: y * 2)


def add_hook_inside(block: Any, h: torch.Tensor) -> None:
    factor(block.k).register_forward_hook(lambda module, args, y: y * 2)
    block.k.base_layer.register_forward_hook(lambda module, args, y: y * 2)


def replace_forward(block: Any, h: torch.Tensor) -> None:
    block.k.forward = lambda x: x[..., :8]


def replace_layer(block: Any, h: torch.Tensor) -> None:
    block.k = nn.Linear(WIDTH, 8).double()
    nn.init.constant_(block.k.weight, 0.1)
    nn.init.constant_(block.k.bias, 0.1)


def switch_off(block: Any, h: torch.Tensor) -> None:
    if isinstance(block.k, lk.LoRALinear):
        block.k.scaling = 0
    else:
        block.k.enable_adapters(False)


def rescale(block: Any, h: torch.Tensor) -> None:
    if isinstance(block.k, lk.LoRALinear):
        block.k.scaling = 9.0
    else:
        block.k.set_scale("default", 7.0)


def merge(block: Any, h: torch.Tensor) -> None:
    with torch.no_grad():
        block.k.merge()
    block.k.requires_grad_(False)


def call_another(block: Any, h: torch.Tensor) -> None:
    block.o(h)


def copy_and_pickle(block: Any, h: torch.Tensor) -> None:
    scope = siblings._thread.scope
    assert scope is None or len(scope.results) == 2
    between, block.between = block.between, None
    for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(copied.q(h), block.q(h))
    block.between = between


EVENTS = [
    edit_factor, edit_base, replace_parameter, replace_data, edit_x, without_grad, under_autocast, of_another_tensor,
    of_a_view, twice, in_a_region, freeze, add_hook, add_hook_inside, replace_forward, replace_layer, switch_off,
    rescale, merge, call_another, copy_and_pickle,
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_happens_between_leader_and_sibling(
    event: Callable[..., Any], kind: str, x: torch.Tensor, groups: list[int]
) -> None:
    # Autograd refuses these where somebody needs what is edited, and of a group somebody does.
    grad = event not in (edit_x, edit_factor, edit_base, merge)
    results = []
    for model in pair(kind):
        found = []
        for step in range(4):
            model.blocks[0].between = event if step == 2 else None
            with torch.set_grad_enabled(grad):
                found.append(values(model, x) if grad else {"y": model(x)})
        results.append(found)
    assert len(groups) >= 8
    for ours, theirs in zip(*results, strict=True):
        assert_equal(ours, theirs)


def test_autocast_between_leader_and_sibling(x: torch.Tensor, groups: list[int]) -> None:
    """In float32, for autocast leaves float64 alone."""

    def in_bfloat16(block: Any, h: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return block.k(h).float()

    ys = []
    for model in pair("inject", dtype=torch.float32):
        model.blocks[0].between = in_bfloat16
        ys.append(model(x.float()))
    assert groups
    torch.testing.assert_close(*ys, rtol=0, atol=1e-5)


def test_plain_modules_see_every_event(x: torch.Tensor) -> None:
    """So that the test above shows something: each event but these changes what the layers compute."""
    same = {without_grad, under_autocast, of_a_view, in_a_region, freeze, call_another, copy_and_pickle}
    for event in EVENTS:
        model = adapted("inject", group=False)
        with torch.no_grad():
            before = model(x)
            model.blocks[0].between = event
            after = model(x)
        assert torch.allclose(before, after) == (event in same or event is merge), event


@pytest.mark.parametrize("kind", KINDS)
def test_a_sibling_that_is_not_called_does_no_harm(kind: str, x: torch.Tensor, groups: list[int]) -> None:
    model, plain = pair(kind)
    for use in ("qkv", "qk", "qkv", "qkv"):
        for each in (model, plain):
            each.blocks[0].use = use
        assert_equal(values(model, x), values(plain, x))
        assert siblings._thread.scope is None
    assert groups == [3] * 2 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_backward_through_one_output_and_twice(kind: str, x: torch.Tensor, groups: list[int]) -> None:
    model, plain = pair(kind)
    for each in (model, plain):
        each.blocks[0].use = "qv"
        values(each, x)
    assert_equal(values(model, x), values(plain, x))
    losses = []
    for each in (model, plain):
        each.blocks[1].use = "q"  # k's and v's outputs get no gradient
        for _ in range(2):
            loss = each(x).square().sum()
        first = torch.autograd.grad(loss, x, retain_graph=True)[0]
        losses += [first, torch.autograd.grad(loss, x)[0]]
    assert all(torch.allclose(losses[0], other, atol=EXACT) for other in losses[1:])
    assert groups


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic = lk.LoRALinear(WIDTH, 4), lk.LoRALinear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.actor(x), self.critic(x)


def test_heads_of_features_that_have_no_backward_stay_apart(groups: list[int]) -> None:
    heads, features = Heads(), torch.randn(3, WIDTH)
    for _ in range(3):
        actor, critic = heads(features)
        actor.sum().backward()
        critic.sum().backward()
    assert not groups


def test_calls_outside_the_parent_make_no_group(x: torch.Tensor, groups: list[int]) -> None:
    model, h = adapted("inject"), x.detach()
    block = model.blocks[0]
    with torch.no_grad():
        for _ in range(3):
            block.q(h), block.k(h), block.v(h)
        assert not groups
        model(x)
        assert len(groups) == 2
        block.q(h)
        factor(block.v).weight.data.zero_()  # which no counter shows
        assert torch.allclose(block.v(h), block.v.base_layer(h))
    assert len(groups) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_between_leaves_nothing_wrong(kind: str, x: torch.Tensor, groups: list[int]) -> None:
    model, plain = pair(kind)
    values(model, x)

    def fail(block: Any, h: torch.Tensor) -> None:
        scope = siblings._thread.scope
        assert scope is not None
        alive.extend(weakref.ref(result.y) for result in scope.results.values())
        raise KeyboardInterrupt  # for which torch runs no hook

    alive: list[Any] = []
    model.blocks[1].between = fail
    with pytest.raises(KeyboardInterrupt):
        model(x)
    model.blocks[1].between = None
    for _ in range(2):
        assert_equal(values(model, x), values(plain, x))
    assert len(alive) == 2 and not any(reference() is not None for reference in alive)
    assert siblings._thread.scope is None


@pytest.mark.parametrize("grad", [False, True])
def test_a_step_that_failed_leaves_nothing_behind(grad: bool, x: torch.Tensor) -> None:
    model = adapted("inject")
    model.blocks[1].between = lambda block, h: 1 / 0
    with torch.set_grad_enabled(grad), pytest.raises(ZeroDivisionError):
        model(x)
    assert siblings._thread.scope is None
    weight = weakref.ref(model.blocks[1].q.base_layer.weight)
    del model
    gc.collect()  # the traceback of the exception held the blocks
    assert weight() is None


def test_the_outputs_of_a_group_have_one_backward(x: torch.Tensor, groups: list[int]) -> None:
    weight, factors = torch.randn(4, WIDTH), (torch.randn(2, WIDTH), torch.randn(4, 2, requires_grad=True))
    x = x.detach().float().requires_grad_()
    first, second = lk.lora_linear_group(x, [weight] * 2, [factors[0]] * 2, [factors[1]] * 2)
    torch.autograd.grad(first.sum(), factors[1], retain_graph=True)
    torch.autograd.grad(first.sum(), factors[1])
    with pytest.raises(RuntimeError, match=r"one backward.*group=False"):
        torch.autograd.grad(second.sum(), factors[1])


@pytest.mark.parametrize(("dropout", "group", "grouped"), [(0.0, None, True), (0.4, None, False), (0.4, True, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_is_shared_only_where_it_was_asked_for(
    kind: str, dropout: float, group: bool | None, grouped: bool, x: torch.Tensor, groups: list[int]
) -> None:
    model = adapted(kind, group=group, dropout=dropout)
    for _ in range(2):
        model(x).sum().backward()
    assert bool(groups) == grouped


def regions(use_reentrant: bool, nested: bool = False) -> Callable[..., Any]:
    def once(block: Any, x: torch.Tensor) -> Any:
        return checkpoint(block, x, use_reentrant=use_reentrant)

    return (lambda block, x: checkpoint(once, block, x, use_reentrant=False)) if nested else once


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    "checkpointing",
    [regions(False), regions(True), regions(False, True), regions(True, True)],
    ids=["non-reentrant", "reentrant", "nested", "reentrant in non-reentrant"],
)
def test_checkpointing(
    checkpointing: Callable[..., Any], dropout: float, kind: str, x: torch.Tensor, groups: list[int]
) -> None:
    """A region that is recomputed decides as it did: the same masks, and the same number of tensors kept."""
    model, plain = adapted(kind, dropout=dropout), adapted(kind, dropout=dropout)
    model.checkpointing = checkpointing
    for step in range(4):
        found = []
        for each in (model, plain):
            torch.manual_seed(step)
            found.append(values(each, x))
        assert_equal(*found)
    assert set(groups) == {3} and len(groups) >= 4 * 2 * 3  # forward and again, beside the plain model's


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_region_within_the_parent_has_no_group(
    kind: str, dropout: float, use_reentrant: bool, x: torch.Tensor, groups: list[int]
) -> None:
    """When it runs again the parent does not."""
    found = []
    for group in (True, False):
        model = adapted(kind, group=group, dropout=dropout)
        for block in model.blocks:
            type(block).forward, whole = of_a_part(use_reentrant), type(block).forward
            try:
                torch.manual_seed(0)
                found.append(values(block, x))
            finally:
                type(block).forward = whole
    assert not groups
    assert_equal(found[0], found[2])
    assert_equal(found[1], found[3])


def of_a_part(use_reentrant: bool) -> Callable[..., Any]:
    def forward(block: Any, x: torch.Tensor) -> torch.Tensor:
        def projections(h: torch.Tensor) -> torch.Tensor:
            return torch.cat([block.q(h), block.k(h), block.v(h)], -1)

        return checkpoint(projections, x.exp(), use_reentrant=use_reentrant)

    return forward


def test_recomputation_that_stops_early(x: torch.Tensor, groups: list[int]) -> None:
    """A region that ends in the group: the last tensors are kept while the leader runs."""

    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = (lk.LoRALinear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = x.exp()
            return self.q(h) + self.k(h)

    torch.manual_seed(0)
    block = Ends()
    for layer in (block.q, block.k):
        nn.init.normal_(layer.lora_B["default"].weight)
    expected = values(block, x)
    declare(block)
    for _ in range(4):
        y = checkpoint(block, x, use_reentrant=False)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        assert torch.allclose(grad, expected["x"], atol=EXACT)
    assert len(groups) >= 4


def declare(*modules: nn.Module) -> None:
    """For layers that nobody injected."""
    for module in modules:
        siblings.declare(siblings.find(module, lambda child: isinstance(child, lk.LoRALinear)), True)


def test_members_of_packed_weights_are_computed_once(groups: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call reads views of their tensors, other ones than the leader has read."""
    found, alone = [], []
    monkeypatch.setattr(
        adapted_file, "lora_linear", lambda *args, **kwargs: alone.append(1) or lk.lora_linear(*args, **kwargs)
    )
    for group in (True, False):
        torch.manual_seed(0)
        model = lk.quantize(Model(), "int4", block=8)
        lk.inject(model, lk.LoRAConfig(r=3, target_modules=["q", "k", "v"], init_lora_weights=False), group=group)
        found.append(values(model, torch.randn(2, 5, WIDTH)))
    assert_equal(*found, tolerance=1e-5)
    assert groups == [3] * 2 and len(alone) == 3 * 2


def test_one_mask_for_the_group(groups: list[int]) -> None:
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = (lk.LoRALinear(WIDTH, WIDTH, r=4, lora_dropout=0.5, bias=False) for _ in range(2))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.q(x), self.k(x)

    module = Same()
    declare(module)
    nn.init.normal_(module.q.lora_B["default"].weight)
    module.k.load_state_dict(module.q.state_dict())
    x = torch.randn(8, WIDTH, requires_grad=True)
    assert torch.equal(*module(x * 1))
    assert len(groups) == 1
    module.k.adapters["default"].lora_dropout = 0.1  # then each has its own
    module(x * 1)
    module.k.eval()
    module(x * 1)
    assert len(groups) == 1


def test_compiled_traced_and_transformed_models_do_without(x: torch.Tensor, groups: list[int]) -> None:
    torch._dynamo.reset()
    model, plain = pair("inject")
    values(model, x)
    values(model, x)
    grouped = len(groups)
    assert grouped == 4
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.allclose(compiled(x), plain(x), atol=EXACT)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    grads = torch.func.grad(loss)(parameters, x.detach())
    expected = values(plain, x)
    assert all(torch.allclose(grads[name], expected[name], atol=EXACT) for name in expected if name in grads)
    each = torch.func.vmap(lambda x: model(x))(x.detach())
    assert torch.allclose(each, plain(x), atol=EXACT)
    with torch.no_grad():
        traced = torch.jit.trace(model, (x.detach(),), check_trace=False)
        assert torch.allclose(traced(2 * x), plain(2 * x), atol=EXACT)
    with torch.inference_mode():
        assert torch.allclose(model(x), plain(x), atol=EXACT)
    assert len(groups) == grouped


def test_threads(x: torch.Tensor) -> None:
    model, plain = pair("inject")
    with torch.no_grad():
        inputs = [torch.randn(2, 5, WIDTH, dtype=torch.float64) for _ in range(4)]
        expected = [plain(each) for each in inputs]
    wrong = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(30):
                if not torch.allclose(model(inputs[i]), expected[i], atol=EXACT):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", KINDS)
def test_switched_off(kind: str, x: torch.Tensor, groups: list[int]) -> None:
    model = adapted(kind, group=False)
    for _ in range(3):
        values(model, x)
    assert not groups
    copied = copy.deepcopy(model)
    values(copied, x)
    values(copied, x)
    assert not groups
    if kind == "peft":
        lk.accelerate(model)
        values(model, x)
        values(model, x)
        assert len(groups) == 4
        hooks = model.blocks[0]._forward_pre_hooks, model.blocks[0]._forward_hooks
        assert all(hooks)
        lk.restore(model)
        assert not any(hooks) and not model.blocks[0]._forward_hooks_always_called
        lk.accelerate(model)
        lk.accelerate(model, group=False)
        assert not any(hooks)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_ddp(tmp_path: Path, x: torch.Tensor, groups: list[int]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, plain = pair("inject")
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        for use in ("qkv", "qkv", "qv", "q", "qkv"):
            for each in (model, plain):
                each.blocks[0].use = use
                each.zero_grad()
            parallel(x).square().sum().backward()
            plain(x).square().sum().backward()
            found = [
                {name: p.grad for name, p in each.named_parameters() if p.grad is not None} for each in (model, plain)
            ]
            assert_equal(*found)
    finally:
        dist.destroy_process_group()
    assert groups


@pytest.mark.parametrize("checkpointing", [False, True])
def test_llama_trains_and_generates(checkpointing: bool, groups: list[int]) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    llama = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    models = []
    for group in (True, False):
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(transformers.LlamaForCausalLM(llama).double(), lora).double()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        lk.accelerate(model, group=group)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        models.append(model.train())
    tokens = torch.randint(1, 96, (2, 6))
    for _ in range(3):
        found = []
        for model in models:
            model.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert_equal(*found)
    assert set(groups) == {2, 3}
    count = len(groups)
    texts = [model.eval().generate(input_ids=tokens, max_new_tokens=5, do_sample=False) for model in models]
    assert torch.equal(*texts)
    assert len(groups) > count


class Cross(nn.Module):
    """k and v of another tensor than q, of the same width."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(3))

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x) + self.k_proj(other).tanh() * self.v_proj(other)


@pytest.mark.parametrize(("name", "members"), [("attn", [3, 3]), ("encoder_attn", [2, 2]), ("EncDecAttention", [2, 2])])
@pytest.mark.parametrize("kind", KINDS)
def test_cross_attention(kind: str, name: str, members: list[int], x: torch.Tensor, groups: list[int]) -> None:
    """Where the names tell of it, k and v are a group; where not, they compute their own."""
    results = []
    for group in (None, False):
        torch.manual_seed(0)
        model: Any = nn.ModuleDict({name: Cross()})
        if kind == "inject":
            lk.inject(model, lk.LoRAConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]), group=group)
        else:
            peft = pytest.importorskip("peft")
            config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"])
            lk.accelerate(peft.inject_adapter_in_model(config, model), group=group)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                nn.init.normal_(parameter)
        for _ in range(2):
            results.append(values(lambda x, model=model: model[name](x, x * 2), x, model))
    assert groups == members
    assert_equal(results[0], results[2])
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_caller_lists(kind: str, x: torch.Tensor, groups: list[int]) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.q, self.k = (nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = x.exp()
            return self.left(h) + self.right(h) + self.q(h) + self.k(h)

    names = ["left", "right", "q", "k"]

    def make(groups: Any, targets: list[str] = names) -> Any:
        model = Odd()
        if kind == "inject":
            return lk.inject(model, lk.LoRAConfig(r=2, target_modules=targets), groups=groups)
        peft = pytest.importorskip("peft")
        model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=targets), model)
        lk.accelerate(model, groups=groups)
        return model

    make([])(x)
    assert groups == [2]
    make([("left", "right")])(x)
    assert groups == [2, 2, 2]
    make([names])(x)
    assert groups == [2, 2, 2, 4]
    make([["left", "k"]])(x)
    assert groups == [2, 2, 2, 4, 2]
    for wrong in ("left", ["left", "right"], [["left", 1]], [[nn.Linear(1, 1)]]):
        with pytest.raises(TypeError, match=r"groups is .* expected a list of lists of names"):
            make(wrong)
    for wrong in ([["left"]], [["left", "centre"]], [[]]):
        with pytest.raises(ValueError, match=r"groups has .* expected the names of two or more"):
            make(wrong)
    with pytest.raises(ValueError, match="groups has"):
        make([["left", "right"]], targets=["left", "q"])


@pytest.mark.parametrize("kind", ["llama", "bert", "t5", "bart", "whisper", "gpt_neox"])
def test_families_of_models_that_people_use(kind: str) -> None:
    """By the module that has them, with layers' numbers left out."""
    transformers = pytest.importorskip("transformers")
    small = {"num_hidden_layers": 1, "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16}
    encdec = {"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    encdec |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    configs = {
        "llama": lambda: transformers.LlamaConfig(**small, num_attention_heads=2, num_key_value_heads=1),
        "bert": lambda: transformers.BertConfig(
            **small, num_attention_heads=2, is_decoder=True, add_cross_attention=True
        ),
        "t5": lambda: transformers.T5Config(
            vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
        ),
        "bart": lambda: transformers.BartConfig(**encdec),
        "whisper": lambda: transformers.WhisperConfig(**encdec, pad_token_id=0, max_source_positions=8),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**small, num_attention_heads=2),
    }
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(configs[kind]())
    names = {module: name for name, module in model.named_modules()}
    found = siblings.find(model, lambda module: type(module) is nn.Linear)
    qkv, kv = {("q_proj", "k_proj", "v_proj")}, {("k_proj", "v_proj")}
    expected: dict[str, dict[str, set[tuple[str, ...]]]] = {
        "llama": {"self_attn": qkv, "mlp": {("gate_proj", "up_proj")}},
        "bert": {"attention.self": {("query", "key", "value")}, "crossattention.self": {("key", "value")}},
        "t5": {
            "SelfAttention": {("q", "k", "v")},
            "EncDecAttention": {("k", "v")},
            "DenseReluDense": {("wi_0", "wi_1")},
        },
        "bart": {"self_attn": qkv, "encoder_attn": kv},
        "whisper": {"self_attn": qkv, "encoder_attn": kv},
        "gpt_neox": {},
    }
    by_parent: dict[str, set[tuple[str, ...]]] = {}
    for parent, groups in found.items():
        end = names[parent].split(".")
        key = ".".join(end[-2:]) if end[-1] == "self" else end[-1]
        by_parent.setdefault(key, set()).update(groups)
    assert by_parent == expected[kind]


def test_a_second_adapter_and_one_from_files(tmp_path: Path, x: torch.Tensor, groups: list[int]) -> None:
    model = adapted("inject")
    lk.save_adapter(model, tmp_path)
    loaded = lk.load_adapter(Model().double(), tmp_path, adapter_name="first")
    loaded(x)
    assert groups == [3, 3]
    lk.inject(model, lk.LoRAConfig(r=2, target_modules=["q", "v"]), adapter_name="second")
    lk.set_adapter(model, "second")
    model(x)
    assert groups == [3, 3, 2, 2]  # k has nothing to add now
    lk.inject(model, lk.LoRAConfig(r=2, target_modules=["q", "v"]), adapter_name="third", group=False)
    model(x)
    assert groups == [3, 3, 2, 2]
