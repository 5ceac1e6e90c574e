import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from support import Blocks, Net, close, linear_sites, perturb, roberta_base

from lorafactory import UserError, attach, load
from lorafactory.variants.nola import draw

SMALL = {"num_bases": 24, "alpha": 32.0}
CHANGES = {"bases": (["shared"], {}), "save_bank": ([True], {"bases": "held"}), "bank_seed": ([1], {})}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}
HERE = {"rank": 3, "num_bases": 10, **TARGETS}


def test_equation_by_hand():
    """Two bases: A = [1, 1] + 2 [1, 0] - [0, 3] = [3, -2], B = 3 [1; 2] + [0; 1] = [3; 7]; alpha / rank = 2."""
    module = nn.Linear(2, 2)
    adapted = attach(nn.Sequential(module), "nola", rank=1, num_bases=2, alpha=2.0, bases="held")
    d = adapted.adapter.deltas["0"]
    with torch.no_grad():
        d.bank.A.copy_(torch.tensor([[[1.0, 1.0]], [[1.0, 0.0]], [[0.0, 3.0]]]))
        d.bank.B.copy_(torch.tensor([[[1.0], [2.0]], [[0.0], [1.0]]]))
        d.a.copy_(torch.tensor([2.0, -1.0]))
        d.c.copy_(torch.tensor([3.0, 1.0]))
    update = 2 * torch.tensor([[9.0, -6.0], [21.0, -14.0]])
    assert close(d.weight(adapted.adapter.sites[0].base), module.weight + update)
    x = torch.randn(4, 2)
    assert close(adapted(x), F.linear(x, module.weight + update, module.bias))


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("bases", ["drawn", "held", "shared"])
def test_outputs_and_gradients_are_those_of_the_sum(bases, offset):
    """In float64; the gradient of a coefficient is the inner product of the factor's with its base."""
    adapted = attach(Net().double(), "nola", bases=bases, offset=offset, **HERE)
    perturb(adapted.adapter, 1.0)
    for s, d in linear_sites(adapted):
        many_a, many_b = d.bank.tensors()
        many_a, many_b = many_a[:, :, : s.d_in], many_b[:, : s.d_out]
        assert many_a.shape == (11, 3, s.d_in) and many_b.shape == (10, s.d_out, 3)
        a = sum(d.a[i] * many_a[i + 1] for i in range(10)) + (many_a[0] if offset else 0)
        b = sum(d.c[i] * many_b[i] for i in range(10))
        x = torch.randn(2, 6, s.d_in, dtype=torch.float64, requires_grad=True)
        y, z = d.update(x, s.base, None), 16 / 3 * x @ (b @ a).T
        g = torch.randn_like(y)
        mine, true = (torch.autograd.grad(t, (d.a, d.c, x), g) for t in (y, z))
        assert close(y, z) and close(d.weight(s.base), s.base.weight + 16 / 3 * b @ a) and z.abs().max() > 1e-3
        assert all(close(m, t) and t.any() for m, t in zip(mine, true, strict=True))


def test_drawing_again_is_holding():
    """The same bits after training; torch's generator stands where it stood, and backward keeps no bases."""
    base, x = Net(), torch.randn(5, 24)
    both = [attach(copy.deepcopy(base), "nola", bases=b, **HERE) for b in ("drawn", "held")]
    for adapted in both:
        optimizer = torch.optim.AdamW(adapted.adapter.parameters(), lr=1e-2)
        for _ in range(4):
            state = torch.random.get_rng_state()
            optimizer.zero_grad()
            adapted(x).square().mean().backward()
            optimizer.step()
            assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(both[0](x), both[1](x)) and not close(both[0](x), base(x))
    kept = []
    for adapted in both:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            adapted(x)
        kept.append(max(sizes))
        assert all(d.bank.A.numel() == (11 * 3 * s.d_in if d.bank.held else 0) for s, d in linear_sites(adapted))
    assert kept[0] <= 24 * 40 < kept[1], "no more than a weight of the base"


def test_start():
    base, x = Net(), torch.randn(9, 24)
    adapted = attach(copy.deepcopy(base), "nola", **HERE)
    assert torch.equal(adapted(x), base(x))
    adapted(x).square().sum().backward()
    for s, d in linear_sites(adapted):
        assert not d.a.any() and not d.c.any() and d.c.grad.all() and not d.a.grad.any()
        (b, a), (many_a, many_b) = d.factors(), d.bank.tensors()
        assert not b.any() and torch.equal(a, many_a[0]) and 0.8 * s.d_in**-0.5 < a.abs().max() <= s.d_in**-0.5
        assert all(0.95 < t.abs().max() * 10**0.5 <= 1 for t in (many_a[1:], many_b))
    plain = attach(copy.deepcopy(base), "nola", offset=False, **HERE)
    assert torch.equal(plain(x), base(x)) and all((d.a == 0.1).all() and not d.c.any() for _, d in linear_sites(plain))
    plain(x).square().sum().backward()
    assert all(d.c.grad.all() for _, d in linear_sites(plain))


