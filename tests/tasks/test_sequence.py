"""Several tasks in order on one adapter: how they are named, what each stage trains, and what is measured."""

import math
from dataclasses import asdict

import pytest
import torch
from runs import configured
from samples import loaded, make, refused
from transformers import BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from lorafactory import Adapted, models, record, registry, run
from lorafactory.tables.build import build
from lorafactory.tables.spec import parse
from lorafactory.tasks import transfer
from lorafactory.tasks.sequence import Heads, config_of, with_outputs

SPLIT = "task.stages=[{task: toy, classes: [red, blue]}, {task: toy, classes: [green, red, blue]}, {task: toy, part: 1/2}]"
MATRIX = [[0.9, 0.3, None], [0.5, 0.8, 0.4], [0.6, 0.5, 0.7]]


def test_the_metrics_by_hand():
    assert transfer.average(MATRIX) == pytest.approx((0.6 + 0.5 + 0.7) / 3)
    assert transfer.backward_transfer(MATRIX) == pytest.approx(((0.6 - 0.9) + (0.5 - 0.8)) / 2)
    assert transfer.forgetting(MATRIX) == pytest.approx(((0.9 - 0.6) + (0.8 - 0.5)) / 2)
    assert transfer.forward_transfer(MATRIX, [0.1, 0.2, 0.1]) == pytest.approx(((0.3 - 0.2) + (0.4 - 0.1)) / 2)
    better = [[0.5, 0.9], [0.7, 0.6]]  # the best of task 0 is its last, and of task 1 nothing later tells
    assert transfer.forgetting(better) == pytest.approx(-0.2) == -transfer.backward_transfer(better)
    assert math.isnan(transfer.backward_transfer([[0.5]])) and math.isnan(transfer.average([[0.5, None]]))


def test_forgetting_is_from_the_best_and_backward_transfer_from_the_first():
    rising = [[0.5, None, None], [0.9, 0.5, None], [0.6, 0.5, 0.5]]
    assert transfer.forgetting(rising) == pytest.approx((0.9 - 0.6) / 2)
    assert transfer.backward_transfer(rising) == pytest.approx((0.6 - 0.5) / 2)


def test_a_part_and_some_classes_of_a_task():
    whole = loaded("toy")
    some = loaded("toy", classes=["blue", "red"])
    assert some.labels == ["blue", "red"] and some.describe()["sizes"] == {"train": 133, "selection": 40, "test": 40}
    want = [(t, whole.labels[n]) for t, n in zip(whole.inputs["test"], whole.targets["test"], strict=True)]
    want = [(t, n) for t, n in want if n != "green"]
    assert list(zip(some.inputs["test"], [some.labels[n] for n in some.targets["test"]], strict=True)) == want
    parts = [loaded("toy", part=f"{k}/3") for k in (1, 2, 3)]
    for split in ("train", "selection", "test"):
        rows = [row for p in parts for row in p.inputs[split]]
        assert sorted(rows) == sorted(whole.inputs[split])
        counts = [p.targets[split].count(n) for p in parts for n in range(3)]
        assert max(counts) - min(counts) <= 1, "parts are stratified"
    assert len({p.fingerprint for p in (whole, some, *parts)}) == 5
    refused(lambda: loaded("toy", classes=["red", "grey"]), "grey", "red")
    for wrong in ({"classes": ["red"]}, {"classes": ["red", "red"]}, {"part": "3/2"}, {"part": "a"}):
        refused(lambda w=wrong: make("toy", **w), next(iter(wrong.values()))[0])


def test_stages_are_presets_with_options_and_the_record_has_them_whole():
    config = configured("task=sequence", SPLIT)
    stages = config.task.stages
    assert [s.kind for s in stages] == ["toy"] * 3 and stages[0].classes == ["red", "blue"] and stages[2].part == "1/2"
    assert config_of("cola").subset == "cola" and config_of("mnli_mm").test_split == "validation_mismatched"
    settings = record.settings(asdict(config))
    assert settings["task.stages"][1]["classes"] == ["green", "red", "blue"] and settings["task.stages"][1]["max_length"] == 16
    other = configured("task=sequence", SPLIT.replace("1/2", "2/2"))
    assert record.run_id(asdict(config)) != record.run_id(asdict(other))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("task.stages=[toy]", ["two or more"]),
        ("task.stages=[toy, tpy]", ["tpy", "toy"]),
        ("task.stages=[toy, {task: toy, clases: [red, blue]}]", ["clases", "classes"]),
        ("task.stages=[toy, {task: toy, max_length: long}]", ["max_length", "toy"]),
        ("task.stages=[toy, {classes: [red, blue]}]", ["names no task"]),
        ("task.stages=[toy, digits]", ["different kinds of model"]),
        ("task.stages=[toy, {task: toy, classes: [red, blue]}] task.heads=shared", ["different classes"]),
        ("task.stages=[toy, toy] task.heads=both", ["own, shared"]),
        ("task.stages=[toy, toy] task.train_size=5", ["task.train_size=5"]),
        ("task.stages=[toy, toy] task.baseline=untrained", ["task.baseline"]),
        ("task.stages=[toy, toy] model.head=keep", ["model.head=keep"]),
    ],
)
def test_refusals(option, words, tmp_path):
    options = option.replace(" task.", "\ttask.").replace(" model.", "\tmodel.").split("\t")
    refused(lambda: run.run(configured("task=sequence", f"results.folder={tmp_path}", *options)), *words)


