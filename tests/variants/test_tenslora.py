import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import Net, close, linear_sites, perturb, roberta_base
from transformers import LlamaConfig, LlamaForCausalLM

from lorafactory import UserError, attach, registry

CHANGES = {
    "mode": (["qkv", "depth", "att"], {"target_modules": ["fc1", "fc2"]}),
    "heads": ([2], {"mode": "att"}),
    "head_major": ([True], {"mode": "att", "heads": 2}),
    "start": (["normal"], {}),
    "ranks": ([[2, 3, 1, 1]], {}),
}
MODES = ("att", "qkv", "depth", "att_qkv", "att_depth", "qkv_depth", "att_qkv_depth")
H = 3


class Blocks(nn.Module):
    """Two blocks with three square projections."""

    def __init__(self, d=12):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({n: nn.Linear(d, d) for n in "qkv"}) for _ in range(2))

    def forward(self, x):
        for b in self.blocks:
            x = x + torch.tanh(b["v"](torch.tanh(b["k"](torch.tanh(b["q"](x))))))
        return x


def options(mode, **more):
    return {"mode": mode, "rank": 4, "heads": H if "att" in mode.split("_") else 1, **more}


def updates(adapted):
    return {s.name: (d.weight(s.base) - s.base.weight).detach() for s, d in linear_sites(adapted)}


def tensor(stack):
    """The whole tensor, axis by axis."""
    factors = [getattr(stack, axis) for axis in stack.sizes]
    if stack.core is None:
        letters = "abcde"[: len(factors)]
        return torch.einsum(",".join(f"{c}r" for c in letters) + "->" + letters, *factors)
    full = stack.core
    for i, f in enumerate(factors):
        full = torch.tensordot(full.movedim(i, -1), f, dims=([-1], [1])).movedim(-1, i)
    return full


def test_equation_by_hand():
    """d = 2, rank 1: core 2, inputs (1, 3), outputs (1, -1), projections (1, 2), layers (1, 5), s = 3."""
    adapted = attach(
        nn.ModuleList(nn.ModuleDict({n: nn.Linear(2, 2) for n in "qk"}) for _ in range(2)),
        "tenslora",
        rank=1,
        scale=3.0,
    )
    (stack,) = adapted.adapter.structure.stacks.values()
    values = {"core": [[[[2.0]]]], "inputs": [[1.0], [3]], "outputs": [[1.0], [-1]], "projections": [[1.0], [2]],
              "layers": [[1.0], [5]]}  # fmt: skip
    with torch.no_grad():
        for name, value in values.items():
            getattr(stack, name).copy_(torch.tensor(value))
    once = 6 * torch.tensor([[1.0, 3.0], [-1.0, -3.0]])
    for name, times in {"0.q": 1, "0.k": 2, "1.q": 5, "1.k": 10}.items():
        assert close(updates(adapted)[name], times * once)


@pytest.mark.parametrize("form", ["tucker", "cp"])
@pytest.mark.parametrize("mode", MODES)
def test_a_layer_is_its_slice_of_the_tensor(mode, form):
    """As the authors read it: slices of the whole tensor, input first, unfolded with h inside; gradients too."""
    adapted = attach(Blocks().double(), "tenslora", form=form, scale=2.0, **options(mode))
    perturb(adapted.adapter, 1.0)
    structure, words = adapted.adapter.structure, mode.split("_")
    tensors = {"qkv": 1 if "depth" in words else 2}.get("qkv" if "qkv" in words else "", 3 if "depth" in words else 6)
    assert len(structure.stacks) == tensors
    for s, d in linear_sites(adapted):
        _, layer, projection = s.name.split(".")
        at = [("qkv".index(projection))] * ("qkv" in words) + [int(layer)] * ("depth" in words)
        full = tensor(d.stack)
        sizes = [12, 4, H] if "att" in words else [12, 12]
        assert list(full.shape) == sizes + [3] * ("qkv" in words) + [2] * ("depth" in words)
        u = full[(..., *at)].flatten(1)
        x = torch.randn(2, 6, 12, dtype=torch.float64, requires_grad=True)
        got, want = d.update(x, s.base, None), 2 * x @ u
        params = [p for p in d.stack.parameters()]
        g = torch.randn_like(got)
        mine, true = (torch.autograd.grad(y, (*params, x), g) for y in (got, want))
        assert close(got, want) and want.abs().max() > 1e-3 and close(d.weight(s.base) - s.base.weight, 2 * u.T)
        assert all(close(m, t) and t.any() for m, t in zip(mine, true, strict=True))


