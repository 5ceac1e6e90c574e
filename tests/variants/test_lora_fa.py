import copy

import pytest
import torch
from support import Net, Regression, adamw, attached, close, loss, perturb, roberta_base, train

from lorafactory import UserError, attach, registry
from lorafactory.variants import lora_fa

CHANGES = {"damping": ([10.0], {})}
TARGETS = ["fc1", "fc2", "fc3"]


def setting(variant="lora_fa", dtype=torch.float64, **options):
    torch.manual_seed(0)
    base = Net().to(dtype)
    data = Regression(base)
    return attached(variant, base, data, target_modules=TARGETS, **{"rank": 3, **options}), data


def pairs(adapted):
    return {s.name: low for s, low in adapted.adapter.low_ranks()}


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1)


@pytest.mark.parametrize("variant", ["lora_fa", "pissa+lora_fa", "dora+lora_fa"])
def test_a_stays_bit_for_bit(variant):
    adapted, data = setting(variant)
    before = {n: low.A.clone() for n, low in pairs(adapted).items()}
    optimizer = adapted.optimizer(lambda g: torch.optim.AdamW(g, lr=1e-2, weight_decay=0.3), 5)
    start = {n: low.B.detach().clone() for n, low in pairs(adapted).items()}
    train(adapted, data, optimizer, steps=5)
    owned = {p for g in optimizer.param_groups for p in g["params"]}
    for n, low in pairs(adapted).items():
        assert torch.equal(low.A, before[n]) and low.A not in owned and low.B in owned and low.A.grad is None
        assert not torch.equal(low.B, start[n])


def test_by_hand():
    """A = [3 0; 0 1], s = 2, g_B = 2 G A^T: g_B' = g_B diag(1/9, 1) / 4 and 2 g_B' A = G."""
    low = next(iter(pairs(setting(rank=2)[0]).values()))
    with torch.no_grad():
        low.A.zero_()
        low.A[0, 0], low.A[1, 1] = 3.0, 1.0
        low.scale.fill_(2.0)
    g = torch.zeros(40, 24, dtype=torch.float64)
    g[0, :2] = torch.tensor([5.0, 7.0])
    low.B.grad = 2 * g @ low.A.T
    part = type("Part", (), {"config": registry.get("lora_fa").Config(damping=0.0)})
    found = lora_fa.LoRAFAOptimizer.precondition(type("Optimizer", (), {"part": part}), [low])[low.B]
    assert close(found[0], torch.tensor([5 / 6, 7 / 2], dtype=torch.float64)) and not found[1:].any()
    assert close(2 * found @ low.A, g)


@pytest.mark.parametrize("variant", ["lora_fa", "hydra_lora+lora_fa"])
def test_w_moves_by_the_projection_of_its_gradient(variant):
    """One step of gradient descent with rate t moves s B A by -t G P_A."""
    adapted, data = setting(variant)
    perturb(adapted.adapter, 0.3)
    before = {n: low.product().detach().clone() for n, low in pairs(adapted).items()}
    optimizer = adapted.optimizer(sgd, 1)
    loss(adapted, data(1)[0]).backward()
    raw = {n: low.B.grad.clone() for n, low in pairs(adapted).items()}
    optimizer.step()
    for n, low in pairs(adapted).items():
        assert torch.equal(low.B.grad, raw[n])  # the gradient is whole again
        change = (low.product() - before[n]) / -0.1
        q = torch.linalg.qr(low.A.T)[0]
        assert close(change @ q @ q.T, change, 10), "it leaves the span of A's rows"
        assert close(low.scale * change @ low.A.T, raw[n], 1e4)  # G P_A A^T = G A^T; damped by 1e-8


def test_the_projection_is_of_the_whole_gradient():
    """Against dL/dW itself, taken on the merged weight."""
    adapted, data = setting()
    perturb(adapted.adapter, 0.3)
    low, module = pairs(adapted)["fc1"], adapted.model.fc1
    optimizer = adapted.optimizer(sgd, 1)
    before = low.product().detach().clone()
    extra = torch.zeros(40, 24, dtype=torch.float64, requires_grad=True)
    handle = module.register_forward_hook(lambda m, args, y: y + args[0] @ extra.T)
    loss(adapted, data(1)[0]).backward()
    handle.remove()
    optimizer.step()
    q = torch.linalg.qr(low.A.T)[0]
    assert close((low.product() - before) / -0.1, extra.grad @ q @ q.T, 1e5)  # the loss is taken in float32


