"""Hugging Face PEFT on the same weights, factors and inputs: outputs, gradients and merged weights, in float32.

Where PEFT does otherwise than the paper a test below pins the paper's form: dropout under DoRA, and the layers that IA3
scales when nobody names them."""

import copy

import pytest
import torch
from peft_base import TARGETS, base, near, output
from support import close, linear_sites, perturb
from transformers import BertConfig, BertModel, Qwen2Config, Qwen2Model

from lorafactory import attach

peft = pytest.importorskip("peft")
KINDS = ("bert", "gpt2")
SECOND = {"bert": ["output.dense"], "gpt2": ["c_proj"]}
RANK, ALPHA = 4, 12
VARIANTS = ("lora", "rslora", "dora", "vera", "ia3", "loha", "lokr", "hira")
LYCORIS = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}
SPLIT = {"rank": 2, "decompose_both": True}  # in some layers W1 is one matrix, in some two
CASES = [(k, v) for k in KINDS for v in VARIANTS if k == "bert" or v not in LYCORIS]  # PEFT has those on nn.Linear only


def ours(kind, variant, **options):
    options = {"target_modules": TARGETS[kind], "trained_modules": [], "seed": 1, **options}
    if variant == "ia3":
        return attach(copy.deepcopy(base(kind)), "ia3", **{"feedforward_modules": SECOND[kind], **options})
    alpha = {} if variant in ("vera", "hira") else {"alpha": ALPHA}
    own = SPLIT if variant == "lokr" else {}
    return attach(copy.deepcopy(base(kind)), variant, **{"rank": RANK, **alpha, **own, **options})


def theirs(kind, variant, **options):
    options = {"target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2", **options}
    if variant in LYCORIS:
        del options["fan_in_fan_out"]
        own = {"r": 2, "decompose_both": True} if variant == "lokr" else {"r": RANK}
        config = LYCORIS[variant](alpha=ALPHA, **own, **options)
    elif variant == "ia3":
        config = peft.IA3Config(**{"feedforward_modules": SECOND[kind], **options})
    elif variant in ("vera", "hira"):
        config = {"vera": peft.VeraConfig, "hira": peft.HiraConfig}[variant](r=RANK, **options)
    else:
        how = {"use_rslora": variant == "rslora", "use_dora": variant == "dora"}
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **how, **options)
    return peft.get_peft_model(copy.deepcopy(base(kind)), config)


def pairs(adapted, model, variant):
    """(our parameter, PEFT's) for everything that trains."""
    found = []
    for site, d in linear_sites(adapted):
        layer = model.get_submodule(f"base_model.model.{site.name}")
        if variant == "vera":
            found += [(d.b, layer.vera_lambda_b["default"]), (d.d, layer.vera_lambda_d["default"])]
        elif variant == "ia3":
            found += [(d.l, layer.ia3_l["default"])]
        elif variant == "hira":
            found += [(d.hadamard.A, layer.hira_A["default"]), (d.hadamard.B, layer.hira_B["default"])]
        elif variant in LYCORIS:
            own = [(getattr(d, here), getattr(layer, there)) for here, there in d.names.items()]
            found += [(p, q["default"]) for p, q in own if p is not None]
        else:
            low = next(m for m in d.modules() if hasattr(m, "fold"))
            found += [(low.A, layer.lora_A["default"].weight), (low.B, layer.lora_B["default"].weight)]
            if variant == "dora":
                found += [(d.magnitude, layer.lora_magnitude_vector["default"].weight)]
    return found


def both(kind, variant, **options):
    """The two, perturbed alike: what trains here trains there."""
    a, b = (
        ours(kind, variant, **options.get("ours", {})).train(),
        theirs(kind, variant, **options.get("theirs", {})).train(),
    )
    perturb(a.adapter, 0.5)
    found = pairs(a, b, variant)
    assert {id(p) for p in a.adapter.parameters()} == {id(p) for p, _ in found}
    assert {id(p) for p in b.parameters() if p.requires_grad} == {id(q) for _, q in found}
    with torch.no_grad():
        for p, q in found:
            q.copy_(p.view_as(q))
        if variant == "vera":
            bank, layer = a.adapter.structure.bank, next(m for m in b.modules() if hasattr(m, "vera_lambda_b"))
            bank.A.copy_(layer.vera_A["default"])
            bank.B.copy_(layer.vera_B["default"])
    return a, b, found


