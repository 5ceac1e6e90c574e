"""Prompts and completions: what is learnt, how it is laid out, what is written, and how that is scored."""

import copy
import json

import pytest
import torch
from samples import loaded, make, refused

from lorafactory import attach, models, tiny
from lorafactory.tasks import layout
from lorafactory.tasks.dialogue import Pair, Wording

PAIRS = [("one two", "three"), ("a", "bc d"), ("say seven", "7"), ("the longest of these prompts", "ok")]


def write(folder, rows=PAIRS, split="train", **columns):
    lines = [json.dumps({"prompt": p, "completion": c}) for p, c in rows]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


@pytest.fixture
def source(tmp_path):
    write(tmp_path / "data", [(f"{p} {i}", c) for i in range(10) for p, c in PAIRS])
    return write(tmp_path / "data", [(f"test {p}", c) for p, c in PAIRS], "test")


def base(**options):
    """(the tiny Llama, its own copy; its tokenizer)"""
    config = models.ModelConfig(name="tiny_causal", source="lorafactory:tiny_causal", **options)
    models._loaded.clear()
    found = models.load(config, make("generation"))
    models._loaded.clear()
    return found.model, found.processor


def ready(source, **options):
    """(task, model) with everything prepared."""
    task = loaded("generation", name="g", source=source, **{"max_length": 64, "max_new_tokens": 8, **options})
    model, processor = base()
    task.prepare(processor)
    return task, model


def rows(task, split="train", count=None):
    return [task.splits[split][i] for i in range(count or len(task.splits[split]))]


# what is learnt


def test_the_end_token_is_learnt_and_padding_is_not(source):
    """B37: this tokenizer has no padding token, so the end token pads; the two are told apart by place."""
    task, _ = ready(source)
    batch = task.training_batch(rows(task, count=8))
    end = task.processor.eos_token_id
    assert task.processor.pad_token_id == end
    for ids, labels, mask, row in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], rows(task), strict=False):
        learnt = labels[labels != layout.IGNORED].tolist()
        assert learnt == row["input_ids"][row["prompt"] :] and learnt[-1] == end and learnt.count(end) == 1
        assert (ids[mask == 0] == end).all() and (labels[mask == 0] == layout.IGNORED).all()
    assert (batch["attention_mask"] == 0).any() and task.size(batch) == int((batch["labels"] != layout.IGNORED).sum())


@pytest.mark.parametrize("chat", ["auto", "never"])
def test_training_and_writing_see_the_same_prompt(source, chat):
    task, _ = ready(source, chat=chat)
    given, wanted = task.wording.texts(task.pairs["train"][0])
    row = task.splits["train"][0]
    ids = row["input_ids"]
    assert task.processor.decode(ids[: row["prompt"]]) == given
    assert task.processor.decode(ids[row["prompt"] :]) == wanted.removesuffix("<|end|>") + "<|end|>"
    assert given.startswith("<|user|>") == (chat == "auto") == given.endswith("<|assistant|>")
    assert task.describe()["chat"] == (chat == "auto") and (task.describe()["template"] is not None) == (chat == "auto")


def test_a_system_message_needs_a_template(source):
    task, _ = ready(source, system="Be short.")
    assert task.wording.texts(task.pairs["train"][0])[0].startswith("<|system|>Be short.<|end|><|user|>")
    refused(lambda: ready(source, system="Be short.", chat="never"), "task.system", "no effect")


def test_templates_and_tokenizers_that_do_not_serve():
    _, processor = base()
    bare, endless, rewriting = (copy.deepcopy(processor) for _ in range(3))
    bare.chat_template = None
    refused(lambda: Wording(bare, "always", ""), "task.chat=always", "task.chat=never")
    endless.eos_token = None
    refused(lambda: Wording(endless, "auto", ""), "no end token")
    rewriting.chat_template = "{{ messages | length }}" + tiny.CHAT
    refused(lambda: Wording(rewriting, "auto", "").texts(Pair("a", "b", "b", "row 0")), "rewrites the prompt", "task.chat=never")


def test_long_rows(source, tmp_path):
    """A completion is cut and a prompt left out of training, both counted; a prompt that is scored is never cut."""
    folder = write(tmp_path / "long", [("p" * 60, "c"), ("p" * 20, "c" * 60), *PAIRS * 4])
    write(tmp_path / "long", PAIRS, "test")
    task, _ = ready(folder, selection_size=2)
    everything = [r for s in ("train", "selection") for r in rows(task, s)]
    about = task.describe()
    assert about["left_out"] + about["sizes"]["train"] + about["sizes"]["selection"] == 18
    assert about["left_out"] + about["cut"]["train"] + about["cut"]["selection"] == 2
    assert max(len(r["input_ids"]) for r in everything) <= 64
    write(tmp_path / "long", [("p" * 2100, "c")], "test")
    refused(lambda: ready(folder, selection_size=2), "test row 0", "max_new_tokens=8", "2048")
    refused(lambda: ready(source, max_length=4096), "task.max_length=4096", "2048")
    refused(lambda: ready(source, max_length=3), "task.max_length=3", "nothing is left to learn")


