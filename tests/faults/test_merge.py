"""MERGE: merged weights are the adapted model, or merging is refused with the reason."""

import copy

import pytest
import torch
import torch.nn as nn
from support import Net, Regression, attached, cloned, close, needs_head, on_linear, perturb, same, small, told
from torch import Tensor
from transformers import GPT2Config, GPT2Model

from lorafactory import Delta, Structure, UserError, attach, load, registry

NAMES = registry.names()
STRUCTURES = registry.names("structure")
INITS = registry.names("init")


def moved(name, base, data, size=0.1, **options):
    adapted = attached(name, base, data, **options).eval()
    perturb(adapted.adapter, size)
    return adapted


def setting(transposed=False):
    torch.manual_seed(0)
    base = Net(transposed).eval()
    return base, Regression(base), torch.randn(3, 5, 24)


def mergeable(name):
    base, data, _ = setting()
    return attached(name, base, data).adapter.mergeable


@pytest.mark.parametrize("name", [n for n in NAMES if on_linear(registry.parse(n)[0].name)])
def test_B02_transposed_layers_merge_and_come_back(name):
    """GPT-2's own layers: c_proj is square, c_attn and c_fc are not; magnitudes and all else are perturbed."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=20, n_positions=8, n_embd=24, n_layer=1, n_head=2, initializer_range=0.2)
    base = GPT2Model(GPT2Config(**sizes)).eval()
    ids = torch.randint(0, 20, (64, 5))
    batches = [{"input_ids": ids[:32]}, {"input_ids": ids[32:]}]
    options = small(name, target_modules=["c_proj", "c_attn", "c_fc"])
    if needs_head(registry.parse(name)[0].name):
        del options["target_modules"]
        options["trained_modules"] = ["c_attn"]
    adapted = attach(
        base, name, batches=batches, loss=lambda m, b: m(b["input_ids"]).last_hidden_state.square().mean(), seed=1, **options
    ).eval()  # fmt: skip
    found = {a["name"] for a in adapted.adapter.describe()} | {k.replace("/", ".") for k in adapted.adapter.trained}
    wanted = {n for n, m in base.named_modules() if n.endswith(("c_proj", "c_attn", "c_fc"))}
    assert found == wanted or needs_head(registry.parse(name)[0].name), "some layers are passed over"
    pristine = cloned(base.state_dict())
    perturb(adapted.adapter, 0.3)
    y = adapted(ids).last_hidden_state.detach()
    if adapted.adapter.mergeable:
        adapted.merge()
        assert close(adapted(ids).last_hidden_state, y, 10)
        adapted.unmerge()
        assert torch.equal(adapted(ids).last_hidden_state, y)
    assert same({n: t for n, t in adapted.detach().state_dict().items()}, pristine)


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("name", INITS)
def test_B02_an_init_touches_every_layer(name, transposed):
    base, data, _ = setting(transposed)
    plain = attached(registry.parse(name)[0].name, base, data, seed=5)
    started = attached(name, base, data, seed=5)
    for (s, a), (_, b) in zip(plain.adapter.low_ranks(), started.adapter.low_ranks(), strict=True):
        assert a.A.shape != b.A.shape or not torch.equal(a.A, b.A), f"{s.name} starts as if there were no {name}"


@pytest.mark.parametrize("name", NAMES)
def test_B03_a_narrow_base_cannot_swallow_the_update(name):
    """An update of about a thousandth of the weight: refused in bfloat16, exact in float32."""
    base, data, x = setting()
    if not mergeable(name):
        pytest.skip("it is never merged")
    base.bfloat16()
    data, fine = Regression(base), getattr(told(name), "FINE", {})
    adapted = attached(name, base, data, **fine).eval()
    with torch.no_grad():
        g = torch.Generator().manual_seed(1)
        for p in adapted.adapter.parameters():
            p.mul_(1 + 1e-3 * torch.randn(p.shape, generator=g))
            p.add_(1e-4 * torch.randn(p.shape, generator=g))
    before = cloned(adapted.model.state_dict())
    with pytest.raises(UserError, match=r"loses \d+%.*float32"):
        adapted.merge()
    assert not adapted.merged and same(adapted.model.state_dict(), before), "a refused merge leaves traces"
    float_base = copy.deepcopy(base).float()
    wide = attached(name, float_base, Regression(float_base), **fine).eval()
    wide.adapter.load(cloned(adapted.adapter.state_dict()))
    y = wide(x).detach()
    lost = adapted.merge(dtype=torch.float32)
    assert max(lost.values()) < 1e-2
    assert all(p.dtype == torch.float32 for p in adapted.model.parameters())
    assert close(adapted(x), y, 1)
    adapted.unmerge()
    assert same(adapted.model.state_dict(), before)
    adapted.merge(limit=float("inf"))  # at one's own risk, and reported
    assert adapted.model.fc1.weight.dtype == torch.bfloat16


def test_B03_a_narrower_dtype_is_refused_and_nothing_converted():
    model = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4).double())
    adapted = attach(model, "lora", rank=2)
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(UserError, match="would narrow"):
            adapted.merge(dtype=dtype)
        assert [p.dtype for p in model.parameters()] == 2 * [torch.bfloat16] + 2 * [torch.float64]
    adapted.merge(dtype=torch.float64)
    adapted.unmerge()
    assert [p.dtype for p in model.parameters()] == 2 * [torch.bfloat16] + 2 * [torch.float64]


def test_B03_buffers_widen_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).bfloat16().eval()
    before = cloned(model.state_dict())
    adapted = attach(model, "lora", rank=2)
    perturb(adapted.adapter, 0.5)
    x = torch.randn(3, 4)
    y = adapted(x.bfloat16())
    adapted.merge(dtype=torch.float32)
    assert adapted(x).dtype == torch.float32 and close(adapted(x), y)
    adapted.unmerge()
    assert all(t.dtype == before[n].dtype for n, t in model.state_dict().items()) and same(model.state_dict(), before)


@pytest.mark.parametrize("name", STRUCTURES)
def test_B04_a_convolution_is_refused_when_attaching_or_exact(name):
    """Conv1d(groups=channels) caught by the target rule, alone and together with linear layers of the same name."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = nn.ModuleDict({"proj": nn.Conv1d(6, 6, 3, groups=6, padding=1)})
            self.mlp = nn.ModuleDict({"proj": nn.Linear(6, 6)})
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.mlp["proj"](self.mixer["proj"](x.transpose(1, 2)).transpose(1, 2)))

    x = torch.randn(2, 5, 6)
    for wanted in (["mixer.proj"], ["proj"], [r"mixer.*"], "all"):
        torch.manual_seed(0)
        base = Block()
        pristine = cloned(base.state_dict())
        options = small(name, target_modules=wanted, trained_modules=["head"])
        try:
            adapted = attach(base, name, seed=1, **{k: v for k, v in options.items() if k != "rank"} | rank_of(name))
        except UserError as e:
            assert "\n" not in str(e)
            assert all(type(m) in (nn.Conv1d, nn.Linear, nn.ModuleDict, Block) for m in base.modules())
            assert same(base.state_dict(), pristine) and all(p.requires_grad for p in base.parameters())
            continue
        assert wanted != ["proj"] or "mixer.proj" in [a["name"] for a in adapted.adapter.describe()], "passed over"
        perturb(adapted.adapter, 0.3)
        y = adapted(x).detach()
        if adapted.adapter.mergeable:
            adapted.merge()
            assert close(adapted(x), y, 3)
        assert same(adapted.detach().state_dict(), pristine)


