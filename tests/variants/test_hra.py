import copy

import pytest
import torch
import torch.nn as nn
from support import Net, Regression, adamw, attached, close, linear_sites, perturb, train
from transformers import LlamaConfig, LlamaForCausalLM

from lorafactory import UserError, attach, load

CHANGES = {"penalty": ([0.5], {})}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}
KINDS = [{"rank": 6}, {"rank": 5}, {"rank": 6, "orthonormal": True}]


def chain(u):
    h = torch.eye(len(u))
    for column in u.T:
        n = column / column.norm()
        h = h @ (torch.eye(len(u)) - 2 * torch.outer(n, n))
    return h


def test_equation_by_hand():
    """u_1 = e_1, u_2 = (3, 4) / 5: H = [[-1, 0], [0, 1]] [[7, -24], [-24, -7]] / 25, whatever the columns' lengths."""
    module = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[25.0, 50.0]]))
    adapted = attach(nn.Sequential(module), "hra", rank=2)
    d = adapted.adapter.deltas["0"]
    with torch.no_grad():
        d.U.copy_(torch.tensor([[7.0, 3.0], [0.0, 4.0]]))
    want = torch.tensor([[-7 * 1.0 - 24 * 2.0, 24 * 1.0 - 7 * 2.0]])
    assert close(d.weight(adapted.adapter.sites[0].base), want)
    assert close(adapted(torch.eye(2)), want.T)
    adapted.merge()
    assert close(module.weight, want)


@pytest.mark.parametrize("options", KINDS)
def test_start_is_the_identity_and_moves_in_one_step(options):
    base, x = Net(), torch.randn(5, 24)
    adapted = attach(copy.deepcopy(base), "hra", **TARGETS, **options)
    assert close(adapted(x), base(x))
    assert (adapted.adapter.deltas["fc1"].U0 is None) == (options == {"rank": 6})
    adapted(x).square().sum().backward()
    assert all(d.U.grad.abs().max() > 1e-4 for _, d in linear_sites(adapted))


def test_the_two_columns_of_a_pair_part_by_themselves():
    """Equal, side by side in the chain, with opposite gradients."""
    adapted = attach(Net(), "hra", rank=6, **TARGETS)
    adapted(torch.randn(5, 24)).square().sum().backward()
    for _, d in linear_sites(adapted):
        assert torch.equal(d.U[:, ::2], d.U[:, 1::2]) and not torch.equal(d.U[:, 0], d.U[:, 2])
        assert close(d.U.grad[:, ::2], -d.U.grad[:, 1::2])


@pytest.mark.parametrize("options", KINDS)
def test_vectors_are_the_paper_s_matrices(options):
    """H^T H = I, the singular values of W0, an update of rank r (2 r with an anchor)."""
    adapted = attach(Net(), "hra", **TARGETS, **options).eval()
    perturb(adapted.adapter, 1.0)
    for s, d in linear_sites(adapted):
        h, w, w0 = chain(d.U), d.weight(s.base), s.base.weight
        if d.orthonormal:
            q, q0 = torch.linalg.qr(d.U).Q, torch.linalg.qr(d.U0).Q
            h = torch.eye(len(q)) - 2 * q @ q.T
            want = w0 @ h @ (torch.eye(len(q)) - 2 * q0 @ q0.T)
        else:
            want = w0 @ h if d.U0 is None else w0 @ h @ chain(d.U0).T
        assert close(h.T @ h, torch.eye(len(h))) and close(w, want) and not close(w, w0, 100)
        assert close(torch.linalg.svdvals(w), torch.linalg.svdvals(w0))
        x = torch.randn(9, s.d_in)
        assert close(d.update(x, s.base, x), x @ (w - w0).T)
        rank = int(torch.linalg.matrix_rank(w - w0, rtol=1e-4))
        assert rank == options["rank"] * (1 if d.U0 is None else 2)


