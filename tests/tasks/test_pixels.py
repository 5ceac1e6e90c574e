"""Pictures as an image processor shapes them: two halves that make the whole, and the cache of the first."""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from images import folders, save_vit
from PIL import Image
from samples import loaded, refused

from lorafactory import models
from lorafactory.tasks import SPLITS, pixels


@pytest.fixture
def source(tmp_path):
    folders(tmp_path / "data", "train", 18)
    return folders(tmp_path / "data", "test", 9)


def processors():
    import transformers as t

    square = {"height": 8, "width": 8}
    return {
        "vit": t.ViTImageProcessorPil(size=square),
        "clip": t.CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=square),
        "dinov2": t.BitImageProcessorPil(size={"shortest_edge": 10}, crop_size=square),
        "convnext": t.ConvNextImageProcessorPil(size={"shortest_edge": 8}, crop_pct=0.9),
        "plain": t.ViTImageProcessorPil(size=square, do_normalize=False),
        "raw": t.ViTImageProcessorPil(size=square, do_normalize=False, do_rescale=False),
        "padded": t.ViTImageProcessorPil(size=square, do_pad=True, pad_size={"height": 10, "width": 10}),
    }


@pytest.mark.parametrize("name", ["vit", "clip", "dinov2", "convnext", "plain", "raw", "padded"])
def test_the_batch_is_what_the_processor_says(source, name):
    task, processor = loaded("image", source=source), processors()[name]
    task.prepare(processor)
    assert task.splits["train"][0]["pixel_values"].dtype == (np.float32 if name == "padded" else np.uint8)
    batch = task.collate(task.splits["test"][:])
    theirs = [np.asarray(processor(p.rgb())["pixel_values"][0]) for p in task.inputs["test"]]
    assert batch["pixel_values"].dtype == torch.float32 and batch["labels"].tolist() == task.targets["test"]
    assert torch.allclose(batch["pixel_values"], torch.from_numpy(np.stack(theirs)).float(), atol=1e-5)


def test_a_processor_without_one_size_is_refused(source, tmp_path):
    Image.new("RGB", (30, 10)).save(tmp_path / "data" / "test" / "red" / "wide.png")
    refused(lambda: loaded("image", source=source).prepare(_loose()), "test row", "[3, 8, 24]", "single size")


def _loose():
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 8}, do_center_crop=False)


@pytest.mark.parametrize("split", SPLITS)
def test_broken_pictures_are_named_before_training(source, tmp_path, split):
    """B62: by the source's own split and number, with how many there are."""
    where = loaded("image", source=source).inputs[split]
    files = sorted((tmp_path / "data" / ("test" if split == "test" else "train")).glob("*/*.png"))
    rows = [int(p.place.split()[-1]) for p in where]
    hurt = sorted(rows)[1:3]
    for i in hurt:
        files[i].write_bytes(files[i].read_bytes()[:50])
    task = loaded("image", source=source)
    message = refused(lambda: task.prepare(processors()["vit"]), "no picture", *(["repair"] if split != "train" else []))
    assert any(f"{'test' if split == 'test' else 'train'} row {i} " in message for i in hurt)


def test_a_second_preparation_reads_the_cache(source, monkeypatch):
    task, processor = loaded("image", source=source), processors()["vit"]
    task.prepare(processor)
    before = [r["pixel_values"].tobytes() for r in task.splits["train"]]
    monkeypatch.setattr(pixels, "_fill", lambda *a: pytest.fail("decoded again"))
    task.prepare(processor)
    assert [r["pixel_values"].tobytes() for r in task.splits["train"]] == before
    assert isinstance(task.splits["train"].values, np.memmap)
    part = loaded("image", source=source, train_size=6)  # selection and test are what they were
    with pytest.raises(pytest.fail.Exception, match="decoded again"):
        part.prepare(processor)


def test_what_changes_pixels_changes_the_entry(source):
    pictures, every = loaded("image", source=source).inputs["train"], processors()
    keys = {n: pixels.Processor(p, pictures[0]).key(pictures) for n, p in every.items()}
    assert len(set(keys.values())) == len(every)
    assert pixels.Processor(every["vit"], pictures[0]).key(pictures[1:]) != keys["vit"]


def test_a_broken_entry_is_made_again_and_an_unwritable_cache_is_said(source, tmp_path, monkeypatch, caplog):
    task, processor = loaded("image", source=source), processors()["vit"]
    monkeypatch.setenv("LORAFACTORY_CACHE", str(tmp_path / "cache"))
    task.prepare(processor)
    whole = task.splits["test"].values.tobytes()
    for file in (tmp_path / "cache" / "pixels").iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    task.prepare(processor)
    assert caplog.text.count("made again") == 3 and task.splits["test"].values.tobytes() == whole
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LORAFACTORY_CACHE", str(tmp_path / "file"))
    refused(lambda: task.prepare(processor), "LORAFACTORY_CACHE")


WORKER = """
import sys, time
from lorafactory import models
from lorafactory.tasks import get_task
cls = get_task("image")
task = cls(cls.Config(source=sys.argv[1]))
task.load()
base = models.load(models.ModelConfig(source=sys.argv[2]), task)
time.sleep(max(0, float(sys.argv[3]) - time.time()))
task.prepare(base.processor)
print(task.fingerprint, sum(int(r["pixel_values"].sum()) for r in task.splits["train"]))
"""


def test_two_processes_build_one_cache(source, tmp_path):
    environment = {"LORAFACTORY_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, "-c", WORKER, source, save_vit(tmp_path / "vit"), str(time.time() + 6)]
    both = [subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    (one, errors), (two, _) = (p.communicate(timeout=120) for p in both)
    assert one and one == two, errors
    assert len(list((tmp_path / "cache" / "pixels").glob("*.npy"))) == 3
    assert not list((tmp_path / "cache").rglob(".*"))  # nothing half-written stays


def test_the_folder_says_pil_whatever_it_was_saved_by(source, tmp_path):
    import json

    where = save_vit(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessorFast", "size": {"height": 8, "width": 8}})
    )
    base = models.load(models.ModelConfig(source=where), loaded("image", source=source))
    assert type(base.processor).__name__ == "ViTImageProcessorPil"
