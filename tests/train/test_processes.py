"""Two processes give what one gives, at the same global batch; nothing is counted twice."""

import json
import re
from pathlib import Path

import pytest
from runs import TINY, lorafactory

from lorafactory import record

# the base's dropout draws differ between processes, so sums agree only without it: the toy model has a still twin
RUN = ["run", *TINY, "train.steps=10", "train.batch_size=10", "train.lr=3e-3"]


def made(folder: Path) -> tuple[dict, dict]:
    (path,) = [p for p in folder.glob("*/adhoc/**/*.json") if "checkpoints" not in p.parts]
    return record.read(path), record.read_predictions(path)


@pytest.mark.parametrize("variant", ["dora+pissa", *(pytest.param(v, marks=pytest.mark.slow) for v in ("lora", "full", "vera"))])
def test_two_processes_equal_one(tmp_path, variant, still_model):
    options = [*RUN, f"variant={variant}", f"model.source={still_model}", "task.train_size=37", "task.test_size=47"]
    one = lorafactory(*options, f"results.folder={tmp_path / 'one'}")
    assert one.returncode == 0, one.stderr
    two = lorafactory(*options, f"results.folder={tmp_path / 'two'}", processes=2)
    assert two.returncode == 0, two.stderr
    assert len(re.findall(r"^record:", two.stdout, re.M)) == 1, "one process speaks"
    (a, raw_a), (b, raw_b) = made(tmp_path / "one"), made(tmp_path / "two")
    assert (a["environment"]["processes"], b["environment"]["processes"]) == (1, 2)
    assert [r["loss"] for r in a["curve"]] == pytest.approx([r["loss"] for r in b["curve"]], abs=1e-5)
    for split in ("selection", "test"):  # B40: each row once, in order
        assert len(raw_a[split]) == len(raw_b[split]) == a["data"]["sizes"][split]
        for x, y in zip(raw_a[split], raw_b[split], strict=True):
            assert x == pytest.approx(y, abs=1e-4)
    assert a["metrics"] == json.loads(json.dumps(b["metrics"]))
