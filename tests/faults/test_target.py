"""TARGET: which modules are adapted, that every entry of a list counts, and the trained head."""

import copy
import logging

import pytest
import torch
import torch.nn as nn
import transformers as tf
from support import close, needs_head, on_linear, perturb, same, small

import lorafactory
from lorafactory import UserError, attach, registry

STRUCTURES = [n for n in registry.names("structure") if on_linear(n) and not needs_head(n)]


class Block(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.q_proj = nn.Linear(24, 24)
        if value:
            self.v_proj = nn.Linear(24, 24)

    def forward(self, x):
        x = torch.tanh(self.q_proj(x))
        return self.v_proj(x) if hasattr(self, "v_proj") else x


class Toy(nn.Module):
    """Three blocks, the second without a v_proj, and a layer outside of them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(24, 24)
        self.blocks = nn.ModuleList(Block(i != 1) for i in range(3))
        self.head = nn.Linear(24, 2)

    def forward(self, x):
        x = self.stem(x)
        for b in self.blocks:
            x = b(x)
        return self.head(x)


def on_toy(name, wanted, **options):
    given = {k: v for k, v in small(name).items() if k != "target_modules"}
    return attach(Toy(), name, target_modules=wanted, trained_modules=["head"], seed=0, **given | options)


@pytest.mark.parametrize("name", STRUCTURES)
def test_B08_one_wrong_name_is_an_error(name):
    for wanted in (
        ["q_proj", "v_proj", "foo_proj"],
        ["q_proj", r"blocks\.7\..*"],
        ["q_proj", "blocks.1.v_proj"],
        ["Q_proj"],
    ):
        model = Toy()
        given = {k: v for k, v in small(name).items() if k != "target_modules"}
        with pytest.raises(UserError) as e:
            attach(model, name, target_modules=wanted, trained_modules=["head"], **given)
        assert repr(wanted[-1]) in str(e.value) and "\n" not in str(e.value)
        assert type(model.blocks[0].q_proj) is nn.Linear
    with pytest.raises(UserError, match="q_proj"):  # near names are listed
        on_toy(name, ["q_prj"])


@pytest.mark.parametrize("name", STRUCTURES)
def test_B08_what_is_missing_in_some_blocks_is_said(name, caplog):
    with caplog.at_level(logging.WARNING):
        adapted = on_toy(name, ["q_proj", "v_proj"])
    assert "v_proj" in caplog.text and "2 of 3" in caplog.text
    assert "q_proj exists" not in caplog.text
    assert adapted.targets == {"q_proj": 3, "v_proj": 2}
    names = [a["name"] for a in adapted.adapter.describe()]
    assert sorted(names) == sorted([f"blocks.{i}.q_proj" for i in range(3)] + ["blocks.0.v_proj", "blocks.2.v_proj"])


@pytest.mark.parametrize("container", (nn.ModuleList, nn.Sequential))
def test_B08_blocks_may_stand_in_any_container(container, caplog):
    model = nn.ModuleDict({"layers": container([Block(i != 1) for i in range(3)]) if container is nn.ModuleList
                           else container(*(Block(i != 1) for i in range(3)))})  # fmt: skip
    with caplog.at_level(logging.WARNING):
        attach(model, "lora", rank=2, target_modules=["v_proj"])
    assert "2 of 3" in caplog.text


def test_B08_every_way_of_naming():
    def found(wanted):
        adapted = on_toy("lora", wanted)
        return [a["name"] for a in adapted.adapter.describe()]

    every = ["stem", "blocks.0.q_proj", "blocks.0.v_proj", "blocks.1.q_proj", "blocks.2.q_proj", "blocks.2.v_proj"]
    assert found("all-linear") == found(["all-linear"]) == found("all") == every
    assert found(["blocks.0.q_proj"]) == ["blocks.0.q_proj"]
    assert found(["0.q_proj"]) == ["blocks.0.q_proj"], "a suffix ends at a dot"
    assert found([r"blocks\.\d+\.q_proj"]) == found(["q_proj"])
    assert found([r"^blocks\.[02]\..*$"]) == [n for n in every if n.startswith(("blocks.0", "blocks.2"))]
    assert found(["q_proj", "blocks.0.q_proj"]) == found(["q_proj"]), "an overlap is one site"
    for wrong in ("proj", "_proj", "blocks", "q_proj.weight", r"q_proj", ""):
        if wrong not in ("q_proj",):
            with pytest.raises(UserError):
                found([wrong])
    with pytest.raises(UserError, match="head"):
        found(["head"])
    with pytest.raises(UserError, match="regular expression"):
        found(["(q_proj"])


@pytest.mark.parametrize("name", STRUCTURES)
def test_B08_a_tied_or_output_embedding_is_never_adapted_in_silence(name):
    torch.manual_seed(0)
    sizes = dict(vocab_size=30, n_positions=8, n_embd=24, n_layer=1, n_head=2)
    model = tf.GPT2LMHeadModel(tf.GPT2Config(**sizes))
    options = {k: v for k, v in small(name).items() if k != "target_modules"}
    adapted = attach(model, name, target_modules="all-linear", seed=0, **options)
    assert not any("lm_head" in a["name"] for a in adapted.adapter.describe())
    adapted.detach()
    with pytest.raises(UserError, match="lm_head"):
        attach(model, name, target_modules=["lm_head"], seed=0, **options)


SIZES = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
FAMILIES = {
    "bert": (tf.BertForSequenceClassification, tf.BertConfig(vocab_size=30, **SIZES), ["classifier"]),
    "roberta": (tf.RobertaForSequenceClassification, tf.RobertaConfig(vocab_size=30, **SIZES), ["classifier"]),
    "distilbert": (
        tf.DistilBertForSequenceClassification,
        tf.DistilBertConfig(vocab_size=30, dim=32, n_layers=1, n_heads=2, hidden_dim=32),
        ["pre_classifier", "classifier"],
    ),
    "gpt2": (
        tf.GPT2ForSequenceClassification,
        tf.GPT2Config(vocab_size=30, n_positions=16, n_embd=32, n_layer=1, n_head=2, pad_token_id=0),
        ["score"],
    ),
    "llama": (
        tf.LlamaForSequenceClassification,
        tf.LlamaConfig(vocab_size=30, pad_token_id=0, num_key_value_heads=2, **SIZES),
        ["score"],
    ),
    "vit": (
        tf.ViTForImageClassification,
        tf.ViTConfig(image_size=8, patch_size=4, num_channels=1, **SIZES),
        ["classifier"],
    ),
}


def family(kind, seed):
    """A model of one family; the seed draws its head alone, as loading a pre-trained base does."""
    cls, config, heads = FAMILIES[kind]
    torch.manual_seed(0)
    model = cls(copy.deepcopy(config)).eval()
    torch.manual_seed(seed)
    for h in heads:
        for p in model.get_submodule(h).parameters():
            nn.init.normal_(p, std=0.3)
    return model


def answer(kind, model):
    if kind == "vit":
        return model(torch.ones(2, 1, 8, 8)).logits.detach()
    return model(torch.tensor([[3, 4, 5, 6], [7, 8, 9, 4]])).logits.detach()


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", ["lora", "head_only", "full", "bitfit"])
def test_B11_the_trained_head_is_saved(kind, name, tmp_path):
    """Loaded into a base whose head was drawn anew: the logits are those of the saved run."""
    options = {"lora": {"rank": 2}, "bitfit": {"add_missing": kind == "llama"}}  # Llama's layers have no biases
    adapted = attach(family(kind, 1), name, seed=0, **options.get(name, {}))
    assert [k.replace("/", ".") for k in adapted.adapter.trained] == FAMILIES[kind][2]
    perturb(adapted.adapter, 0.5)
    y = answer(kind, adapted)
    adapted.save(tmp_path)
    fresh = family(kind, 2)
    assert not close(answer(kind, fresh), y)
    loaded = lorafactory.load(fresh, tmp_path)
    assert torch.equal(answer(kind, loaded), y)
    if adapted.adapter.mergeable:
        loaded.merge()
        assert close(answer(kind, loaded), y, 10)
    own = family(kind, 2)
    assert same(loaded.detach().state_dict(), own.state_dict()), "the base's own head comes back"


@pytest.mark.parametrize("kind", FAMILIES)
def test_B11_a_wrong_head_name_is_an_error(kind):
    model = family(kind, 1)
    with pytest.raises(UserError, match="no_such_head"):
        attach(model, "lora", rank=2, trained_modules=["no_such_head"])
    with pytest.raises(UserError, match="no parameters"):
        name = next(n for n, m in model.named_modules() if isinstance(m, nn.Dropout) or not list(m.parameters()))
        attach(model, "lora", rank=2, trained_modules=[name])
    assert type(model) is FAMILIES[kind][0] and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", FAMILIES)
def test_B11_the_head_is_counted_apart(kind):
    model = family(kind, 1)
    head = sum(p.numel() for h in FAMILIES[kind][2] for p in model.get_submodule(h).parameters())
    total = sum(p.numel() for p in model.parameters())
    cost = attach(model, "lora", rank=2).cost()
    assert cost["head_parameters"] == head and cost["total_parameters"] == total
    assert cost["adapter_parameters"] > 0


def test_B11_nested_and_repeated_heads_are_one_copy():
    model = nn.ModuleDict({"b": nn.Linear(8, 8), "head": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))})
    for heads in (["head", "head.0"], ["head.1", "head"], ["head", "head"]):
        adapted = attach(model, "lora", rank=2, trained_modules=heads)
        assert list(adapted.adapter.trained) == ["head"]
        adapted.detach()
    adapted = attach(model, "lora", rank=2, trained_modules=["head.1"])
    assert list(adapted.adapter.trained) == ["head/1"]
    assert [a["name"] for a in adapted.adapter.describe()] == ["b", "head.0"]


def test_B11_a_head_may_hold_buffers(tmp_path):
    """Batch norm's running statistics are part of a trained head, and the base keeps its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2)))
    pristine = {n: t.clone() for n, t in model.state_dict().items()}
    adapted = attach(model, "lora", rank=2, trained_modules=["1"])
    x = torch.randn(64, 8)
    adapted.train()(x)
    y = adapted.eval()(x).detach()
    adapted.save(tmp_path)
    plain = adapted.detach()
    assert same(plain.state_dict(), pristine), "training moved the base's own statistics"
    assert torch.equal(lorafactory.load(plain, tmp_path).eval()(x), y)