@pytest.mark.parametrize("kind, variant", CASES)
def test_outputs_gradients_and_merged_weights(kind, variant):
    a, b, found = both(kind, variant)
    x, y = torch.randn(3, 7, 32, requires_grad=True), torch.randn(3, 7, 32)
    z = x.detach().clone().requires_grad_()
    got, want = output(a, x), output(b, z)
    assert near(got, want) and not close(got, output(base(kind), x), 100)
    (got * y).sum().backward()
    (want * y).sum().backward()
    assert near(x.grad, z.grad)
    for p, q in found:
        assert q.grad.any() and near(p.grad, q.grad.view_as(p))
    a.eval().merge()
    b.eval().merge_adapter()
    assert near(output(a, x), output(b, x)) and near(output(a, x), got)
    layers = [(s.base, b.get_submodule(f"base_model.model.{s.name}").get_base_layer()) for s, _ in linear_sites(a)]
    assert len(layers) > 6
    for here, there in layers:
        assert near(here.module.weight, there.weight) and near(here.module.bias, there.bias)


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_start_at_the_base_and_train_alike(variant):
    """Ten steps of AdamW from one start."""
    a, b = ours("bert", variant).train(), theirs("bert", variant).train()
    x, y = torch.randn(3, 7, 32), torch.randn(3, 7, 32)
    assert near(output(a, x), output(base("bert"), x)) and near(output(b, x), output(base("bert"), x))
    found = pairs(a, b, variant)
    with torch.no_grad():
        for p, q in found:
            p.copy_(q.view_as(p))
    losses = []
    for model, params in ((a, [p for p, _ in found]), (b, [q for _, q in found])):
        optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0)
        losses.append([])
        for _ in range(10):
            optimizer.zero_grad()
            loss = (output(model, x) - y).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0] - 1e-3


def test_starts_are_drawn_alike():
    """A uniform with the same bound, B zero, magnitudes the row norms; VeRA's bank from one seed the very numbers."""
    a, b = ours("bert", "dora"), theirs("bert", "dora")
    for p, q in pairs(a, b, "dora"):
        assert p.dim() == 1 and near(p, q) or float(p.abs().max()) == pytest.approx(float(q.abs().max()), rel=0.2)
    for seed in (0, 7):
        a = ours("bert", "vera", bank_seed=seed)
        b = theirs("bert", "vera", projection_prng_key=seed)
        layer = next(m for m in b.modules() if hasattr(m, "vera_lambda_b"))
        bank = a.adapter.structure.bank
        assert near(bank.A, layer.vera_A["default"]) and near(bank.B, layer.vera_B["default"])


def test_paper_dora_drops_only_what_A_reads():
    """Ours: (m / c - 1) W0 x sees all of x. PEFT, as the authors' code, drops x there too."""
    x, drop = torch.randn(3, 7, 32), {"ours": {"dropout": 0.5}, "theirs": {"lora_dropout": 0.5}}
    a, b, found = both("bert", "dora", **drop)
    with torch.no_grad():
        for p, q in found:
            if p.dim() == 2 and p.shape[1] == RANK:  # B = 0: the low-rank part is silent, the magnitudes are not
                p.zero_()
                q.zero_()
    assert torch.equal(output(a, x), output(a, x))
    assert not near(output(b, x), output(b, x))
    assert near(output(a.eval(), x), output(b.eval(), x)), "without dropout they are one function"


@pytest.mark.parametrize("kind", KINDS)
def test_peft_dora_drops_what_w0_reads_too(kind):
    """drop_base: the same draws, the same outputs and gradients; without dropout it is refused."""
    x, y = torch.randn(3, 7, 32, requires_grad=True), torch.randn(3, 7, 32)
    z = x.detach().clone().requires_grad_()
    ours = {"dropout": 0.5, "decomposition": {"drop_base": True}}
    a, b, found = both(kind, "dora", ours=ours, theirs={"lora_dropout": 0.5})
    results = []
    for model, read in ((a, x), (b, z)):
        torch.manual_seed(3)
        results.append(output(model, read))
        (results[-1] * y).sum().backward()
    assert near(*results) and near(x.grad, z.grad)
    for p, q in found:
        assert q.grad.any() and near(p.grad, q.grad.view_as(p))
    assert near(output(a.eval(), x), output(b.eval(), x)) and not near(output(a, x), results[0])


def test_paper_ia3_scales_keys_values_and_the_hidden_activation():
    """PEFT's defaults add the attention's own output layer in a BERT, and take queries for keys in a Qwen2."""
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    bert = BertModel(BertConfig(vocab_size=50, **sizes))
    qwen = Qwen2Model(Qwen2Config(vocab_size=50, num_key_value_heads=2, **sizes))
    for model, here, there in (
        (bert, {"self.key", "self.value", "0.output.dense"}, {"attention.output.dense"}),
        (qwen, {"self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"}, {"self_attn.q_proj"}),
    ):
        mine = {s.name for s, _ in linear_sites(attach(copy.deepcopy(model), "ia3"))}
        assert len(mine) == 3 and all(any(n.endswith(t) for n in mine) for t in here)
        wrapped = peft.get_peft_model(model, peft.IA3Config(task_type="FEATURE_EXTRACTION"))
        scaled = {
            n.removeprefix("base_model.model.") for n, m in wrapped.named_modules() if hasattr(m, "is_feedforward")
        }
        assert any(n.endswith(t) for n in scaled - mine for t in there), scaled
