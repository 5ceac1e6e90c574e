import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, close, linear_sites, perturb, updates
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ViTConfig, ViTForImageClassification

from lorafactory import UserError, attach

CHANGES = {"form": (["tk"], {}), "width": ([4], {})}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}


def shared(adapted):
    return adapted.adapter.structure.shared


def test_equation_by_hand():
    """d = 2, [4, 2]: U = [1, 2], V = [1; -1], S = (3; 5), s = 10: blocks 30 V U over 50 V U."""
    module = nn.Linear(2, 4)
    adapted = attach(nn.Sequential(module), "fact", rank=1, scale=10.0, dropout=0.0)
    with torch.no_grad():
        shared(adapted).U.copy_(torch.tensor([[1.0, 2.0]]))
        shared(adapted).V.copy_(torch.tensor([[1.0], [-1.0]]))
        adapted.adapter.deltas["0"].S.copy_(torch.tensor([[3.0], [5.0]]))
    update = torch.tensor([[30.0, 60.0], [-30.0, -60.0], [50.0, 100.0], [-50.0, -100.0]])
    assert close(updates(adapted)[0], update)
    x = torch.randn(4, 2)
    assert close(adapted(x), F.linear(x, module.weight + update, module.bias))


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_blocks_share_two_matrices(form):
    """Each block [8, 8] of every layer is s V S U, S its own core or the one that its column of P makes; gradients too."""
    adapted = attach(Net().double(), "fact", form=form, rank=3, scale=2.0, **TARGETS).eval()
    perturb(adapted.adapter, 1.0)
    k = shared(adapted)
    assert k.U.shape == (3, 8) and all(d.shared is k for _, d in linear_sites(adapted))
    for s, d in linear_sites(adapted):
        assert (d.down, d.across) == (s.d_out // 8, s.d_in // 8)
        rows = []
        for i in range(d.down):
            if form == "tt":
                cores = [d.S[3 * i : 3 * i + 3, 3 * j : 3 * j + 3] for j in range(d.across)]
            else:
                cores = [sum(d.P[n, i * d.across + j] * k.C[:, :, n] for n in range(3)) for j in range(d.across)]
            rows.append(torch.cat([2 * k.V @ core @ k.U for core in cores], 1))
        dense = torch.cat(rows)
        x = torch.randn(2, 6, s.d_in, dtype=torch.float64, requires_grad=True)
        got, want = d.update(x, s.base, None), F.linear(x, dense)
        params = [*k.parameters(), *d.parameters(), x]
        g = torch.randn_like(got)
        mine, true = (torch.autograd.grad(y, params, g) for y in (got, want))
        assert close(got, want) and want.abs().max() > 1e-3 and close(d.weight(s.base) - s.base.weight, dense)
        assert all(close(m, t) and t.any() for m, t in zip(mine, true, strict=True))


def test_square_layers_alone_are_lotr():
    base, x = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)), torch.randn(5, 12)
    fact = attach(copy.deepcopy(base), "fact", rank=3, scale=2.0, dropout=0.0)
    lotr = attach(copy.deepcopy(base), "lotr", rank=3, alpha=6.0)
    perturb(fact.adapter, 1.0)
    bank = lotr.adapter.structure.banks["12x12"]
    with torch.no_grad():
        bank.L.copy_(shared(fact).V)
        bank.R.copy_(shared(fact).U)
        for n in ("0", "1"):
            lotr.adapter.deltas[n].M.copy_(fact.adapter.deltas[n].S)
    assert close(fact(x), lotr(x)) and not close(fact(x), base(x))


