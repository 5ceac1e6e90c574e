"""What every legal composite must do. Each check returns what it found wrong, so that one build serves many checks."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from support import (
    STEPS,
    Net,
    Regression,
    begun,
    cloned,
    close,
    linear_sites,
    overall,
    perturb,
    same,
    small,
    train,
)
from torch import Tensor

from lorafactory import Adapted, UserError, checkpoint, load, registry

LR = 2e-3  # small enough for what multiplies it
SNAPSHOTS = (5, 11)  # steps after which a run is killed and goes on


def adamw(groups: list[dict]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=LR, weight_decay=0.0)


class Life:
    """One composite on one base; `bad` collects what is wrong."""

    def __init__(self, spelling: str, transposed: bool = False, **options: Any):
        torch.manual_seed(0)
        self.spelling, self.bad = spelling, []
        self.base = Net(transposed)
        self.pristine = cloned(self.base.state_dict())
        self.data, self.x = Regression(self.base), torch.randn(3, 5, 24)
        self.y0 = self.base(self.x).detach()
        self.options = small(spelling, **options)
        self.config = registry.config(spelling, **self.options)
        self.zero = registry.chosen(self.config)[0].zero_start

    def ok(self, fine: Any, what: str) -> None:
        if not fine:
            self.bad.append(what)

    def refused(self, call: Any, what: str, *words: str) -> None:
        try:
            call()
            self.bad.append(f"not refused: {what}")
        except UserError as e:
            self.ok(all(w in str(e) for w in words) and "\n" not in str(e), f"{what}: the message is {str(e)!r}")

    def build(self, seed: int = 5, config: Any = None) -> Adapted:
        """Attached, not begun."""
        return Adapted(copy.deepcopy(self.base), config or self.config, seed)

    def bare(self) -> Any:
        """The config without the parts that only train."""
        empty = {a: registry.CONFIGS[a]() for a in registry.PARTS if a not in registry.WRAPPING}
        return replace(self.config, **empty)

    @torch.no_grad()  # some parts let training compute something else: a sample, the same in other roundings
    def output(self, adapted: Any) -> Tensor:
        return adapted(self.x)

    @torch.no_grad()
    def forward_is_weight(self, adapted: Adapted, when: str, times: float = 1.0) -> None:
        for s, d in linear_sites(adapted):
            if d.mergeable:
                dtype = s.base.weight.dtype
                z = torch.randn(7, s.d_in, generator=torch.Generator().manual_seed(4)).to(dtype)
                want = F.linear(
                    z, d.weight(s.base).to(dtype), None if d.bias(s.base) is None else d.bias(s.base).to(dtype)
                )
                self.ok(close(s.base.module(z), want, times), f"forward is not weight at {s.name}, {when}")

    def untouched(self, adapted: Adapted, when: str) -> None:
        with adapted.disabled() as model:
            now = cloned(model.state_dict())
            self.ok(torch.equal(model(self.x), self.y0), f"disabled is not the base, {when}")
        self.ok(same(now, self.pristine), f"the base changed, {when}")


def training(spelling: str, folder: Path) -> list[str]:
    """Attach, train, be killed and go on, end, save, load, export, copy; on nn.Linear, without dropout."""
    c = Life(spelling)
    adapted = start(c)
    killed, losses = run(c, adapted, folder)
    resume(c, adapted, killed, losses)
    adapted.eval()
    finish(c, adapted)
    reload(c, adapted, folder)
    copies(c, adapted)
    refusals(c, adapted)
    return c.bad


def start(c: Life) -> Adapted:
    state = torch.random.get_rng_state()
    adapted = c.build()
    c.ok(torch.equal(state, torch.random.get_rng_state()), "attach with a seed moves torch's generator")
    c.ok(same(adapted.adapter.state_dict(), c.build().adapter.state_dict()), "the seed does not settle the start")
    c.ok(not c.zero or close(c.output(adapted), c.y0), "attach changes the output")
    begun(adapted, c.data)
    c.ok(torch.equal(state, torch.random.get_rng_state()), "begin with a seed moves torch's generator")
    c.ok(not c.zero or close(c.output(adapted), c.y0, 3), "begin changes the output")
    c.ok(
        same(adapted.adapter.state_dict(), begun(c.build(), c.data).adapter.state_dict()),
        "the seed does not settle begin",
    )
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    c.ok(trained and all(n.startswith("adapter.") for n in trained), "the base is trained")
    c.ok(all(p.dtype == torch.float32 for p in adapted.adapter.parameters()), "adapter parameters are not float32")
    c.forward_is_weight(adapted, "begun")
    again = registry.from_dict(json.loads(json.dumps(asdict(c.config))))
    c.ok(again == c.config and type(again) is type(c.config), "the config does not survive JSON")
    c.ok(registry.spell(c.config) == c.spelling == adapted.variant, "the spelling is not stable")
    return adapted


def owned_once(c: Life, adapted: Adapted, optimizer: Any) -> None:
    owned = [p for g in optimizer.param_groups for p in g["params"]]
    wanted = [p for p in adapted.adapter.parameters() if p.requires_grad]
    c.ok(len(owned) == len(set(owned)) and set(owned) == set(wanted), "the optimiser misses or doubles a parameter")
    cost, count = adapted.cost(), sum(p.numel() for p in owned)
    c.ok(
        cost["adapter_parameters"] + cost["head_parameters"] == count == adapted.num_trainable(),
        "the declared count is wrong",
    )
    c.ok(cost["total_parameters"] == sum(t.numel() for t in c.pristine.values()), "the base is counted wrongly")


def run(c: Life, adapted: Adapted, folder: Path) -> tuple[dict[int, Path], list[float]]:
    """Train, and save after some steps as a killed run would have."""
    optimizer = adapted.optimizer(adamw, STEPS)
    owned_once(c, adapted, optimizer)
    seen: set[str] = set()
    killed: dict[int, Path] = {}

    def watch(i: int) -> None:
        seen.update(n for n, p in adapted.adapter.named_parameters() if p.grad is not None and p.grad.any())
        if i in SNAPSHOTS:  # before step i: what the steps up to i - 1 left
            killed[i] = folder / f"step-{i}"
            checkpoint.save(adapted, killed[i], {"step": i}, optimizer)

    before = overall(adapted, c.data)
    losses = train(adapted, c.data, optimizer, watch=watch)
    after = overall(adapted, c.data)
    c.ok(after < before, f"the loss goes from {before:.4f} to {after:.4f}")
    idle = tuple(f"deltas.{k}." for k in adapted.adapter.idle())
    for n, p in adapted.adapter.named_parameters():
        c.ok(n in seen or not p.requires_grad or not p.numel() or n.startswith(idle), f"no gradient reaches {n}")
    owned_once(c, adapted, optimizer)
    c.untouched(adapted, "training")
    c.last = cloned(checkpoint._flatten(optimizer.state_dict())[0])
    return killed, losses


def resume(c: Life, adapted: Adapted, killed: dict[int, Path], losses: list[float]) -> None:
    want = cloned(adapted.adapter.state_dict())
    for step, folder in killed.items():
        again = c.build(seed=78)
        checkpoint.restore(again, folder)
        begun(again, c.data)
        optimizer = again.optimizer(adamw, STEPS)
        optimizer.lifecycle.index = checkpoint.restore_optimizer(optimizer, folder)["step"]
        went = train(again, c.data, optimizer, start=step)
        c.ok(went == losses[step:], f"losses differ after a resume at step {step}")
        c.ok(same(again.adapter.state_dict(), want), f"tensors differ after a resume at step {step}")
        c.ok(
            same(checkpoint._flatten(optimizer.state_dict())[0], c.last),
            f"the optimiser differs after a resume at step {step}",
        )


def finish(c: Life, adapted: Adapted) -> None:
    before = c.output(adapted)
    changed = adapted.end()
    c.ok(changed or close(c.output(adapted), before, 3), "end changes the output and does not say so")
    perturb(adapted.adapter)
    c.forward_is_weight(adapted, "trained")
    c.ok((c.output(adapted) - c.y0).abs().max() > 1e-5, "training and perturbing change nothing")
    c.ok(not c.config.trained_modules or adapted.adapter.trained, "the head is not trained")


def reload(c: Life, adapted: Adapted, folder: Path) -> None:
    y, state = c.output(adapted), cloned(adapted.adapter.state_dict())
    adapted.save(folder / "trained")
    rng = torch.random.get_rng_state()
    loaded = load(copy.deepcopy(c.base), folder / "trained").eval()
    c.ok(torch.equal(rng, torch.random.get_rng_state()), "load moves torch's generator")
    c.ok(torch.equal(c.output(loaded), y), "load differs")
    c.ok(loaded.num_trainable() == adapted.num_trainable(), "what is loaded cannot be trained on")
    loaded.begin()
    c.ok(torch.equal(c.output(loaded), y), "begin after load starts afresh")
    loaded.optimizer(adamw, 1)
    if "rank" in type(c.config).__dataclass_fields__:  # another rank in the config: the saved one counts
        other = c.build(
            77, replace(c.config, rank=c.config.rank - 1, **({"alpha": 3.0} if hasattr(c.config, "alpha") else {}))
        )
        other.adapter.load(state)
        c.ok(torch.equal(c.output(other.eval()), y), "loading depends on the config's rank or alpha")
    exported = c.build(79, c.bare()).eval()
    exported.adapter.load(cloned(adapted.adapter.export()))
    c.ok(torch.equal(c.output(exported), y), "export into the bare structure differs")


def copies(c: Life, adapted: Adapted) -> None:
    y = c.output(adapted)
    for how, twin in (("deepcopy", copy.deepcopy(adapted)), ("pickle", pickle.loads(pickle.dumps(adapted)))):
        c.ok(torch.equal(c.output(twin), y), f"{how} differs")
        c.ok(same(twin.adapter.state_dict(), adapted.adapter.state_dict()), f"{how} has another state")
        perturb(twin.adapter, 0.3)
        c.ok(torch.equal(c.output(adapted), y) and not torch.equal(c.output(twin), y), f"{how} shares or is cut off")
        twin.optimizer(adamw, 1)
        twin.end()
        plain = twin.detach()
        c.ok(same(plain.state_dict(), c.pristine), f"{how} cannot give the base back")
    tensors = {n: t for n, t in adapted.adapter.state_dict().items() if t.numel()}
    c.ok(len({(t.data_ptr(), t.shape) for t in tensors.values()}) == len(tensors), "a tensor is saved twice")


def refusals(c: Life, adapted: Adapted) -> None:
    state = cloned(adapted.adapter.state_dict())
    name = next(n for n, t in state.items() if t.numel() and t.dim())
    wrong = {
        "a missing tensor": ({n: t for n, t in state.items() if n != name}, name),
        "an unknown tensor": ({**state, "deltas.fc1.extra": torch.ones(2)}, "extra"),
        "another shape": ({**state, name: state[name].new_zeros(7, 3, 5)}, name),
        "a longer first dimension": ({**state, name: longer(state[name], 0)}, ""),
        "a longer last dimension": ({**state, name: longer(state[name], -1)}, ""),
    }
    for what, (given, word) in wrong.items():
        victim = begun(c.build(80), c.data).eval()
        before, y = cloned(victim.adapter.state_dict()), c.output(victim)
        c.refused(lambda v=victim, g=given: v.adapter.load(g), f"loading {what}", word)
        c.ok(
            same(victim.adapter.state_dict(), before) and torch.equal(c.output(victim), y),
            f"refusing {what} leaves traces",
        )


def longer(t: Tensor, dim: int) -> Tensor:
    return torch.cat([t, t.narrow(dim, 0, 1)], dim)


def surroundings(spelling: str) -> list[str]:
    """On GPT-2's Conv1D, with a trained head and dropout: two stages, disabled, merge, unmerge, bake, detach."""
    droppable = "dropout" in registry.parse(spelling)[0].Config.__dataclass_fields__
    c = Life(spelling, transposed=True, trained_modules=["head"], **({"dropout": 0.2} if droppable else {}))
    modes(c)
    adapted = c.build().train()
    if c.zero:
        c.ok(close(c.output(adapted), c.y0), "dropout reaches the base")
    stages(c, adapted)
    perturb(adapted.adapter)
    if droppable and any(low.rank for _, low in adapted.adapter.low_ranks()):
        adapted.train()
        c.ok(not torch.equal(c.output(adapted), c.output(adapted)), "no dropout in training")
    adapted.eval()
    c.forward_is_weight(adapted, "on Conv1D")
    c.untouched(adapted, "two stages")
    y, state = c.output(adapted), cloned(adapted.adapter.state_dict())
    for config, saved in ((c.config, state), (c.bare(), cloned(adapted.adapter.export()))):
        loaded = c.build(77, config).eval()
        loaded.adapter.load(saved)
        c.ok(torch.equal(c.output(loaded), y), "load after two stages differs")
    merging(c, adapted)
    model, fc1 = adapted.model, adapted.model.fc1
    plain = adapted.detach()
    c.ok(
        plain is model and type(fc1) is type(c.base.fc1) and vars(fc1).keys() == vars(c.base.fc1).keys(),
        "detach leaves traces",
    )
    c.ok(same(plain.state_dict(), c.pristine) and torch.equal(plain(c.x), c.y0), "detach does not give the base back")
    c.ok(all(p.requires_grad for p in plain.parameters()), "detach leaves the base frozen")
    return c.bad


