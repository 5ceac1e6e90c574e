"""What a user types, and what comes back: exit status, one line for a mistake, nothing half-written."""

import json
from pathlib import Path

import pytest
from runs import TINY, environment, lorafactory

from lorafactory import record, registry

MISTAKES = [
    (["run", "variant=lorra"], "no variant 'lorra'; nearest: lora"),
    (["run", "task=colla"], "no task 'colla'; nearest: cola"),
    (["run", "model=mini"], "no model 'mini'; nearest: minilm"),
    (["run", "experiment=demmo"], "no experiment 'demmo'; nearest: demo"),
    (["run", "train.lrr=1"], "no option 'train.lrr'; nearest: lr"),
    (["run", "variant.rnk=4"], "rnk"),
    (["run", "vairant=lora"], "no option 'vairant'; nearest: variant"),
    (["run", "train.lr=fast"], "'fast' of type 'str' could not be converted to Float"),
    (["run", "variant.rank=0"], "rank is 0; it must be at least 1"),
    (["run", *TINY, "variant.rank=999"], "rank 999 is more than bert.encoder.layer.0.attention.self.query"),
    (["run", *TINY, "variant.target_modules=[foo]"], "target 'foo' matches no module"),
    (["run", *TINY, "variant.target_modules=[classifier]"], "belongs to the head"),
    (["run", "variant=lora+full"], "'lora' and 'full' both choose the structure"),
    (["run", "variant=pissa+lora_ga"], "both choose the init"),
    (["run", "variant=full+pissa"], "'pissa' needs a structure with additive, low_rank"),
    (["run", "variant=full", "variant/init=pissa"], "'pissa' needs a structure with"),
    (["run", "task=cola", "model=tiny", "task.source=./no/such/folder"], "no/such/folder"),
    (["run", "model=hf", "task=toy", "model.source=./no/such/model"], "no/such/model"),
    (["run", "train.patience=3"], "set train.eval_every"),
    (["run", "train.lr"], "train.lr"),
    (["show", "lorra"], "no variant 'lorra'"),
    (["table", "gleu"], "gleu"),
    (["runn"], "no command 'runn'; nearest: run"),
    (["variants", "--yaml"], "--yaml"),
    (["completion", "tcsh"], "bash or zsh"),
]


