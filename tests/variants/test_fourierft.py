import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file
from support import Net, close, perturb, roberta_base, updates
from transformers import LlamaConfig, LlamaForCausalLM

from lorafactory import UserError, attach, export_peft, load
from lorafactory.adapter import spectral
from lorafactory.variants.fourierft import bandpass, drawn_by

SMALL = {"n": 100, "scale": 20.0}
FINE = {"start": "zero"}
CHANGES = {"start": (["zero"], {}), "position_seed": ([1], {})}
CHANGES |= {"central_frequency": ([0.0, 5.0], {}), "bandwidth": ([2.0], {"central_frequency": 5.0})}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}


def put(adapted, entries, d_in):
    """One layer's entries, {(j, l): c}, in place of those drawn."""
    d = adapted.adapter.deltas["0"]
    with torch.no_grad():
        d.positions.index.copy_(torch.tensor([j * d_in + col for j, col in entries]))
        d.c.copy_(torch.tensor(list(entries.values())))
    return d


def test_equation_by_hand():
    """s = 6 on [2, 3]: entry (0, 0) = 2 is the constant 2; entry (1, 0) = 5 adds 5 cos(pi p): rows of 7 and of -3."""
    module = nn.Linear(3, 2)
    adapted = attach(nn.Sequential(module), "fourierft", n=2, scale=6.0)
    put(adapted, {(0, 0): 2.0, (1, 0): 5.0}, 3)
    update = torch.tensor([[7.0, 7.0, 7.0], [-3.0, -3.0, -3.0]])
    assert close(updates(adapted)[0], update)
    x = torch.randn(4, 3)
    assert close(adapted(x), F.linear(x, module.weight + update, module.bias))


def test_an_entry_is_a_cosine():
    adapted = attach(nn.Sequential(nn.Linear(8, 6)), "fourierft", n=1, scale=48.0)
    put(adapted, {(4, 3): 1.5}, 8)
    p, q = torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij")
    assert close(updates(adapted)[0], 1.5 * torch.cos(2 * math.pi * (4 * p / 6 + 3 * q / 8)))


@pytest.mark.parametrize("n, dense", [(3, False), (400, True)])
def test_both_paths_are_the_equation(n, dense, monkeypatch):
    """Outputs and gradients in float64."""
    formed = []
    monkeypatch.setattr(spectral, "linear", lambda x, w: formed.append(w) or F.linear(x, w))
    adapted = attach(nn.Sequential(nn.Linear(61, 70)).double(), "fourierft", n=n, scale=10.0)
    perturb(adapted.adapter, 1.0)
    d, s = adapted.adapter.deltas["0"], adapted.adapter.sites[0]
    rows, columns = d.at()
    p, q = torch.arange(70.0).double()[:, None], torch.arange(61.0).double()
    waves = torch.stack(
        [torch.cos(2 * math.pi * (p * j / 70 + q * col / 61)) for j, col in zip(rows, columns, strict=True)]
    )
    x = torch.randn(2, 6, 61, dtype=torch.float64, requires_grad=True)
    got, want = d.update(x, s.base, None), F.linear(x, 10 / (61 * 70) * torch.einsum("k,kpq->pq", d.c, waves))
    g = torch.randn_like(got)
    mine, true = (torch.autograd.grad(y, (d.c, x), g) for y in (got, want))
    assert close(got, want) and want.abs().max() > 1e-2 and bool(formed) == dense
    assert all(close(m, t) and t.any() for m, t in zip(mine, true, strict=True))


@pytest.mark.parametrize("d_out, d_in, itself", [(4, 6, 4), (5, 7, 1), (5, 6, 2)])
def test_what_all_entries_can_represent(d_out, d_in, itself):
    """Even matrices, dW_pq = dW_-p,-q, all of them and no other: half of all, for (j, l) and (-j, -l) are one cosine."""
    adapted = attach(nn.Sequential(nn.Linear(d_in, d_out)).double(), "fourierft", n=d_out * d_in, scale=1.0)
    d = adapted.adapter.deltas["0"]
    images = torch.stack([d.dense(e).flatten() for e in torch.eye(d_out * d_in, dtype=torch.float64)])
    even = lambda m: (m + m.flip(0, 1).roll((1, 1), (0, 1))) / 2  # noqa: E731
    assert torch.linalg.matrix_rank(images) == (d_out * d_in + itself) // 2 < d_out * d_in
    m = torch.randn(d_out, d_in, dtype=torch.float64)
    wanted = even(m)
    rows, columns = d.at()
    assert close(d.dense(torch.fft.fft2(wanted).real[rows, columns]), wanted)
    best = torch.linalg.lstsq(images.T, m.flatten()[:, None], driver="gelsd").solution
    assert close((images.T @ best).view(d_out, d_in), wanted), "the nearest to a matrix is its even part"


