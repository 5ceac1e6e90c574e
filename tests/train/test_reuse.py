"""Many runs in one process: base and tokenised rows are loaded once, come back bit for bit, and no run feels another."""

from dataclasses import replace

import pytest
from runs import configured

from lorafactory import fingerprint, models, record, run
from lorafactory.tasks import tokens

VARIANTS = ["full", "dora+pissa", "adalora", "relora", "bitfit", "molora"]
SMALL = ("train.steps=4", "task.train_size=24", "task.selection_size=8", "task.test_size=8", "train.lr=1e-2")


@pytest.fixture
def counted(monkeypatch):
    """How often a base was loaded and a split tokenised; each is then one that nobody else has."""
    models._loaded.clear()
    calls = {"load": 0, "tokenise": 0}

    def count(name, module, function):
        real = getattr(module, function)

        def call(*args, **kwargs):
            calls[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, function, call)

    count("load", models, "_load")
    count("tokenise", tokens, "tokenise")
    yield calls
    models._loaded.clear()


def made(folder, variant):
    found = run.run(configured(*SMALL, f"variant={variant}", f"results.folder={folder}"))
    return found.record, record.read_predictions(found.path)


def test_a_sweep_loads_once_and_gives_the_base_back(tmp_path, counted, monkeypatch):
    monkeypatch.setenv("LORAFACTORY_CACHE", str(tmp_path / "cache"))
    alone = made(tmp_path / "alone", VARIANTS[0])
    (loaded,) = models._loaded.values()
    heads = models.heads(loaded)
    before = fingerprint.of_model(loaded.model, heads)
    flags = [(n, p.requires_grad, p.dtype) for n, p in loaded.model.named_parameters()]
    kinds = [type(m) for m in loaded.model.modules()]
    tokenised = counted["tokenise"]
    for variant in VARIANTS[1:]:
        assert made(tmp_path / "sweep", variant)[0]["base"]["fingerprint"] == before
        assert fingerprint.of_model(loaded.model, heads) == before, variant
    assert flags == [(n, p.requires_grad, p.dtype) for n, p in loaded.model.named_parameters()]
    assert kinds == [type(m) for m in loaded.model.modules()] and not loaded.model.training
    assert counted == {"load": 1, "tokenise": tokenised}, "loaded or tokenised again"
    after = made(tmp_path / "sweep", VARIANTS[0])
    assert alone[1] == after[1]
    for part in ("metrics", "curve", "adapted"):
        assert alone[0][part] == after[0][part], part


def test_another_model_config_is_another_base(tmp_path, counted):
    made(tmp_path, "lora")
    config = configured(*SMALL, f"results.folder={tmp_path}")
    run.run(replace(config, model=replace(config.model, dtype="bfloat16")))
    assert counted["load"] == 2
