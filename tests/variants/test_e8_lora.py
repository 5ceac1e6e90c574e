import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, cloned, close, linear_sites, perturb, roberta_base

from lorafactory import UserError, attach, load
from lorafactory.variants.e8_lora import simple_roots

CONSTRUCTIONS = ("simple_roots_gs", "simple_roots_polar", "root_frame", "random", "identity")
CHANGES = {
    "construction": (["root_frame"], {}),
    "frame_seed": ([1], {"construction": "random"}),
    "rectangle": (["fold"], {"init_scale": 1.0}),
    "tail": (["cut"], {"init_scale": 1.0}),
    "share": (["block"], {}),
}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}


def block(**options):
    return attach(Net().double(), "e8_lora", **TARGETS, **options).adapter.structure.frame.Q


def update(d_out, d_in, name="e8_lora", **options):
    """M, of a layer of that shape."""
    adapted = attach(nn.Sequential(nn.Linear(d_in, d_out)).double(), name, **options)
    (site, d), s = next(linear_sites(adapted)), next(adapted.adapter.parameters())
    with torch.no_grad():
        s.fill_(1.0)
    m, x = (d.weight(site.base) - site.base.weight).detach(), torch.randn(3, d_in, dtype=torch.float64)
    assert close(d.update(x, site.base, None), F.linear(x, m)), "the fast path is the matrix"
    return m


