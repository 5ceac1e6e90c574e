import copy

import pytest
import torch
import torch.nn as nn
from support import Net, Regression, adamw, attached, close, linear_sites, perturb, roberta_base, train
from transformers import GPT2Config, GPT2LMHeadModel

from lorafactory import UserError, attach

INNER = ("lora", "dora", "vera", "lotr", "full", "ia3")
NAMES = {"ia3": {"target_modules": ["fc1", "fc2", "fc3"]}}


def make(inner, experts=3, base=None, **options):
    torch.manual_seed(0)
    base = base or Net()
    small = {"rank": 4} if inner not in ("full", "ia3") else {}
    options = {"trained_modules": ["head"], **small, **NAMES.get(inner, {}), **options}
    return attach(base, f"{inner}+molora", seed=0, routing={"experts": experts}, **options)


def mixtures(adapted):
    return [(s, d) for s, d in linear_sites(adapted) if hasattr(d, "router")]


def test_equation_by_hand():
    """Two experts whose updates are x -> x and x -> -3 x; the router prefers the first by log 3: 3/4 x - 3/4 x = 0."""
    module = nn.Linear(1, 1, bias=False)
    adapted = attach(nn.Sequential(module), "molora", rank=1, alpha=1.0, routing={"experts": 2})
    d = adapted.adapter.deltas["0"]
    with torch.no_grad():
        module.weight.fill_(10.0)
        for expert, b in zip(d.experts, (1.0, -3.0), strict=True):
            expert.low_rank.A.fill_(1.0)
            expert.low_rank.B.fill_(b)
        d.router.copy_(torch.tensor([[1.0986123], [0.0]]))
    assert close(d.gates(torch.ones(1, 1)), torch.tensor([[0.75, 0.25]]))
    assert close(adapted(torch.ones(1, 1)), torch.tensor([[10.0]]))
    assert close(adapted(torch.zeros(1, 1) + 1e-6), torch.tensor([[9e-6]]))


@pytest.mark.parametrize("inner", INNER)
def test_starts_at_the_base_and_weights_sum_to_one(inner):
    base, x = Net(), torch.randn(5, 7, 24)
    adapted = make(inner, base=copy.deepcopy(base))
    assert close(adapted(x), base(x)) and len(mixtures(adapted)) == 3
    for s, d in mixtures(adapted):
        w = d.gates(torch.randn(5, s.d_in))
        assert (
            w.shape == (5, 3)
            and close(w.sum(-1), torch.ones(5))
            and float(d.router.detach().std()) == pytest.approx(0.02, rel=0.4)
        )


@pytest.mark.parametrize("inner", INNER)
def test_one_expert_is_the_plain_delta(inner):
    adapted = make(inner, experts=1)
    perturb(adapted.adapter, 0.2)
    for s, d in mixtures(adapted):
        x = torch.randn(6, s.d_in)
        assert close(d(x, s.base), d.experts[0](x, s.base))


@pytest.mark.parametrize("inner", INNER)
def test_equal_experts_are_one_whatever_the_router_says(inner):
    adapted = make(inner)
    perturb(adapted.adapter, 0.2)
    for s, d in mixtures(adapted):
        for e in d.experts[1:]:
            e.load_state_dict(d.experts[0].state_dict())
        with torch.no_grad():
            d.router.normal_()
        x = torch.randn(6, s.d_in)
        assert close(d(x, s.base), d.experts[0](x, s.base), 2)


def test_outputs_are_mixed_not_factors():
    """sum_k w_k B_k A_k x; mixing A and B apart would be another function. Each expert has an A and a B of its own."""
    adapted = make("lora")
    perturb(adapted.adapter, 0.3)
    s, d = mixtures(adapted)[0]
    x = torch.randn(6, s.d_in)
    w = (x @ d.router.T).softmax(-1)
    lows = [e.low_rank for e in d.experts]
    want = sum(w[:, k, None] * (4 * x @ low.A.T @ low.B.T) for k, low in enumerate(lows))
    assert close(d(x, s.base) - s.base(x), want)
    apart = 4 * sum(w[:, k, None] * x @ low.A.T for k, low in enumerate(lows))
    mixed = sum(w[:, k, None] * apart @ low.B.T for k, low in enumerate(lows))
    assert not close(want, mixed)
    assert len({id(low.A) for low in lows}) == 3


def test_over_ia3_it_is_the_mixture_of_vectors():
    """y = (sum_k w_k l_k) * (W0 x + b) where outputs are scaled, W0 ((sum_k w_k l_k) * x) + b where inputs are."""
    adapted = make("ia3")
    perturb(adapted.adapter, 0.5)
    for s, d in mixtures(adapted):
        x = torch.randn(6, s.d_in)
        scale = d.gates(x) @ torch.stack([e.l for e in d.experts])
        want = scale * s.base(x) if len(scale[0]) == s.d_out and s.name != "fc2" else s.base(scale * x)
        assert close(d(x, s.base), want)