def modes(c: Life) -> None:
    """Attach, begin and detach leave modes and flags as they are."""
    base = copy.deepcopy(c.base).eval()
    base.fc1.requires_grad_(False)
    adapted = begun(Adapted(base, c.config, 5), c.data)
    c.ok(not any(m.training for m in adapted.modules()), "attach or begin leaves evaluation mode")
    plain = adapted.detach()
    c.ok(not any(m.training for m in plain.modules()), "detach leaves evaluation mode")
    flags = {n for n, p in plain.named_parameters() if not p.requires_grad}
    c.ok(
        flags == {n for n, _ in plain.named_parameters() if n.startswith("fc1.")},
        "detach does not restore the frozen parameters",
    )


def stages(c: Life, adapted: Adapted) -> None:
    for index in (0, 1):
        y, data = c.output(adapted.eval()), Regression(c.base, index + 1)
        anchors = [None if low.A0 is None else low.A0.clone() for _, low in adapted.adapter.low_ranks()]
        begun(adapted, data, index)
        c.ok(
            (index == 0 and not c.zero) or close(c.output(adapted), y, 5), f"begin of stage {index} changes the output"
        )
        if index:
            now = [low.A0 for _, low in adapted.adapter.low_ranks()]
            fixed = all(
                b is None or (a is not None and torch.equal(a, b))  # a stage may fold its anchor into the past
                for a, b in zip(anchors, now, strict=True)
            )
            c.ok(fixed, "an initialisation ran in the second stage")
        train(adapted.train(), data, adapted.optimizer(adamw, 4), steps=4)
        y = c.output(adapted.eval())
        c.ok(adapted.end() or close(c.output(adapted), y, 5), f"end of stage {index} changes the output")