def tiling(q, d_out, d_in):
    """The first d_out rows and d_in columns of I kron Q."""
    n = -(-max(d_out, d_in) // len(q))
    return torch.kron(torch.eye(n, dtype=q.dtype), q)[:d_out, :d_in]


def test_equation_by_hand():
    """s = 3 and Q = H8 / sqrt 8, one block: the first two rows of the update are 3 / sqrt 8 times (1, 1, ...), (1, -1, ...)."""
    module = nn.Linear(8, 8)
    adapted = attach(nn.Sequential(module), "e8_lora", construction="root_frame", init_scale=3.0)
    rows = torch.tensor([[1.0, 1, 1, 1, 1, 1, 1, 1], [1.0, -1, 1, -1, 1, -1, 1, -1]]) * 3 / math.sqrt(8)
    (site, d) = next(linear_sites(adapted))
    assert close((d.weight(site.base) - module.weight)[:2], rows)
    x = torch.randn(4, 8)
    assert close(adapted(x)[:, :2], F.linear(x, module.weight[:2] + rows, module.bias[:2]))


def test_the_roots_are_those_of_E8():
    """Their Gram matrix is the Cartan matrix, whose determinant is 1."""
    cartan = 2 * torch.eye(8, dtype=torch.float64)
    for i, j in ((1, 3), (3, 4), (2, 4), (4, 5), (5, 6), (6, 7), (7, 8)):
        cartan[i - 1, j - 1] = cartan[j - 1, i - 1] = -1
    s = simple_roots()
    assert torch.equal(s @ s.T, cartan) and float(torch.linalg.det(s @ s.T)) == pytest.approx(1.0)


def test_blocks():
    """Orthogonal, and as far as they follow from the roots with these numbers."""
    for how in CONSTRUCTIONS:
        q = block(construction=how)
        assert close(q @ q.T, torch.eye(8, dtype=torch.float64)), how
        assert (q.diag().diag() == q).all() == (how == "identity"), how
    q, r = block(), 0.5**0.5
    assert close(q[0], torch.tensor([1, -1, -1, -1, -1, -1, -1, 1], dtype=torch.float64) / math.sqrt(8))
    assert close(q[1], torch.tensor([r, r, 0, 0, 0, 0, 0, 0], dtype=torch.float64))
    assert close(q[7], torch.tensor([0, 0, 0, 0, 0, 0, r, r], dtype=torch.float64))
    assert float(q.trace()) == pytest.approx(0.4605, abs=1e-4)
    polar = block(construction="simple_roots_polar")[0]
    assert polar.tolist() == pytest.approx([0.1859, -0.2153, -0.3038, -0.3418, -0.3618, -0.3726, -0.3774, 0.5457], abs=1e-4)
    s = simple_roots()
    nearest = (block(construction="simple_roots_polar") - s).norm()
    assert all(nearest < (block(construction=how) - s).norm() for how in CONSTRUCTIONS if how != "simple_roots_polar")
    roots = 8**0.5 / 2 * block(construction="root_frame")  # of norm sqrt 2: in the lattice if all products are whole
    assert close((roots @ s.T).round(), roots @ s.T) and close(roots @ roots.T, 2 * torch.eye(8, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(24, 24), (40, 24), (24, 40)])
def test_truncated(shape):
    """M is a cut of the tiling, with orthonormal rows or columns."""
    m = update(*shape)
    assert close(m, tiling(block(), *shape))
    small = m @ m.T if shape[0] <= shape[1] else m.T @ m
    assert close(small, torch.eye(24, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(48, 24), (24, 48), (40, 24), (24, 40)])
def test_folded(shape):
    """Chunks of min(d_in, d_out), summed before or repeated after, over sqrt k; every coordinate counts."""
    m, square = update(*shape, rectangle="fold"), tiling(block(), 24, 24) / math.sqrt(2)
    want = torch.cat([square, square], 0)[: shape[0]] if shape[0] > 24 else torch.cat([square, square], 1)[:, : shape[1]]
    assert close(m, want) and (m.abs().sum(0) > 0).all() and (m.abs().sum(1) > 0).all()
    if 40 not in shape:
        small = m @ m.T if shape[0] <= shape[1] else m.T @ m
        assert close(small, torch.eye(24, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(20, 20), (20, 27), (27, 20), (5, 5), (5, 30)])
def test_tails(shape):
    m, (whole, least) = tiling(block(), *shape), (min(shape) // 8 * 8, min(shape))
    assert close(update(*shape, tail="cut"), m)
    m[whole:], m[:, whole:] = 0, 0
    assert close(update(*shape, tail="zero"), m)
    for k in range(whole, least):
        m[k, k] = 1
    assert close(update(*shape), m)
    assert close(m.T @ m if shape[1] == least else m @ m.T, torch.eye(least, dtype=torch.float64)), "still orthogonal"


def test_every_singular_value_is_the_scalar():
    adapted = attach(Net().double(), "e8_lora", target_modules=["fc3"], init_scale=-0.3)
    site, d = next(linear_sites(adapted))
    x = torch.randn(5, 24, dtype=torch.float64)
    assert close(torch.linalg.svdvals(d.weight(site.base) - site.base.weight), torch.full((24,), 0.3, dtype=torch.float64))
    assert close(d.update(x, site.base, None).norm(dim=1), 0.3 * x.norm(dim=1))


def test_the_scalar_trains_from_zero_and_the_frame_does_not():
    """dL/ds is the sum of <dL/dy, M x>."""
    base, x = nn.Sequential(nn.Linear(16, 24)).double(), torch.randn(5, 16, dtype=torch.float64)
    adapted = attach(copy.deepcopy(base), "e8_lora")
    assert torch.equal(adapted(x), base(x))
    y = adapted(x)
    y.retain_grad()
    y.square().sum().backward()
    (s,) = [p for p in adapted.adapter.parameters() if p.requires_grad]
    assert s.shape == (1,) and not s.any()
    assert close(s.grad[0], (y.grad * F.linear(x, tiling(block(), 24, 16))).sum()) and s.grad.any()
    assert not adapted.adapter.structure.frame.Q.requires_grad


def test_start_of_the_sketch_changes_the_model():
    base, x = Net(), torch.randn(5, 24)
    assert not close(attach(copy.deepcopy(base), "e8_lora", init_scale=1.0)(x), base(x))
    assert torch.equal(attach(copy.deepcopy(base), "e8_lora")(x), base(x))


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        make = lambda: nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 16)})  # noqa: E731
        self.layers, self.last = nn.ModuleList(make() for _ in range(3)), nn.Linear(8, 8)

    def forward(self, x):
        for b in self.layers:
            x = x + torch.tanh(b["q"](x)) + b["v"](x)[..., :8]
        return self.last(x)


