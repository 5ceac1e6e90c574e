import copy
import itertools

import pytest
import torch
import torch.nn as nn
from support import Net, close, linear_sites, roberta_base

from lorafactory import UserError, attach
from lorafactory.variants.leech_lora import basis, golay, hadamard, hermite

CONSTRUCTIONS = ("leech_frame", "leech_basis_polar", "paper_sketch", "random", "identity")
CHANGES = {
    "construction": (["paper_sketch"], {"init_scale": 1.0}),
    "frame_seed": ([1], {"construction": "random", "init_scale": 1.0}),
    "rectangle": (["fold"], {"init_scale": 1.0}),
    "tail": (["cut"], {"init_scale": 1.0}),
    "share": (["block"], {}),
}
EYE = torch.eye(24, dtype=torch.float64)


def update(d_out, d_in, **options):
    adapted = attach(nn.Sequential(nn.Linear(d_in, d_out)).double(), "leech_lora", init_scale=1.0, **options)
    site, d = next(linear_sites(adapted))
    return (d.weight(site.base) - site.base.weight).detach()


def test_equation_by_hand():
    """s = 2, one block: the first row of the update is 2 / sqrt 24 in every place."""
    module = nn.Linear(24, 24)
    adapted = attach(nn.Sequential(module), "leech_lora", init_scale=2.0)
    x = torch.randn(4, 24)
    row = torch.full((1, 24), 2 / 24**0.5)
    assert close(adapted(x)[:, :1], x @ (module.weight[:1] + row).T + module.bias[:1])


def test_blocks_are_orthogonal_and_no_two_are_the_same():
    found = {how: update(24, 24, construction=how) for how in CONSTRUCTIONS}
    for how, q in found.items():
        assert close(q @ q.T, EYE) and close(q, EYE) == (how == "identity"), how
    assert not any(close(p, q) for p, q in itertools.combinations(found.values(), 2))


def words(generators):
    """All sums modulo 2, as rows."""
    of = torch.cartesian_prod(*[torch.arange(2)] * len(generators))
    return of @ torch.tensor(generators) % 2


def test_golay_code():
    """759 words of weight 8, 2576 of weight 12: from the generators, and from the minus signs of the Hadamard matrix."""
    want = {0: 1, 8: 759, 12: 2576, 16: 759, 24: 1}
    signs = {tuple(r) for r in (hadamard() < 0).int().tolist()} - {(0,) * 24}
    span = {(0,) * 24}
    for s in signs:
        span |= {tuple(a ^ b for a, b in zip(s, w, strict=True)) for w in span}
    for code in (words(golay()).tolist(), span):
        weights = [sum(w) for w in code]
        assert {k: weights.count(k) for k in set(weights)} == want


def test_leech_lattice():
    """Even, of determinant 1 and without a vector of norm 2: its shortest have norm 4. In units of 1 / sqrt 8."""
    b = basis()
    assert float(torch.linalg.slogdet(b)[1] / torch.tensor(2.0).double().log()) == pytest.approx(36)
    gram = b @ b.T / 8
    assert torch.equal(gram, gram.round()) and not (gram.diag() % 2).any() and gram.diag().min() == 4
    assert torch.equal(b, b.triu()) and (b.diag() > 0).all()
    inside = torch.linalg.solve(b.T, 2 * hadamard().T)  # the frame's vectors, in the basis: whole numbers
    assert close(inside, inside.round()) and close(hadamard() @ hadamard().T, 24 * EYE)
    g = torch.Generator().manual_seed(0)
    some = torch.randint(-2, 3, (2000, 24), generator=g).double() @ b
    norms = some.square().sum(1) / 8
    assert not (norms % 2).any() and norms[norms > 0].min() >= 4


def test_hermite_form_by_hand():
    assert hermite([[2, 4], [3, 5]]) == [[1, 1], [0, 2]], "of determinant 2, as 2 * 5 - 3 * 4"
    assert hermite([[0, 3], [2, 1], [4, 4]]) == [[2, 1], [0, 1]] or hermite([[0, 3], [2, 1], [4, 4]]) == [[2, 0], [0, 1]]


def test_sketch_by_hand():
    """The orthogonal factor of the placeholder's QR: its first column is (2, 0, ..., 0, -2) normed."""
    q = update(24, 24, construction="paper_sketch")
    first = torch.zeros(24, dtype=torch.float64)
    first[0], first[-1] = 0.5**0.5, -(0.5**0.5)
    assert close(q[:, 0], first)
    m = 2 * (EYE + EYE.roll(1, 1))
    m[-1, 0] = -2
    r = q.T @ m
    assert close(r, r.triu()) and (r.diag() > 0).all()


@pytest.mark.parametrize("d", [72, 32, 20])
def test_what_fills_no_block_maps_to_itself(d):
    m, whole = update(d, d), d // 24 * 24
    assert close(torch.linalg.svdvals(m), torch.ones(d, dtype=torch.float64))
    assert torch.allclose(m[whole:, whole:], torch.eye(d - whole, dtype=torch.float64))
    assert (m[whole:, :whole].abs() < 1e-9).all() and (m[:whole, whole:].abs() < 1e-9).all()
    if d % 24:
        zero = update(d, d, tail="zero")
        assert torch.allclose(zero[:whole], m[:whole]) and (zero[whole:].abs() < 1e-9).all()
        assert torch.linalg.svdvals(update(d, d, tail="cut")).max() <= 1 + 1e-9


def test_it_is_E8_only_without_an_update():
    base, x = Net(), torch.randn(5, 24)
    zero = [attach(copy.deepcopy(base), n)(x) for n in ("e8_lora", "leech_lora")]
    one = [attach(copy.deepcopy(base), n, init_scale=1.0)(x) for n in ("e8_lora", "leech_lora")]
    assert torch.equal(*zero) and not close(*one)


def test_counts():
    adapted = attach(copy.deepcopy(roberta_base()), "leech_lora", target_modules=["query", "value"])
    assert adapted.cost()["adapter_parameters"] == 24


def test_nonsense():
    with pytest.raises(UserError, match="construction is 'root_frame'; it takes leech_frame"):
        attach(Net(), "leech_lora", construction="root_frame")
    with pytest.raises(UserError, match="tail=cut has no meaning here: every layer is a whole number of 24-blocks"):
        attach(Net(), "leech_lora", tail="cut", target_modules=["fc1", "fc2", "fc3"])
