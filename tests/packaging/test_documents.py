"""What README and CONTRIBUTING show works as it stands there."""

import re
import shlex

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from places import DOCUMENTS, ROOT, blocks, commands, text

import lorafactory
from lorafactory import cli, config, paths, registry, tiny

SHOWN = [c for d in DOCUMENTS for c in commands(d, "lorafactory")]


def known(line):
    """Not the example plug-in of the README, which test_plugin.py installs and runs."""
    chosen = re.search(r"variant=(\S+)", line)
    return not chosen or set(re.split("[+,]", chosen.group(1))) <= set(registry.names())


def first(override: str) -> str:
    """One value of a sweep's override."""
    (parsed,) = OverridesParser.create().parse_overrides([override])
    if not parsed.is_sweep_override():
        return override
    return f"{parsed.get_key_element()}={next(parsed.sweep_string_iterator())}"


@pytest.mark.parametrize("line", [c for c in SHOWN if c.startswith("run ") and known(c)])
def test_a_run_that_is_shown_composes(line):
    line = re.sub(r"<[^>]*>", "anything", line)
    words = [w for w in shlex.split(line)[1:] if w not in ("-m", "--cfg", "job")]
    config.publish()
    with initialize_config_dir(version_base="1.3", config_dir=str(paths.configs())):
        assert config.load(compose("config", overrides=[first(w) for w in words])).variant.name


def test_every_command_that_is_shown_exists():
    shown = {re.split(r"[ |]", c)[0] for c in SHOWN}
    assert {"run", "variants", "show", "targets", "table"} <= shown <= set(cli.commands())


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_into_the_repository_leads_somewhere(name):
    links = re.findall(r"\]\(([^)#]+)\)", text(name))
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_the_python_example(tmp_path, monkeypatch):
    """On the tiny model; then its last comment: load it back."""
    code = blocks("README.md", "python")[0].replace('"…"', repr(str(tiny.folder())))
    ids = torch.randint(5, 20, (4, 6))
    found = {"batches": [{"input_ids": ids, "labels": torch.tensor([0, 1, 0, 1])}] * 6}
    monkeypatch.chdir(tmp_path)
    exec(code, found)
    adapted = found["adapted"].eval()
    with torch.no_grad():
        y = adapted(input_ids=ids).logits
        assert torch.equal(lorafactory.load(adapted.detach(), "my-adapter").eval()(input_ids=ids).logits, y)