# how it is laid out


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("autocast", [False, True])
def test_packed_rows_are_the_same_rows(source, attention, autocast):
    """Loss and gradient do not know how a batch is laid out."""
    task, _ = ready(source)
    model, _ = base(attention=attention)
    some = rows(task, count=9)
    batches = [layout.side_by_side(some, 0), layout.packed(some, 64, 0)]
    assert len(batches[1]["input_ids"]) < len(batches[0]["input_ids"]) == 9 and "segments" in batches[1]
    found = []
    for batch in batches:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = task.loss(model, batch)
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}, task.size(batch)))
    (a, ga, na), (b, gb, nb) = found
    assert na == nb and torch.allclose(a, b, rtol=1e-2 if autocast else 1e-6)
    if not autocast:
        for name in ga:
            assert torch.allclose(ga[name], gb[name], atol=1e-5 * float(ga[name].abs().max())), name


def test_packed_rows_do_not_see_each_other(source):
    task, model = ready(source)
    some = rows(task, count=3)
    batch = layout.packed(some, 64, 0)
    assert len(batch["input_ids"]) == 1
    first = batch["segments"][0] == 1
    where = {"position_ids": batch["position_ids"], "attention_mask": layout.sees(batch["segments"])}
    before = model(input_ids=batch["input_ids"], **where)
    batch["input_ids"][0, ~first] = 5
    after = model(input_ids=batch["input_ids"], **where)
    assert torch.equal(before.logits[0, first], after.logits[0, first])
    assert not torch.equal(before.logits[0, ~first], after.logits[0, ~first])


def test_packing_is_for_training_only_and_needs_a_mask(source):
    task, model = ready(source, packing=True)
    some = rows(task, count=6)
    assert "segments" in task.training_batch(some) and len(task.collate(some)["input_ids"]) == 6
    model.config._attn_implementation = "flash_attention_2"
    refused(lambda: task.loss(model, task.training_batch(some)), "task.packing=true", "flash_attention_2", "sdpa")


def test_the_loss_is_transformers_own(source):
    task, model = ready(source)
    batch = task.training_batch(rows(task, count=5))
    theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    assert torch.allclose(task.loss(model, batch) / task.size(batch), theirs, rtol=1e-6)


# what is written


def written(task, model, count, split="test"):
    found = []
    for start in range(0, len(task.splits[split]), count):
        found += task.predict(model, task.collate(rows(task, split)[start : start + count]))
    return found


def test_the_batch_changes_nothing(source):
    """B50: prompts of different length, in float32."""
    task, model = ready(source)
    assert len({r["prompt"] for r in rows(task, "test")}) > 2
    one, two, all_of_them = (written(task, model, n) for n in (1, 2, 4))
    assert [p["texts"] for p in one] == [p["texts"] for p in two] == [p["texts"] for p in all_of_them]
    assert len({p["texts"][0] for p in one}) > 1
    for a, b in zip(one, all_of_them, strict=True):
        assert a["tokens"] == b["tokens"] and a["log_likelihood"] == pytest.approx(b["log_likelihood"], rel=1e-5)


def test_the_answer_is_what_the_model_would_say_step_by_step(source):
    task, model = ready(source)
    row = task.splits["test"][1]
    ids = row["input_ids"][: row["prompt"]]
    for _ in range(8):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    (found,) = task.predict(model, task.collate([row]))
    assert found["texts"] == [task.processor.decode(ids[row["prompt"] :], skip_special_tokens=True)]


def test_a_checkpoints_own_settings_are_left_out_and_left_alone(source):
    task, model = ready(source)
    plain = written(task, model, 4)
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=9.0, eos_token_id=[0, 70])
    before = model.generation_config.to_dict()
    found = written(task, model, 4)
    assert [p["texts"][0] for p in found] == [p["texts"][0].split(task.processor.decode([70]))[0] for p in plain]
    assert model.generation_config.to_dict() == before


def test_samples(source):
    task, model = ready(source, temperature=1.0, samples=3)
    torch.manual_seed(1)
    first = written(task, model, 4)
    torch.manual_seed(1)
    assert written(task, model, 4) == first and written(task, model, 4) != first
    assert all(len(p["texts"]) == len(p["ended"]) == len(p["new_tokens"]) == 3 for p in first)
    assert len({t for p in first for t in p["texts"]}) > 6
    scores = task.metrics(first, task.references("test"))
    assert scores["exact_match"] == 0 and not scores["constant_prediction"]


