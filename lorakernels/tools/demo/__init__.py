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
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

import lorakernels as lk
from lorakernels.backend import ENVIRONMENT
from lorakernels.tools.demo.digits import WORLDS, Digits, accuracy, answers, load, network, train
from lorakernels.tools.demo.picture import Strip, draw
from lorakernels.tools.demo.report import Claim, DemoResult, World

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
    set_for_now = {} if impl is None else {ENVIRONMENT: impl}
    with patch.dict(os.environ, set_for_now), torch.random.fork_rng(), ExitStack() as at_the_end:
        # Layers this small lose more to waiting threads than they gain, many times over on a busy machine.
        at_the_end.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        lk.explain(torch.zeros(1, device=device))  # raises now, not after the base has been trained
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        return _run(folder, load(seed, device), seed, steps)


def _run(folder: Path, digits: Digits, seed: int, steps: int | None) -> DemoResult:
    adapter_steps = ADAPTER_STEPS if steps is None else steps
    images, labels = digits.test_images, digits.test_labels
    base, seconds = network(images.device), {}
    with tqdm(total=BASE_STEPS + len(WORLDS) * adapter_steps, unit="step", leave=False, disable=None) as bar:
        bar.set_description("base network")
        train(base, digits.train_images, digits.train_labels, BASE_STEPS, BASE_RATE, bar.update)
        model, fresh = copy.deepcopy(base), copy.deepcopy(base)
        for name, change in WORLDS.items():
            bar.set_description(f"adapter {name!r}")
            lk.inject(model, CONFIG, adapter_name=name)
            lk.set_adapter(model, name)
            changed = change(digits.train_images)
            seconds[name] = train(model, changed, digits.train_labels, adapter_steps, ADAPTER_RATE, bar.update)
    for name in WORLDS:
        lk.save_adapter(model, folder / name, adapter_name=name)
        lk.load_adapter(fresh, folder / name, adapter_name=name)

    upright = Strip("upright", images, labels, answers(base, images))
    right = accuracy(upright.base, labels)
    learnt = f"upright: the network has learnt the digits, {right:.1%} (at least {REGAINED:.0%})"
    strips, worlds, claims = [upright], [], [Claim(learnt, right >= REGAINED)]
    for name, change in WORLDS.items():
        lk.set_adapter(model, name)
        lk.set_adapter(fresh, name)
        changed = change(images)
        strip = Strip(name, changed, labels, answers(base, changed), answers(model, changed))
        world, found = _judge(strip, model, fresh, seconds[name], enforced=steps is None)
        strips.append(strip)
        worlds.append(world)
        claims += found
    claims += _mixed(base, folder, strips)
    lk.set_adapter(model, [])
    now, then = _base_tensors(model), base.state_dict()
    same = now.keys() == then.keys() and all(now[name].equal(then[name]) for name in then)
    same = same and answers(model, images).equal(upright.base)
    claims.append(Claim("with no adapter active: weights and answers are the base's to the bit", same))
    layer = next(module for module in model.modules() if isinstance(module, lk.LoRALinear))
    A = layer.lora_A[next(iter(WORLDS))].weight
    return DemoResult(
        folder=folder,
        picture=draw(strips, folder / "digits.png", f"rank-{CONFIG.r} adapter"),
        explanation=lk.explain(layer.weight.new_zeros(len(labels), layer.in_features), layer.weight, A),  # type: ignore[arg-type]
        device=str(images.device),
        seed=seed,
        rank=CONFIG.r,
        steps=adapter_steps,
        upright=right,
        worlds=tuple(worlds),
        claims=tuple(claims),
    )


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
    each = (strip.base, after, reloaded, merged)
    alone, adapted, loaded, once_merged = (accuracy(logits, strip.labels) for logits in each)
    difference, same = _compared(merged, after, MERGED_LIMIT)
    reached = f"{name}: its adapter reaches {adapted:.1%} (at least {REGAINED:.0%})"
    claims = [
        Claim(f"{name}: the frozen network alone falls to {alone:.1%} (below {LOST:.0%})", alone < LOST),
        Claim(reached, adapted >= REGAINED, enforced),
        Claim(f"{name}: loaded into a fresh copy, it answers the same to the bit", reloaded.equal(after)),
        Claim(f"{name}: merged, it predicts the same (logits within {difference:.0e})", same),
        Claim(f"{name}: unmerged, it answers as before to the bit", unmerged.equal(after)),
    ]
    return World(name, alone, adapted, loaded, once_merged, trainable, trainable / size, seconds), claims


def _compared(logits: torch.Tensor, expected: torch.Tensor, limit: float) -> tuple[float, bool]:
    """The largest difference, of the largest logit, and whether it is within the limit and changes no prediction."""
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    return difference, difference <= limit and logits.argmax(-1).equal(expected.argmax(-1))


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
    difference, same = _compared(mixed, alone, MIXED_LIMIT)
    of_base, of_spoilt = (torch.tensor([row == name for row in rows], device=images.device) for name in (None, spoilt))
    apart = beside[of_spoilt].isnan().any(-1).all() and beside[~of_spoilt].equal(mixed[~of_spoilt])
    unchanged = mixed[of_base].equal(answers(base, images)[of_base])
    each = f"each row as alone (logits within {difference:.0e})"
    return [
        Claim(f"mixed: {len(WORLDS)} adapters and the base answer one batch of {len(rows):,} rows, {each}", same),
        Claim("mixed: its rows without an adapter are the base's to the bit", unchanged),
        Claim("mixed: an adapter that gives NaN leaves all other rows as they were, to the bit", bool(apart)),
    ]


def _base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The frozen part of an adapted model, under the names it had before."""
    return {
        name.replace("base_layer.", ""): tensor for name, tensor in model.state_dict().items() if "lora_" not in name
    }
