import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, close, linear_sites, perturb, roberta_base, updates

from lorafactory import UserError, attach
from lorafactory.adapter import spectral
from lorafactory.variants.waveft import WAVELETS, analysis, filters, synthesis

SMALL = {"n": 100, "scale": 5.0}
CHANGES = {"position_seed": ([1], {}), "wavelet": (["db2", "sym4", "coif1"], {})}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}


def put(adapted, entries, d_in):
    """One layer's entries, {(row, column): c}, in place of those drawn."""
    d = adapted.adapter.deltas["0"]
    with torch.no_grad():
        d.positions.index.copy_(torch.tensor([r * d_in + col for r, col in entries]))
        d.c.copy_(torch.tensor(list(entries.values())))
    return d


def test_equation_by_hand():
    """s = 2 on [2, 2]: mean a = 1, along rows h = 2 (upper right), along columns v = 3 (lower left), both d = 4."""
    module = nn.Linear(2, 2)
    adapted = attach(nn.Sequential(module), "waveft", n=4, scale=2.0)
    put(adapted, {(0, 0): 1.0, (0, 1): 2.0, (1, 0): 3.0, (1, 1): 4.0}, 2)
    update = torch.tensor([[1.0 + 2 + 3 + 4, 1 + 2 - 3 - 4], [1 - 2 + 3 - 4, 1 - 2 - 3 + 4]])
    assert close(updates(adapted)[0], update)
    x = torch.randn(4, 2)
    assert close(adapted(x), F.linear(x, module.weight + update, module.bias))


@pytest.mark.parametrize("row, column, signs", [(1, 2, "++++"), (1, 7, "++--"), (5, 2, "+-+-"), (5, 7, "+--+")])
def test_an_entry_of_haar_is_four_weights(row, column, signs):
    """Of each quarter of [8, 10], one: cell (1, 2), rows 2 and 3, columns 4 and 5, at s c / 2."""
    adapted = attach(nn.Sequential(nn.Linear(10, 8)), "waveft", n=1, scale=6.0)
    put(adapted, {(row, column): 1.5}, 10)
    want = torch.zeros(8, 10)
    want[2:4, 4:6] = 4.5 * torch.tensor([1.0 if s == "+" else -1.0 for s in signs]).view(2, 2)
    assert close(updates(adapted)[0], want)


def test_norm_is_that_of_the_entries():
    adapted = attach(nn.Sequential(nn.Linear(20, 12)).double(), "waveft", n=130, scale=7.0)
    perturb(adapted.adapter, 1.0)
    d = adapted.adapter.deltas["0"]
    assert close(updates(adapted)[0].norm(), 7 * d.c.norm())


