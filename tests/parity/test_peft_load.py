"""What PEFT saves, load reads: the same outputs; and there and back again."""

import copy
import json

import pytest
import torch
from small_models import BATCHES, MODELS, adapt, bare, bert, far, logits
from support import adamw, perturb
from transformers import BertConfig, BertForSequenceClassification

from lorafactory import UserError, export_peft, load

peft = pytest.importorskip("peft")
PLAIN = {"r": 4, "lora_alpha": 12}
LAYERS = {"query": 2, "c_fc": 3}
PATTERNS = {**PLAIN, "rank_pattern": LAYERS, "alpha_pattern": {"query": 5, "c_fc": 7}}
SECOND = {"bert": ["output.dense"], "gpt2": ["c_proj"]}
VBLORA = {"r": 3, "num_vectors": 20, "vector_length": 8, "topk": 3, "init_vector_bank_bound": 0.5}
CASES = {
    "lora": (peft.LoraConfig, PLAIN),
    "lora, patterns": (peft.LoraConfig, PATTERNS),
    "rslora": (peft.LoraConfig, {**PATTERNS, "use_rslora": True}),
    "dora": (peft.LoraConfig, {**PATTERNS, "use_dora": True}),
    "dora+rslora": (peft.LoraConfig, {**PLAIN, "use_dora": True, "use_rslora": True}),
    "vera": (peft.VeraConfig, {"r": 6, "projection_prng_key": 3}),
    "vera, drawn": (peft.VeraConfig, {"r": 6, "projection_prng_key": 3, "save_projection": False}),
    "randlora": (peft.RandLoraConfig, {"r": 5, "randlora_alpha": 50}),
    "randlora, sparse": (peft.RandLoraConfig, {"r": 5, "very_sparse": True, "projection_prng_key": 3}),
    "vb_lora": (peft.VBLoRAConfig, VBLORA),
    "ia3": (peft.IA3Config, {}),
    "oft": (peft.OFTConfig, {"oft_block_size": 4, "use_cayley_neumann": False}),
    "oft, series": (peft.OFTConfig, {"oft_block_size": 4, "num_cayley_neumann_terms": 6}),
    "oft, constrained": (peft.OFTConfig, {"oft_block_size": 4, "coft": True, "eps": 0.5, "block_share": True}),
    "hra": (peft.HRAConfig, {"r": 4}),
    "hra, odd": (peft.HRAConfig, {"r": 3}),
    "hra, orthonormal": (peft.HRAConfig, {"r": 3, "apply_GS": True}),
    "miss": (peft.MissConfig, {"r": 7}),
    "miss, mini": (peft.MissConfig, {"r": 4, "init_weights": "mini", "mini_r": 8}),
    "miss, bat": (peft.MissConfig, {"r": 4, "init_weights": "bat"}),
    "ln_tuning": (peft.LNTuningConfig, {"target_modules": r".*(LayerNorm|ln_\w)"}),
    "delora": (peft.DeloraConfig, {"r": 3, "delora_lambda": 4}),
    "shira": (peft.ShiraConfig, {"r": 3, "random_seed": 4}),
    "boft": (peft.BOFTConfig, {"boft_block_size": 4}),
    "c3a": (peft.C3AConfig, {"block_size": 4, "block_size_pattern": {"query": 8}, "init_weights": "gaussian"}),
    "waveft": (peft.WaveFTConfig, {"n_frequency": 90, "n_frequency_pattern": {"query": 30}, "random_loc_seed": 3}),
    "waveft, db2": (peft.WaveFTConfig, {"n_frequency": 9, "wavelet_family": "db2", "proportional_parameters": True}),
    "waveft, sym8": (peft.WaveFTConfig, {"n_frequency": 90, "wavelet_family": "sym8"}),
    "waveft, coif2": (peft.WaveFTConfig, {"n_frequency": 9, "wavelet_family": "coif2"}),
    "waveft, sparse": (peft.WaveFTConfig, {"n_frequency": 90, "use_idwt": False, "scaling": 2.0, "init_weights": False}),
    "fourierft": (peft.FourierFTConfig, {"n_frequency": 90, "n_frequency_pattern": {"query": 30}, "random_loc_seed": 3}),
    "adalora": (peft.AdaLoraConfig, {"init_r": 5, "target_r": 2, "lora_alpha": 9, "total_step": 10}),
    "hira": (peft.HiraConfig, {"r": 4, "hira_dropout": 0.25, "init_weights": "gaussian"}),
    "loha": (peft.LoHaConfig, {"r": 4, "alpha": 6, "rank_pattern": LAYERS, "alpha_pattern": {"query": 5}}),
    "lokr": (peft.LoKrConfig, {"r": 2, "alpha": 6, "rank_pattern": {"query": 8}, "decompose_both": True}),
    "lokr, factor": (peft.LoKrConfig, {"r": 2, "alpha": 6, "decompose_factor": 3, "init_weights": "lycoris"}),
}
# PEFT has them for no Conv1D
ONLY_LINEAR = ("oft", "hra", "miss", "delora", "boft", "loha", "lokr", "shira", "c3a")
PAIRS = [(c, k) for c in CASES for k in MODELS if k == "bert" or c.partition(",")[0] not in ONLY_LINEAR]
ALIKE = ("lora", "rslora", "dora", "dora+rslora", "vera", "ia3", "adalora", "oft", "hra", "miss", "ln_tuning", "delora",
         "loha", "lokr", "hira", "shira", "fourierft", "waveft", "c3a", "randlora", "vb_lora")  # fmt: skip


