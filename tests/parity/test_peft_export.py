"""What export_peft writes, PEFT loads as the method that it itself has: over the registry, each name and each pair."""

import copy
import json

import pytest
import torch
import torch.nn as nn
from composites import sized
from small_models import MODELS, adapt, bare, bert, far, logits
from support import perturb
from transformers.pytorch_utils import Conv1D

from lorafactory import UserError, attach, export_peft, load

peft = pytest.importorskip("peft")
TYPES = {"vera": "VERA", "ia3": "IA3", "adalora": "ADALORA", "adalora+pissa": "ADALORA", "adalora+rslora": "ADALORA"}
TYPES |= {"randlora": "RANDLORA", "vb_lora": "VBLORA"}
LORA = "lora rslora dora pissa eva lora_ga lora_plus lora_pro relora gelora dora+pissa dora+adalora dora+rslora dora+eva"
TYPES |= {"oft": "OFT", "hra": "HRA", "miss": "MISS", "ln_tuning": "LN_TUNING", "delora": "DELORA"}
TYPES |= {"shira": "SHIRA", "fourierft": "FOURIERFT", "waveft": "WAVEFT", "c3a": "C3A"}
TYPES |= dict.fromkeys(LORA.split(), "LORA")
TYPES |= dict.fromkeys(("hira", "hira+lora_plus", "hira+adalora"), "HIRA")
LYCORIS = {"loha": "LOHA", "lokr": "LOKR"}
TYPES |= LYCORIS
ONLY_LINEAR = ("OFT", "HRA", "MISS", "DELORA", "SHIRA", "C3A", *LYCORIS.values())  # PEFT has them for no Conv1D
PAIRS = [(s, list(MODELS)[i // 3 % 2]) for i, s in enumerate(sized(2, 2)) if i % 3 == 0 or s in TYPES]


def loaded(adapted, folder):
    return peft.PeftModel.from_pretrained(bare(adapted), folder).eval()


def check(adapted, folder):
    """PEFT computes the same; returns its name of the method."""
    kind = export_peft(adapted, folder)
    ours = logits(adapted)
    assert far(logits(bare(adapted)), ours) > 1e-2
    assert far(logits(loaded(adapted, folder)), ours) < 1e-5
    return kind


@pytest.mark.parametrize(("spelling", "kind"), [(s, k) for s in sized(1, 1) for k in MODELS] + PAIRS)
def test_every_name_is_loaded_by_peft_or_refused_in_one_line(spelling, kind, tmp_path):
    adapted = adapt(kind, spelling)
    assert adapted.cost()["head_parameters"]
    before = logits(adapted)
    if spelling in TYPES and not (kind == "gpt2" and TYPES[spelling] in ONLY_LINEAR):
        assert check(adapted, tmp_path / "a") == TYPES[spelling]
        return
    try:
        check(adapted, tmp_path / "a")
    except UserError as e:
        assert "\n" not in str(e) and "PEFT has " in str(e) and ("would do" in str(e) or "lorafactory.load" in str(e))
        assert not list(tmp_path.iterdir()) and torch.equal(logits(adapted), before)


def test_the_names_that_peft_has_are_known_here():
    assert {s for s in TYPES if "+" not in s} <= set(sized(1, 1)) and {s for s in TYPES if "+" in s} <= set(sized(2, 2))


@pytest.mark.parametrize("spelling", ("lora", "rslora", "dora", "adalora", "dora+adalora", "hira", "hira+adalora"))
def test_anchors_pasts_gates_and_layers_without_rank(spelling, tmp_path):
    """Whatever a pair of factors may have become."""
    adapted = adapt("bert", spelling)
    lows = [low for _, low in adapted.adapter.low_ranks()]
    with torch.no_grad():
        lows[0].fold()
        lows[1].start(torch.randn(4, lows[1].A.shape[1]), torch.randn(lows[1].B.shape[0], 4))
        perturb(adapted.adapter, 0.3)
        lows[2].keep(torch.tensor([], dtype=torch.long))
        lows[3].keep(torch.tensor([0, 2]))
    check(adapted, tmp_path / "a")


def test_hira_of_several_ranks_has_the_largest_in_peft(tmp_path):
    """PEFT ignores HiRA's rank_pattern when it loads."""
    adapted = adapt("bert", "hira", rank_pattern={"encoder.layer.0.intermediate.dense": 2, "query": 6}, dropout=0.25)
    check(adapted, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["r"] == 6 and "rank_pattern" not in config and config["hira_dropout"] == 0.25


@pytest.mark.parametrize("spelling", LYCORIS)
def test_ranks_alphas_and_dropouts_of_their_own(spelling, tmp_path):
    options = {"rank_pattern": {"encoder.layer.0.intermediate.dense": 2, "query": 3}, "alpha_pattern": {"query": 5.0}}
    adapted = adapt("bert", spelling, rank=4, alpha=12.0, rank_dropout=0.25, module_dropout=0.5, **options)
    check(adapted, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["alpha"] == pytest.approx(12) and list(config["alpha_pattern"].values()) == pytest.approx([5, 5])
    assert sorted(config["rank_pattern"].values()) == [2, 3, 3] and config["rank_dropout"] == 0.25
    again = load(bare(adapted), tmp_path / "a")
    assert again.variant == spelling and again.adapter.config.module_dropout == 0.5


@pytest.mark.parametrize("spelling", ("lora", "rslora"))
def test_ranks_and_alphas_of_their_own(spelling, tmp_path):
    """A, B and alpha as they are, so that PEFT trains on alike; the layers that differ in patterns."""
    options = {"rank_pattern": {"encoder.layer.0.intermediate.dense": 2, "query": 3}, "alpha_pattern": {"query": 5.0}}
    adapted = adapt("bert", spelling, alpha=12.0, dropout=0.25, **options)
    check(adapted, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == pytest.approx(12) and config["r"] == 4 and config["lora_dropout"] == 0.25
    assert sorted(config["rank_pattern"].values()) == [2, 3, 3] and len(config["alpha_pattern"]) >= 2
    assert config.get("use_rslora", False) == (spelling == "rslora") and config["modules_to_save"] == ["classifier"]


@pytest.mark.parametrize(("wavelet", "kind"), [("sym7", "bert"), ("coif3", "gpt2")])
def test_wavelets_of_every_family(wavelet, kind, tmp_path):
    assert check(adapt(kind, "waveft", wavelet=wavelet, scale=9.0), tmp_path / "a") == "WAVEFT"


def test_dora_on_rows_of_zeros(tmp_path):
    """There c counts as 1 here and PEFT divides by |V|, which a trained update keeps from zero; without one it cannot."""
    model = bert()
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.weight[3:5] = 0
    adapted = attach(model, "dora", target_modules=["query"], rank=4, seed=1).eval()
    with pytest.raises(UserError, match="divide by zero: bert.encoder.layer.0.attention.self.query has rows of zeros"):
        export_peft(adapted, tmp_path / "a")
    perturb(adapted.adapter, 0.3)
    check(adapted, tmp_path / "a")
    assert far(logits(load(bare(adapted), tmp_path / "a").eval()), logits(adapted)) < 1e-5


@pytest.mark.parametrize("spelling", ("lora", "dora", "vera", "ia3", "adalora", "hira", "randlora", "vb_lora"))
def test_linear_and_conv1d_in_one_model(spelling, tmp_path):
    base = bert()
    dense = base.bert.encoder.layer[0].intermediate.dense
    other = Conv1D(40, 24)
    with torch.no_grad():
        other.weight.copy_(dense.weight.T)
        other.bias.copy_(dense.bias)
    base.bert.encoder.layer[0].intermediate.dense = other
    options = {} if spelling == "ia3" else {"rank": 4}
    adapted = attach(base, spelling, target_modules=["intermediate.dense", "query"], seed=1, **options).eval()
    perturb(adapted.adapter, 0.3)
    check(adapted, tmp_path / "a")


class Names(nn.Module):
    """A target whose name is another's suffix, and a head whose name is."""

    def __init__(self, other):
        super().__init__()
        self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.inner = nn.ModuleDict({"fc": nn.Linear(6, 6), other: nn.Linear(6, 6)})

    def forward(self, x):
        for layer in self.inner.values():
            x = torch.tanh(layer(x))
        return self.head(torch.tanh(self.fc(x)))


@pytest.mark.parametrize("spelling", ("lora", "vera", "ia3", "adalora", "loha", "lokr", "hira", "randlora", "vb_lora"))
def test_names_that_end_alike(spelling, tmp_path):
    x = torch.randn(3, 6)
    # IA3: both are targets, and PEFT's list of names to scale at the input would take both
    more = {"rank": 2} if spelling != "ia3" else {"feedforward_modules": ["^fc$"]}
    targets = ["^fc$"] if spelling != "ia3" else ["fc"]
    adapted = attach(Names("tail"), spelling, target_modules=targets, trained_modules=["head"], seed=1, **more)
    perturb(adapted.adapter, 0.5)
    export_peft(adapted, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(adapted).detach(), tmp_path / "a")
    assert far(theirs(x), adapted(x)) < 1e-5
    assert hasattr(theirs.base_model.model.inner["fc"], "base_layer") == (spelling == "ia3")
    adapted = attach(Names("forehead"), spelling, target_modules=["^fc$"], trained_modules=["^head$"], seed=1, **more)
    with pytest.raises(UserError, match="ends of their names: head would be inner.forehead, too"):
        export_peft(adapted, tmp_path / "b")


def test_misuse(tmp_path):
    adapted = adapt("bert", "lora")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="holds other files"):
        export_peft(adapted, tmp_path / "b")
    adapted.merge()
    with pytest.raises(UserError, match=r"export_peft\(\) .* unmerged"):
        export_peft(adapted, tmp_path / "a")