@pytest.mark.parametrize("form", ["tucker", "cp"])
@pytest.mark.parametrize("mode", MODES)
def test_start_keeps_the_function_and_everything_trains(mode, form):
    base, x = Blocks(), torch.randn(5, 12)
    adapted = attach(copy.deepcopy(base), "tenslora", form=form, seed=0, **options(mode))
    assert close(adapted(x), base(x))
    optimizer = adapted.optimizer(lambda g: torch.optim.AdamW(g, lr=1e-2), 3)
    moved = []
    for _ in range(3):
        optimizer.zero_grad()
        adapted(x).square().mean().backward()
        moved.append({n.rpartition(".")[2] for n, p in adapted.adapter.named_parameters() if p.grad.any()})
        optimizer.step()
    assert moved[0] == {"core" if form == "tucker" else "inputs"}
    assert all(p.grad.any() for p in adapted.adapter.parameters()), moved


def test_starts():
    made = lambda **o: next(iter(attach(Blocks(60), "tenslora", seed=0, **o).adapter.structure.stacks.values()))  # noqa: E731
    s = made(rank=4)
    assert (
        close(s.inputs.T @ s.inputs, torch.eye(4)) and close(s.layers @ s.layers.T, torch.eye(2)) and not s.core.any()
    )
    s = made(rank=16, start="normal")  # (1 / prod sqrt r_i)^(1/5)
    assert float(s.inputs.detach().std()) == pytest.approx(16**-0.4, rel=0.1)
    s = made(rank=16, form="cp", start="normal")
    assert (
        float(s.outputs.detach().std()) == pytest.approx(16**-0.125, rel=0.1) and not s.inputs.any() and s.core is None
    )
    s = made(rank=16, form="cp")
    assert float(s.outputs.abs().max()) == pytest.approx(0.25, rel=0.02)


def test_with_an_identity_core_one_layer_is_lora():
    """qkv of one projection: Tucker's core is a matrix times a number."""
    base, x = nn.Sequential(nn.Linear(12, 20)), torch.randn(5, 12)
    tens = attach(copy.deepcopy(base), "tenslora", mode="qkv", ranks=[3, 3, 1])
    lora = attach(copy.deepcopy(base), "lora", rank=3, alpha=3.0)
    perturb(lora.adapter, 1.0)
    (stack,), low = tens.adapter.structure.stacks.values(), lora.adapter.deltas["0"].low_rank
    with torch.no_grad():
        stack.core.copy_(torch.eye(3)[:, :, None])
        stack.projections.fill_(1.0)
        stack.inputs.copy_(low.A.T)
        stack.outputs.copy_(low.B)
    assert close(tens(x), lora(x)) and not close(tens(x), base(x))


def test_ranks_and_equal_rows():
    """rank(U) <= min(r_1, r_2); unfolded, min(r_1, r_2 r_3); layers with equal rows have equal updates."""
    for mode, ranks, want in (("depth", [5, 3, 2], 3), ("att", [5, 2, 2], 4), ("att", [5, 4, 2], 5)):
        adapted = attach(Blocks().double(), "tenslora", ranks=ranks, **options(mode))
        perturb(adapted.adapter, 1.0)
        assert {int(torch.linalg.matrix_rank(u, rtol=1e-9)) for u in updates(adapted).values()} == {want}
    adapted = attach(Blocks(), "tenslora", rank=4)
    perturb(adapted.adapter, 1.0)
    (stack,) = adapted.adapter.structure.stacks.values()
    assert not close(*list(updates(adapted).values())[:2])
    with torch.no_grad():
        stack.projections.copy_(stack.projections[:1].expand(3, -1))
        stack.layers.copy_(stack.layers[:1].expand(2, -1))
    first, *others = updates(adapted).values()
    assert first.any() and all(close(u, first) for u in others)


def test_heads_are_columns_or_blocks():
    """h = 2 of d_out = 4: a column is a h + j as the authors have it, or, head by head, j d_h + a."""
    base = nn.Sequential(nn.Linear(4, 4))
    found = {}
    for major in (False, True):
        adapted = attach(copy.deepcopy(base), "tenslora", mode="att", rank=2, heads=2, head_major=major, seed=0)
        perturb(adapted.adapter, 1.0)
        with torch.no_grad():
            adapted.adapter.structure.stacks["*-0-4x4"].heads[1] = 0
        found[major] = updates(adapted)["0"].any(1).tolist()
    assert found == {False: [True, False, True, False], True: [True, True, False, False]}


