"""A small base model, a task for it, a training loop, and how near two numbers of a dtype must be."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lorafactory import Adapted, UserError, attach, registry

STEPS, LR = 16, 5e-3
# what a few dozen operations may lose, as a share of the largest entry
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def close(a: Tensor, b: Tensor, times: float = 1.0) -> bool:
    """Equal up to the rounding of the narrower dtype; `times` for long computations."""
    tolerance = times * max(TOLERANCE[a.dtype], TOLERANCE[b.dtype])
    return a.shape == b.shape and bool(
        (a.double() - b.double()).abs().max() <= tolerance * (1 + b.double().abs().max())
    )


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit, names and shapes included."""
    return a.keys() == b.keys() and all(t.shape == b[n].shape and torch.equal(t, b[n]) for n, t in a.items())


def cloned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in state.items()}


class Net(nn.Module):
    """Wide, tall and square layers; transposed: GPT-2's Conv1D, else nn.Linear, the last one without a bias."""

    def __init__(self, transposed: bool = False):
        super().__init__()
        self.fc1, self.fc2 = _layer(24, 40, transposed), _layer(40, 24, transposed)
        self.norm = nn.LayerNorm(24)
        self.fc3 = _layer(24, 24, transposed, bias=False)
        self.head = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc3(torch.tanh(self.norm(self.fc2(torch.tanh(self.fc1(x))))))))


def _layer(d_in: int, d_out: int, transposed: bool, bias: bool = True) -> nn.Module:
    if not transposed:
        return nn.Linear(d_in, d_out, bias)
    made = Conv1D(d_out, d_in)
    nn.init.normal_(made.weight, std=d_in**-0.5)
    nn.init.normal_(made.bias, std=0.1)
    return made


class Blocks(nn.Module):
    """Three blocks with two square layers and one that is not, as attention has them."""

    def __init__(self, d=12, wide=20):
        super().__init__()
        make = lambda: nn.ModuleDict({"q": nn.Linear(d, d), "v": nn.Linear(d, d), "up": nn.Linear(d, wide)})  # noqa: E731
        self.blocks = nn.ModuleList(make() for _ in range(3))

    def forward(self, x):
        for b in self.blocks:
            x = x + torch.tanh(b["v"](torch.tanh(b["q"](x)))) + b["up"](x)[..., : x.shape[-1]]
        return x


class Regression:
    """Batches {x, y} of a teacher: the base with a dense and a rank-1 change of every matrix, and of every bias."""

    def __init__(self, base: nn.Module, seed: int = 1):
        g = torch.Generator().manual_seed(seed)
        self.teacher = copy.deepcopy(base)
        with torch.no_grad():
            for p in self.teacher.parameters():
                dense = torch.randn(p.shape, generator=g)
                if p.dim() == 2:
                    line = torch.randn(p.shape[0], 1, generator=g) @ torch.randn(1, p.shape[1], generator=g)
                    p.add_(p.std() * (0.5 * dense + 0.3 * line))
                else:
                    p.add_(0.3 * dense)
            x = torch.randn(8, 8, 4, 24, generator=g).to(next(base.parameters()).dtype)
            self.all = [{"x": b, "y": self.teacher(b)} for b in x]

    def __call__(self, count: int) -> list[dict[str, Tensor]]:
        return [self.all[i % len(self.all)] for i in range(count)]


