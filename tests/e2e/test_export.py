"""From a run to what other tools load: the numbers are the record's own."""

import pytest
import torch
from runs import TINY, lorafactory

from lorafactory import config, models, record
from lorafactory.tasks import get_task


def made(folder, *overrides):
    results = f"results.folder={folder}"
    done = lorafactory("run", *TINY, results, "results.keep_adapter=true", "train.lr=1e-2", *overrides)
    assert done.returncode == 0, done.stderr
    (path,) = [p for p in folder.rglob("*.json") if p.parent.parent.parent.name in ("runs", "scratch")]
    return path


def predictions(model, path):
    """Of the test split by a model that knows nothing of us."""
    cls = get_task("toy")
    about = record.read(path)["config"]["task"]
    task = cls(cls.Config(**about))
    task.load()
    task.prepare(models.load(config.ModelConfig(name="tiny", source=models.TINY), task).processor)
    return torch.tensor(task.predict(model.eval(), task.collate(task.splits["test"][:])))


def test_merged_is_a_checkpoint_that_answers_as_the_run_did(tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = made(tmp_path / "results", "variant=dora+pissa", "variant.rank=4")
    done = lorafactory("export", str(path), "--format", "merged", "--out", str(tmp_path / "m"))
    assert done.returncode == 0 and str(tmp_path / "m") in done.stdout, done.stderr
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    assert torch.allclose(predictions(model, path), torch.tensor(record.read_predictions(path)["test"]), atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "m").pad_token
    assert model.config.id2label == {i: n for i, n in enumerate(record.read(path)["data"]["labels"])}


def test_lora_is_a_folder_that_peft_loads(tmp_path):
    peft = pytest.importorskip("peft")
    path = made(tmp_path / "results", "variant=lora", "variant.rank=4")
    done = lorafactory("export", str(path), "--format", "peft", "--out", str(tmp_path / "l"))
    assert done.returncode == 0 and "at most 0.00e+00" in done.stdout, done.stderr
    cls = get_task("toy")
    task = cls(cls.Config(**record.read(path)["config"]["task"]))
    task.load()
    models._loaded.clear()
    base = models.load(config.ModelConfig(name="tiny", source=models.TINY), task).model
    models._loaded.clear()  # PEFT rewrites it
    model = peft.PeftModel.from_pretrained(base, tmp_path / "l")
    assert torch.allclose(predictions(model, path), torch.tensor(record.read_predictions(path)["test"]), atol=1e-4)


def test_mistakes_are_one_line_and_write_nothing(tmp_path):
    path = made(tmp_path / "results", "variant=dora", "variant.rank=4")
    out = str(tmp_path / "o")
    for arguments, told in (
        ((str(path), "--format", "peft"), "not exactly low-rank: give rank="),
        ((str(path), "--format", "merged", "--rank", "2"), "--rank 2 has no effect"),
        ((str(tmp_path / "no.json"), "--format", "peft"), "no.json"),
        ((str(path), "--format", "gguf"), "gguf"),
    ):
        done = lorafactory("export", *arguments, "--out", out)
        assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "o").exists()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    done = lorafactory("export", str(path), "--format", "merged", "--out", str(tmp_path / "base"))
    assert done.returncode == 2 and "holds other files" in done.stderr, "it may be the base model"
    for kept in (tmp_path / "results" / "adapters").iterdir():
        kept.rename(tmp_path / "moved")
    done = lorafactory("export", str(path), "--format", "peft", "--out", out, "--rank", "2")
    assert done.returncode == 2 and "results.keep_adapter=true" in done.stderr
