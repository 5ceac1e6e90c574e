"""LoRA-GA: singular vectors of the first gradient, and an untouched function."""

import copy

import pytest
import torch
from support import Net, Regression, attached, close, loss

from lorafactory import UserError, attach, registry
from lorafactory.variants.lora_ga import LoRAGA

SMALL = {"batches": 4, "gamma": 4.0}
CHANGES = {"norm_clip": ([True], {"scale": "unit"})}


def built(**options):
    base = Net()
    data = Regression(base)
    return base, data, attached("lora_ga", base, data, init={**SMALL, **options})


def gradient(base, data, name, count):
    """The mean dL/dW of a layer, by autograd on the whole base."""
    model = copy.deepcopy(base)
    sum(loss(model, b) for b in data(count)).div(count).backward()
    return model.get_submodule(name).weight.grad


@pytest.mark.parametrize(
    ("direction", "right", "left"),
    [("ArB2r", [0, 1, 2, 3], [4, 5, 6, 7]), ("A2rBr", [4, 5, 6, 7], [0, 1, 2, 3]), ("ArBr", [1, 3, 5, 7], [0, 2, 4, 6])],
)
@pytest.mark.parametrize("name", ["fc1", "fc2", "fc3"])
def test_factors_are_singular_vectors_of_the_gradient(direction, right, left, name):
    base, data, adapted = built(direction=direction)
    u, _, vt = torch.linalg.svd(gradient(base, data, name, 4).double(), full_matrices=False)
    (low,) = [low for site, low in adapted.adapter.low_ranks() if site.name == name]
    size = base.get_submodule(name).weight.shape[0] ** 0.25 / SMALL["gamma"] ** 0.5
    for got, want in ((low.A / size, vt[right]), ((low.B / size).T, u[:, left].T)):
        assert close((got * want.float()).sum(1).abs(), torch.ones(4), 50)


@pytest.mark.parametrize(("scale", "size"), [("unit", 1.0), ("gd", 0.25), ("stable", 24**0.25 / 2)])
def test_scales(scale, size):
    _, _, adapted = built(scale=scale)
    (low,) = [low for site, low in adapted.adapter.low_ranks() if site.name == "fc2"]  # d_out 24, alpha / rank = 4
    assert close(low.A @ low.A.T, size**2 * torch.eye(4), 20)
    assert close(low.B.T @ low.B, size**2 * torch.eye(4), 20)


def test_norm_clip_bounds_the_start_by_the_weight():
    for clip in (False, True):
        base, _, adapted = built(scale="unit", norm_clip=clip)
        most = [float((low.scale * (low.B @ low.A)).abs().max() / site.base.weight.abs().max())
                for site, low in adapted.adapter.low_ranks()]  # fmt: skip
        assert (max(most) <= 1 + 1e-5) == clip


def test_the_function_is_untouched_and_the_first_step_goes_along_the_gradient():
    base, data, adapted = built()
    x = torch.randn(4, 24)
    assert close(adapted(x), base(x))
    optimizer = adapted.optimizer(lambda g: torch.optim.SGD(g, lr=1e-4), 1)
    before = {s.name: low.product().detach() for s, low in adapted.adapter.low_ranks()}
    sum(loss(adapted, b) for b in data(4)).div(4).backward()
    optimizer.step()
    for site, low in adapted.adapter.low_ranks():
        step = low.product().detach() - before[site.name]
        g = gradient(base, data, site.name, 4)
        u, s, vt = torch.linalg.svd(g, full_matrices=False)
        best = (u[:, :8] * s[:8]) @ vt[:8]  # what a change of rank 2r can hold of it
        assert torch.nn.functional.cosine_similarity(-step.flatten(), best.flatten(), dim=0) > 0.99, site.name


def test_too_high_a_rank_is_refused_by_layer():
    base = Net()
    with pytest.raises(UserError, match="rank 20 takes 40 singular vectors of fc1: at most 12"):
        attach(base, "lora_ga", rank=20, target_modules=["fc1"], batches=Regression(base), loss=loss)


def test_it_needs_batches_and_says_so():
    with pytest.raises(UserError, match="'lora_ga' starts from data"):
        attach(Net(), "lora_ga")


@pytest.mark.parametrize("options", [{"direction": "up"}, {"scale": "large"}, {"gamma": 0.0}, {"batches": 0}])
def test_nonsense_is_refused(options):
    with pytest.raises(UserError):
        registry.config("lora_ga", init=options)


def test_no_gradient_is_left_and_the_base_has_none():
    base, _, adapted = built()
    assert all(p.grad is None for p in adapted.parameters())
    assert isinstance(adapted.adapter.parts["init"], LoRAGA)
