"""The package's main job on real input: one frozen network, three changed worlds, an adapter for each.

A network learns handwritten digits. The digits are then rotated, inverted and mirrored, and it cannot read them any
more. For each change one adapter is trained beside the frozen network; all of them live in it at once and are
switched by name. They are saved, loaded into a fresh copy, merged and unmerged, and answer one batch whose rows are
mixed; each promise about that is checked.
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

import lorakernels as lk
from lorakernels.backend import ENVIRONMENT, Explanation
from lorakernels.tools.demo.digits import WORLDS, Digits, accuracy, answers, load, network, train
from lorakernels.tools.demo.picture import Strip, draw
from lorakernels.tools.demo.results import Claim, DemoResult, World

CONFIG = lk.LoRAConfig(r=4, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear")
BASE_STEPS, ADAPTER_STEPS = 400, 600
BASE_RATE, ADAPTER_RATE = 5e-3, 1e-2

REGAINED, LOST = 0.90, 0.70  # the accuracy that an adapter must reach, and that the base must have fallen below
MERGED_LIMIT = 1e-4  # of the largest logit: a merged weight is rounded once more
MIXED_LIMIT = 1e-4  # of the largest logit: sums are made in another order
OVERFLOWING = 1e30  # times this an adapter's numbers are finite still, and what they give is not
MAX_SEED = 2**32 - 1  # scikit-learn's


def run_demo(
    out: str | os.PathLike[str], *, seed: int = 0, impl: str | None = None, steps: int | None = None
) -> DemoResult:
    """Run the demo; write its adapters and its picture into `out`.

    Args:
        out: made where it is missing; what the demo wrote there before is replaced.
        seed: of the split, the network and the training.
        impl: "auto", "torch" or "triton" for every layer; None leaves it to LORAKERNELS_IMPL.
        steps: how long each adapter trains. With a number the accuracies are reported and not enforced.

    Raises:
        ValueError: `seed`, `steps` or `impl` is not among what is possible.
        ModuleNotFoundError: scikit-learn or matplotlib is missing.
        BackendError: `impl="triton"` cannot run here.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed is {seed}; expected 0 to {MAX_SEED}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")
    for package, module in (("scikit-learn", "sklearn"), ("matplotlib", "matplotlib")):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ModuleNotFoundError(f'the demo needs {package}: pip install "lorakernels[demo]"') from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with _implementation(impl), _one_thread(), torch.random.fork_rng():
        lk.explain(torch.zeros(1, device=device))  # raises now, not after the base has been trained
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        return _run(folder, load(seed, device), seed, steps)


def _run(folder: Path, digits: Digits, seed: int, steps: int | None) -> DemoResult:
    adapter_steps = ADAPTER_STEPS if steps is None else steps
    device = digits.test_images.device
    base = network(device)
    with tqdm(total=BASE_STEPS + len(WORLDS) * adapter_steps, unit="step", leave=False, disable=None) as bar:
        bar.set_description("base network")
        train(base, digits.train_images, digits.train_labels, BASE_STEPS, BASE_RATE, bar.update)
        model = copy.deepcopy(base)
        seconds = {}
        for name, change in WORLDS.items():
            bar.set_description(f"adapter {name!r}")
            seconds[name] = _train_adapter(model, name, change, digits, adapter_steps, bar.update)
    fresh = copy.deepcopy(base)
    for name in WORLDS:
        lk.save_adapter(model, folder / name, adapter_name=name)
        lk.load_adapter(fresh, folder / name, adapter_name=name)

    upright = Strip("upright", digits.test_images, digits.test_labels, answers(base, digits.test_images))
    strips, worlds, claims = [upright], [], [_base_learned(upright)]
    for name, change in WORLDS.items():
        lk.set_adapter(model, name)
        lk.set_adapter(fresh, name)
        images = change(digits.test_images)
        strip = Strip(name, images, digits.test_labels, answers(base, images), answers(model, images))
        world, found = _judge(strip, model, fresh, seconds[name], enforced=steps is None)
        strips.append(strip)
        worlds.append(world)
        claims += found
    claims += _mixed(base, folder, strips)
    claims.append(_base_unchanged(model, base, upright))
    return DemoResult(
        folder=folder,
        picture=draw(strips, folder / "digits.png", f"rank-{CONFIG.r} adapter"),
        explanation=_explanation(model, len(digits.test_labels)),
        device=str(device),
        seed=seed,
        rank=CONFIG.r,
        steps=adapter_steps,
        upright=accuracy(upright.base, digits.test_labels),
        worlds=tuple(worlds),
        claims=tuple(claims),
    )


def _train_adapter(
    model: nn.Module,
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    digits: Digits,
    steps: int,
    advance: Callable[[], object],
) -> float:
    lk.inject(model, CONFIG, adapter_name=name)
    lk.set_adapter(model, name)
    return train(model, change(digits.train_images), digits.train_labels, steps, ADAPTER_RATE, advance)