def test_tk_with_columns_of_the_identity_is_tt_with_slices_of_the_core():
    base, x = Net(), torch.randn(5, 24)
    tk, tt = (attach(copy.deepcopy(base), "fact", form=form, rank=4, dropout=0.0, **TARGETS) for form in ("tk", "tt"))
    perturb(tk.adapter, 1.0)
    with torch.no_grad():
        for n in "UV":
            getattr(shared(tt), n).copy_(getattr(shared(tk), n))
        for n in ("fc1", "fc2", "fc3"):
            d = tk.adapter.deltas[n]
            which = torch.arange(d.P.shape[1]) % 4
            d.P.copy_(torch.eye(4)[:, which])
            blocks = [[shared(tk).C[:, :, which[i * d.across + j]] for j in range(d.across)] for i in range(d.down)]
            tt.adapter.deltas[n].S.copy_(torch.cat([torch.cat(row, 1) for row in blocks]))
    assert close(tk(x), tt(x)) and not close(tk(x), base(x))


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_start(form):
    base, x = Net(), torch.randn(5, 24)
    adapted = attach(copy.deepcopy(base), "fact", form=form, rank=4, **TARGETS)
    k = shared(adapted)
    assert torch.equal(adapted(x), base(x)) and not k.V.any()
    adapted(x).square().sum().backward()
    assert {n for n, p in adapted.adapter.named_parameters() if p.grad.any()} == {"structure.shared.V"}
    assert 0.8 * 8**-0.5 < k.U.abs().max() <= 8**-0.5
    d = adapted.adapter.deltas["fc2"]
    if form == "tt":
        assert 0.8 * 20**-0.5 < d.S.abs().max() <= 20**-0.5, "of the rank five times: what S reads"
    else:
        total = 15 + 15 + 9
        assert 0.8 * (6 / (4 + total)) ** 0.5 < d.P.abs().max() <= (6 / (4 + total)) ** 0.5
        assert 0.8 * 3**0.5 / 4 < k.C.abs().max() <= 3**0.5 / 4


def test_dropout_is_between_the_core_and_V():
    adapted = attach(Net(), "fact", rank=4, dropout=0.5, **TARGETS).train()
    perturb(adapted.adapter, 1.0)
    k, d, module, x = shared(adapted), adapted.adapter.deltas["fc1"], adapted.model.fc1, torch.randn(6, 24)
    torch.manual_seed(1)
    got = module(x)
    torch.manual_seed(1)
    z = F.dropout(F.linear(F.linear(x.view(6, 3, 8), k.U).flatten(1), d.S), 0.5)
    want = F.linear(z.view(6, 5, 4), k.V).flatten(1)
    assert close(got, F.linear(x, module.weight, module.bias) + want) and want.any()


def test_no_update_is_formed():
    """Forward and backward; fc1 is [40, 24]."""

    class Shapes(TorchDispatchMode):
        seen: list = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.seen.append(getattr(out, "shape", None))
            return out

    adapted = attach(Net(), "fact", rank=4, target_modules=["fc1"], trained_modules=[])
    d, base, x = adapted.adapter.deltas["fc1"], adapted.adapter.sites[0].base, torch.randn(7, 24)
    with Shapes() as shapes:
        d.update(x, base, None).sum().backward()
    assert len(shapes.seen) > 5 and not {torch.Size([40, 24]), torch.Size([24, 40])} & {*shapes.seen}


def test_loading_takes_the_saved_rank():
    for form, told in (
        ("tt", r"fc1.S is no \[30, 18\], as U of rank 6 needs"),
        ("tk", "fc1.P has another rank than U, 6"),
    ):
        base, x = Net(), torch.randn(3, 24)
        saved, other = (attach(copy.deepcopy(base), "fact", form=form, rank=r, **TARGETS).eval() for r in (6, 2))
        perturb(saved.adapter, 1.0)
        state = {n: t.clone() for n, t in saved.adapter.state_dict().items()}
        other.adapter.load(state)
        assert torch.equal(other(x), saved(x))
        name = "deltas.fc1.S" if form == "tt" else "deltas.fc1.P"
        with pytest.raises(UserError, match=told):
            other.adapter.load({**state, name: state[name][:-1]})


def test_counts():
    """ViT-B: 2 d r + 12 L r^2, or 2 d r + 12 L r + r^3."""
    with torch.device("meta"):
        vit = ViTForImageClassification(ViTConfig(num_labels=10))
    for options, count in (({"rank": 16}, 61_440), ({"form": "tk", "rank": 32}, 86_528)):
        adapted = attach(copy.deepcopy(vit), "fact", **options)
        assert adapted.cost()["adapter_parameters"] == count and len(adapted.adapter.sites) == 72
        assert adapted.adapter.structure.d == 768 and adapted.adapter.structure.total == 144


def test_nonsense():
    with pytest.raises(UserError, match=r"width is 12; it must divide \[40, 24\], the shape of fc1"):
        attach(Net(), "fact", width=12, **TARGETS)
    with pytest.raises(UserError, match="rank 9 is more than fc1 .* can have: at most 8"):
        attach(Net(), "fact", rank=9, **TARGETS)
    for options in ({"rank": 0}, {"form": "cp"}, {"scale": 0.0}, {"width": 0}, {"dropout": 1.0}):
        with pytest.raises(UserError, match=f"{next(iter(options))} is"):
            attach(Net(), "fact", **options)