def test_B04_what_is_read_without_being_called_is_refused():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.Linear(8, 8)})
    with pytest.raises(UserError, match="reads its weight without calling it"):
        attach(model, "lora", rank=2, target_modules=["out_proj"])
    assert [a["name"] for a in attach(model, "lora", rank=2).adapter.describe()] == ["b"]


def rank_of(name):
    return {"rank": 2} if "rank" in registry.get(name).Config.__dataclass_fields__ else {}


class Scaling(Delta):
    """Output scaling with a shift: W = diag(l) W0, bias = l b0 + c"""

    def __init__(self, site):
        super().__init__()
        self.l = nn.Parameter(site.new(site.d_out, fill=1.0))
        self.c = nn.Parameter(site.new(site.d_out))

    def weight(self, base):
        return self.l[:, None] * base.weight

    def shift(self, base):
        return self.c if base.bias is None else (self.l - 1) * base.bias + self.c

    def update(self, x, base, y):
        return (self.l - 1) * y + self.c


@pytest.fixture
def scaling():
    """A structure that scales outputs and adds a bias where there was none: registered for one test."""

    @registry.register("test_scaling")
    class _Scaling(Structure):
        """Scaling: W = diag(l) W0"""

        paper, gives = "none", frozenset({"weight"})

        def build(self, site, make):
            return Scaling(site)

    yield "test_scaling"
    del registry._classes["test_scaling"]


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("over", ["", *(n for n in registry.names("decomposition") if "additive" not in registry.get(n).needs)])
def test_B04_output_scaling_scales_the_bias_too(scaling, over, transposed):
    base, data, x = setting(transposed)
    pristine = cloned(base.state_dict())
    adapted = moved("+".join(filter(None, (scaling, over))), base, data, 0.5)
    y = adapted(x).detach()
    adapted.merge()
    assert close(adapted(x), y, 3)
    assert (adapted.model.fc3.bias is not None) and not torch.equal(adapted.model.fc1.bias, pristine["fc1.bias"])
    adapted.unmerge()
    assert torch.equal(adapted(x), y)
    baked = copy.deepcopy(adapted).bake()
    assert close(baked(x), y, 3) and isinstance(baked.fc3.bias, (nn.Parameter, Tensor))
    plain = adapted.detach()
    assert same(plain.state_dict(), pristine) and (transposed or plain.fc3.bias is None)


