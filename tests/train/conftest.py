import shutil

import pytest


@pytest.fixture(scope="session")
def still_model(tmp_path_factory):
    """The tiny model without dropout, as a folder."""
    import json

    from lorafactory import tiny

    folder = tmp_path_factory.mktemp("still") / "model"
    shutil.copytree(tiny.folder(), folder)
    about = json.loads((folder / "config.json").read_text())
    about |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(about))
    return folder
