"""From a run, or from a folder, to what other tools load: the numbers are the record's own."""

import copy
import json
import shutil

import pytest
import torch
from runs import TINY, lorafactory
from support import close, perturb

from lorafactory import attach, config, models, record, tiny
from lorafactory.cli import main
from lorafactory.tasks import get_task


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The record of a run that kept its adapter, a DoRA with an anchor."""
    folder = tmp_path_factory.mktemp("results")
    options = ["results.keep_adapter=true", "train.lr=1e-2", "variant=dora+pissa", "variant.rank=4"]
    done = lorafactory("run", *TINY, f"results.folder={folder}", *options)
    assert done.returncode == 0, done.stderr
    (made,) = [p for p in folder.rglob("*.json") if p.parent.parent.parent.name in ("runs", "scratch")]
    return made


@pytest.fixture
def export(capfd, monkeypatch):
    """(exit status, what it said) of `lorafactory export`, in this process."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments):
        models._loaded.clear()
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["export", *map(str, arguments)])
        models._loaded.clear()  # PEFT rewrites what a test loads next
        return ended.value.code, "".join(capfd.readouterr())

    return run


def task_of(path):
    cls = get_task("toy")
    task = cls(cls.Config(**record.read(path)["config"]["task"]))
    task.load()
    return task


def predictions(model, path):
    """Of the test split by a model that knows nothing of us."""
    task = task_of(path)
    task.prepare(models.load(config.ModelConfig(name="tiny", source=models.TINY), task).processor)
    return torch.tensor(task.predict(model.eval(), task.collate(task.splits["test"][:])))


def recorded(path):
    return torch.tensor(record.read_predictions(path)["test"])


def test_merged_is_a_checkpoint_that_answers_as_the_run_did(path, export, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    code, said = export(path, "--format", "merged", "--out", tmp_path / "m")
    assert code == 0 and f"wrote {tmp_path / 'm'}" in said, said
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    assert torch.allclose(predictions(model, path), recorded(path), atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "m").pad_token
    assert model.config.id2label == {i: n for i, n in enumerate(record.read(path)["data"]["labels"])}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["peft"], "PEFT type LORA, exact"), (["lora", "--rank", "32"], "relative error of the update: at most 0.00e+00")],
    ids=("peft", "lora"),
)
def test_peft_and_lora_are_folders_that_peft_loads(arguments, told, path, export, tmp_path):
    """DoRA as PEFT has it, and as the LoRA of full rank."""
    peft = pytest.importorskip("peft")
    code, said = export(path, "--format", *arguments, "--out", tmp_path / "l")
    assert code == 0 and told in said, said
    base = models.load(config.ModelConfig(name="tiny", source=models.TINY), task_of(path)).model
    models._loaded.clear()
    model = peft.PeftModel.from_pretrained(base, tmp_path / "l")
    assert torch.allclose(predictions(model, path), recorded(path), atol=1e-4)
    assert json.loads((tmp_path / "l" / "adapter_config.json").read_text()).get("use_dora", False) == (arguments == ["peft"])


def test_a_folder_that_save_wrote_or_peft(export, tmp_path):
    """On the base that it notes or that --model names, in its dtype, with the head's class names; and from PEFT's folder."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    names = {0: "no", 1: "yes", 2: "maybe"}
    base = AutoModelForSequenceClassification.from_pretrained(tiny.folder(), id2label=names, dtype=torch.bfloat16).eval()
    ids = torch.arange(5, 17).reshape(2, 6)
    adapted = attach(base, "vera", rank=6, seed=0).eval()
    perturb(adapted.adapter, 5.0)
    y = adapted(ids).logits
    adapted.save(tmp_path / "a")
    for format, more in (("merged", []), ("peft", ["--model", tiny.folder()]), ("lora", [])):
        code, said = export(tmp_path / "a", "--format", format, "--out", tmp_path / format, *more)
        assert code == 0, said
    plain = adapted.detach()
    assert not close(plain(ids).logits, y)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token
    assert merged.dtype == torch.bfloat16 and merged.config.id2label == names and close(merged(ids).logits, y)
    for format in ("peft", "lora"):
        assert close(peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / format).eval()(ids).logits, y)
    code, said = export(tmp_path / "lora", "--format", "merged", "--model", tmp_path / "merged", "--out", tmp_path / "again",
                        "--dtype", "float32")  # fmt: skip
    assert code == 0, said
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again", dtype="auto")
    assert again.dtype == torch.float32 and not close(again(ids).logits, merged(ids).logits), "the update is there twice"


def test_mistakes_are_one_line_and_write_nothing(path, export, tmp_path):
    (kept,) = (path.parents[3] / "adapters").iterdir()
    unnamed, out = tmp_path / "unnamed", tmp_path / "o"
    shutil.copytree(kept, unnamed)
    (unnamed / "base.json").unlink()
    for arguments, told in (
        ((path, "--format", "lora"), "not exactly low-rank: give rank="),
        ((path, "--format", "merged", "--rank", 2), "--rank 2 has no effect"),
        ((path, "--format", "peft", "--rank", 2), "--rank 2 has no effect"),
        ((path, "--format", "peft", "--dtype", "float32"), "--dtype float32 has no effect"),
        ((path, "--format", "peft", "--model", "x"), "--model x has no effect on a record"),
        ((kept, "--format", "peft", "--model", "./no/such"), "--model=./no/such"),
        ((tmp_path, "--format", "peft"), "no adapter.json"),
        ((unnamed, "--format", "peft"), "does not say where its base model came from: give --model"),
        ((tmp_path / "no.json", "--format", "peft"), "no.json"),
        ((path, "--format", "gguf"), "gguf"),
    ):
        code, said = export(*arguments, "--out", out)
        assert code == 2 and told in said and said.count("\n") == 1, said
        assert not out.exists()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    code, said = export(path, "--format", "merged", "--out", tmp_path / "base")
    assert code == 2 and "holds other files" in said, "it may be the base model"
    moved = tmp_path / "results" / "runs" / "e" / "v" / path.name
    moved.parent.mkdir(parents=True)
    shutil.copy(path, moved)
    code, said = export(moved, "--format", "lora", "--out", out, "--rank", 2)
    assert code == 2 and "results.keep_adapter=true" in said