def test_parseval_and_conjugates():
    """|dW|_F = s |c| / sqrt(d_out d_in) where each entry has its conjugate too; alone half of it is lost."""
    adapted = attach(nn.Sequential(nn.Linear(8, 8)).double(), "fourierft", n=2, scale=8.0)
    d = put(adapted, {(1, 2): 3.0, (7, 6): 3.0}, 8)
    both = d.dense(d.c).norm()
    assert close(both, d.c.norm())
    put(adapted, {(1, 2): 3.0, (7, 6): 0.0}, 8)
    assert close(d.dense(d.c), 0.5 * d.dense(torch.tensor([3.0, 3.0]).double()))


def test_positions_are_peft_s_and_one_for_all_layers_of_a_shape(tmp_path):
    base = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 20), nn.Linear(12, 12)])
    first, second = (attach(copy.deepcopy(base), "fourierft", n=30, seed=run, n_pattern={"2": 7}) for run in (1, 2))
    for shape, (rows, columns) in {"12x12": (12, 12), "20x12": (20, 12)}.items():
        index = first.adapter.structure.positions[shape].index
        drawn = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(777))[:30]
        assert index.dtype == torch.int32 and torch.equal(index.long(), drawn)
        assert torch.equal(second.adapter.structure.positions[shape].index, index), "whatever the run's seed"
    d = first.adapter.deltas
    assert d["0"].positions is d["2"].positions is not d["1"].positions and len(d["2"].c) == 7
    assert torch.equal(d["2"].at()[0], d["0"].at()[0][:7]) and len({*zip(*d["0"].at(), strict=True)}) == 30
    first.save(tmp_path)
    saved = load_file(tmp_path / "adapter.safetensors")
    assert {n for n in saved if "index" in n} == {f"structure.positions.{s}.index" for s in ("12x12", "20x12")}
    assert sum(t.numel() for t in saved.values()) == 67 + 3 + 2 * 30


def test_another_draw_or_a_damaged_file_changes_no_function(monkeypatch):
    """Positions are those of the file, whatever torch draws now; entries twice or outside are refused."""
    base = Net()
    adapted = attach(copy.deepcopy(base), "fourierft", n=50, **TARGETS)
    perturb(adapted.adapter, 1.0)
    state = {n: t.clone() for n, t in adapted.adapter.state_dict().items()}
    other = attach(copy.deepcopy(base), "fourierft", n=20, position_seed=1, **TARGETS, scale=3.0)
    x = torch.randn(4, 24)
    assert not torch.equal(other(x), adapted(x))
    other.adapter.load(state)
    assert torch.equal(other(x), adapted(x))
    name = "structure.positions.40x24.index"
    for entry in (int(state[name][1]), 960, -1):
        broken = state[name].clone()
        broken[0] = entry
        with pytest.raises(UserError, match="40x24.index is not of different entries, of 960: the file is damaged"):
            other.adapter.load({**state, name: broken})
    with pytest.raises(
        UserError, match="deltas.fc1.fourier has more entries than structure.positions.40x24.index has positions"
    ):
        other.adapter.load({**state, name: state[name][:9]})


