"""Two processes give what one gives, at the same global batch, with a whole base in each or a sharded one; nothing is
counted twice."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from runs import TINY, configured, lorafactory, trainer
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lorafactory import checkpoint, models, paths, record, run, shard
from lorafactory.errors import UserError

ALWAYS = ("lora", "dora", "vera", "pissa", "adalora", "increlora")
MORE = ("dora+pissa", "lora_pro", "relora", "gelora", "molora", "lora_ga", "eva", "bitfit", "ia3", "lotr", "sora", "alora",
        "codyra", "autolora", "diffora", "dylora", "matryoshka_lora", "lora_squeeze", "airllm", "colora")
REPLACING = ("full", "galore")  # their deltas hold the weights themselves: nothing of the base is left to shard
# the base's dropout draws differ between processes, so sums agree only without it: the toy model has a still twin.
# 37 rows by 10 in micro-batches of 3, 47 by 23: the processes do not have the same number of batches
SIZES = ["task.train_size=57", "task.test_size=47", "train.eval_batch_size=23", "train.batch_size=10"]
RUN = ["run", "-m", *TINY, *SIZES, "train.micro_batch_size=3", "train.steps=10", "train.lr=3e-3", "train.checkpoint_every=4",
       "results.keep_adapter=true"]  # fmt: skip


def made(folder: Path) -> dict[str, tuple[dict, dict]]:
    """Record and predictions by variant."""
    found = [p for p in folder.glob("*/adhoc/**/*.json") if "checkpoints" not in p.parts]
    return {record.read(p)["variant"]: (record.read(p), record.read_predictions(p)) for p in found}


def swept(folder: Path, variants: tuple[str, ...], model: Path, *options: str, processes: int = 1) -> dict:
    command = [*RUN, f"variant={','.join(variants)}", f"model.source={model}", f"results.folder={folder}", *options]
    done = lorafactory(*command, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^ok ", done.stdout, re.M)) == len(variants), "one process speaks"
    assert done.stdout.count(" ran, 0 found, 0 failed") == 1
    return made(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, still_model):
    """What one process makes of some variants, each set once."""
    cache: dict[tuple, dict] = {}

    def get(variants: tuple[str, ...]) -> dict:
        if variants not in cache:
            cache[variants] = swept(tmp_path_factory.mktemp("one"), variants, still_model)
        return cache[variants]

    return get


FSDP2, LESS = "train.shard=fsdp2", "train.gradient_checkpointing=true"
CASES = {"whole": (ALWAYS,), "fsdp2": (ALWAYS, FSDP2), "whole more": ((*MORE, *REPLACING),), "fsdp2 more": (MORE, FSDP2),
         "fsdp2 recomputed": (("lora", "dora"), FSDP2, LESS)}  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if " " in c else []) for c in CASES])
def test_two_processes_equal_one(tmp_path, case, still_model, alone):
    variants, *options = CASES[case]
    one = alone(variants)
    two = swept(tmp_path, variants, still_model, *options, processes=2)
    assert one.keys() == two.keys() == set(variants)
    for variant, (a, raw_a) in one.items():
        b, raw_b = two[variant]
        assert (a["environment"]["processes"], b["environment"]["processes"]) == (1, 2)
        classes = ["BertForSequenceClassification", "FSDPBertForSequenceClassification"]
        assert [a["base"]["class"], b["base"]["class"]] == [classes[0], classes[FSDP2 in options]]
        if FSDP2 in options:
            assert b["base"]["process_bytes"] < 0.6 * a["base"]["process_bytes"]
        assert a["base"]["fingerprint"] == b["base"]["fingerprint"]
        losses = [[r["loss"] for r in x["curve"]] for x in (a, b)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5), variant
        assert a["adapted"] == b["adapted"], variant
        for split in ("selection", "test"):  # B40: each row once, in order
            assert len(raw_a[split]) == len(raw_b[split]) == a["data"]["sizes"][split]
            for x, y in zip(raw_a[split], raw_b[split], strict=True):
                assert x == pytest.approx(y, abs=1e-4), variant
        assert a["metrics"] == json.loads(json.dumps(b["metrics"]))
        assert a["id"] == b["id"] or LESS in options, "how the base is held changes no number"
        (saved,) = tmp_path.glob(f"adapters/{b['id']}")
        assert checkpoint.read_json(saved / "adapter.json")["base"] == a["base"]["fingerprint"], "before it was sharded"


@pytest.fixture
def one_rank():
    """A process group of this process alone, so that FSDP2 itself can be looked at."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield SimpleNamespace(device=torch.device("cpu"), num_processes=1)
    dist.destroy_process_group()


def test_what_a_sharded_base_cannot_do_is_refused(tmp_path, one_rank):
    t = trainer(tmp_path, "variant=dora+pissa")
    before = t.adapted.save(tmp_path / "a")
    shard.shard(t.adapted, one_rank)
    base = t.adapted.model
    layers = [m for m in base.modules() if type(m).__name__ == "FSDPBertLayer"]
    assert isinstance(base, FSDPModule) and len(layers) == 2
    assert all(isinstance(p, DTensor) for layer in layers for p in layer.parameters())
    assert not any(isinstance(p, DTensor) for p in t.adapted.adapter.parameters())
    t.adapted.train()
    loss, _ = t._step(0)
    assert loss["loss"] > 0
    after = t.adapted.save(tmp_path / "b")
    about = [checkpoint.read_json(p / "adapter.json")["base"] for p in (before, after)]
    assert about[0] == about[1]
    for verb in (t.adapted.merge, t.adapted.bake, t.adapted.detach):
        with pytest.raises(UserError, match="sharded over processes"):
            verb()


@pytest.mark.parametrize("variant", REPLACING)
def test_a_base_of_which_nothing_is_left_is_not_sharded(tmp_path, one_rank, variant):
    with pytest.raises(UserError, match=f"nothing is left to shard, for {variant} replaces every weight"):
        shard.shard(trainer(tmp_path, f"variant={variant}").adapted, one_rank)


def test_sharding_in_one_process_or_beside_a_plug_in_is_refused(tmp_path, server, monkeypatch):
    ended = server.run(["run", *TINY, "train.shard=fsdp2", f"results.folder={tmp_path}"])
    assert (ended.status, ended.said.count("\n")) == (2, 1) and "needs several processes" in ended.said
    ended = server.run(["run", *TINY, "train.shard=zero", f"results.folder={tmp_path}"])
    assert ended.status == 2 and "train.shard is 'zero'; it takes fsdp2" in ended.said
    for plugin, name in (("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed")):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=f"{name} plug-in would do nothing here"):
            patch.setenv(f"ACCELERATE_USE_{plugin}", "true")
            run.run(configured(f"results.folder={tmp_path}"))
    assert not list(tmp_path.rglob("*.json"))


def test_a_base_that_was_sharded_is_loaded_anew(still_model):
    loaded = models.Loaded(models.ModelConfig(), torch.nn.Linear(2, 2), None)
    models._loaded["it"] = loaded
    models.forget(loaded)
    assert "it" not in models._loaded


def test_accelerates_config_is_one_that_it_reads():
    read = load_config_from_file(str(paths.configs() / "accelerate" / "multi_gpu.yaml"))
    assert (read.distributed_type.value, read.num_processes, read.mixed_precision) == ("MULTI_GPU", 2, "no")