@pytest.mark.parametrize("wavelet", ["db1", "db2", "db5", "sym4", "coif1", None])
@pytest.mark.parametrize("d_out, d_in", [(70, 61), (61, 70)])
@pytest.mark.parametrize("n, dense", [(5, False), (400, True)])
def test_both_paths_are_one_function(n, dense, d_out, d_in, wavelet, monkeypatch):
    """Outputs and gradients in float64, sizes odd and even; and the transform is linear in c, entry by entry."""
    formed = []
    monkeypatch.setattr(spectral, "linear", lambda x, w: formed.append(w) or F.linear(x, w))
    adapted = attach(nn.Sequential(nn.Linear(d_in, d_out)).double(), "waveft", n=n, wavelet=wavelet)
    perturb(adapted.adapter, 1.0)
    d, s = adapted.adapter.deltas["0"], adapted.adapter.sites[0]
    x = torch.randn(2, 6, d_in, dtype=torch.float64, requires_grad=True)
    got, want = d.update(x, s.base, None), F.linear(x, d.dense(d.c))
    g = torch.randn_like(got)
    mine, true = (torch.autograd.grad(y, (d.c, x), g) for y in (got, want))
    assert close(got, want) and want.abs().max() > 1e-2 and bool(formed) == dense
    assert all(close(m, t) and t.any() for m, t in zip(mine, true, strict=True))
    one, two = torch.eye(n, dtype=torch.float64)[[0, 3]]
    assert d.dense(one).any() and close(d.dense(2 * one - two), 2 * d.dense(one) - d.dense(two))


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_filters_are_orthonormal_and_blind_to_polynomials(wavelet):
    """With all their shifts by two. A family's name tells its length and below which order the high one sees nothing; a
    coiflet's low one neither, but for the mean, from tap -2 order on."""
    low, high = filters(wavelet)
    family, order = wavelet.rstrip("0123456789"), int(wavelet.lstrip("dbsymcoif"))
    length, blind = (6 * order, 2 * order) if family == "coif" else (2 * order, order)
    assert len(low) == length
    for shift in range(length // 2):
        for a, b, want in ((low, low, shift == 0), (high, high, shift == 0), (low, high, 0.0)):
            dot = float((a[2 * shift :] * b[: length - 2 * shift]).sum())
            assert dot == pytest.approx(float(want), abs=1e-10)
    k = torch.linspace(-1, 1, length, dtype=torch.float64)
    assert all(abs(float((high * k**p).sum())) < 1e-8 for p in range(blind))
    assert float(low.sum()) == pytest.approx(2**0.5)
    if family == "coif":
        k = torch.arange(-2 * order, 4 * order, dtype=torch.float64) / (2 * order)
        assert all(abs(float((low * k**p).sum())) < 1e-10 for p in range(1, blind))


@pytest.mark.parametrize(
    "wavelet, low",
    [
        ("db2", [1 + 3**0.5, 3 + 3**0.5, 3 - 3**0.5, 1 - 3**0.5]),
        ("sym2", [1 + 3**0.5, 3 + 3**0.5, 3 - 3**0.5, 1 - 3**0.5]),
        ("coif1", [(b + c * 7**0.5) / 4 for b, c in ((1, -1), (5, 1), (14, 2), (14, -2), (1, -1), (-3, 1))]),
    ],
)
def test_filters_in_full(wavelet, low):
    assert close(filters(wavelet)[0], torch.tensor(low, dtype=torch.float64) / 32**0.5)


@pytest.mark.parametrize("order", range(4, 11))
def test_symlets_are_nearly_symmetric(order):
    """One spectrum with Daubechies' wavelet; the product with the mirror image, 1 if that is the filter itself."""
    low, other = filters(f"sym{order}")[0], filters(f"db{order}")[0]
    assert close(torch.fft.fft(low, 64).abs(), torch.fft.fft(other, 64).abs(), 100)
    mirrored = [float(F.conv1d(h[None], h.flip(0)[None, None], padding=2 * order - 1).max()) for h in (low, other)]
    assert mirrored[0] > mirrored[1] + 0.015 and mirrored[0] > 0.9, mirrored


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_filters_are_those_of_tables(wavelet):
    """As PEFT has them from PyWavelets, of which some have 12 digits."""
    table = pytest.importorskip("peft.tuners.waveft.wavelet").Wavelet(wavelet)
    want = torch.tensor([table.rec_lo, table.rec_hi], dtype=torch.float64)
    assert (filters(wavelet) - want).abs().max() < 1e-11


def test_coiflets_that_peft_has_not():
    """PEFT 0.21's tables of coif4 and coif5: not of unit norm, or too long."""
    wavelet = pytest.importorskip("peft.tuners.waveft.wavelet").Wavelet
    assert [(len(wavelet(n).rec_lo), sum(c * c for c in wavelet(n).rec_lo) == pytest.approx(1, abs=1e-3)) for n in
            ("coif3", "coif4", "coif5")] == [(18, True), (24, False), (48, False)]  # fmt: skip


def test_analysis_is_synthesis_transposed():
    for wavelet, d in (("db1", 9), ("db3", 12), ("db4", 11), ("sym5", 13), ("coif2", 10)):
        bank = filters(wavelet)
        s = synthesis(torch.eye(d + d % 2 + bank.shape[1] - 2, dtype=torch.float64), bank, d)
        assert close(analysis(torch.eye(d, dtype=torch.float64), bank), s.T)


def test_start_and_positions():
    """Zero, and every entry has a gradient; positions are FourierFT's for the same seed."""
    base, x = Net(), torch.randn(5, 24)
    adapted = attach(copy.deepcopy(base), "waveft", n=100, **TARGETS)
    assert torch.equal(adapted(x), base(x))
    adapted(x).square().sum().backward()
    assert all(d.c.grad.all() for _, d in linear_sites(adapted))
    other = attach(copy.deepcopy(base), "fourierft", n=100, **TARGETS)
    for n in ("40x24", "24x40", "24x24"):
        assert torch.equal(adapted.adapter.structure.positions[n].index, other.adapter.structure.positions[n].index)


def test_without_a_wavelet_it_trains_weights():
    adapted = attach(nn.Sequential(nn.Linear(12, 20)), "waveft", n=50, scale=3.0, wavelet=None)
    perturb(adapted.adapter, 1.0)
    d, u = adapted.adapter.deltas["0"], updates(adapted)[0]
    assert int((u != 0).sum()) == 50 and close(u[d.at()], 3 * d.c.detach())


def test_counts():
    """n a layer, whatever its shape: 24 in RoBERTa-base."""
    targets = {"target_modules": ["query", "value"]}
    assert attach(copy.deepcopy(roberta_base()), "waveft", n=2592, **targets).cost()["adapter_parameters"] == 24 * 2592


def test_nonsense():
    with pytest.raises(UserError, match=r"n is 577; fc3 \[24, 24\] has 576 entries"):
        attach(Net(), "waveft", n=577, target_modules=["fc3"])
    wrong = [{"wavelet": w} for w in ("sym1", "sym11", "db11", "coif4")]
    for options in ({"n": 0}, {"scale": 0.0}, {"position_seed": -1}, *wrong):
        with pytest.raises(UserError, match=f"{next(iter(options))}.* is"):
            attach(Net(), "waveft", **{"n": 9, **options})