def merging(c: Life, adapted: Adapted) -> None:
    y = c.output(adapted)
    if not adapted.adapter.mergeable:
        c.refused(adapted.merge, "merging what depends on its input", "input")
        c.refused(copy.deepcopy(adapted).bake, "baking what depends on its input", "input")
        return
    twin = copy.deepcopy(adapted)
    lost = adapted.merge()
    c.ok(
        lost.keys() >= {s.name for s, _ in linear_sites(adapted)} and max(lost.values()) < 1e-4,
        "the merge report is wrong",
    )
    c.ok(close(c.output(adapted), y, 5), "merge differs")
    c.ok(not same(adapted.model.state_dict(), c.pristine), "merge writes nothing")
    c.refused(lambda: adapted.disabled().__enter__(), "disabled while merged", "merged")
    c.refused(lambda: adapted.save("nowhere"), "save while merged", "merge")
    c.refused(adapted.merge, "a second merge", "merged")
    adapted.unmerge()
    c.ok(torch.equal(c.output(adapted), y), "unmerge differs")
    c.refused(adapted.unmerge, "unmerge of what is not merged", "merge")
    baked = copy.deepcopy(adapted).bake()
    c.ok(close(baked(c.x), y, 5), "bake differs")
    c.ok(
        baked.state_dict().keys() == c.pristine.keys() and type(baked.fc1) is type(c.base.fc1),
        "bake leaves an adapted layer",
    )
    twin.merge()
    c.ok(same(twin.detach().state_dict(), c.pristine), "detach of a merged model does not give the base back")