def test_router_reads_x_before_dropout():
    adapted = make("lora", dropout=0.9).train()
    perturb(adapted.adapter, 0.3)
    s, d = mixtures(adapted)[0]
    x = torch.randn(6, s.d_in)
    with torch.no_grad():
        for e in d.experts:
            e.low_rank.dropout = 0.0
            e.low_rank.load_state_dict(d.experts[0].low_rank.state_dict())
    assert torch.equal(d.gates(x), d.gates(x))
    assert close(d(x, s.base), d.experts[0](x, s.base), 2)


def test_softmax_runs_in_float32():
    """In bfloat16 logits of 300 and 301 are one number."""
    adapted = make("lora", base=Net().bfloat16())
    s, d = mixtures(adapted)[0]
    with torch.no_grad():
        d.router.zero_()
        d.router[:, 0] = torch.tensor([300.0, 301.0, 0.0])
    x = torch.eye(s.d_in)[:1].bfloat16()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            w = d.gates(x)
        assert w.dtype == torch.float32 and close(w, torch.tensor([[300.0, 301.0, 0.0]]).softmax(-1))


def test_what_is_not_linear_has_no_experts():
    """A norm and an embedding are copied once; nothing trains without a weight, so nothing can be routed there."""
    adapted = make("full", trained_modules=[])
    assert set(adapted.adapter.deltas) == {"fc1", "fc2", "norm", "fc3", "head"}
    assert not hasattr(adapted.adapter.deltas["norm"], "router") and hasattr(adapted.adapter.deltas["fc1"], "router")
    for other in ("head_only", "bitfit"):
        with pytest.raises(UserError, match=f"'molora' needs a structure with weight, which '{other}' has not"):
            attach(Net(), f"{other}+molora")


def test_a_tied_weight_is_trained_as_one():
    sizes = dict(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    base, ids = GPT2LMHeadModel(GPT2Config(**sizes)).eval(), torch.randint(0, 50, (2, 6))
    y0 = base(ids).logits
    adapted = attach(base, "full+molora", routing={"experts": 2}, seed=0)
    assert close(adapted(ids).logits, y0, 2) and not hasattr(adapted.adapter.deltas["lm_head"], "router")
    perturb(adapted.adapter, 0.3)
    adapted.adapter.deltas["transformer/wte"].module.weight.data.zero_()
    assert not adapted(ids).logits.any(), "both ends are one parameter"


def test_it_has_no_single_weight():
    adapted = make("lora")
    with pytest.raises(UserError, match="depends on its input"):
        adapted.merge()


def test_experts_part_ways_and_count():
    base = Net()
    data = Regression(base)
    adapted = attached("molora", base, data, rank=2, target_modules=["fc1"], trained_modules=["head"])
    train(adapted, data, adapted.optimizer(adamw, 6), steps=6)
    experts = adapted.adapter.deltas["fc1"].experts
    assert len({tuple(e.low_rank.B.flatten().tolist()) for e in experts}) == len(experts) == 4
    assert adapted.adapter.counters() == {"routed_layers": 1, "experts": 4}
    count = attach(copy.deepcopy(roberta_base()), "molora", rank=4, target_modules=["query"], routing={"experts": 10})
    assert count.cost()["adapter_parameters"] == 12 * (10 * 4 * (768 + 768) + 10 * 768)


def test_nonsense():
    for options in ({"experts": 0}, {"router_std": -1.0}):
        with pytest.raises(UserError, match=f"{next(iter(options))} is"):
            attach(Net(), "molora", routing=options)


@pytest.mark.parametrize("inner", ("lora", "vera", "lotr"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_one_tall_pair_is_the_sum_over_experts(inner, dtype):
    """Values and gradients; and with dropout every expert still draws its own."""
    adapted = make(inner)
    perturb(adapted.adapter, 0.2)
    for s, d in mixtures(adapted):
        x = torch.randn(5, 7, s.d_in, requires_grad=True)
        trained = [p for p in d.parameters() if p.requires_grad]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            fast = d.update(x, s.base, None)
            slow = sum(w[..., None] * e.update(x, s.base, None) for w, e in zip(d.gates(x).unbind(-1), d.experts, strict=True))
        error = 1e-6 if dtype is torch.float32 else 2e-2
        assert (fast - slow).norm() < error * slow.norm()
        ours, theirs = (torch.autograd.grad(y.float().square().sum(), [x, *trained]) for y in (fast, slow))
        assert all((a - b).norm() < 2 * error * b.norm() for a, b in zip(ours, theirs, strict=True))
    assert any(d.pairs(s.base) for s, d in mixtures(adapted))


def test_with_dropout_each_expert_draws_its_own():
    adapted = make("lora", dropout=0.5)
    for s, d in mixtures(adapted):
        assert d.train().pairs(s.base) is None and d.eval().pairs(s.base) is not None
