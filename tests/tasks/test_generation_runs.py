"""Whole runs of a causal model: the record, the untrained base beside it, and mistakes as a user meets them."""

import json

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from samples import refused

from lorafactory import config as configs
from lorafactory import course, models, paths, record, run, tables

SMALL = ["model=tiny_causal", "train.batch_size=4", "task.max_new_tokens=8", "task.max_length=96", "train.steps=3"]


@pytest.fixture(autouse=True)
def fresh():
    models._loaded.clear()
    run._measured.clear()
    GlobalHydra.instance().clear()
    yield
    models._loaded.clear()
    GlobalHydra.instance().clear()


@pytest.fixture
def source(tmp_path):
    for split, size in (("train", 40), ("test", 6)):
        lines = [json.dumps({"prompt": f"{split} {i}", "completion": f"is {i}"}) for i in range(size)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def made(tmp_path, source, *overrides):
    configs.publish()
    options = [*SMALL, "task=generation", f"task.source={source}", f"results.folder={tmp_path / 'results'}"]
    with initialize_config_dir(version_base="1.3", config_dir=str(paths.configs())):
        config = configs.load(compose("config", overrides=[*options, *overrides]))
    return run.run(config)


def test_the_record_tells_all(tmp_path, source):
    found = made(tmp_path, source, "variant=dora", "task.packing=true").record
    assert found["metrics"]["primary"] == found["metrics"]["selects"] == "exact_match"
    assert found["data"]["template"] and found["base"]["head"] == "none"
    assert found["base"]["padding"].startswith("<|end|>, ")
    assert found["cost"]["head_parameters"] == 0 and "untrained" not in found["metrics"]
    assert not any(a.get("site", "").endswith("lm_head") for a in found["adapted"])


def test_raw_predictions_give_the_metrics_again(tmp_path, source):
    found = made(tmp_path, source)
    raw = record.read_predictions(found.path)
    assert [len(raw[s]) for s in ("selection", "test")] == [4, 6] and all(len(p["texts"]) == 1 for p in raw["test"])
    likelihood = sum(p["log_likelihood"] for p in raw["test"]) / sum(p["tokens"] for p in raw["test"])
    assert found.record["metrics"]["test"]["log_likelihood"] == pytest.approx(likelihood)


def test_the_untrained_base_stands_beside(tmp_path, source, monkeypatch):
    calls, real = [], run.score
    for module in (run, course):
        monkeypatch.setattr(module, "score", lambda *a: calls.append(a[2]) or real(*a))
    first = made(tmp_path, source, "task.baseline=untrained", "train.lr=1e-2")
    second = made(tmp_path, source, "task.baseline=untrained", "train.lr=3e-2")
    assert calls == ["test", "selection", "test", "selection", "test"]  # a sweep measures its base once
    base, trained = (first.record["metrics"][k] for k in ("untrained", "test"))
    assert base == second.record["metrics"]["untrained"] and base["log_likelihood"] != trained["log_likelihood"]
    still = made(tmp_path, source, "train.lr=1e-12").record["metrics"]["test"]  # a start that leaves the base as it is
    assert still["log_likelihood"] == pytest.approx(base["log_likelihood"], rel=1e-6)
    refused(lambda: made(tmp_path, source, "task.baseline=random"), "task.baseline=random", "untrained")


def test_a_table_of_both(tmp_path, source):
    made(tmp_path, source, "task.baseline=untrained", "results.experiment=g")
    spec = tmp_path / "g.yaml"
    spec.write_text("caption: c\nexperiments: [g]\ntasks: [{task: generation, label: G, metric: log_likelihood}]\nseeds: [0]\n"
                    "select: {over: [train.lr], seeds: [0]}\n")  # fmt: skip
    tables.main([str(spec), "--results", str(tmp_path / "results"), "--with-scratch", "--out", str(tmp_path)])
    text = (tmp_path / "g.md").read_text()
    assert "(untrained)" in text and "(majority class)" not in text


@pytest.mark.parametrize("packing", [False, True])
def test_micro_batches_weigh_by_tokens(tmp_path, source, packing):
    """B33: completions differ in length, so a mean of means would be another loss."""
    options = [f"task.packing={str(packing).lower()}", "train.batch_size=9", "train.optimizer=sgd", "model.dtype=float32"]
    whole = made(tmp_path, source, *options).record["curve"]
    cut = made(tmp_path, source, *options, "train.micro_batch_size=2").record["curve"]
    assert [r["loss"] for r in whole] == pytest.approx([r["loss"] for r in cut], rel=1e-5)


@pytest.mark.parametrize("variant", ["lora", "dora+eva", "lora_ga", "adalora", "molora", "hydra_lora", "galore", "vera"])
def test_packing_is_a_layout_for_every_part(tmp_path, source, variant):
    """Starts, routers and budgets see the same tokens, however they lie; micro-batches here are as long as they like."""
    options = [f"variant={variant}", "train.batch_size=8", "train.lr=1e-3"]
    plain = made(tmp_path, source, *options).record
    packed = made(tmp_path, source, *options, "task.packing=true").record
    assert [r["loss"] for r in plain["curve"]] == pytest.approx([r["loss"] for r in packed["curve"]], rel=2e-4)
    assert plain["adapted"] == packed["adapted"]
