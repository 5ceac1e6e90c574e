"""HF PEFT's own methods beside LoRA's kin, on the same weights, numbers and inputs: outputs, gradients, merged weights."""

import copy
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft_base import TARGETS, base, near, output
from support import close, perturb

from lorafactory import attach, linalg

peft = pytest.importorskip("peft")


@dataclass
class Case:
    """One method on both sides. pair(our delta, PEFT's layer): (our parameter, PEFT's, how ours is written in theirs,
    how their gradient is written in ours) of everything that trains."""

    variant: str
    config: Any
    pair: Any
    ours: dict = field(default_factory=dict)
    theirs: dict = field(default_factory=dict)
    size: float = 0.5


NORMS = {"target_modules": ["LayerNorm"]}


def same(p):
    return p


def oft(sign):
    return lambda d, layer: [(d.q, layer.oft_R["default"].weight, lambda q: sign * q, lambda g: sign * g)]


def hra(d, layer):
    return [(d.U, layer.hra_u["default"], same, same)]


def miss(d, layer):
    return [(d.D, layer.miss_block["default"], same, same)]


def ln_tuning(d, layer):
    theirs = dict(layer.ln_tuning_layers["default"].named_parameters())
    return [(p, theirs[n], same, same) for n, p in d.module.named_parameters()]


def delora(d, layer):
    theirs = [getattr(layer, f"delora_{n}")["default"] for n in ("A", "B", "lambda")]
    return [(p, q, same, same) for p, q in zip((d.A, d.B, d.bound), theirs, strict=True)]


def shira(d, layer):
    layer.shira_indices["default"] = d.index
    return [(d.values, layer.shira_weight["default"], same, same)]


def boft(d, layer):
    """Theirs is -Q as a whole matrix, of which they read the skew part."""
    there, here = lambda q: -linalg.skew(q, d.size), lambda g: linalg.upper(g.mT - g)
    scale = (d.s, layer.boft_s["default"], lambda s: s[:, None], lambda g: g[:, 0])
    return [(d.q, layer.boft_R["default"], there, here), scale]


def vb_lora(d, layer):
    """The bank comes with every layer, and is paired once."""
    theirs = layer.vblora_logits_A["default"], layer.vblora_logits_B["default"], layer.vblora_vector_bank["default"]
    return [(p, q, same, same) for p, q in zip((d.logits_A, d.logits_B, d.bank.vectors), theirs, strict=True)]


def randlora(d, layer):
    """On PEFT's bases."""
    d.bank.A.copy_(layer.randlora_A["default"].squeeze(1))
    d.bank.B.copy_(layer.randlora_B["default"].flatten(1))
    return [(d.Lambda, layer.randlora_lambda["default"], same, same), (d.Gamma, layer.randlora_gamma["default"], same, same)]


def fourierft(d, layer):
    return [(d.c, layer.fourierft_spectrum["default"], same, same)]


def c3a(d, layer):
    return [(d.w, layer.c3a_kernel["default"], same, same)]


def waveft(d, layer):
    return [(d.c, layer.waveft_spectrum["default"], same, same)]


def wavelets(n, family):
    theirs = {"wavelet_family": family} if family else {"use_idwt": False}
    own = {"n": n, "scale": 3.0, "wavelet": family}
    return Case("waveft", "WaveFTConfig", waveft, own, {"n_frequency": n, "scaling": 3.0, **theirs})


FAMILIES = ((300, "db1"), (1, "db1"), (200, "db3"), (1, "db2"), (200, "sym4"), (1, "sym7"), (200, "coif1"), (1, "coif3"))