def numbers(spelling: str) -> list[str]:
    """In float64 the fast path is the meaning to the last digits; a bfloat16 base works, is left alone and merges wide."""
    c = Life(spelling)
    wide = Life(spelling)
    wide.base.double()
    wide.x, wide.data = wide.x.double(), Regression(wide.base)
    adapted = begun(wide.build(), wide.data)
    train(adapted, wide.data, adapted.optimizer(adamw, 3), steps=3)
    perturb(adapted.eval().adapter, 0.1)
    c.ok(all(p.dtype == torch.float64 for p in adapted.adapter.parameters()), "a float64 base has a narrower adapter")
    wide.forward_is_weight(adapted, "in float64")
    y = adapted(wide.x).detach()
    if adapted.adapter.mergeable:
        adapted.merge()
        wide.ok(close(adapted(wide.x), y, 5), "merge differs in float64")
        adapted.unmerge()
    single = c.build().eval()
    single.adapter.load({n: t.float() if t.is_floating_point() else t for n, t in adapted.adapter.state_dict().items()})
    c.ok(close(c.output(single), y, 5), "float32 is far from float64")
    return c.bad + wide.bad + half(spelling)


def half(spelling: str) -> list[str]:
    c = Life(spelling, trained_modules=["head"])
    c.base.bfloat16()
    x, data = c.x.bfloat16(), Regression(c.base)
    y0 = c.base(x).detach()
    adapted = begun(c.build(), data)
    c.ok(
        all(p.dtype == torch.float32 for p in adapted.adapter.parameters()),
        "a bfloat16 base has an adapter in half precision",
    )
    with torch.no_grad():
        y = adapted(x)
    c.ok(y.dtype == torch.bfloat16 and (not c.zero or close(y, y0)), "attach changes the output in bfloat16")
    before = overall(adapted, data)
    train(adapted, data, adapted.optimizer(adamw, 8), steps=8)
    after = overall(adapted, data)
    c.ok(after < before, f"in bfloat16 the loss goes from {before:.4f} to {after:.4f}")
    perturb(adapted.eval().adapter, 0.1)
    y = adapted(x).detach()
    if adapted.adapter.mergeable:
        adapted.merge(dtype=torch.float32)
        c.ok(adapted.model.fc1.weight.dtype == torch.float32 and close(adapted(c.x), y), "a wide merge differs")
        adapted.unmerge()
        c.ok(torch.equal(adapted(x), y), "unmerge differs in bfloat16")
    with adapted.disabled():
        c.ok(torch.equal(adapted(x), y0), "disabled is not the base in bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        c.ok(close(adapted(x), y, 2), "autocast differs")
    return c.bad