@pytest.mark.parametrize("name", NAMES)
def test_B05_every_trained_tensor_is_merged(name):
    """Move one tensor at a time: the merged model moves with it, exactly as the adapted one does."""
    base, data, x = setting()
    adapted = moved(name, base, data, trained_modules=["head"])
    if not adapted.adapter.mergeable:
        for call in (adapted.merge, adapted.bake):
            with pytest.raises(UserError, match="depends on its input"):
                call()
        return
    y = adapted(x).detach()
    idle = tuple(f"deltas.{k}." for k in adapted.adapter.idle())
    defining = adapted.adapter.export()  # a posterior's spread only trains
    for n, p in adapted.adapter.named_parameters():
        if not p.numel() or n.startswith(idle) or n not in defining:
            continue
        kept = p.detach().clone()
        with torch.no_grad():
            p.add_(torch.randn_like(p))
        changed = adapted(x).detach()
        assert not close(changed, y), f"{n} has no effect"
        adapted.merge()
        assert close(adapted(x), changed, 5), f"{n} is lost in merging"
        adapted.unmerge()
        with torch.no_grad():
            p.copy_(kept)
    assert torch.equal(adapted(x), y)


@pytest.mark.parametrize("name", NAMES)
def test_B06_an_adapter_knows_its_base(name, tmp_path):
    """Trained on a base of simulated 4 bits: that base is recorded, another one refused, and equality holds on it alone."""
    base, data, x = setting()
    quantised = copy.deepcopy(base)
    with torch.no_grad():
        for p in quantised.parameters():
            step = p.abs().max().clamp_min(1e-6) / 7
            p.copy_((p / step).round() * step)
    adapted = moved(name, quantised, data, trained_modules=["head"])
    adapted.save(tmp_path)
    y = adapted(x).detach()
    with pytest.raises(UserError, match="another base model"):
        load(copy.deepcopy(base), tmp_path)
    onto = load(copy.deepcopy(quantised), tmp_path).eval()
    assert torch.equal(onto(x), y)
    if adapted.adapter.mergeable:
        onto.merge()
        assert close(onto(x), y, 5)
    if not isinstance_of_replaced(adapted):
        try:
            other = load(copy.deepcopy(base), tmp_path, check_base=False).eval()
            assert not close(other(x), y), "the error of quantisation is not in the adapter"
        except UserError as e:
            assert "the base has other" in str(e)  # it trained between this base's own vectors


def isinstance_of_replaced(adapted):
    """Full weights do not depend on the base that they replace."""
    return all(d.replaces for d in adapted.adapter.deltas.values()) and len(adapted.adapter.deltas) > 0