def test_chain_and_gram_schmidt_agree_on_orthonormal_columns():
    layer = nn.Linear(12, 7)
    both = [attach(nn.Sequential(copy.deepcopy(layer)), "hra", rank=4, orthonormal=o) for o in (False, True)]
    q = torch.linalg.qr(torch.randn(12, 4)).Q
    found = []
    for adapted in both:
        d = adapted.adapter.deltas["0"]
        with torch.no_grad():
            d.U.copy_(3 * q)
        d.U0 = None
        found.append(d.weight(adapted.adapter.sites[0].base))
    assert close(*found) and close(found[0], layer.weight @ (torch.eye(12) - 2 * q @ q.T))


def test_penalty_is_asked_for_only_where_there_is_one():
    """lambda sum |I - U^T U|: with the paired start r / 2 pairs, so at least sqrt(r) a layer."""
    adapted = attach(Net(), "hra", rank=4, penalty=0.1, **TARGETS)
    want = 0.0
    for _, d in linear_sites(adapted):
        u = d.U / d.U.norm(dim=0)
        want += float((torch.eye(4) - u.T @ u).norm())
    assert float(adapted.penalty()) == pytest.approx(0.1 * want, rel=1e-5) and want > 3 * 2
    adapted.penalty().backward()
    assert all(d.U.grad.any() for _, d in linear_sites(adapted))
    for penalty, needed in ((0.1, True), (0.0, False)):
        adapted = attach(Net(), "hra", rank=4, penalty=penalty, **TARGETS)
        optimizer = adapted.optimizer(adamw, 1)
        adapted(torch.randn(5, 24)).square().sum().backward()
        assert adapted.adapter.has_penalty == needed
        if needed:
            with pytest.raises(UserError, match="adds a penalty"):
                optimizer.step()
        else:
            optimizer.step()


def test_the_penalty_makes_columns_orthogonal():
    base = Net()
    data = Regression(base)
    off = {}
    for penalty in (0.0, 1.0):
        adapted = attached("hra", base, data, penalty=penalty, trained_modules=[])
        train(adapted, data, adapted.optimizer(lambda g: torch.optim.AdamW(g, lr=5e-2), 80), steps=80)
        u = adapted.adapter.deltas["fc1"].units()
        off[penalty] = float((u.T @ u - torch.eye(4)).norm())
    assert off[1.0] < 0.5 * off[0.0]


@pytest.mark.parametrize("saved, into", [(4, 5), (5, 4), (3, 7)])
def test_an_anchor_is_saved_with_its_start(saved, into, tmp_path):
    base, x = Net(), torch.randn(5, 24)
    adapted = attach(copy.deepcopy(base), "hra", rank=saved, **TARGETS)
    perturb(adapted.adapter, 0.5)
    y, state = adapted(x), adapted.adapter.state_dict()
    assert ("deltas.fc1.U0" in state) == (saved % 2 == 1)
    other = attach(copy.deepcopy(base), "hra", rank=into, seed=9, **TARGETS)
    other.adapter.load(state)
    assert torch.equal(other(x), y)
    adapted.save(tmp_path)
    assert torch.equal(load(copy.deepcopy(base), tmp_path)(x), y)


def test_ranks_that_disagree_are_refused():
    adapted = attach(Net(), "hra", rank=4, **TARGETS)
    state = {n: t.clone() for n, t in adapted.adapter.state_dict().items()}
    state["deltas.fc2.U"] = torch.ones(40, 5)
    with pytest.raises(UserError, match="deltas.fc2.U has rank 5, the others 4"):
        adapted.adapter.load(state)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 25}, "rank 25 is more than the 24 inputs of fc1"),
        ({"penalty": -1.0}, "penalty is -1.0"),
        ({"penalty": 1.0, "orthonormal": True}, "of no effect on orthonormal columns"),
    ],
)
def test_nonsense(options, said):
    with pytest.raises(UserError, match=said):
        attach(Net(), "hra", **options)


def test_counts():
    """Llama-2-7B, queries and values, 32 reflections: 8,388,608, 0.12 %."""
    sizes = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=32000)
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32, **sizes))
    cost = attach(llama, "hra", rank=32, target_modules=["q_proj", "v_proj"]).cost()
    assert cost["adapter_parameters"] == 8_388_608
    assert round(100 * cost["adapter_parameters"] / cost["total_parameters"], 2) == 0.12