def from_peft(tmp_path, kind, make, **options):
    """A fresh copy of the base, and PEFT's model on it, perturbed and saved."""
    base, targets = MODELS[kind]
    torch.manual_seed(0)
    model = base()
    options |= {"feedforward_modules": SECOND[kind]} if make is peft.IA3Config else {}
    head = ["classifier"] if kind == "bert" else ["score"]
    options |= {"fan_in_fan_out": True} if kind == "gpt2" and "fan_in_fan_out" in make.__dataclass_fields__ else {}
    made = make(**{"target_modules": targets, "modules_to_save": head, **options})
    theirs = peft.get_peft_model(copy.deepcopy(model), made).eval()
    perturb(theirs, 0.3)
    theirs.save_pretrained(tmp_path / "p")
    frozen = {n.replace("base_layer.", ""): t for n, t in theirs.base_model.model.state_dict().items()}
    model.load_state_dict({n: frozen.get(n, t) for n, t in model.state_dict().items()})
    return model, theirs


@pytest.mark.parametrize("case, kind", PAIRS)
@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")
def test_load_reads_what_peft_saved(kind, case, tmp_path):
    """Then: saved as ours, and exported again."""
    make, options = CASES[case]
    model, theirs = from_peft(tmp_path, kind, make, **options)
    want = logits(theirs)
    adapted = load(model, tmp_path / "p").eval()
    assert adapted.variant == case.partition(",")[0]
    assert far(logits(adapted), want) < 1e-5 and far(logits(bare(adapted)), want) > 1e-2
    adapted.save(tmp_path / "ours")
    export_peft(adapted, tmp_path / "again")
    plain = adapted.detach()
    for folder in ("ours", "again"):
        again = load(plain, tmp_path / folder).eval()
        assert far(logits(again), want) < 1e-5
        again.detach()
    assert far(logits(peft.PeftModel.from_pretrained(plain, tmp_path / "again").eval()), want) < 1e-5


@pytest.mark.parametrize("kind", MODELS)
def test_top_weights_alone_are_read_and_written(kind, tmp_path):
    """A VB-LoRA without its logits, which PEFT refuses to train on, too."""
    model, theirs = from_peft(tmp_path, kind, peft.VBLoRAConfig, **VBLORA, save_only_topk_weights=True)
    want = logits(theirs)
    adapted = load(model, tmp_path / "p").eval()
    assert far(logits(adapted), want) < 1e-5 and far(logits(bare(adapted)), want) > 1e-2
    with pytest.raises(UserError, match="cannot train on"):
        adapted.optimizer(adamw, 1)
    export_peft(adapted, tmp_path / "again")
    files = [tmp_path / p / "adapter_model.safetensors" for p in ("p", "again")]
    assert files[0].stat().st_size == pytest.approx(files[1].stat().st_size, rel=0.05)
    assert far(logits(peft.PeftModel.from_pretrained(adapted.detach(), tmp_path / "again").eval()), want) < 1e-5


@pytest.mark.parametrize("spelling", ALIKE)
def test_ours_comes_back_from_peft_as_it_was(spelling, tmp_path):
    """The same variant and, where the scale is not folded into a gate, the same numbers."""
    adapted = adapt("bert", spelling, **({"alpha": None} if spelling == "hira" else {}))  # PEFT has no scale for it
    export_peft(adapted, tmp_path / "a")
    again = load(bare(adapted), tmp_path / "a").eval()
    assert again.variant == spelling and far(logits(again), logits(adapted)) < 1e-5
    if spelling != "adalora":
        mine, theirs = adapted.adapter.state_dict(), again.adapter.state_dict()
        assert all(torch.allclose(mine[n], t, rtol=1e-6) for n, t in theirs.items() if n in mine and "checksum" not in n)