def test_unlike_shapes_are_refused_by_name_or_have_a_tensor_each():
    sizes = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)
    llama = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes))
    targets = {"target_modules": ["q_proj", "k_proj", "v_proj"], "rank": 2}
    with pytest.raises(
        UserError, match=r"0.self_attn.q_proj \[24, 24\] and .*0.self_attn.k_proj \[12, 24\] have no meaning"
    ):
        attach(llama, "tenslora", per_shape=False, **targets)
    adapted = attach(llama, "tenslora", **targets)
    stacks = adapted.adapter.structure.stacks
    assert {k: list(s.sizes.values()) for k, s in stacks.items()} == {"24x24": [24, 24, 1, 2], "12x24": [24, 12, 2, 2]}
    adapted.detach()
    for mode in ("depth", "att"):
        assert len(attach(llama, "tenslora", mode=mode, **targets).adapter.structure.stacks) == (
            3 if mode == "depth" else 6
        )
        llama = copy.deepcopy(LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes)))


def test_a_tensor_is_saved_once_and_owned_by_the_structure():
    adapted = attach(Blocks(), "tenslora", rank=2, per_shape=False)
    assert set(adapted.adapter.state_dict()) == {
        f"structure.stacks.all.{n}" for n in ("core", "inputs", "outputs", "projections", "layers", "scale")
    }
    assert len({id(d.stack) for _, d in linear_sites(adapted)}) == 1
    assert {tuple(d.place.values()) for _, d in linear_sites(adapted)} == {(p, at) for p in range(3) for at in range(2)}


def test_experts_of_one_tensor_would_be_one():
    with pytest.raises(UserError, match="'molora' does not work with 'tenslora' .shares every number."):
        registry.config("tenslora+molora")


def test_counts():
    """RoBERTa-base, q, k and v: sum n_i r + r^N a tensor; R sum n_i in CP."""
    d, h, layers = 768, 12, 12
    wanted = {
        "att": (36, [d, 64, h]), "qkv": (12, [d, d, 3]), "depth": (3, [d, d, layers]), "att_qkv": (12, [d, 64, h, 3]),
        "att_depth": (3, [d, 64, h, layers]), "qkv_depth": (1, [d, d, 3, layers]), "att_qkv_depth": (1, [d, 64, h, 3, layers]),
    }  # fmt: skip
    targets = {"target_modules": ["query", "key", "value"]}
    for mode, (tensors, sizes) in wanted.items():
        for form in ("tucker", "cp"):
            own = options(mode, heads=h if "att" in mode.split("_") else 1)
            adapted = attach(copy.deepcopy(roberta_base()), "tenslora", form=form, **targets, **own)
            core = 4 ** len(sizes) if form == "tucker" else 0
            assert adapted.cost()["adapter_parameters"] == tensors * (4 * sum(sizes) + core)
    for mode, rank, count in (("qkv_depth", 4, 6_460), ("qkv_depth", 8, 16_504), ("depth", 4, 18_768)):
        adapted = attach(copy.deepcopy(roberta_base()), "tenslora", mode=mode, rank=rank, **targets)
        assert adapted.cost()["adapter_parameters"] == count


def test_forward_is_additive_to_the_base():
    adapted = attach(Blocks(), "tenslora", rank=3)
    perturb(adapted.adapter, 1.0)
    (s, _), x = next(linear_sites(adapted)), torch.randn(4, 12)
    assert close(s.base.module(x), F.linear(x, s.base.weight + updates(adapted)[s.name], s.base.bias))


def test_nonsense():
    with pytest.raises(UserError, match="heads is 5; it must divide 12, the outputs of blocks.0.q"):
        attach(Blocks(), "tenslora", mode="att", heads=5)
    for given in (
        {"rank": 0}, {"heads": 0}, {"heads": 2}, {"mode": "heads"}, {"form": "tt"}, {"start": "zero"}, {"scale": 0.0},
        {"ranks": [2, 2, 2]}, {"ranks": [2, 2, 2, 0]}, {"ranks": [2, 2, 2, 2], "form": "cp"}, {"head_major": True},
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"{next(iter(given))} is"):
            attach(Net(), "tenslora", **given)
