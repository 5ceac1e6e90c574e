"""LoRA-GA: singular vectors of the first gradient, and an untouched function."""

import copy

import pytest
import torch
from support import Net, Regression, attached, close, loss, perturb

from lorafactory import UserError, attach, probe, registry
from lorafactory.variants.lora_ga import LoRAGA

SMALL = {"batches": 4, "gamma": 4.0}
CHANGES = {"norm_clip": ([True], {"scale": "unit"})}
LAYERS = ["fc1", "fc2", "fc3"]


def built(**options):
    torch.manual_seed(0)
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
@pytest.mark.parametrize("name", LAYERS)
def test_factors_are_singular_vectors_of_the_gradient(direction, right, left, name):
    base, data, adapted = built(direction=direction, niter=0)
    u, _, vt = torch.linalg.svd(gradient(base, data, name, 4).double(), full_matrices=False)
    (low,) = [low for site, low in adapted.adapter.low_ranks() if site.name == name]
    size = base.get_submodule(name).weight.shape[0] ** 0.25 / SMALL["gamma"] ** 0.5
    for got, want in ((low.A / size, vt[right]), ((low.B / size).T, u[:, left].T)):
        assert close((got * want.float()).sum(1).abs(), torch.ones(4), 50)


def test_random_takes_other_vectors_for_A_than_for_B():
    """As the authors' code: no singular vector serves both."""
    base, data, adapted = built(direction="random", scale="unit", niter=0)
    for site, low in adapted.adapter.low_ranks():
        if site.name in LAYERS:
            u, _, vt = torch.linalg.svd(gradient(base, data, site.name, 4), full_matrices=False)
            right = (low.A @ vt[:8].T).abs().argmax(1).tolist()
            left = (low.B.T @ u[:, :8]).abs().argmax(1).tolist()
            assert sorted(right + left) == list(range(8))


def test_the_randomised_svd_is_near_and_the_seed_settles_it():
    (base, data, exact), (_, _, near), (_, _, again) = built(niter=0), built(niter=4), built(niter=4)
    for (site, low), (_, other), (_, same) in zip(*(a.adapter.low_ranks() for a in (exact, near, again)), strict=True):
        assert torch.equal(other.A, same.A) and not torch.equal(low.A, other.A)
        if site.name in LAYERS:
            g = gradient(base, data, site.name, 4)
            assert (g @ other.A.T).norm() > 0.99 * (g @ low.A.T).norm()


@pytest.mark.parametrize(("scale", "size"), [("unit", 1.0), ("gd", 0.25), ("stable", 24**0.25 / 2)])
def test_scales(scale, size):
    _, _, adapted = built(scale=scale)
    (low,) = [low for site, low in adapted.adapter.low_ranks() if site.name == "fc2"]  # d_out 24, alpha / rank = 4
    assert close(low.A @ low.A.T, size**2 * torch.eye(4), 20)
    assert close(low.B.T @ low.B, size**2 * torch.eye(4), 20)


def test_weightS_is_the_mean_root_of_the_weights_singular_values():
    base, _, adapted = built(scale="weightS", niter=0)
    for site, low in adapted.adapter.low_ranks():
        if site.name in LAYERS:
            size = (torch.linalg.svdvals(base.get_submodule(site.name).weight.detach())[:4] / 4).sqrt().mean()
            assert close(low.A @ low.A.T, size**2 * torch.eye(4), 20)
            assert close(low.B.T @ low.B, size**2 * torch.eye(4), 20)


def test_norm_clip_bounds_the_start_by_the_weight():
    for clip in (False, True):
        base, _, adapted = built(scale="unit", norm_clip=clip)
        most = [float((low.scale * (low.B @ low.A)).detach().abs().max() / site.base.weight.abs().max())
                for site, low in adapted.adapter.low_ranks()]  # fmt: skip
        assert (max(most) <= 1 + 1e-5) == clip


def test_norm_clip_leaves_a_start_that_is_small_enough():
    (_, _, plain), (_, _, clipped) = built(gamma=1e4), built(gamma=1e4, norm_clip=True)
    for (_, a), (_, b) in zip(plain.adapter.low_ranks(), clipped.adapter.low_ranks(), strict=True):
        assert torch.equal(a.A, b.A) and torch.equal(a.B, b.B)


def test_the_probe_gives_the_mean_gradient_of_the_batches():
    base, data, adapted = built()
    found = probe.gradients(adapted._stage, 4)
    assert all(close(found[name], gradient(base, data, name, 4)) for name in LAYERS)


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


def test_a_layer_without_gradient_is_refused():
    base = Net()
    base.idle = torch.nn.Linear(24, 24)
    with pytest.raises(UserError, match="no gradient reached idle"):
        attach(base, "lora_ga", rank=4, batches=Regression(base), loss=loss)


@pytest.mark.parametrize(
    "options", [{"direction": "up"}, {"scale": "large"}, {"gamma": 0.0}, {"batches": 0}, {"niter": -1}]
)
def test_nonsense_is_refused(options):
    with pytest.raises(UserError):
        registry.config("lora_ga", init=options)


def test_no_gradient_is_left_and_the_base_has_none():
    base, _, adapted = built()
    assert all(p.grad is None for p in adapted.parameters())
    assert isinstance(adapted.adapter.parts["init"], LoRAGA)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_vectors_outputs_and_gradients_are_pefts(direction):
    """PEFT's A is ours of the scale `unit`; its B is ours times singular values of G, which the paper does not have."""
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.loraga import preprocess_loraga

    torch.manual_seed(0)
    base = Net()
    data = Regression(base)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, init_lora_weights="lora_ga",
                             lora_ga_config=peft.LoraGAConfig(direction=direction, scale="unit"))  # fmt: skip
    theirs = copy.deepcopy(base)
    preprocess_loraga(theirs, config, lambda: [loss(theirs, b).backward() for b in data(4)])
    theirs = peft.get_peft_model(theirs, config)
    init = {"batches": 4, "direction": direction, "scale": "unit", "niter": 0}
    ours = attach(copy.deepcopy(base), "lora_ga", rank=4, alpha=6.0, target_modules=LAYERS, trained_modules=[],
                  batches=data, loss=loss, init=init)  # fmt: skip
    pairs = {s.name: (s, low, getattr(theirs.base_model.model, s.name)) for s, low in ours.adapter.low_ranks()}
    grads = {name: gradient(base, data, name, 4) for name in LAYERS}
    left, _ = LoRAGA.columns(ours.adapter.parts["init"], 4)
    x = torch.randn(7, 24)
    assert close(ours(x), base(x)) and close(theirs(x), base(x))
    with torch.no_grad():
        for name, (site, low, layer) in pairs.items():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            assert close((low.A * a).sum(1).abs(), torch.ones(4), 500), name  # theirs is a randomised SVD
            s = torch.linalg.svdvals(grads[name])[left]
            assert close((low.B * b).sum(0).abs() / s, torch.ones(4), 500), name
            layer.get_base_layer().weight.copy_(site.base.weight - low.scale * low.B @ low.A)
    perturb(ours.adapter, 0.5)
    with torch.no_grad():
        for _, low, layer in pairs.values():
            layer.lora_A["default"].weight.copy_(low.A)
            layer.lora_B["default"].weight.copy_(low.B)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    assert close(ours(x), theirs(x)) and not close(ours(x), base(x), 100)
    for _, low, layer in pairs.values():
        assert close(low.A.grad, layer.lora_A["default"].weight.grad)
        assert close(low.B.grad, layer.lora_B["default"].weight.grad)
