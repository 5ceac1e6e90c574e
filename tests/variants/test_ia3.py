import copy

import pytest
import torch
import torch.nn as nn
from support import Net, close, linear_sites, perturb, roberta_base
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    GPTNeoXConfig,
    GPTNeoXModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from lorafactory import UserError, attach
from lorafactory.variants.ia3 import InputScaled, OutputScaled

SMALL = {"target_modules": [r"(.*\.)?(fc\d|key|value|output\.dense|c_attn|c_proj)"]}
CHANGES = {"feedforward_modules": ([["fc1"]], {})}
SIZES = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)


def models():
    yield "bert", BertModel, BertConfig(vocab_size=50, **SIZES)
    yield "gpt2", GPT2Model, GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2)
    yield "llama", LlamaModel, LlamaConfig(vocab_size=50, num_key_value_heads=1, **SIZES)
    yield "t5", T5Model, T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    yield "vit", ViTModel, ViTConfig(image_size=32, **SIZES)
    yield "clip", CLIPVisionModel, CLIPVisionConfig(image_size=32, patch_size=16, **SIZES)
    yield "distilbert", DistilBertModel, DistilBertConfig(vocab_size=50, dim=8, n_layers=2, n_heads=2, hidden_dim=16)
    yield "neox", GPTNeoXModel, GPTNeoXConfig(vocab_size=50, **SIZES)


def roles(adapted):
    """(names scaled at their output, names scaled at their input), of the first block."""
    found = {OutputScaled: [], InputScaled: []}
    for s, d in linear_sites(adapted):
        found[type(d)].append(s.name)
    return tuple(sorted(n for n in names if ".0." in n) for names in found.values())


ROLES = {
    "bert": (["attention.self.key", "attention.self.value"], ["layer.0.output.dense"]),
    "gpt2": (["attn.c_attn"], ["mlp.c_proj"]),
    "llama": (["self_attn.k_proj", "self_attn.v_proj"], ["mlp.down_proj"]),
    "vit": (["k_proj", "v_proj"], ["fc2"]),
    "clip": (["self_attn.k_proj", "self_attn.v_proj"], ["mlp.fc2"]),
    "distilbert": (["attention.k_lin", "attention.v_lin"], ["ffn.lin2"]),
    "neox": (["attention.query_key_value"], ["mlp.dense_4h_to_h"]),
}


@pytest.mark.parametrize("kind, cls, config", list(models()), ids=lambda v: v if isinstance(v, str) else "")
def test_keys_values_and_second_layers_are_found(kind, cls, config):
    """Queries, attention outputs and first layers are not; grouped-query keys, narrow as they are, count as keys."""
    with torch.device("meta"):
        base = cls(config)
    outputs, inputs = roles(attach(base, "ia3"))
    if kind == "t5":  # self and cross attention, and both stacks
        assert len(outputs) == 6 and all(n.endswith((".k", ".v")) for n in outputs)
        assert len(inputs) == 2 and all(n.endswith("DenseReluDense.wo") for n in inputs)
        return
    want_outputs, want_inputs = ROLES[kind]
    assert len(outputs) == len(want_outputs) and len(inputs) == len(want_inputs)
    assert all(n.endswith(w) for n, w in zip(outputs + inputs, want_outputs + want_inputs, strict=True))