def test_a_scalar_a_block(tmp_path):
    """One for q and v of a block, one for the layer outside; saved once; a gradient from both its layers."""
    base, x = Blocks(), torch.randn(5, 8)
    adapted = attach(copy.deepcopy(base), "e8_lora", share="block")
    assert {n for n, _ in adapted.adapter.named_parameters()} == {
        f"structure.scalars.{n}.s" for n in ("layers/0", "layers/1", "layers/2", "last")
    }
    alone = attach(copy.deepcopy(base), "e8_lora")
    assert adapted.num_trainable() == 4 and alone.num_trainable() == 7
    for a in (adapted, alone):
        a(x).square().sum().backward()
    own = {s.name: d.scalar.s.grad for s, d in linear_sites(alone)}
    shared = adapted.adapter.structure.scalars["layers/1"].s.grad
    assert close(shared, own["layers.1.q"] + own["layers.1.v"]) and shared.any()
    perturb(adapted.adapter, 1.0)
    y = adapted(x)
    adapted.save(tmp_path)
    assert torch.equal(load(copy.deepcopy(base), tmp_path)(x), y) and not close(y, base(x))


def test_the_frame_is_saved_once_and_counts_whatever_the_config():
    base, x = Net(), torch.randn(5, 24)
    outputs = []
    for how in CONSTRUCTIONS:
        source = attach(copy.deepcopy(base), "e8_lora", construction=how, init_scale=1.0, **TARGETS)
        saved = cloned(source.adapter.state_dict())
        assert len(saved) == 4 and saved["structure.frame.Q"].shape == (8, 8)
        other = attach(copy.deepcopy(base), "e8_lora", **TARGETS)
        other.adapter.load(saved)
        assert torch.equal(other(x), source(x)) and not any(close(source(x), y) for y in outputs)
        outputs.append(source(x))
    first, again = (block(construction="random", frame_seed=7, seed=s) for s in (1, 2))
    assert torch.equal(first, again) and not close(first, block(construction="random"))


def test_dropout_is_of_what_the_update_reads():
    adapted = attach(Net(), "e8_lora", dropout=0.5, init_scale=1.0, **TARGETS).train()
    site, d = next(linear_sites(adapted))
    x = torch.randn(6, 24)
    torch.manual_seed(1)
    got = d.update(x, site.base, None)
    torch.manual_seed(1)
    assert close(got, F.linear(F.dropout(x, 0.5), d.weight(site.base) - site.base.weight))


def test_counts():
    """RoBERTa-base, query and value: 24 numbers, or one for each of 12 blocks."""
    for share, count in (("module", 24), ("block", 12)):
        adapted = attach(copy.deepcopy(roberta_base()), "e8_lora", target_modules=["query", "value"], share=share)
        assert adapted.cost()["adapter_parameters"] == count


def test_nonsense():
    for options in ({"construction": "leech_frame"}, {"share": "model"}, {"tail": "warn"}, {"rectangle": "no"}, {"dropout": 1.0}):
        with pytest.raises(UserError, match=f"{next(iter(options))} is"):
            attach(Net(), "e8_lora", **options)
    with pytest.raises(UserError, match="only construction=random is drawn"):
        attach(Net(), "e8_lora", frame_seed=1)
    with pytest.raises(UserError, match="frame_seed is -1"):
        attach(Net(), "e8_lora", construction="random", frame_seed=-1)
    with pytest.raises(UserError, match="rectangle=fold has no meaning here"):
        attach(Net(), "e8_lora", rectangle="fold", target_modules=["fc3"])
    with pytest.raises(UserError, match="tail=cut has no meaning here: every layer is a whole number of 8-blocks"):
        attach(Net(), "e8_lora", tail="cut")