def loss(model: Callable, batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(model(batch["x"]).float(), batch["y"].float())


def adamw(groups: list[dict]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=LR, weight_decay=0.0)


@torch.no_grad()
def overall(adapted: Adapted, data: Regression) -> float:
    """The mean loss over all batches, in evaluation mode."""
    mode = adapted.training
    adapted.eval()
    found = sum(float(loss(adapted, b)) for b in data.all) / len(data.all)
    adapted.train(mode)
    return found


def train(
    adapted: Adapted,
    data: Regression,
    optimizer: Any,
    steps: int = STEPS,
    start: int = 0,
    watch: Callable = lambda i: None,
) -> list[float]:
    """Losses of steps `start` to `steps`; watch(i) is called after the backward pass of step i."""
    losses = []
    for i in range(start, steps):
        torch.manual_seed(100 + i)
        batch = data(i + 1)[i]
        adapted.adapter.before_forward(batch)
        task = loss(adapted, batch)
        optimizer.zero_grad()
        (task + adapted.penalty()).backward()
        watch(i)
        optimizer.lifecycle.loss = task.detach()
        optimizer.step()
        losses.append(float(task.detach()))
    return losses


def begun(adapted: Adapted, data: Regression, index: int = 0) -> Adapted:
    return adapted.begin(data, loss, index=index)


@cache
def roberta_base() -> nn.Module:
    """RoBERTa-base with two labels, shapes without numbers: what papers count parameters on. Copy it before attaching."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    with torch.device("meta"):
        return RobertaForSequenceClassification(RobertaConfig(max_position_embeddings=514, type_vocab_size=1))


@torch.no_grad()
def perturb(adapter: nn.Module, size: float = 0.03) -> None:
    """So that nothing is equal merely because it still stands where it started."""
    g = torch.Generator().manual_seed(3)
    for p in adapter.parameters():
        if p.requires_grad and p.numel():
            p.add_(size * (p.abs().mean() + 0.1) * torch.randn(p.shape, generator=g).to(p.dtype))


def linear_sites(adapted: Adapted) -> Iterator[tuple[Any, Any]]:
    """(site, delta) of every adapted linear layer."""
    for s in adapted.adapter.sites:
        if s.key in adapted.adapter.deltas and s.is_linear:
            yield s, adapted.adapter.deltas[s.key]


def updates(adapted: Adapted) -> list[Tensor]:
    """W - W0 of every adapted linear layer."""
    return [(d.weight(s.base) - s.base.weight).detach() for s, d in linear_sites(adapted)]


def trained(spelling: str, size: float, transposed: bool = False, **options: Any) -> Adapted:
    """Away from its start, by six steps and then at random."""
    torch.manual_seed(0)
    base = Net(transposed)
    data = Regression(base)
    adapted = attached(spelling, base, data, **options)
    train(adapted, data, adapted.optimizer(adamw, 6), steps=6)
    perturb(adapted.adapter, size)
    return adapted


# what a variant's own test file tells the tests that run over all variants


@cache
def told(name: str) -> Any:
    """tests/variants/test_<name>.py, which may hold
    SMALL    {option: value}: under these the method acts within a few steps on 24 dimensions
    FINE     {option: value}: under these a small change of what trains is a small update
    TOTAL    the ranks of a layer's pairs together, as a multiple of the option `rank`, where that is not 1
    TALL     how many outputs a pair has for each of its layer's, where that is not 1
    outcome  options -> what a run leaves, where the one that test_options makes would not show all that they do
    CHANGES  {option: ([values to try], {other options under which it matters})}, where guessing by type will not do"""
    path = Path(__file__).parent / "variants" / f"test_{name}.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location(f"told_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small(spelling: str, **options: Any) -> dict[str, Any]:
    """Options of a composite for small layers and short runs."""
    made: dict[str, Any] = {}
    for cls in registry.parse(spelling):
        known = cls.Config.__dataclass_fields__
        own = {"rank": 4} if cls.axis == "structure" and "rank" in known else {}
        own |= getattr(told(cls.name), "SMALL", {})
        if cls.axis == "structure":
            made |= own
        elif own:
            made[cls.axis] = own
    if needs_head(registry.parse(spelling)[0].name):
        made["trained_modules"] = ["head"]
    return made | options


@cache
def needs_head(structure: str) -> bool:
    """Whether the structure alone trains nothing."""
    try:
        Adapted(Net(), registry.config(structure, trained_modules=[]), seed=0)
        return False
    except UserError as e:
        return "would train nothing" in str(e)


def on_linear(structure: str) -> bool:
    """Whether the structure's sites may be linear layers."""
    return registry.get(structure).fits(nn.Linear(2, 2))


def attached(spelling: str, base: nn.Module, data: Regression, seed: int = 5, **options: Any) -> Adapted:
    """A begun adapter on a copy of the base."""
    return attach(copy.deepcopy(base), spelling, batches=data, loss=loss, seed=seed, **small(spelling, **options))
