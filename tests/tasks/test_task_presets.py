"""Every preset composes into the typed config of its kind, and the offline ones load."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from samples import refused

from lorafactory import config as configs
from lorafactory import models
from lorafactory.tasks import get_task

ROOT = Path(__file__).parents[2]
NAMES = {group: sorted(f.stem for f in (ROOT / "configs" / group).glob("*.yaml")) for group in ("task", "model")}


@pytest.fixture(scope="module")
def composed():
    GlobalHydra.instance().clear()
    configs.publish()
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        yield lambda *overrides: configs.load(compose("config", list(overrides)))
    GlobalHydra.instance().clear()


@pytest.mark.parametrize("name", NAMES["task"])
def test_task_presets(composed, name):
    stages = name == "sequence"  # of other tasks, which have the rows
    size = "task.stages=[{task: toy, test_size: 20}, {task: toy}]" if stages else "task.test_size=20"
    task = composed(f"task={name}", size, "model=tiny").task
    cls = get_task(task.kind)
    assert type(task) is cls.Config and task.name == name
    assert task.test_size == 20 or (stages and cls(task).stages()[0].config.test_size == 20)
    assert cls(task).primary in getattr(task, "metrics", ("exact_match", "pass@1", "average"))


@pytest.mark.parametrize("name", NAMES["model"])
def test_model_presets(composed, name):
    model = composed(f"model={name}", "model.source=some/where").model
    assert isinstance(model, models.ModelConfig) and model.name == name and model.source == "some/where"


def test_wrong_overrides_are_refused(composed):
    refused(lambda: composed("task=toy", "task.test_size=-1"), "task.test_size=-1")
