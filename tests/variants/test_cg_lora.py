import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, Regression, adamw, cloned, close, linear_sites, loss, perturb

from lorafactory import UserError, attach, load

CHANGES = {
    "codes": ([["a", "b"]], {}),
    "split": (["rank"], {"codes": ["a", "b"]}),
    "absent": (["base"], {"trained_modules": ["head"]}),
}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}
TWO = {"codes": ["text", "camera"], "code_dim": 6, "rank": 4, "hidden": 3}


def conditioned(base=None, **options):
    adapted = attach(base or Net().double(), "cg_lora", **{**TWO, **TARGETS, **options})
    perturb(adapted.adapter, 1.0)
    return adapted


def batch(n=5):
    g = torch.Generator().manual_seed(0)
    made = {k: torch.randn(n, 6, generator=g, dtype=torch.float64) for k in ("text", "camera")}
    return {"x": torch.randn(n, 7, 24, generator=g, dtype=torch.float64), **made}


def test_equation_by_hand():
    """down c = [2, 1] [3, 1] = 7, A = 7 [1, -1] = [7, -7], U = [1; 2], s = 3: the update is [[21, -21], [42, -42]]."""
    module = nn.Linear(2, 2)
    adapted = attach(nn.Sequential(module), "cg_lora", rank=1, code_dim=2, hidden=1, scale=3.0, absent="base")
    d = adapted.adapter.deltas["0"]
    with torch.no_grad():
        d.down.copy_(torch.tensor([[[2.0, 1]]]))
        d.up.copy_(torch.tensor([1.0, -1]).view(2, 1, 1))
        d.U.copy_(torch.tensor([[1.0], [2]]))
    x = torch.randn(4, 2)
    assert torch.equal(adapted(x), module.base_forward(x)), "without a code it is the base"
    adapted.adapter.before_forward({"code": torch.tensor([3.0, 1])})
    update = torch.tensor([[21.0, -21], [42, -42]])
    assert close(adapted(x), F.linear(x, module.weight + update, module.bias))


def authors(x, d, text, camera):
    """Their layer: two linear maps a code, their outputs side by side, and one reshape to [batch, d_in, rank]."""
    up = d.up.unflatten(0, (2, -1)).flatten(1, 2)  # [2, d_in rank / 2, hidden]
    flat = [F.linear(F.linear(c, d.down[j]), up[j]) for j, c in enumerate((text, camera))]
    return d.scale * x.matmul(torch.cat(flat, -1).reshape(len(x), -1, d.U.shape[1])) @ d.U.T


def test_it_is_the_authors_layer():
    adapted, b = conditioned(scale=0.7), batch()
    adapted.adapter.before_forward(b)
    for s, d in linear_sites(adapted):
        x = torch.randn(5, 7, s.d_in, dtype=torch.float64, requires_grad=True)
        got, want = d.update(x, s.base, s.base(x)), authors(x, d, b["text"], b["camera"])
        g = torch.randn_like(got)
        mine, true = (torch.autograd.grad(y, (x, d.down, d.up, d.U), g) for y in (got, want))
        assert close(got, want) and want.abs().max() > 1e-2
        assert all(close(m, t) and t.any() for m, t in zip(mine, true, strict=True))
        flat = x[:, 0]  # a layer that sees one position an example
        assert close(d.update(flat, s.base, s.base(flat)), got[:, 0])


@pytest.mark.parametrize("split", ["input", "rank"])
def test_each_code_generates_its_share(split):
    """Of the inputs or of the ranks: changing the camera changes only the other half of A."""
    adapted, b = conditioned(split=split), batch(2)
    d = adapted.adapter.deltas["fc1"]
    one = torch.stack([b["text"], b["camera"]], 1)
    two = torch.stack([b["text"], b["camera"] + 1], 1)
    changed = (d.generated(one) - d.generated(two)).abs() > 1e-9  # [batch, d_in, rank]
    first, second = changed.chunk(2, 1 if split == "input" else 2)
    assert not first.any() and second.all()


def test_a_mixed_batch_is_each_example_alone():
    adapted, b = conditioned(), batch()
    adapted.adapter.before_forward(b)
    y = adapted(b["x"])
    for k in range(5):
        adapted.adapter.before_forward({n: t[k : k + 1] for n, t in b.items()})
        assert close(adapted(b["x"][k : k + 1]), y[k : k + 1])
    same = {n: t[:1] if n == "x" else t for n, t in b.items()}
    adapted.adapter.before_forward({**b, "text": b["text"].flip(0), "camera": b["camera"].flip(0)})
    assert not close(adapted(b["x"]), y) and same["x"].shape[0] == 1


def test_codes_that_are_absent():
    base, b = Net().double(), batch()
    y0 = base(b["x"])
    off = conditioned(copy.deepcopy(base), absent="base")
    off.adapter.before_forward({"x": b["x"]})
    assert torch.equal(off(b["x"]), y0) and off.adapter.structure.codes.learned is None
    learned = conditioned(copy.deepcopy(base))
    stand_in = learned.adapter.structure.codes.learned
    learned.adapter.before_forward({"x": b["x"]})
    y = learned(b["x"])
    assert not close(y, y0) and stand_in.shape == (2, 6)
    learned.adapter.before_forward({"x": b["x"], "text": stand_in[0].detach(), "camera": stand_in[1].detach()})
    assert close(learned(b["x"]), y)
    learned(b["x"]).sum().backward()
    assert stand_in.grad is None
    learned.adapter.before_forward({"x": b["x"]})
    learned(b["x"]).sum().backward()
    assert stand_in.grad.any()


