import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, cloned, close, linear_sites, perturb, roberta_base

from lorafactory import UserError, attach, load

SMALL = {"block": 1}
VECTOR = [0.5, -1.0, 2.0]
CHANGES = {
    "instruction": ([VECTOR], {}),
    "beta": ([3.0], {"instruction": VECTOR}),
    "temperature": ([0.5], {"instruction": VECTOR}),
    "positions": (["sequence"], {}),
}
TARGETS = {"target_modules": ["fc1", "fc2", "fc3"], "trained_modules": []}


def queryable(base=None, size=1.0, **options):
    made = {"rank": 3, "atoms": 5, "top": 2, "width": 4, "block": 1, **TARGETS, **options}
    adapted = attach(base or Net().double(), "queryable_lora", **made)
    perturb(adapted.adapter, size)
    return adapted


def memory(adapted):
    return adapted.adapter.structure.memory


def inputs(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_equation_by_hand():
    """Two atoms of rank 1, M = 3 and 5, equal logits: R = 4. s = 2, A = [1, 2], B = [1; -1]: [[8, 16], [-8, -16]]."""
    module = nn.Linear(2, 2)
    adapted = attach(nn.Sequential(module), "queryable_lora", rank=1, alpha=2.0, atoms=2, top=2)
    d, m = adapted.adapter.deltas["0"], memory(adapted)
    with torch.no_grad():
        m.atoms.copy_(torch.tensor([3.0, 5]).view(2, 1, 1))
        m.keys.zero_()
        d.A.copy_(torch.tensor([[1.0, 2]]))
        d.B.copy_(torch.tensor([[1.0], [-1]]))
    x, update = torch.randn(4, 2), torch.tensor([[8.0, 16], [-8, -16]])
    assert close(adapted(x), F.linear(x, module.weight + update, module.bias))


def spelled_out(adapted, x):
    """The outputs of Net, position by position and with loops: one block a layer, as the card has it."""
    m, h, states = memory(adapted), x, []
    net, found = adapted.model, []
    for s, d in linear_sites(adapted):
        out = torch.empty(*h.shape[:-1], s.d_out, dtype=h.dtype)
        z = h @ d.A.T
        for at in torch.cartesian_prod(*[torch.arange(n) for n in h.shape[:-1]]).view(-1, h.dim() - 1).tolist():
            own, before = z[tuple(at)], [t[tuple(at)] for t in states]
            query = m.query @ own
            if before:
                share = torch.stack([(m.ask @ own) @ (m.tell @ b) / 2 for b in before]).softmax(0)
                query = query + m.query_past @ sum(a * (m.value @ b) for a, b in zip(share, before, strict=True))
            logits = m.keys @ query / 2
            best = logits.topk(m.top).indices
            w = logits[best].softmax(0)
            operator = sum(a * m.atoms[k] for a, k in zip(w, best, strict=True))
            out[tuple(at)] = s.base.weight @ h[tuple(at)] + d.scale * d.B @ operator @ own
        out = out if s.base.bias is None else out + s.base.bias
        states.append(z)
        found.append(out)
        h = torch.tanh(out) if s.name != "fc2" else torch.tanh(net.norm(out))
    return net.head(h)


def test_it_is_what_the_loops_compute():
    adapted, x = queryable(), inputs(2, 3, 24)
    got, want = adapted(x), spelled_out(adapted, x)
    of = [p for p in adapted.adapter.parameters() if p.requires_grad]
    g = torch.randn_like(got)
    mine, true = (torch.autograd.grad(y, of, g, retain_graph=True) for y in (got, want))
    assert close(got, want) and not close(got, adapted.model.head(torch.zeros(2, 3, 24).double()))
    assert all(close(a, b) and b.any() for a, b in zip(mine, true, strict=True))


def test_weights_are_a_convex_combination_of_a_few():
    adapted = queryable()
    m = memory(adapted)
    w = m.weights(inputs(50, 3), [inputs(50, 3) + 1])
    assert (w >= 0).all() and close(w.sum(-1), torch.ones(50).double()) and ((w > 0).sum(-1) == 2).all()
    assert len(set(w.argmax(-1).tolist())) > 1, "not the same for every state"
    norms = torch.linalg.matrix_norm(m.atoms, 2)
    r = torch.einsum("bk,kij->bij", w, m.atoms)
    assert (torch.linalg.matrix_norm(r, 2) <= norms.max() + 1e-9).all()


def test_order_of_the_atoms_does_not_matter():
    adapted, x = queryable(instruction=VECTOR), inputs(2, 3, 24)
    y, m, order = adapted(x), memory(adapted), torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        for t in (m.atoms, m.keys, m.prior):
            t.copy_(t[order].clone())
    assert close(adapted(x), y)
    with torch.no_grad():
        m.keys.copy_(m.keys[order].clone())
    assert not close(adapted(x), y)


def test_one_atom_at_the_identity_is_lora():
    base, x = Net(), torch.randn(5, 24)
    ours = attach(copy.deepcopy(base), "queryable_lora", rank=3, alpha=6.0, atoms=1, top=1, **TARGETS)
    lora = attach(copy.deepcopy(base), "lora", rank=3, alpha=6.0, **TARGETS)
    with torch.no_grad():
        memory(ours).atoms.copy_(torch.eye(3)[None])
        for (_, d), (_, theirs) in zip(linear_sites(ours), linear_sites(lora), strict=True):
            d.B.normal_()
            theirs.low_rank.A.copy_(d.A)
            theirs.low_rank.B.copy_(d.B)
    assert close(ours(x), lora(x)) and not close(ours(x), base(x))


def test_layers_of_a_block_share_its_first_ones_weights():
    """fc1 asks for fc2; fc3 asks for itself and sees fc1's state, but not fc2's."""
    adapted, x = queryable(block=2), inputs(4, 24)
    m, asked = memory(adapted), []
    real = m.weights
    m.weights = lambda z, earlier: asked.append((z, earlier)) or real(z, earlier)  # type: ignore[method-assign]
    adapted(x)
    (first, none), (last, before) = asked
    assert not none and len(before) == 1 and before[0] is first
    assert close(first, x @ adapted.adapter.deltas["fc1"].A.T) and last.shape == first.shape
    adapted(x + 1)
    assert len(asked) == 4 and not asked[2][1] and len(asked[3][1]) == 1, "a new pass starts afresh"


def test_what_early_layers_saw_moves_later_weights():
    adapted = queryable()
    z, m = inputs(6, 3), memory(adapted)
    one, two = (m.weights(z, [inputs(6, 3) + k]) for k in (1.0, 2.0))
    assert not close(one, two) and not close(one, m.weights(z, []))


def test_tokens_do_not_see_each_other_unless_asked_to():
    """By token, changing the last position changes no other; by sequence it does."""
    x = inputs(2, 5, 24)
    other = x.clone()
    other[:, -1] += 1
    for positions, alike in (("token", True), ("sequence", False)):
        adapted = queryable(positions=positions)
        assert close(adapted(x)[:, :-1], adapted(other)[:, :-1]) == alike


def test_padding_is_left_out_of_the_mean():
    adapted, x = queryable(positions="sequence"), inputs(2, 5, 24)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    adapted.adapter.before_forward({"attention_mask": mask})
    y = adapted(x)
    adapted.adapter.before_forward({"attention_mask": mask[:1, :3]})
    assert close(adapted(x[:1, :3]), y[:1, :3])
    adapted.adapter.before_forward({})
    assert not close(adapted(x)[0, :3], y[0, :3]) and close(adapted(x)[1], y[1])


def test_a_layer_that_sees_other_positions_asks_for_itself():
    """A pooler reads one token of a row: it neither takes nor changes the weights of its block."""
    adapted = queryable(block=3)
    d1, d2, d3 = (adapted.adapter.deltas[n] for n in ("fc1", "fc2", "fc3"))
    base = {s.name: s.base for s, _ in linear_sites(adapted)}
    x, h = inputs(2, 5, 24), inputs(2, 5, 40)
    d1.update(x, base["fc1"], None)
    want = d2.update(h, base["fc2"], None)
    d1.update(x, base["fc1"], None)
    pooled = d3.update(x[:, 0], base["fc3"], None)
    assert pooled.shape == (2, 24) and close(d2.update(h, base["fc2"], None), want)


def test_the_instruction_is_a_prior():
    """E starts at zero, a prior that is uniform: nothing changes; then beta log pi is added to the logits."""
    base, x = Net().double(), inputs(3, 24)
    options = dict(rank=3, atoms=5, top=5, width=4, seed=0, **TARGETS)
    plain = attach(copy.deepcopy(base), "queryable_lora", **options)
    told = attach(copy.deepcopy(base), "queryable_lora", instruction=VECTOR, beta=2.0, temperature=0.5, **options)
    of_prior = {f"structure.memory.{n}" for n in ("prior", "instruction")}
    plain.adapter.load(cloned({n: t for n, t in told.adapter.state_dict().items() if n not in of_prior}))
    for a in (plain, told):
        torch.manual_seed(0)
        for _, d in linear_sites(a):
            nn.init.normal_(d.B)
    assert close(told(x), plain(x))
    z, m = inputs(4, 3), memory(told)
    nn.init.normal_(m.prior)
    pi = (m.prior @ torch.tensor(VECTOR).double() / 0.5).softmax(0)
    assert close(m.weights(z, []), (memory(plain).weights(z, []) * pi**2 / (memory(plain).weights(z, []) @ pi**2)[:, None]))
    assert not close(told(x), plain(x))
    y = told(x)
    given = torch.tensor([VECTOR, [0.0, 0, 0], [1.0, 1, 1]]).double()
    told.adapter.before_forward({"instruction": given})
    each = told(x)
    assert close(each[0], y[0]) and not close(each[1], y[1]) and close(each[1], plain(x)[1])
    sequence = told(x[:, None].expand(3, 4, 24))
    assert close(sequence[:, 2], each), "one instruction a row, whatever its length"


def test_start():
    base, x = Net(), torch.randn(5, 24)
    adapted = attach(copy.deepcopy(base), "queryable_lora", rank=6, atoms=40, width=25, **TARGETS)
    assert torch.equal(adapted(x), base(x))
    m = memory(adapted)
    off = m.atoms.detach() - torch.eye(6)
    assert float(off.std()) == pytest.approx(0.02, rel=0.1) and float(m.keys.detach().std()) == pytest.approx(0.2, rel=0.1)
    adapted(x).square().sum().backward()
    assert all(d.B.grad.any() and not d.A.grad.any() for _, d in linear_sites(adapted)) and not m.keys.grad.any()


def test_the_memory_is_owned_and_saved_once(tmp_path):
    base, x = Net().double(), inputs(2, 3, 24)
    adapted = queryable(copy.deepcopy(base), instruction=VECTOR)
    assert all(d.memory is memory(adapted) for _, d in linear_sites(adapted))
    assert sum("atoms" in n for n in adapted.adapter.state_dict()) == 1
    y = adapted(x)
    adapted.save(tmp_path)
    assert torch.equal(load(copy.deepcopy(base), tmp_path)(x), y) and not close(y, base(x))
    twin = copy.deepcopy(adapted)
    assert torch.equal(twin(x), y) and memory(twin) is not memory(adapted) and memory(twin).trail.keys() == {0, 1, 2}
    with pytest.raises(UserError, match="depends on its input"):
        adapted.merge()


def test_dropout_is_of_what_A_reads():
    adapted, x = queryable(dropout=0.5).train(), inputs(6, 24)
    s, d = next(linear_sites(adapted))
    torch.manual_seed(1)
    got = d.update(x, s.base, None)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    adapted.eval()
    assert close(got, d.update(dropped, s.base, None)) and got.any()


def test_counts():
    """RoBERTa-base, query and value, rank 8, 16 atoms, width 16: 294,912 of the pairs and 2,048 of the memory."""
    options = {"target_modules": ["query", "value"], "rank": 8, "atoms": 16, "width": 16}
    adapted = attach(copy.deepcopy(roberta_base()), "queryable_lora", **options)
    assert adapted.cost()["adapter_parameters"] == 294_912 + 16 * (64 + 16) + 4 * 8 * 16 + 16 * 16 == 296_960


def test_what_does_not_fit_is_refused():
    adapted = queryable(instruction=VECTOR)
    with pytest.raises(UserError, match=r"instruction is \[2, 4\]; it must be \[batch, 3\]"):
        adapted.adapter.before_forward({"instruction": torch.ones(2, 4)})
    with pytest.raises(UserError, match="none here: give the option a vector"):
        queryable().adapter.before_forward({"instruction": torch.ones(2, 4)})
    state = cloned(adapted.adapter.state_dict())
    state["deltas.fc1.A"], state["deltas.fc1.B"] = torch.ones(2, 24), torch.ones(40, 2)
    with pytest.raises(UserError, match="deltas.fc1.A has rank 2, the atoms 3"):
        adapted.adapter.load(state)
    for options in ({"rank": 0}, {"atoms": 0}, {"top": 17}, {"width": 0}, {"block": 0}, {"alpha": 0.0}, {"positions": "row"},
                    {"dropout": 1.0}, {"instruction": []}):  # fmt: skip
        with pytest.raises(UserError, match=f"{next(iter(options))} is"):
            attach(Net(), "queryable_lora", **options)
    for options in ({"beta": -1.0}, {"temperature": 0.0}):
        with pytest.raises(UserError, match=f"{next(iter(options))} is"):
            attach(Net(), "queryable_lora", instruction=VECTOR, **options)
    with pytest.raises(UserError, match="there is none: leave them out"):
        attach(Net(), "queryable_lora", beta=2.0)
