"""Image classification: layouts, labels by name (B64), splits, and runs that learn."""

import json

import pytest
import torch
from images import COLOURS, folders, parquet, picture, save_vit
from samples import loaded, make, refused

from lorafactory import models
from lorafactory.tasks import SPLITS


def rows(count, names=tuple(COLOURS)):
    return [(picture(names[i % len(names)], i), i % len(names)) for i in range(count)]


@pytest.fixture
def source(tmp_path):
    """30 training and 12 test pictures of three colours, in folders."""
    folders(tmp_path / "data", "train", 30)
    return folders(tmp_path / "data", "test", 12)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return models.ModelConfig(name="vit", source=save_vit(tmp_path_factory.mktemp("vit")))


def test_folders_and_parquet_read_the_same(source, tmp_path):
    for split in ("train", "test"):
        files = sorted((tmp_path / "data" / split).glob("*/*.png"))
        parquet(tmp_path / "hub", split, [(f.read_bytes(), f.parent.name) for f in files])
    both = loaded("image", source=source), loaded("image", source=str(tmp_path / "hub"))
    for task in both:
        assert task.labels == ["blue", "green", "red"]
        for split in SPLITS:
            pairs = zip(task.inputs[split], task.targets[split], strict=True)
            assert all(_colour(p) == task.labels[n] for p, n in pairs)
    assert both[0].fingerprint == both[1].fingerprint


def _colour(found):
    red, green, blue = found.rgb().resize((1, 1)).getpixel((0, 0))
    return max((red, "red"), (green, "green"), (blue, "blue"))[1]


def test_the_datas_own_order_wins(tmp_path):
    source = parquet(tmp_path, "train", rows(30), names=list(COLOURS))
    task = loaded("image", source=source, test_split="train")
    assert task.labels == ["red", "green", "blue"] and task.head()["label2id"] == {"red": 0, "green": 1, "blue": 2}
    assert all(_colour(p) == task.labels[n] for p, n in zip(task.inputs["train"], task.targets["train"], strict=True))
    refused(make("image", source=source, test_split="train", labels=sorted(COLOURS)).load, "its own", "'red', 'green'")


def test_numbers_are_named_by_labels_or_by_themselves(tmp_path):
    source = parquet(tmp_path, "train", rows(30))
    assert loaded("image", source=source, test_split="train").labels == ["0", "1", "2"]
    assert loaded("image", source=source, test_split="train", labels=list(COLOURS)).labels == list(COLOURS)
    refused(make("image", source=source, test_split="train", labels=["red", "green"]).load, "train row 2", "0..1")


def test_a_class_that_only_test_has_names_its_row(tmp_path):
    parquet(tmp_path, "train", [(p, str(n)) for p, n in rows(20, ("red", "green"))])
    parquet(tmp_path, "test", [(p, str(n)) for p, n in rows(9)])
    refused(make("image", source=str(tmp_path)).load, "test row 2", "'2'", "0, 1")


def test_hidden_test_labels_are_refused_with_a_pointer(tmp_path):
    parquet(tmp_path, "train", rows(30), names=list(COLOURS))
    parquet(tmp_path, "test", [(p, -1) for p, _ in rows(6)])
    parquet(tmp_path, "validation", rows(6), names=list(COLOURS))
    refused(make("image", source=str(tmp_path)).load, "test row 0", "-1", "task.test_split=validation")
    about = loaded("image", source=str(tmp_path), test_split="validation").describe()
    assert about["sizes"] == {"train": 27, "selection": 3, "test": 6}


def test_missing_classes_shift_nothing_and_are_listed(tmp_path):
    names = [str(i) for i in range(12)]
    lacking = [n for n in names if n != "2"]
    for split, present in (("train", names), ("test", lacking)):
        for i, name in enumerate(present * 2):
            file = tmp_path / split / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture("red", 0, (2 + int(name), 3)).save(file)  # as wide as its number says
    (tmp_path / "test" / "5x").mkdir()  # an empty folder is no class
    task = loaded("image", source=str(tmp_path), selection_size=2)
    assert sorted(task.labels) == sorted(names) and task.describe()["missing_labels"]["test"] == ["2"]
    pairs = zip(task.inputs["test"], task.targets["test"], strict=True)
    assert all(p.rgb().width == 2 + int(task.labels[n]) for p, n in pairs)


def test_splits_duplicates_and_the_description(source, tmp_path):
    task = loaded("image", name="colours", source=source, selection_size=6)
    held = {s: set(task.inputs[s]) for s in SPLITS}
    assert [len(held[s]) for s in SPLITS] == [24, 6, 12] and not held["train"] & held["selection"]
    about = task.describe()
    assert json.loads(json.dumps(about)) == about and about["majority"]["accuracy"] == pytest.approx(1 / 3)
    assert sum(about["duplicates"].values()) == 0
    twice = tmp_path / "data" / "test" / "red" / "again.png"
    twice.write_bytes((tmp_path / "data" / "train" / "red" / "000.png").read_bytes())
    again = loaded("image", name="colours", source=source, selection_size=6)
    assert sum(again.describe()["duplicates"].values()) == 1 and again.fingerprint != task.fingerprint