def test_a_model_of_other_names_is_refused_until_it_is_told():
    with pytest.raises(UserError, match="matches no module"):
        attach(Net(), "ia3")
    with pytest.raises(UserError, match="feedforward_modules entry 'fc9' matches no target; nearest: fc"):
        attach(Net(), "ia3", target_modules=["fc1", "fc3"], feedforward_modules=["fc9"])
    half = nn.ModuleDict({"k_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4), "out": nn.Linear(8, 4)})
    with pytest.raises(UserError, match="matches no module"):
        attach(half, "ia3")  # keys and values alone would be another method in silence
    told = attach(half, "ia3", target_modules=["k_proj", "v_proj", "out"], feedforward_modules=["out"])
    assert {n: type(d).__name__ for n, d in told.adapter.deltas.items()} == {
        "k_proj": "OutputScaled",
        "v_proj": "OutputScaled",
        "out": "InputScaled",
    }
    none = attach(Net(), "ia3", target_modules=["fc2"], feedforward_modules=[])
    assert isinstance(none.adapter.deltas["fc2"], OutputScaled)


def test_equation_by_hand():
    """W0 = [[1, 2], [3, 4]], b = (5, 6), l = (10, -1); x = (1, 1): (80, -13) at the output, (13, 32) at the input."""
    for second, want in ((False, [80.0, -13.0]), (True, [13.0, 32.0])):
        module = nn.Linear(2, 2)
        with torch.no_grad():
            module.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
            module.bias.copy_(torch.tensor([5.0, 6.0]))
        adapted = attach(
            nn.Sequential(module), "ia3", target_modules=["0"], feedforward_modules=["0"] if second else []
        )
        with torch.no_grad():
            adapted.adapter.deltas["0"].l.copy_(torch.tensor([10.0, -1.0]))
        assert adapted(torch.ones(1, 2)).tolist() == [want]
        adapted.merge()
        assert adapted(torch.ones(1, 2)).tolist() == [want]
        assert module.bias.tolist() == ([5.0, 6.0] if second else [50.0, -6.0]), (
            "an output's bias is scaled with it B04"
        )


@pytest.mark.parametrize("transposed", [False, True])
def test_identity_at_the_start_then_merge_and_back(transposed):
    base, x = Net(transposed), torch.randn(5, 24)
    pristine = {n: t.clone() for n, t in base.state_dict().items()}
    adapted = attach(copy.deepcopy(base), "ia3", target_modules=["fc1", "fc2", "fc3"])
    assert torch.equal(adapted(x), base(x))
    assert {n: type(d).__name__ for n, d in adapted.adapter.deltas.items()} == {
        "fc1": "OutputScaled",
        "fc2": "InputScaled",
        "fc3": "OutputScaled",
    }
    perturb(adapted.adapter, 0.5)
    with torch.no_grad():
        adapted.adapter.deltas["fc1"].l[3] = 0.0  # where dividing by l could not bring the weight back
    y = adapted(x).detach()
    adapted.merge()
    assert close(adapted(x), y)
    adapted.unmerge()
    assert torch.equal(adapted(x), y)
    assert all(torch.equal(t, pristine[n]) for n, t in adapted.detach().state_dict().items())


def test_scaled_keys_and_values_and_the_hidden_activation():
    """In a GPT-2 block by hand: the l of mlp.c_proj multiplies what its activation gives."""
    torch.manual_seed(0)
    base = GPT2Model(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, initializer_range=0.3)).eval()
    adapted = attach(base, "ia3")
    perturb(adapted.adapter, 0.5)
    mlp, vector = base.h[0].mlp, adapted.adapter.deltas["h/0/mlp/c_proj"].l
    x = torch.randn(3, 8)
    hidden = vector * mlp.act(mlp.c_fc(x))
    assert close(mlp(x), hidden @ mlp.c_proj.weight + mlp.c_proj.bias)


def test_one_batch_of_mixed_tasks_is_what_separate_runs_give():
    """A vector for each example instead of one for all: rows do not see each other."""
    base = nn.Sequential(nn.Linear(6, 6))
    adapted = attach(base, "ia3", target_modules=["0"], feedforward_modules=[])
    d, site, x = adapted.adapter.deltas["0"], adapted.adapter.sites[0], torch.randn(4, 6)
    vectors = torch.rand(4, 6) + 0.5
    rows = []
    for i in range(4):
        with torch.no_grad():
            d.l.copy_(vectors[i])
        rows.append(adapted(x[i : i + 1]))
    assert close(torch.cat(rows), vectors * site.base(x))


def test_count_on_roberta_and_no_decay():
    adapted = attach(copy.deepcopy(roberta_base()), "ia3")
    assert adapted.cost()["adapter_parameters"] == 12 * (768 + 768 + 3072) == 55_296
    optimizer = adapted.optimizer(lambda g: torch.optim.AdamW(g, lr=1e-3, weight_decay=0.5), 1)
    decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {decay[d.l] for d in adapted.adapter.deltas.values()} == {0.0}, "decay would pull l from 1 to 0"


def test_dora_over_it_is_void():
    """m / |V| would undo l."""
    with pytest.raises(UserError, match="'dora' does not work with 'ia3' .scales rows.: drop one of them"):
        attach(Net(), "ia3+dora", target_modules=["fc1"])
