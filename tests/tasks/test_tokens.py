"""Tokenised rows: the cache, padding, loss, and the model's own limits."""

import subprocess
import sys
import time

import pytest
import torch
from samples import loaded, refused, save_model, tiny_config, write_csv

from lorafactory import models
from lorafactory.tasks import tokens


@pytest.fixture
def base(toy):
    found = models.load(tiny_config(), toy)
    toy.prepare(found.processor)
    return found


def test_rows_are_what_the_tokenizer_says(toy, base):
    for split in ("train", "test"):
        rows = toy.splits[split]
        assert len(rows) == len(toy.texts[split]) and rows[-1] == rows[len(rows) - 1]
        for i in (0, 3, len(rows) - 1):
            assert rows[i] == {**base.processor(*toy.texts[split][i]), "labels": toy.references(split)[i]}
    with pytest.raises(IndexError):
        toy.splits["test"][len(toy.splits["test"])]


def test_loss_is_the_sum_however_a_batch_is_cut(toy, base):
    rows = toy.splits["train"][:10]
    whole = toy.loss(base.model, toy.collate(rows))
    parts = [toy.collate(rows[:3]), toy.collate(rows[3:])]
    assert sum(toy.loss(base.model, b) for b in parts).item() == pytest.approx(whole.item(), rel=1e-5)
    assert [toy.size(b) for b in parts] == [3, 7] and whole.dtype == torch.float32


def test_predictions_are_json_and_recompute_the_metrics(toy, base):
    import json

    predictions = toy.predict(base.model, toy.collate(toy.splits["test"][:]))
    assert json.loads(json.dumps(predictions)) == predictions
    chosen = [max(range(3), key=row.__getitem__) for row in predictions]
    right = sum(a == b for a, b in zip(chosen, toy.references("test"), strict=True))
    assert toy.metrics(predictions, toy.references("test"))["accuracy"] == pytest.approx(right / len(chosen))


def test_a_second_preparation_reads_the_cache(toy, base, monkeypatch):
    monkeypatch.setattr(tokens, "tokenise", lambda *a: pytest.fail("tokenised again"))
    before = toy.splits["train"][:]
    toy.prepare(base.processor)
    assert toy.splits["train"][:] == before


def test_another_length_or_text_is_another_entry(base, toy):
    keys = {tokens.key(base.processor, *parts) for parts in (("a", 16), ("a", 17), ("b", 16))}
    assert len(keys) == 3
    base.processor("x" * 50, truncation=True, max_length=9)  # leaves its mark on the tokenizer
    assert tokens.key(base.processor, "a", 16) in keys


def test_a_broken_entry_is_made_again(toy, base, cache, caplog):
    for file in (cache / "tokens").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    toy.prepare(base.processor)
    assert "made again" in caplog.text and toy.splits["train"][0]["input_ids"]


def test_an_unwritable_cache_is_said(toy, base, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LORAFACTORY_CACHE", str(tmp_path / "file"))
    refused(lambda: toy.prepare(base.processor), "LORAFACTORY_CACHE")


WORKER = """
import sys, time
from lorafactory import models
from lorafactory.tasks import get_task
cls = get_task("text")
task = cls(cls.Config(source=sys.argv[1], test_split="train", max_length=32))
time.sleep(max(0, float(sys.argv[2]) - time.time()))
task.load()
base = models.load(models.ModelConfig(source=models.TINY), task)
task.prepare(base.processor)
print(task.fingerprint, base.fingerprint, sum(map(sum, (r["input_ids"] for r in task.splits["train"]))))
"""


def test_two_processes_build_one_cache(tmp_path):
    source = write_csv(tmp_path / "data" / "train.csv", [(f"text number {i}", i % 3) for i in range(900)])
    environment = {"LORAFACTORY_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, "-c", WORKER, str(source), str(time.time() + 4)]
    both = [subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    (one, errors), (two, _) = (p.communicate(timeout=60) for p in both)
    assert one and one == two, errors
    assert len(list((tmp_path / "cache" / "tokens").glob("*.safetensors"))) == 1
    assert not list((tmp_path / "cache").glob(".*"))  # nothing half-written stays


# the model's limits


def test_rows_longer_than_the_model_are_refused(toy):
    task = loaded("toy", max_length=600)
    base = models.load(tiny_config(), task)
    refused(lambda: task.prepare(base.processor), "task.max_length=600", "512")
    task.config.max_length = 2
    refused(lambda: task.prepare(base.processor), "task.max_length=2", "3")


def test_roberta_has_fewer_positions_than_rows_in_its_table(toy, tmp_path):
    from transformers import RobertaConfig, RobertaModel

    sizes = dict(vocab_size=200, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    source = save_model(tmp_path, RobertaModel(RobertaConfig(max_position_embeddings=20, pad_token_id=0, **sizes)))
    toy.config.max_length = 20
    refused(lambda: toy.prepare(models.load(tiny_config(source=source), toy).processor), "20", "19 tokens")


def gpt2(folder):
    from transformers import GPT2Config, GPT2Model

    sizes = dict(vocab_size=200, n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    source = save_model(folder, GPT2Model(GPT2Config(bos_token_id=3, eos_token_id=3, **sizes)))
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"pad_token": "[PAD]",', '"pad_token": null,'))
    return source


def test_a_tokenizer_without_padding_pads_with_its_end_token_and_says_so(toy, tmp_path):
    source = gpt2(tmp_path)
    base = models.load(tiny_config(source=source), toy)
    assert base.processor.pad_token == "[UNK]" and base.describe()["padding"].startswith("[UNK], ")
    assert base.model.config.pad_token_id == base.processor.pad_token_id
    assert "padding" not in models.load(tiny_config(), toy).describe()
    assert "padding" not in models.load(tiny_config(source=source, pad_token="[SEP]"), toy).describe()
    refused(lambda: models.load(tiny_config(source=source, pad_token="<none>"), toy), "<none>", "vocabulary")


@pytest.mark.parametrize("named", ["[SEP]", None])
def test_a_decoder_reads_the_last_real_token_in_any_batch(toy, tmp_path, named):
    base = models.load(tiny_config(source=gpt2(tmp_path), pad_token=named), toy)
    base.redraw(0)
    toy.prepare(base.processor)
    end = base.processor.pad_token_id
    ids = [[7, 8, 9], [5, 6, end, 7, 8, 9, 10], [11, end, 12, 13]]
    rows = [{"input_ids": i, "attention_mask": [1] * len(i), "labels": 0} for i in ids]
    together = torch.tensor(toy.predict(base.model, toy.collate(rows)))
    alone = torch.tensor([toy.predict(base.model, toy.collate([r]))[0] for r in rows])
    assert torch.allclose(together, alone, atol=1e-5) and together.std(0).max() > 1e-2