def test_pruned_adalora_is_read(tmp_path):
    """PEFT saves only the ranks that it kept, in some layers none, and still scales by the first rank."""
    model, theirs = from_peft(tmp_path, "bert", *CASES["adalora"][:1], **CASES["adalora"][1])
    tuner = theirs.base_model
    pattern = {n.replace("base_model.model.", "") + ".lora_E": [i < k for i in range(5)]
               for k, n in enumerate(n for n, m in theirs.named_modules() if hasattr(m, "ranknum"))}  # fmt: skip
    assert {sum(p) for p in pattern.values()} >= {0, 1, 5}
    tuner.peft_config["default"].rank_pattern = {n + ".default": p for n, p in pattern.items()}
    with torch.no_grad():
        for n, kept in pattern.items():
            tuner.get_submodule("model." + n.removesuffix(".lora_E")).lora_E["default"][~torch.tensor(kept)] = 0
    want = logits(theirs)
    theirs.save_pretrained(tmp_path / "p")
    adapted = load(model, tmp_path / "p").eval()
    assert far(logits(adapted), want) < 1e-5
    assert sorted({low.rank for _, low in adapted.adapter.low_ranks()}) == [1, 2, 3, 4, 5]
    assert adapted.adapter.config.budget.target == 2


@pytest.mark.parametrize("case", CASES)
def test_what_was_read_trains_on_B31(case, tmp_path):
    """PEFT's inference_mode is not carried over."""
    model, _ = from_peft(tmp_path, "bert", CASES[case][0], **CASES[case][1])
    assert json.loads((tmp_path / "p" / "adapter_config.json").read_text())["inference_mode"]
    adapted = load(model, tmp_path / "p").train()
    optimizer = adapted.optimizer(adamw, 12)
    losses = []
    for _ in range(12):
        loss = adapted(**BATCHES[0]).loss
        (loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    adapted.end()
    assert losses[-1] < losses[0] - 1e-3
    with torch.no_grad():
        assert adapted(**BATCHES[0]).loss < losses[0]


REFUSALS = {
    "drawn": (peft.RandLoraConfig, {"r": 4, "save_projection": False}, "save it with save_projection=True"),
    "waveft": (peft.WaveFTConfig, {"n_frequency": 9, "wavelet_family": "coif4"}, "wavelet is 'coif4'; it takes db1"),
    "poly": (peft.PolyConfig, {}, "adapter of type POLY; what is read: .*ia3"),
    "biases": (peft.LoraConfig, {"bias": "all"}, "bias=all has no counterpart in lora"),
    "lora_bias": (peft.LoraConfig, {"lora_bias": True}, "lora_bias=True has no counterpart"),
    "pissa": (peft.LoraConfig, {"init_lora_weights": "pissa"}, "init_lora_weights=pissa changed the base"),
    "tokens": (peft.LoraConfig, {"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_load_cannot_read_is_refused_and_the_model_left_alone(case, tmp_path):
    make, options, told = REFUSALS[case]
    model = bert()
    theirs = peft.get_peft_model(copy.deepcopy(model), make(target_modules=["query"], **options))
    theirs.save_pretrained(tmp_path / "p")
    before = logits(model)
    with pytest.raises(UserError, match=told) as e:
        load(model, tmp_path / "p")
    assert "\n" not in str(e.value)
    assert torch.equal(logits(model), before) and not any("_held" in vars(m) for m in model.modules())


def test_dora_trains_on_with_pefts_dropout(tmp_path):
    for drop, found in ((0.25, True), (0.0, None)):
        folder = tmp_path / str(drop)
        model, _ = from_peft(folder, "bert", peft.LoraConfig, **PLAIN, use_dora=True, lora_dropout=drop)
        config = load(model, folder / "p").adapter.config
        assert (config.dropout, config.decomposition.drop_base) == (drop, found)


def test_damaged_folders_and_another_base_are_refused(tmp_path):
    """A tensor too many, one too few, a field that is missing, and layers of another width."""
    from safetensors.torch import load_file, save_file

    model, _ = from_peft(tmp_path, "bert", *CASES["dora"][:1], **PLAIN, use_dora=True)
    before, file = logits(model), tmp_path / "p" / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(n for n in tensors if n.endswith("lora_magnitude_vector"))
    more = {first.replace("lora_magnitude_vector", "lora_C"): torch.zeros(1)}
    for changed, told in (
        ({n: t for n, t in tensors.items() if n != first}, "has no lora_magnitude_vector"),
        (tensors | more, "lora_C has no place in dora"),
        ({n: t for n, t in tensors.items() if not n.endswith("classifier.bias")}, "classifier has weight there and weight, bias"),
    ):
        save_file(changed, file)
        with pytest.raises(UserError, match=told):
            load(model, tmp_path / "p")
    save_file(tensors, file)
    sizes = dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, num_labels=3)
    narrow = BertForSequenceClassification(BertConfig(vocab_size=50, **sizes))
    with pytest.raises(UserError, match=r"\[4, 24\] there and \[4, 12\]"):
        load(narrow, tmp_path / "p")
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    del config["lora_alpha"]
    (tmp_path / "p" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="lacks 'lora_alpha'"):
        load(model, tmp_path / "p")
    assert torch.equal(logits(model), before)
    assert not any("_held" in vars(m) for m in (*model.modules(), *narrow.modules()))