@pytest.mark.parametrize("center", [0.0, 3.0])
@pytest.mark.parametrize("d_out, d_in", [(12, 8), (7, 9)])
def test_bias_is_the_formula_around_frequency_zero(d_out, d_in, center):
    """Equation 5 on the matrix with frequency (0, 0) in the middle, entry by entry, and moved from there to a corner."""
    want = torch.empty(d_out, d_in)
    for u in range(d_out):
        for v in range(d_in):
            square = (u - d_out // 2) ** 2 + (v - d_in // 2) ** 2
            middle = 1.0 if center == 0 else 0.0
            want[u, v] = math.exp(-((square - center**2) ** 2) / (square * 2.5**2)) if square else middle
    assert close(bandpass(d_out, d_in, center, 2.5).exp(), torch.fft.ifftshift(want))


def test_draws_follow_the_bias():
    """The first of 20,000 draws by p; the second by what is left: for p = 0.5, 0.3, 0.2 the last comes second with chance
    0.5 0.2 / 0.5 + 0.3 0.2 / 0.7. An entry of p = 0 comes last."""
    log_p = torch.tensor([[0.5, 0.3], [0.0, 0.2]]).log()
    draws = torch.stack([drawn_by(log_p, 4, seed) for seed in range(20_000)])
    first, second = (draws[:, i].bincount(minlength=4) / len(draws) for i in (0, 1))
    assert first.tolist() == pytest.approx([0.5, 0.3, 0.0, 0.2], abs=0.012)
    assert float(second[3]) == pytest.approx(0.2 + 0.06 / 0.7, abs=0.012)
    assert (draws[:, 3] == 2).all() and draws.dtype == torch.int32


def test_biased_positions(tmp_path):
    """Nearer to the frequency asked for, all different, whatever the run's seed; a file has them, PEFT cannot."""
    base = nn.ModuleList([nn.Linear(60, 60), nn.Linear(60, 44), nn.Linear(60, 60)])
    low, high = ({"n": 60, "central_frequency": f, "bandwidth": 5.0} for f in (0.0, 25.0))
    for options, least, most in ((low, 0, 15), (high, 17, 35)):
        one, two = (attach(copy.deepcopy(base), "fourierft", seed=run, **options) for run in (1, 2))
        for name, d in one.adapter.deltas.items():
            rows, columns = d.at()
            j, k = torch.minimum(rows, d.d_out - rows), torch.minimum(columns, d.d_in - columns)
            distance = torch.hypot(j.float(), k.float())
            assert distance.min() >= least and distance.max() <= most
            assert len(d.positions.index.unique()) == 60
            assert torch.equal(d.positions.index, two.adapter.deltas[name].positions.index)
        assert one.adapter.deltas["0"].positions is one.adapter.deltas["2"].positions
    perturb(one.adapter, 1.0)
    one.save(tmp_path / "a")
    again = load(copy.deepcopy(base), tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(updates(one), updates(again), strict=True))
    with pytest.raises(UserError, match="PEFT has fourierft at positions that its seed draws, and seed 777 draws others here"):
        export_peft(one, tmp_path / "p")


def test_starts():
    """The authors' changes the output: entries of deviation s sqrt(n / 2) / (d_out d_in)."""
    base, x = nn.Sequential(nn.Linear(300, 200)), torch.randn(9, 300)
    normal = attach(copy.deepcopy(base), "fourierft", n=500, scale=150.0, seed=0)
    assert float(normal.adapter.deltas["0"].c.detach().std()) == pytest.approx(1, rel=0.1)
    assert float(updates(normal)[0].std()) == pytest.approx(150 * 250**0.5 / 60_000, rel=0.1)
    assert not close(normal(x), base(x))
    zero = attach(copy.deepcopy(base), "fourierft", n=500, start="zero")
    assert torch.equal(zero(x), base(x))
    zero(x).square().sum().backward()
    assert zero.adapter.deltas["0"].c.grad.all()


def test_counts():
    """RoBERTa-base and large, query and value; a grouped-query 3B Llama, 56 layers."""
    targets = {"target_modules": ["query", "value"]}
    assert attach(copy.deepcopy(roberta_base()), "fourierft", **targets).cost()["adapter_parameters"] == 24_000
    sizes = dict(hidden_size=3072, intermediate_size=64, num_hidden_layers=28, num_attention_heads=24, head_dim=128)
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(num_key_value_heads=8, **sizes))
    assert attach(llama, "fourierft", target_modules=["q_proj", "v_proj"]).num_trainable() == 56_000


BIASES = [{"central_frequency": -1.0}, {"bandwidth": 3.0}, {"bandwidth": 0.0, "central_frequency": 1.0}]


def test_nonsense():
    with pytest.raises(UserError, match=r"n is 577; fc3 \[24, 24\] has 576 entries"):
        attach(Net(), "fourierft", n=577, target_modules=["fc3"])
    for options in ({"n": 0}, {"scale": 0.0}, {"start": "one"}, {"position_seed": -1}, {"n_pattern": {"fc1": 0}}, *BIASES):
        with pytest.raises(UserError, match=f"{next(iter(options))}.* is"):
            attach(Net(), "fourierft", **{"n": 9, **options})