def _judge(
    strip: Strip, model: nn.Module, fresh: nn.Module, seconds: float, enforced: bool
) -> tuple[World, list[Claim]]:
    """Reload, merge and unmerge the adapter of one world, which is active in `model` and in `fresh`."""
    name, after = strip.world, strip.adapter
    assert after is not None
    trainable = lk.trainable_parameters(model).num_trainable
    size = sum(p.numel() for p in _base_tensors(model).values()) + trainable
    reloaded = answers(fresh, strip.images)
    lk.merge(model, name, keep_base=True)
    merged = answers(model, strip.images)
    lk.unmerge(model)
    unmerged = answers(model, strip.images)
    difference = ((merged - after).abs().max() / after.abs().max()).item()
    before_, after_, reloaded_, merged_ = (
        accuracy(logits, strip.labels) for logits in (strip.base, after, reloaded, merged)
    )
    claims = [
        Claim(f"{name}: the frozen network alone falls to {before_:.1%} (below {LOST:.0%})", before_ < LOST),
        Claim(f"{name}: its adapter reaches {after_:.1%} (at least {REGAINED:.0%})", after_ >= REGAINED, enforced),
        Claim(f"{name}: loaded into a fresh copy, it answers the same to the bit", reloaded.equal(after)),
        Claim(
            f"{name}: merged, it predicts the same (logits within {difference:.0e})",
            merged.argmax(-1).equal(after.argmax(-1)) and difference <= MERGED_LIMIT,
        ),
        Claim(f"{name}: unmerged, it answers as before to the bit", unmerged.equal(after)),
    ]
    return World(name, before_, after_, reloaded_, merged_, trainable, trainable / size, seconds), claims


def _mixed(base: nn.Module, folder: Path, strips: Sequence[Strip]) -> list[Claim]:
    """One batch in which a digit of each world follows the next, each row with its own adapter or none."""
    images = torch.stack([strip.images for strip in strips], 1).flatten(0, 1)
    alone = torch.stack([strip.base if strip.adapter is None else strip.adapter for strip in strips], 1).flatten(0, 1)
    names = [None if strip.adapter is None else strip.world for strip in strips]
    rows = names * len(strips[0].images)
    served = copy.deepcopy(base)
    store = lk.AdapterStore(served, max_adapters=len(WORLDS), max_rank=CONFIG.r)
    for name in WORLDS:
        store.load(name, folder / name)
    with store.batch(rows):
        mixed = answers(served, images)
    spoilt = next(iter(WORLDS))
    tensors = load_file(folder / spoilt / "adapter_model.safetensors")
    store.replace(spoilt, (CONFIG, {key: tensor * OVERFLOWING for key, tensor in tensors.items()}))
    with store.batch(rows):
        beside = answers(served, images)
    store.close()
    difference = ((mixed - alone).abs().max() / alone.abs().max()).item()
    of_base, of_spoilt = (torch.tensor([row == name for row in rows], device=images.device) for name in (None, spoilt))
    apart = beside[of_spoilt].isnan().any(-1).all() and beside[~of_spoilt].equal(mixed[~of_spoilt])
    same = difference <= MIXED_LIMIT and mixed.argmax(-1).equal(alone.argmax(-1))
    return [
        Claim(
            f"mixed: {len(WORLDS)} adapters and the base answer one batch of {len(rows):,} rows, each row as "
            f"alone (logits within {difference:.0e})",
            same,
        ),
        Claim(
            "mixed: its rows without an adapter are the base's to the bit",
            mixed[of_base].equal(answers(base, images)[of_base]),
        ),
        Claim("mixed: an adapter that gives NaN leaves all other rows as they were, to the bit", bool(apart)),
    ]


def _base_learned(upright: Strip) -> Claim:
    right = accuracy(upright.base, upright.labels)
    return Claim(
        f"upright: the network has learnt the digits, {right:.1%} (at least {REGAINED:.0%})", right >= REGAINED
    )


def _base_unchanged(model: nn.Module, base: nn.Module, upright: Strip) -> Claim:
    lk.set_adapter(model, [])
    now, then = _base_tensors(model), base.state_dict()
    same = now.keys() == then.keys() and all(now[name].equal(then[name]) for name in then)
    same = same and answers(model, upright.images).equal(upright.base)
    return Claim("with no adapter active: weights and answers are the base's to the bit", same)


def _base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The frozen part of an adapted model, under the names it had before."""
    return {
        name.replace("base_layer.", ""): tensor for name, tensor in model.state_dict().items() if "lora_" not in name
    }


def _explanation(model: nn.Module, tokens: int) -> Explanation:
    layer = next(module for module in model.modules() if isinstance(module, lk.LoRALinear))
    A = layer.lora_A[layer.adapter_names[0]].weight
    return lk.explain(layer.weight.new_zeros(tokens, layer.in_features), layer.weight, A)  # type: ignore[arg-type]


@contextmanager
def _implementation(impl: str | None) -> Iterator[None]:
    """Every layer inside runs `impl`; None changes nothing."""
    kept = os.environ.get(ENVIRONMENT)
    if impl is not None:
        os.environ[ENVIRONMENT] = impl
    try:
        yield
    finally:
        if kept is not None:
            os.environ[ENVIRONMENT] = kept
        else:
            os.environ.pop(ENVIRONMENT, None)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Layers this small lose more to waiting threads than they gain, many times over on a busy machine."""
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(kept)