def sequence(*options):
    from lorafactory.tasks import get_task

    config = configured("task=sequence", SPLIT, *options)
    task = get_task("sequence")(config.task)
    task.load()
    model = models.load(config.model, task)
    task.prepare(model.processor)
    return task, model


def test_each_stage_has_a_head_and_trains_it_alone():
    task, loaded = sequence()
    assert isinstance(loaded.model.classifier, Heads) and [h.out_features for h in loaded.model.classifier.heads] == [2, 3, 3]
    fresh = {f"classifier.heads.{k}.{p}" for k in range(3) for p in ("weight", "bias")}
    assert {n for n in loaded.fresh if "heads" in n} == fresh
    adapted = Adapted(loaded.model, registry.config("lora"), 0)
    try:
        for k, stage in enumerate(task.stages()):
            task.enter(adapted, stage)
            trained = {n for n, p in adapted.adapter.named_parameters() if p.requires_grad and "heads" in n}
            assert trained == {f"trained.classifier.module.heads.{k}.{p}" for p in ("weight", "bias")}
            batch = stage.collate([stage.splits["train"][i] for i in range(4)])
            stage.loss(adapted, batch).backward()
            assert len(stage.predict(adapted, batch)[0]) == (2, 3, 3)[k]
        assert all(p.requires_grad is False for p in loaded.model.parameters()), "the base's own heads stay frozen"
    finally:
        adapted.detach()


def test_a_joint_stage_is_the_sum_of_its_stages():
    task, loaded = sequence("task.joint=true")
    (joint,) = task.stages()
    assert len(joint.splits["train"]) == sum(len(p.splits["train"]) for p in task.parts) and joint.splits["train"].lengths()
    rows, total = [], 0.0
    loaded.model.eval()
    for k, part in enumerate(task.parts):
        task.enter(loaded.model, part)
        batch = part.collate([part.splits["train"][i] for i in range(3)])
        total += float(part.loss(loaded.model, batch).detach())
        start = sum(len(p.splits["train"]) for p in task.parts[:k])
        rows += [joint.splits["train"][start + i] for i in range(3)]
    task.enter(loaded.model, joint)
    assert [r["labels"] for r in rows[3:6]] == [n + 2 for n in task.parts[1].targets["train"][:3]]
    assert float(joint.loss(loaded.model, joint.collate(rows)).detach()) == pytest.approx(total, rel=1e-5)
    guessed = [max(range(8), key=p.__getitem__) for p in joint.predict(loaded.model, joint.collate(rows))]
    assert [0 if g < 2 else 1 if g < 5 else 2 for g in guessed] == [0] * 3 + [1] * 3 + [2] * 3
    task.enter(loaded.model, task.parts[0])


def test_a_head_of_several_layers_gets_its_last_one_anew():
    small = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}
    head = RobertaForSequenceClassification(RobertaConfig(**small, num_labels=2)).classifier
    made = with_outputs(head, 2, 5)
    assert made.out_proj.out_features == 5 and torch.equal(made.dense.weight, head.dense.weight)
    assert made.dense.weight is not head.dense.weight and head.out_proj.out_features == 2
    assert BertForSequenceClassification.base_model_prefix == "bert"


def test_a_run_scores_every_task_met_and_the_next_one(tmp_path):
    options = ("task=sequence", SPLIT, "train.lr=3e-3", f"results.folder={tmp_path}")
    made = run.run(configured(*options)).record
    assert made["metrics"]["primary"] == "average"
    for split in ("selection", "test"):
        found = made["metrics"][split]
        assert [[v is not None for v in row] for row in found["matrix"]] == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]
        assert all(v is not None for v in found["before"])
        assert found["average"] == pytest.approx(transfer.average(found["matrix"]))
        assert found["backward_transfer"] == pytest.approx(transfer.backward_transfer(found["matrix"]))
        assert found["forward_transfer"] == pytest.approx(transfer.forward_transfer(found["matrix"], found["before"]))
    assert [r["stage"] for r in made["curve"]] == [0] * 8 + [1] * 8 + [2] * 8
    assert [r["step"] for r in made["curve"]] == list(range(1, 25)) and made["optimizer"]["steps"] == 24
    raw = record.read_predictions(run.run(configured(*options)).path)
    assert [len(r) for r in raw["test"]] == [40, 60, 30]
    columns = [{"task": "sequence", "metric": m, "label": m} for m in ("primary", "backward_transfer", "forgetting")]
    shown = build(parse("mine", {"experiments": ["adhoc"], "tasks": columns, "mean": False}), tmp_path, scratch=True)
    cells = shown.rows[0].cells
    for column, name in (("primary", "average"), ("backward_transfer", "backward_transfer"), ("forgetting", "forgetting")):
        assert cells[column].values == {0: pytest.approx(made["metrics"]["test"][name])}
    joint = run.run(configured(*options, "task.joint=true")).record
    assert len(joint["metrics"]["test"]["matrix"]) == 1 and "backward_transfer" not in joint["metrics"]["test"]
    assert joint["id"] != made["id"] and joint["optimizer"]["steps"] == 8