@pytest.mark.parametrize(("arguments", "said"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_a_mistake_is_one_line_and_status_2(arguments, said, tmp_path, monkeypatch, capfd):
    from lorafactory.cli import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capfd.readouterr()
    assert ended.value.code == 2, err
    assert said in err
    assert err.count("\n") == 1 and err.startswith("lorafactory: ")
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("*.json"))


def test_debug_shows_where(tmp_path):
    ended = lorafactory("run", "variant.rank=0", f"results.folder={tmp_path}", "--debug")
    assert "Traceback" in ended.stderr and "rank is 0" in ended.stderr


def test_a_run_names_its_metric_and_record_and_is_found_again(tmp_path):
    options = ["run", *TINY, "train.steps=3", f"results.folder={tmp_path}"]
    first, second = lorafactory(*options), lorafactory(*options)
    assert first.returncode == second.returncode == 0, first.stderr
    metric, where = first.stdout.splitlines()[-2:]
    assert metric.startswith("accuracy on test: ")
    made = record.read(Path(where.removeprefix("record: ")))
    assert made["command"].startswith("lorafactory run model=tiny task=toy")
    assert str(tmp_path) not in made["command"]
    assert second.stdout.splitlines()[-2] == metric + " (found, not run again)"
    assert {r["name"].rpartition(".")[2] for r in made["adapted"]} == {"query", "key", "value", "dense"}
    assert all(r["rank"] == 8 and r["scale"] == 2.0 for r in made["adapted"])


def test_the_two_spellings_of_the_command_are_one(tmp_path):
    import subprocess
    import sys

    script = Path(sys.executable).with_name("lorafactory")
    if not script.exists():
        pytest.skip("the console script is not installed here")
    said = [subprocess.run([*c, "--version"], capture_output=True, text=True, env=environment()).stdout
            for c in ([str(script)], [sys.executable, "-m", "lorafactory"])]  # fmt: skip
    assert said[0] == said[1] != ""


def test_a_sweep_goes_on_after_a_failure_and_says_what_happened(tmp_path):
    swept = lorafactory(
        "run", "-m", *TINY, "train.steps=3", "variant=lora,dora", "variant.rank=4,99", "results.experiment=sweep",
        f"results.folder={tmp_path}",
    )  # fmt: skip
    assert swept.returncode == 1
    lines = swept.stdout.splitlines()
    assert "2 ran, 0 found, 2 failed, 0 diverged" in lines
    after = lines[lines.index("2 ran, 0 found, 2 failed, 0 diverged") + 1 :]
    assert len(after) == 2 and all("rank 99 is more than" in line and "traceback.txt" in line for line in after)
    assert len(list(tmp_path.rglob("traceback.txt"))) == 2
    again = lorafactory(
        "run", "-m", *TINY, "train.steps=3", "variant=lora,dora", "results.experiment=sweep", "variant.rank=4",
        f"results.folder={tmp_path}",
    )  # fmt: skip
    assert again.returncode == 0
    assert "0 ran, 2 found, 0 failed, 0 diverged" in again.stdout


def test_a_diverged_run_leaves_a_record(tmp_path):
    ended = lorafactory(
        "run", *TINY, "train.lr=1e30", "train.optimizer=sgd", "train.clip=0", f"results.folder={tmp_path}"
    )  # fmt: skip
    assert ended.returncode == 1
    where = Path(ended.stdout.splitlines()[-1].removeprefix("record: "))
    made = record.read(where)
    assert made["status"] == "diverged" and "at step" in made["reason"]
    assert made["metrics"]["test"] == {}


def test_variants_show_and_targets(capsys):
    from lorafactory.cli import main

    def said(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        assert ended.value.code == 0
        return capsys.readouterr().out

    rows = json.loads(said("variants", "--json"))
    assert {r["name"] for r in rows} == set(registry.names())
    assert all(r["paper"] and r["summary"].endswith((".", ":")) for r in rows), "each has a paper and one line"
    assert all(n in said("variants") for n in registry.names())
    for name in registry.names():
        text = said("show", name, "--model", "tiny")
        assert "trainable parameters" in text and name in text
    assert "variant.init.niter=0" in said("show", "dora+pissa", "--model", "tiny")
    assert "bert.encoder.layer.*.attention.self.query    Linear [32, 32]  x 2" in said("targets", "tiny")


@pytest.mark.parametrize(
    ("line", "expected"),
    [("lorafactory ru", "run"), ("lorafactory ex", "export"), ("lorafactory run variant=dor", "variant=dora"),
     ("lorafactory run train.l", "train.lr="), ("lorafactory run variant/init=pi", "variant/init=pissa"),
     ("lorafactory show pis", "pissa")],
)  # fmt: skip
def test_tab_completes(line, expected):
    assert expected in lorafactory("completion", "query", COMP_LINE=line).stdout.split()


def test_cfg_job_shows_every_parts_typed_fields():
    shown = lorafactory("run", "--cfg", "job", "variant=dora+pissa+lora_plus").stdout
    assert all(f in shown for f in ("name: dora", "niter: 0", "ratio: 16.0", "target_modules:", "rank: 8"))


@pytest.mark.parametrize(
    ("overrides", "variant"),
    [(["variant=dora", "variant/init=pissa"], "dora+pissa"), (["variant=pissa+dora"], "dora+pissa"),
     (["experiment=demo", "variant=bitfit"], "bitfit"), (["variant=lora+dora", "variant.rank=2"], "dora")],
)  # fmt: skip
def test_the_last_choice_wins_however_it_is_spelled(overrides, variant):
    """B47"""
    from hydra import compose, initialize_config_dir

    from lorafactory import config, paths

    config.publish()
    with initialize_config_dir(version_base="1.3", config_dir=str(paths.configs())):
        made = compose("config", overrides=[o for o in overrides if not o.startswith("experiment")])
    assert registry.spell(config.load(made).variant) == variant