@pytest.mark.parametrize("absent", ["learned", "base"])
def test_fixed_codes_merge_and_are_saved(absent, tmp_path):
    base, b = Net().double(), batch()
    adapted = conditioned(copy.deepcopy(base), absent=absent)
    with pytest.raises(UserError, match="depends on its input"):
        adapted.merge()
    adapted.adapter.structure.fix(b["text"][0], b["camera"][0])
    y = adapted(b["x"]).detach()
    adapted.adapter.before_forward(b)
    assert torch.equal(adapted(b["x"]), y), "the batch's own count no longer"
    adapted.save(tmp_path / "a")
    assert torch.equal(load(copy.deepcopy(base), tmp_path / "a")(b["x"]), y)
    adapted.merge()
    assert close(adapted(b["x"]), y, 5) and not close(y, base(b["x"]))
    adapted.unmerge()
    assert close(adapted.bake()(b["x"]), y, 5)


def test_start():
    """U is zero and alone has a gradient in the first step; every map is Xavier-uniform."""
    base, b = Net().double(), batch()
    adapted = attach(copy.deepcopy(base), "cg_lora", **TWO, **TARGETS)
    adapted.adapter.before_forward(b)
    assert torch.equal(adapted(b["x"]), base(b["x"]))
    adapted(b["x"]).square().sum().backward()
    for s, d in linear_sites(adapted):
        assert d.U.grad.any() and not d.U.any() and not d.up.grad.any() and not d.down.grad.any()
        for t, bound in ((d.down, (6 / (6 + 3)) ** 0.5), (d.up, (6 / (3 + s.d_in * 4 // 2)) ** 0.5)):
            assert 0.8 * bound < t.detach().abs().max() <= bound


def test_it_learns_what_only_the_code_tells(tmp_path):
    """The sign of the target is in the code alone: with codes the loss falls far below what shuffled codes reach."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 12))
    x, sign = torch.randn(64, 12), torch.randint(0, 2, (64, 1)) * 2.0 - 1
    target = base(x).detach() + sign * (x @ torch.randn(12, 1)) @ torch.randn(1, 12) / 3
    found = {}
    for how, codes in (("true", sign), ("shuffled", sign[torch.randperm(64)])):
        adapted = attach(copy.deepcopy(base), "cg_lora", rank=2, code_dim=1, seed=0)
        optimizer = torch.optim.Adam(adapted.adapter.parameters(), lr=0.02)
        for _ in range(150):
            adapted.adapter.before_forward({"code": codes})
            optimizer.zero_grad()
            error = (adapted(x) - target).square().mean()
            error.backward()
            optimizer.step()
        found[how] = float(error.detach())
    assert found["true"] < 0.1 * found["shuffled"]


def test_trains_without_codes_and_comes_back(tmp_path):
    base = Net()
    data = Regression(base)
    adapted = attach(copy.deepcopy(base), "cg_lora", seed=0, **TARGETS)
    optimizer = adapted.optimizer(adamw, 4)
    for b in data(4):
        adapted.adapter.before_forward(b)
        optimizer.zero_grad()
        loss(adapted, b).backward()
        optimizer.step()
    adapted.save(tmp_path)
    x = torch.randn(3, 24)
    assert torch.equal(load(copy.deepcopy(base), tmp_path)(x), adapted(x)) and not torch.equal(adapted(x), base(x))


def test_dropout_is_of_the_update():
    adapted, b = conditioned(dropout=0.5).train(), batch()
    adapted.adapter.before_forward(b)
    s, d = next(linear_sites(adapted))
    torch.manual_seed(1)
    got = d.update(b["x"], s.base, s.base(b["x"]))
    torch.manual_seed(1)
    assert close(got, F.dropout(authors(b["x"], d, b["text"], b["camera"]), 0.5)) and got.any()


def test_counts():
    """320 square, e = 1024, two codes, both ranks 4: 2 (4,096 + 2,560) + 1,280 = 14,592."""
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(320, 320))
    adapted = attach(base, "cg_lora", codes=["text", "camera"], code_dim=1024, rank=4, hidden=4, absent="base")
    assert adapted.num_trainable() == 14_592


def test_what_does_not_fit_is_refused():
    adapted, b = conditioned(), batch()
    with pytest.raises(UserError, match="the batch has text but not all of text, camera"):
        adapted.adapter.before_forward({"text": b["text"]})
    with pytest.raises(UserError, match="camera is .*; it must be .*code_dim being 6"):
        adapted.adapter.before_forward({**b, "camera": b["camera"][:, :5]})
    adapted.adapter.before_forward(b)
    with pytest.raises(UserError, match="5 codes for the 3 examples that fc1 sees"):
        adapted(b["x"][:3])
    for options in ({"codes": []}, {"codes": ["a", "a"]}, {"rank": 0}, {"hidden": 0}, {"code_dim": 0}, {"split": "no"},
                    {"absent": "no"}, {"scale": 0.0}, {"dropout": 1.0}, {"split": "rank"}):  # fmt: skip
        with pytest.raises(UserError, match=f"{next(iter(options))} is"):
            attach(Net(), "cg_lora", **options)
    with pytest.raises(UserError, match="2 codes do not divide the rank 3 of fc1"):
        attach(Net(), "cg_lora", codes=["a", "b"], split="rank", rank=3)
    state = cloned(adapted.adapter.state_dict())
    assert {n for n in state if "codes" in n} == {"structure.codes.learned"}, "owned once"