def test_too_few_rows_are_refused(source):
    refused(make("image", source=source, selection_size=30).load, "0 rows left for train")
    refused(make("image", source=source, test_split="validation").load, "validation", "test_split=train")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head": "probe"}, ("task.head=probe", "linear, zero_shot")),
        ({"prompt": "a {}"}, ("task.prompt", "no effect", "task.head=linear")),
        ({"head": "zero_shot", "prompt": "a thing"}, ("task.prompt", "{}")),
    ],
)
def test_options_that_make_no_sense_are_refused(options, words):
    refused(lambda: make("image", source="x", **options), *words)


def test_a_text_model_is_refused(source):
    refused(lambda: models.load(models.ModelConfig(source=models.TINY), loaded("image", source=source)), "cannot load")


def test_a_head_that_was_trained_is_mapped_by_name(source, tmp_path):
    from images import SIZES
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    theirs = ["Red", "Blue", "Green"]
    names = {"id2label": dict(enumerate(theirs)), "label2id": {n: i for i, n in enumerate(theirs)}}
    config = ViTConfig(image_size=8, patch_size=4, initializer_range=0.3, **SIZES, **names)
    ViTForImageClassification(config).save_pretrained(tmp_path / "m")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "m")
    task = loaded("image", source=source)
    chosen = [models.load(models.ModelConfig(source=str(tmp_path / "m"), head=h), task) for h in ("auto", "keep")]
    task.prepare(chosen[0].processor)
    batch = task.collate(task.splits["test"][:4])
    ours, raw = (torch.tensor(task.predict(b.model, batch)) for b in chosen)
    assert torch.equal(ours, raw[:, [1, 2, 0]]) and not torch.equal(ours, raw)
    assert chosen[0].describe()["head"] == "by name, from positions [1, 2, 0]"


def test_loss_is_the_sum_however_a_batch_is_cut(source, vit):
    task = loaded("image", source=source)
    base = models.load(vit, task)
    task.prepare(base.processor)
    rows = task.splits["train"][:7]
    whole, parts = task.collate(rows), [task.collate(rows[:3]), task.collate(rows[3:])]
    assert whole["pixel_values"].shape == (7, 3, 8, 8) and whole["labels"].tolist() == task.targets["train"][:7]
    total = task.loss(base.model, whole)
    assert sum(task.loss(base.model, b) for b in parts).item() == pytest.approx(total.item(), rel=1e-5)
    assert [task.size(b) for b in parts] == [3, 4]


def architectures():
    import transformers as t

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    swin = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2, "patch_size": 2, "image_size": 8}
    return {
        "dinov2": t.Dinov2Model(t.Dinov2Config(image_size=8, patch_size=4, mlp_ratio=2, **sizes)),
        "swin": t.SwinModel(t.SwinConfig(**swin)),
        "convnext": t.ConvNextModel(t.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2)),
    }


@pytest.mark.parametrize("name", ["dinov2", "swin", "convnext"])
@pytest.mark.parametrize("variant", ["lora", "full"])
def test_other_architectures_train_whole_or_by_adapter(source, tmp_path, name, variant):
    from transformers import ViTImageProcessorPil

    architectures()[name].save_pretrained(tmp_path / "m")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "m")
    record = run(tmp_path, models.ModelConfig(name="m", source=str(tmp_path / "m")), source, variant, steps=6)
    assert record["status"] == "ok" and record["cost"]["head_parameters"] > 0
    curve = [row["loss"] for row in record["curve"]]
    assert curve[-1] < curve[0]


def run(folder, model, source, variant="lora", task=None, **train):
    from lorafactory import config, registry
    from lorafactory import run as runs
    from lorafactory.tasks import get_task

    made = config.RunConfig(
        model=model,
        task=get_task("image").Config(name="colours", source=source, **task or {}),
        variant=registry.config(variant),
        train=config.TrainConfig(lr=1e-2, **train),
        results=config.ResultsConfig(folder=str(folder / "results")),
    )
    return runs.run(made).record


def test_a_run_learns_and_its_record_tells_how_pictures_were_prepared(source, tmp_path, vit):
    record = run(tmp_path, vit, source, steps=60)
    assert record["metrics"]["test"]["accuracy"] > 0.9 and record["data"]["majority"]["accuracy"] < 0.4
    told = record["base"]["processor"]  # B63
    assert told["class"] == "ViTImageProcessorPil" and told["size"] == {"height": 8, "width": 8} and "resample" in told


def test_real_cifar10(data, tmp_path, vit):
    if not (data / "cifar10").is_dir():
        pytest.skip(f"no cifar10 in {data}")
    options = {"image": "img", "train_size": 300, "selection_size": 50, "test_size": 100}
    task = loaded("image", name="cifar10", source=str(data / "cifar10"), **options)
    assert task.labels[:3] == ["airplane", "automobile", "bird"] and len(task.labels) == 10
    assert [task.targets["test"].count(i) for i in range(10)] == [10] * 10
    base = models.load(vit, task)
    task.prepare(base.processor)
    assert len(task.predict(base.model, task.collate(task.splits["test"][:5]))) == 5


def test_targets_and_show_read_an_image_model(vit):
    from lorafactory import describe

    found = {r["role"]: r for r in describe.linear_layers(describe.base_model(vit.source))}
    assert found["vit.layers.*.attention.q_proj"]["count"] == 2
    assert found["classifier"]["d_out"] == 2 and "head" in found["classifier"]["note"]
    refused(lambda: describe.base_model("no/such"), "no/such", "config.json")
