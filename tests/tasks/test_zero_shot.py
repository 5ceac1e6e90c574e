"""CLIP: its vision tower under a drawn head, or under the text features of the class names."""

import pytest
import torch
from images import folders, save_clip, save_vit
from samples import loaded, refused

import lorafactory
from lorafactory import models


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    folders(folder, "train", 24)
    return folders(folder, "test", 6)


def start(clip, source, **options):
    task = loaded("image", source=source, **options)
    base = models.load(models.ModelConfig(name="clip", source=clip), task)
    task.prepare(base.processor)
    return task, base


def theirs(clip, prompts, pixels):
    """CLIP's own answer."""
    from transformers import AutoTokenizer, CLIPModel

    tokens = AutoTokenizer.from_pretrained(clip)(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return CLIPModel.from_pretrained(clip).eval()(**tokens, pixel_values=pixels).logits_per_image


@pytest.mark.parametrize("prompt", ["a photo of a {}.", "{} seen from space"])
def test_zero_shot_is_clips_own_answer_before_training(clip, source, prompt):
    task, base = start(clip, source, head="zero_shot", prompt=prompt)
    batch = task.collate(task.splits["test"][:])
    expected = theirs(clip, [prompt.replace("{}", n) for n in task.labels], batch["pixel_values"])
    assert torch.allclose(torch.tensor(task.predict(base.model, batch)), expected, atol=1e-5)
    assert expected.std(1).min() > 1e-3  # the classes are told apart at all


def test_names_are_read_with_spaces(source):
    task = loaded("image", source=source, head="zero_shot")
    task.labels = ["apple_pie", "hot dog"]
    assert task.head()["prompts"] == ["a photo of a apple pie.", "a photo of a hot dog."]


def test_the_frozen_head_stays_and_the_image_side_trains(clip, source):
    task, base = start(clip, source, head="zero_shot")
    assert models.heads(base) == [] == base.fresh and base.describe()["head"] == "frozen"
    before = {n: b.clone() for n, b in base.model.head.named_buffers()}
    batch = task.collate(task.splits["train"][:8])
    for variant in ("lora", "full"):
        adapted = lorafactory.attach(base.model, variant, trained_modules=models.heads(base), seed=0)
        assert not any(n.startswith("head") for n in adapted.adapter.deltas) and adapted.cost()["head_parameters"] == 0
        first = task.loss(adapted, batch)
        optimizer = adapted.optimizer(lambda g: torch.optim.AdamW(g, lr=1e-3), total=5)
        for _ in range(5):
            task.loss(adapted, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert task.loss(adapted, batch) < first
        adapted.detach()
    assert all(torch.equal(b, before[n]) for n, b in base.model.head.named_buffers())


def test_the_symmetric_loss_by_hand(clip, source, monkeypatch):
    """Logits of pictures 0, 1, 2 (classes 1, 1, 0) for 3 texts; text 2 has no picture."""
    task = loaded("image", source=source, head="zero_shot", symmetric=True)
    plain = loaded("image", source=source, head="zero_shot")
    logits = torch.tensor([[1.0, 2, 0], [0, 3, 1], [2, 1, 1]])
    monkeypatch.setattr(type(task), "_logits", lambda self, model, batch: logits)
    batch = {"labels": torch.tensor([1, 1, 0])}
    text = torch.log_softmax(logits, 0)
    want = -(text[2, 0] + text[0, 1] + text[1, 1]) / 3
    got = (task.loss(None, batch) - plain.loss(None, batch)) / task.size(batch)
    assert float(got) == pytest.approx(float(want)) and task.couples and not plain.couples


def test_the_symmetric_loss_is_for_texts_and_whole_batches(clip, source, tmp_path):
    from test_image import run

    refused(lambda: loaded("image", source=source, symmetric=True), "task.symmetric", "zero_shot")
    config, task = models.ModelConfig(name="clip", source=clip), {"head": "zero_shot", "symmetric": True}
    assert run(tmp_path / "a", config, source, "lora", steps=2, task=task)["status"] == "ok"
    refused(lambda: run(tmp_path / "b", config, source, "lora", steps=2, task=task, micro_batch_size=4), "train.micro_batch_size")


def test_both_heads_stand_on_one_base(clip, source):
    _, linear = start(clip, source)
    task, frozen = start(clip, source, head="zero_shot")
    assert models.heads(linear) == ["classifier"] and linear.fresh == ["classifier.weight", "classifier.bias"]
    _, other = start(clip, source, head="zero_shot", prompt="{}")
    assert linear.fingerprint == frozen.fingerprint == other.fingerprint
    assert not torch.equal(frozen.model.head.text, other.model.head.text)


def test_what_save_pretrained_wrote_comes_back(clip, source, tmp_path):
    from lorafactory.tasks.zero_shot import ZeroShotCLIP

    task, base = start(clip, source, head="zero_shot")
    base.model.save_pretrained(tmp_path)
    batch = task.collate(task.splits["test"][:])
    again = ZeroShotCLIP.from_pretrained(tmp_path).eval()
    assert task.predict(again, batch) == task.predict(base.model, batch)


def test_a_trained_clip_classifier_is_mapped_by_name_and_holes_are_refused(clip, source, tmp_path):
    from safetensors.torch import load_file, save_file

    task, base = start(clip, source)
    names = ["red", "blue", "green"]
    base.model.config.id2label = dict(enumerate(names))
    base.model.config.label2id = {n: i for i, n in enumerate(names)}
    base.model.save_pretrained(tmp_path)
    base.processor.save_pretrained(tmp_path)
    again = models.load(models.ModelConfig(source=str(tmp_path)), task)
    assert again.describe()["head"] == "by name, from positions [1, 2, 0]" and models.heads(again) == ["classifier"]
    state = load_file(tmp_path / "model.safetensors")
    lost = {n: t for n, t in state.items() if "layers.1.self_attn.q_proj" not in n}
    save_file(lost, tmp_path / "model.safetensors", {"format": "pt"})
    models._loaded.clear()
    refused(lambda: models.load(models.ModelConfig(source=str(tmp_path)), task), "missing", "q_proj")


def test_what_has_no_effect_or_no_text_side_is_refused(clip, source, tmp_path):
    task = loaded("image", source=source, head="zero_shot")
    refused(lambda: models.load(models.ModelConfig(source=clip, head="new"), task), "model.head=new", "no effect")
    other = models.ModelConfig(source=save_vit(tmp_path))
    refused(lambda: models.load(other, task), "task.head=zero_shot", "CLIP", "vit")
    long = loaded("image", source=source, head="zero_shot", prompt="a very very long sentence about {}")
    refused(lambda: models.load(models.ModelConfig(source=clip), long), "task.prompt", "24")
    _, base = start(clip, source, head="zero_shot")
    refused(lambda: lorafactory.attach(base.model, "head_only", trained_modules=models.heads(base)), "nothing")


@pytest.mark.parametrize("head", ["linear", "zero_shot"])
def test_full_fine_tuning_passes_over_what_no_loss_depends_on(clip, source, tmp_path, head, caplog):
    """CLIP's classifier averages positions before its last norm: `all` must not fail on that, and says so."""
    from test_image import run

    config = models.ModelConfig(name="clip", source=clip)
    record = run(tmp_path, config, source, "full", steps=6, task={"head": head})
    assert record["status"] == "ok" and ("post_layernorm" in caplog.text) == (head == "linear")