def test_what_is_learnt_by_heart_is_said_and_ended(source, tmp_path):
    """B37: generations end by themselves."""
    folder = write(tmp_path / "heart", PAIRS * 10)
    write(tmp_path / "heart", PAIRS, "test")
    task, model = ready(folder, selection_size=4)
    adapted = attach(model, "lora", rank=16, alpha=32)
    batch = task.training_batch(rows(task, count=36))
    assert task.metrics(written(task, adapted, 4), task.references("test"))["exact_match"] < 1
    optimizer = torch.optim.AdamW(adapted.adapter.parameters(), lr=2e-2)
    adapted.begin()
    for _ in range(100):
        (task.loss(adapted, batch) / task.size(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    scores = task.metrics(written(task, adapted, 4), task.references("test"))
    assert scores["exact_match"] == 1 and scores["ended"] == 1 and scores["no_answer"] == 0, scores
    assert -0.1 < scores["log_likelihood"] < 0
    with adapted.disabled():
        assert task.metrics(written(task, model, 4), task.references("test"))["exact_match"] < 1


# how it is scored, and where it comes from


def test_metrics_by_hand():
    task = make("generation", scorer="number")
    rows = [
        {"log_likelihood": -2.0, "tokens": 4, "texts": ["#### 5"], "new_tokens": [3], "ended": [True]},
        {"log_likelihood": -1.0, "tokens": 2, "texts": ["6"], "new_tokens": [1], "ended": [True]},
        {"log_likelihood": -3.0, "tokens": 6, "texts": ["none"], "new_tokens": [8], "ended": [False]},
    ]
    assert task.metrics(rows, ["#### 5", "7", "8"]) == {
        "log_likelihood": -0.5,
        "exact_match": pytest.approx(1 / 3),
        "no_answer": pytest.approx(1 / 3),
        "ended": pytest.approx(2 / 3),
        "new_tokens": 4.0,
        "constant_prediction": False,
    }
    assert make("generation", scorer="none").primary == "log_likelihood"
    assert set(make("generation", scorer="none").metrics([{"log_likelihood": -2.0, "tokens": 4}], ["x"])) == {"log_likelihood"}


def test_without_a_scorer_nothing_is_written(source):
    task, model = ready(source, scorer="none")
    found = written(task, model, 4)
    assert all(set(p) == {"log_likelihood", "tokens"} for p in found)
    assert task.metrics(found, task.references("test"))["log_likelihood"] < 0


def test_another_source_is_scored(source, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "test.jsonl").write_text(json.dumps({"q": "how many", "a": "it is\n#### 4"}) + "\n")
    folder = write(tmp_path / "number", [(f"p{i}", f"{i} it is") for i in range(20)])
    options = {"test_source": str(tmp_path / "other"), "test_prompt": "Q {q}?", "test_completion": "{a}", "scorer": "number"}
    task, _ = ready(folder, **options)
    assert [p.prompt for p in task.pairs["test"]] == ["Q how many?"] and task.describe()["sizes"]["train"] == 18
    assert task.source_split["test"].endswith(":test")
    refused(lambda: ready(folder, test_prompt="{q}"), "task.test_prompt", "task.test_source")
    refused(lambda: ready(folder, **{**options, "test_split": "validation"}), "no ", "validation")


def test_mistakes_are_named(source, tmp_path):
    refused(lambda: ready(source, prompt="{question}"), "task.prompt", "'question'", "prompt")
    refused(lambda: ready(source, prompt="nothing"), "task.prompt='nothing'", "{question}")
    refused(lambda: ready(source, completion="{"), "task.completion='{'")
    refused(lambda: ready(source, scorer="number"), "task.scorer=number", "finds no answer")
    refused(lambda: make("generation", top_p=0.5), "task.top_p=0.5", "no effect", "task.temperature")
    refused(lambda: make("generation", samples=5), "task.samples=5", "no effect")
    refused(lambda: make("generation", chat="maybe"), "task.chat=maybe", "auto")
    refused(lambda: make("generation", max_new_tokens=0), "task.max_new_tokens=0")
    refused(lambda: make("generation", selection_split="test"), "selection and test")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.jsonl").write_text('{"prompt": "a", "completion": 3}\n')
    refused(lambda: ready(str(tmp_path / "bad"), test_split="train"), "train row 0", "'completion'", "3")
    refused(lambda: ready(str(tmp_path / "nowhere"), test_split="train"), "task.source", "train.jsonl")


def test_gsm8k_as_its_authors_publish_it(data):
    columns = {"prompt": "{question}", "completion": "{answer}"}
    task = loaded("generation", source=str(data / "gsm8k"), subset="main", scorer="number", **columns)
    assert (len(task.pairs["train"]) + len(task.pairs["selection"]), len(task.pairs["test"])) == (7473, 1319)
    row = {"log_likelihood": -1.0, "tokens": 1, "new_tokens": [1], "ended": [True]}
    own = [row | {"texts": [p.completion]} for p in task.pairs["test"]]
    assert task.metrics(own, task.references("test"))["exact_match"] == 1