@pytest.mark.parametrize("make", [adamw, sgd])
def test_without_it_is_lora_with_a_frozen(make):
    adapted, data = setting(dynamics={"precondition": False})
    plain, _ = setting("lora")
    for low in pairs(plain).values():
        low.A.requires_grad_(False)
    losses = [train(m, data, m.optimizer(make, 5), steps=5) for m in (adapted, plain)]
    assert losses[0] == losses[1] and adapted.adapter.counters()["projected_steps"] == 0
    other, _ = setting()
    assert train(other, data, other.optimizer(make, 5), steps=5) != losses[0]
    assert other.adapter.counters() == {"frozen_numbers": 3 * (24 + 40 + 24), "projected_steps": 5}


def test_no_input_is_kept():
    """Of what autograd keeps for the backward pass nothing is as large as the input; LoRA keeps the input."""
    kept = {}
    for variant in ("lora", "lora_fa"):
        torch.manual_seed(0)
        adapted = attach(torch.nn.Sequential(torch.nn.Linear(64, 8)), variant, rank=2).train()
        x = torch.randn(50, 64, requires_grad=True) * 1.0
        with torch.autograd.graph.saved_tensors_hooks(lambda t, v=variant: kept.setdefault(v, []).append(t) or t, lambda t: t):
            adapted(x).square().sum().backward()
        kept[variant] = any(t.data_ptr() == x.data_ptr() and t.numel() == x.numel() for t in kept[variant])
    assert kept == {"lora": True, "lora_fa": False}


def test_count():
    """d_out rank: RoBERTa-base's 12 layers have 6 matrices with outputs 768 (5) and 3072."""
    options = {"target_modules": ["query", "key", "value", "dense"], "trained_modules": ["classifier"]}
    adapted = attach(copy.deepcopy(roberta_base()), "lora_fa", rank=8, **options)
    assert adapted.cost()["adapter_parameters"] == 12 * 8 * (5 * 768 + 3072)


def test_count_of_the_card():
    """A square layer of 4096 at rank 8: 32,768 where LoRA has 65,536."""
    for variant, count in (("lora_fa", 32768), ("lora", 65536)):
        with torch.device("meta"):
            model = torch.nn.Sequential(torch.nn.Linear(4096, 4096))
        assert attach(model, variant, rank=8).num_trainable() == count


def test_a_rank_that_drops_stays_frozen():
    adapted, _ = setting()
    low = pairs(adapted)["fc1"]
    low.keep(torch.tensor([0, 2]))
    assert not low.A.requires_grad and low.B.requires_grad


@pytest.mark.parametrize("wrong", [{"damping": -1.0}, {"precondition": False, "damping": 1e-3}])
def test_values_without_meaning(wrong):
    with pytest.raises(UserError, match="damping"):
        setting(dynamics=wrong)


def test_a_penalty_on_the_factors_is_refused():
    for name in [n for n in registry.names() if "penalty on the factors" in registry.get(n).does]:
        with pytest.raises(UserError, match="penalty on the factors"):
            registry.config(f"{name}+lora_fa")


def test_equal_to_peft():
    """Ten steps. PEFT's AdamW adds eps before the bias is corrected, so eps is small here."""
    peft = pytest.importorskip("peft", reason="needs PEFT to compare with")
    from peft.optimizers import create_lorafa_optimizer

    adapted, data = setting(rank=4, alpha=8.0)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    theirs = peft.get_peft_model(Net().double(), config, autocast_adapter_dtype=False)
    layers = {n: theirs.base_model.model.get_submodule(n) for n in pairs(adapted)}
    for n, low in pairs(adapted).items():
        layers[n].lora_A.default.weight.data.copy_(low.A)
    optimizer = adapted.optimizer(lambda groups: torch.optim.AdamW(groups, lr=1e-2, eps=1e-14, weight_decay=0.0), 10)
    other = create_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=1e-2)
    for g in other.param_groups:
        g["eps"] = 1e-14
    for i in range(10):
        for model, o in ((adapted, optimizer), (theirs, other)):
            o.zero_grad()
            loss(model, data(i + 1)[i]).backward()
            o.step()
    for n, low in pairs(adapted).items():
        theirs_b = layers[n].lora_B.default.weight
        assert (low.B - theirs_b).abs().max() < 1e-6 < 0.01 < low.B.abs().max()