CASES = {
    "randlora": Case("randlora", "RandLoraConfig", randlora, {"rank": 5, "scale": 4.0, "by_terms": False},
                     {"r": 5, "randlora_alpha": 20}),
    "randlora, sparse": Case("randlora", "RandLoraConfig", randlora, {"rank": 5, "scale": 8.0, "by_terms": False},
                             {"r": 5, "randlora_alpha": 40, "sparse": True}),
    "vb_lora": Case("vb_lora", "VBLoRAConfig", vb_lora, {"rank": 3, "num_vectors": 20, "vector_length": 8, "bound": 0.5},
                    {"r": 3, "num_vectors": 20, "vector_length": 8}),
    **{f"waveft, {n} of {family}": wavelets(n, family) for n, family in FAMILIES},
    "waveft, the weights themselves": wavelets(200, None),
    "c3a": Case("c3a", "C3AConfig", c3a, {"block_size": 16}, {"block_size": 16}),
    "c3a, small blocks": Case("c3a", "C3AConfig", c3a, {"block_size": 2}, {"block_size": 2}),
    "fourierft": Case("fourierft", "FourierFTConfig", fourierft, {"n": 300, "scale": 20.0},
                      {"n_frequency": 300, "scaling": 20.0}),
    "fourierft, by the activations": Case("fourierft", "FourierFTConfig", fourierft,
                                          {"n": 1, "scale": 500.0, "position_seed": 3},
                                          {"n_frequency": 1, "scaling": 500.0, "random_loc_seed": 3}),
    **{f"boft, {m} factors": Case("boft", "BOFTConfig", boft, {"block_size": b, "factors": m},
                                  {"boft_block_size": b, "boft_n_butterfly_factor": m})
       for m, b in ((1, 8), (2, 8), (3, 4))},
    "delora": Case("delora", "DeloraConfig", delora, {"rank": 6, "bound": 3.0}, {"r": 6, "delora_lambda": 3}),
    "shira": Case("shira", "ShiraConfig", shira, {"rank": 3}, {"r": 3}, 1.0),
    "ln_tuning": Case("ln_tuning", "LNTuningConfig", ln_tuning, NORMS, NORMS),
    "miss": Case("miss", "MissConfig", miss, {"rank": 8}, {"r": 8}),
    "miss, a shard that is not whole": Case("miss", "MissConfig", miss, {"rank": 7}, {"r": 7}),
    "miss, mini": Case("miss", "MissConfig", miss, {"rank": 8, "tile": 4}, {"r": 8, "mini_r": 4, "init_weights": "mini"}),
    "miss, bat": Case("miss", "MissConfig", miss, {"rank": 8, "bat": True}, {"r": 8, "init_weights": "bat"}),
    "hra": Case("hra", "HRAConfig", hra, {"rank": 6}, {"r": 6}),
    "oft": Case("oft", "OFTConfig", oft(-1), {"block_size": 8}, {"oft_block_size": 8, "use_cayley_neumann": False}),
    "oft, series": Case("oft", "OFTConfig", oft(1), {"block_size": 8, "terms": 5}, {"oft_block_size": 8}),
    "oft, longer series": Case("oft", "OFTConfig", oft(1), {"block_size": 8, "terms": 7},
                               {"oft_block_size": 8, "num_cayley_neumann_terms": 7}),
    "oft, shared": Case("oft", "OFTConfig", oft(1), {"block_size": 16, "terms": 5, "block_share": True},
                        {"oft_block_size": 16, "block_share": True}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def without_the_kernel(monkeypatch):
    """Without its CUDA kernel PEFT's BOFT takes one factor; what the kernel computes is torch.block_diag."""
    layer = peft.tuners.boft.layer
    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    diagonal = lambda r: torch.stack([torch.block_diag(*blocks) for blocks in r])  # noqa: E731
    monkeypatch.setattr(layer.FastBlockDiag, "apply", diagonal)


@pytest.fixture(autouse=True)
def with_the_gradient_of_its_forward(monkeypatch):
    """PEFT's C3A has a backward pass of its own, wrong in x: a test below. Here autograd differentiates its forward."""
    layer = peft.tuners.c3a.layer
    forward, context = layer.BlockCircularConvolution.forward, SimpleNamespace(save_for_backward=lambda *t: None)
    monkeypatch.setattr(layer, "BlockCircularConvolution", SimpleNamespace(apply=partial(forward, context)))


def both(case):
    """The two on one BERT of square, tall and wide layers, perturbed alike."""
    c = CASES[case]
    options = {"target_modules": TARGETS["bert"], "trained_modules": [], "seed": 1}
    a = attach(copy.deepcopy(base("bert")), c.variant, **{**options, **c.ours}).train()
    made = getattr(peft, c.config)(**{"target_modules": TARGETS["bert"], **c.theirs})
    b = peft.get_peft_model(copy.deepcopy(base("bert")), made).train()
    perturb(a.adapter, c.size)
    found = [t for s in a.adapter.sites
             for t in c.pair(a.adapter.deltas[s.key], b.get_submodule(f"base_model.model.{s.name}"))]
    assert {id(p) for p in a.adapter.parameters()} == {id(t[0]) for t in found}
    assert {id(p) for p in b.parameters() if p.requires_grad} == {id(t[1]) for t in found}
    with torch.no_grad():
        for p, q, there, _ in found:
            q.copy_(there(p))
    return a, b, found


@pytest.mark.parametrize("case", CASES)
def test_outputs_gradients_and_merged_weights(case):
    a, b, found = both(case)
    x, y = torch.randn(3, 7, 32, requires_grad=True), torch.randn(3, 7, 32)
    z = x.detach().clone().requires_grad_()
    got, want = output(a, x), output(b, z)
    assert near(got, want) and not close(got, output(base("bert"), x), 100)
    (got * y).sum().backward()
    (want * y).sum().backward()
    assert near(x.grad, z.grad)
    for p, q, _, here in found:
        assert q.grad.any() and near(p.grad, here(q.grad))
    a.eval().merge()
    b.eval().merge_adapter()
    assert near(output(a, x), output(b, x)) and near(output(a, x), got)
    layers = [(s.base.module, b.get_submodule(f"base_model.model.{s.name}").get_base_layer()) for s in a.adapter.sites]
    assert len(layers) > 4
    for here, there in layers:
        assert near(here.weight, there.weight) and near(here.bias, there.bias)


def test_peft_s_two_rotations_are_each_other_s_inverse():
    """Its exact R against its series, for one small q; ours are one function either way."""
    module = peft.tuners.oft.layer.OFTRotationModule(1, 28, 8, 8)
    q = 0.01 * torch.randn(1, 28)
    series, exact = module._cayley_batch(q, 8, True, 9), module._cayley_batch(q, 8, False)
    assert near(series, exact.mT) and not near(series, exact)
    s = linalg.skew(q, 8)
    assert near(linalg.cayley(s), series) and near(linalg.cayley(s, 9), series)


@pytest.mark.parametrize("b, right", [(2, True), (3, False), (8, False)])
def test_peft_s_backward_of_c3a_is_wrong_in_x(b, right):
    """Against autograd through its own dense matrix: right in w, in x only for blocks of two."""
    from peft.tuners.c3a.utils import BlockCircularConvolution, get_circulant_fast

    x, w = torch.randn(5, 3 * b, requires_grad=True), torch.randn(2, 3, b, requires_grad=True)
    y, z = BlockCircularConvolution.apply(x, w), x @ get_circulant_fast(w).T
    g = torch.randn_like(y)
    (of_x, of_w), (true_x, true_w) = torch.autograd.grad(y, (x, w), g), torch.autograd.grad(z, (x, w), g)
    assert near(y, z) and near(of_w, true_w) and near(of_x, true_x) == right
    ours = attach(torch.nn.Sequential(torch.nn.Linear(3 * b, 2 * b)), "c3a", block_size=b)
    with torch.no_grad():
        ours.adapter.deltas["0"].w.copy_(w * 3 * b)
    mine = ours.adapter.deltas["0"].update(x, ours.adapter.sites[0].base, None)
    assert near(mine, z) and near(torch.autograd.grad(mine, x, g)[0], true_x)