def test_bases_depend_on_their_seed_alone():
    """Each layer's own, or the shared ones in slices."""
    made = [attach(Net(), "nola", bases="held", seed=s, bank_seed=b, **HERE) for s, b in ((1, 0), (2, 0), (1, 1))]
    first, same, other = ([d.bank.B for _, d in linear_sites(a)] for a in made)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    alike = [d.bank.tensors() for _, d in linear_sites(attach(Blocks(), "nola", rank=2, num_bases=5, target_modules=["q"]))]
    assert not any(torch.equal(a, b) for a, b in zip(alike[0], alike[1], strict=True)), "layers of one shape"
    shared = attach(Net(), "nola", bases="shared", **HERE)
    bank = shared.adapter.structure.bank
    assert all(d.bank is bank for _, d in linear_sites(shared)) and bank.A.shape == (11, 3, 40)
    assert sum("bank" in n for n in shared.adapter.state_dict()) == 1


@pytest.mark.parametrize("bases, keep", [("drawn", False), ("held", False), ("held", True), ("shared", False), ("shared", True)])
def test_a_checkpoint_holds_coefficients_and_a_checksum_B21(bases, keep, tmp_path):
    base, x = Net(), torch.randn(5, 24)
    adapted = attach(copy.deepcopy(base), "nola", bases=bases, save_bank=keep, **HERE)
    perturb(adapted.adapter, 1.0)
    adapted.save(tmp_path)
    file = tmp_path / "adapter.safetensors"
    state, y = load_file(file), adapted(x)
    banks = 1 if bases == "shared" else 3
    sizes = [40 + 40] if bases == "shared" else [64, 64, 48]
    held = sum(10 * 3 * n for n in sizes) + 3 * (40 if bases == "shared" else 88) if keep else 0
    assert sum(t.numel() for t in state.values()) == adapted.num_trainable() + 3 + 3 * banks + held
    assert torch.equal(load(copy.deepcopy(base), tmp_path)(x), y)
    other = attach(copy.deepcopy(base), "nola", bases=bases, save_bank=keep, alpha=1.0, **{**HERE, "rank": 2})
    other.adapter.load(adapted.adapter.state_dict())
    assert torch.equal(other(x), y) and {d.rank for _, d in linear_sites(other)} == {3}
    name = next(n for n in state if n.endswith("bank.A" if keep else "checksum"))
    state[name].view(-1)[2] += 1
    save_file(state, file)
    with pytest.raises(UserError, match="damaged" if keep else "draws another bank"):
        load(copy.deepcopy(base), tmp_path)


def test_rank_and_count():
    """2 k a layer whatever the rank: RoBERTa-base's queries and values at k = 1000."""
    for rank in (1, 3):
        adapted = attach(Net().double(), "nola", **{**HERE, "rank": rank})
        perturb(adapted.adapter, 1.0)
        found = [torch.linalg.matrix_rank(d.weight(s.base) - s.base.weight, rtol=1e-10) for s, d in linear_sites(adapted)]
        assert [int(r) for r in found] == [rank] * 3 and adapted.num_trainable() == 60
    roberta = attach(copy.deepcopy(roberta_base()), "nola", rank=1, num_bases=1000, target_modules=["query", "value"])
    assert roberta.cost()["adapter_parameters"] == 48_000


def test_dropout_is_of_what_A_reads():
    adapted = attach(Net(), "nola", dropout=0.5, **HERE).train()
    perturb(adapted.adapter, 1.0)
    (b, a), module, x = adapted.adapter.deltas["fc1"].factors(), adapted.model.fc1, torch.randn(6, 24)
    torch.manual_seed(1)
    got = module(x)
    torch.manual_seed(1)
    assert close(got, F.linear(x, module.weight, module.bias) + F.dropout(x, 0.5) @ a.T @ b.T)


def test_nonsense():
    wrong = ({"rank": 0}, {"num_bases": 0}, {"alpha": 0.0}, {"bases": "kept"}, {"dropout": 1.0}, {"bank_seed": -1},
             {"save_bank": True})  # fmt: skip
    for options in wrong:
        with pytest.raises(UserError, match=f"{next(iter(options))} is"):
            attach(Net(), "nola", **options)
    adapted = attach(Net(), "nola", **HERE)
    with pytest.raises(UserError, match=r"a is \[11\], not \[10\]"):
        adapted.adapter.load(attach(Net(), "nola", **{**HERE, "num_bases": 11}).adapter.state_dict())


def test_the_operator_is_what_a_compiler_is_told():
    torch.library.opcheck(draw, (3, 2, 5, 7, 4))
