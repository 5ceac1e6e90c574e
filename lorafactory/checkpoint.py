"""Save and load an adapter: safetensors plus JSON, written whole or not at all, loaded strictly.

A folder holds adapter.safetensors, adapter.json (variant, config, base fingerprint, what was adapted), base.json (where the
base was on this machine) and, for a run that goes on, optimizer.safetensors and state.json."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import fingerprint, registry
from .attach import Adapted
from .errors import UserError
from .version import __version__

SCHEMA = 1


def save(adapted: Adapted, folder: Path, state: dict[str, Any] | None = None, optimizer: Any = None) -> Path:
    """Write the adapter (and, to go on later, the optimiser and a JSON state). Raises UserError where the folder is
    somebody else's or cannot be written."""
    if adapted.merged:
        raise UserError("save() while merged: unmerge() first, or bake() and save the model itself")
    refuse_foreign(folder, "adapter.json")
    about = {
        "schema": SCHEMA,
        "lorafactory": __version__,
        "variant": adapted.variant,
        "config": asdict(adapted.adapter.config),
        "base": adapted.base_fingerprint(),
        "heads": list(adapted.adapter.copies()),
        "adapted": adapted.adapter.describe(),
        **adapted.cost(),
    }
    tensors, about["aliases"] = _unshared(adapted.adapter.state_dict())
    texts, files = {"adapter.json": about, "base.json": _model(adapted)}, {"adapter.safetensors": tensors}
    if state is not None:
        flat, plain = _flatten(optimizer.state_dict())
        texts["state.json"], files["optimizer.safetensors"] = {**state, "optimizer": plain}, flat
    write_files(folder, files, texts)
    return folder


def refuse_foreign(folder: Path, own: str) -> None:
    """Raises UserError where replacing the folder would remove somebody else's files; own: a file of ours, or ""."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give a folder")
    if folder.exists() and any(folder.iterdir()) and not (own and (folder / own).exists()):
        raise UserError(f"{folder} holds other files: give an empty or a new folder")


def load(model: nn.Module, folder: str | Path, check_base: bool = True) -> Adapted:
    """Attach what save() wrote to its base model. The base's own numbers are compared with those it was trained on
    (check_base=False: not); no data-driven start runs again. A folder that PEFT saved is read, too, where its method
    is one of ours. Raises UserError and leaves the model as it was."""
    folder = Path(folder)
    if (folder / "adapter_config.json").exists() and not (folder / "adapter.json").exists():
        from .peft_load import load_peft

        return load_peft(model, folder)
    about = _about(folder)
    config = registry.from_dict(about["config"])
    config.trained_modules = about["heads"]
    if check_base and fingerprint.of_model(model, about["heads"]) != about["base"]:
        raise UserError(
            f"{folder} was trained on another base model (fingerprint {about['base']}): load that one, "
            "in the same dtype, or pass check_base=False"
        )
    adapted = Adapted(model, config, seed=0)  # what it draws is overwritten: torch's generator stays where it is
    try:
        restore(adapted, folder)
    except BaseException:
        adapted.detach()
        raise
    return adapted


def restore(adapted: Adapted, folder: Path) -> None:
    """The adapter's tensors from a folder; all or nothing."""
    aliases, tensors = _about(folder)["aliases"], read_tensors(folder / "adapter.safetensors")
    adapted.adapter.load({**tensors, **{alias: tensors[n] for alias, n in aliases.items() if n in tensors}})


def restore_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> dict[str, Any]:
    """The optimiser's state from a folder; returns the JSON state that was saved with it."""
    state = read_json(folder / "state.json")
    saved = _unflatten(read_tensors(folder / "optimizer.safetensors"), state.pop("optimizer"))
    try:
        optimizer.load_state_dict(saved)
    except ValueError as e:
        raise UserError(f"{folder} holds the state of another optimiser: {e}") from None
    return state


def _about(folder: Path) -> dict[str, Any]:
    about = read_json(folder / "adapter.json")
    if lack := [k for k in ("schema", "config", "base", "heads", "aliases") if k not in about]:
        raise UserError(f"{folder / 'adapter.json'} is damaged (it has no {lack[0]}): use an older checkpoint")
    if about["schema"] != SCHEMA:
        raise UserError(f"{folder} has schema {about['schema']}, and this lorafactory {__version__} reads {SCHEMA}")
    return about


def read_json(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise UserError(f"no checkpoint folder {path.parent}")
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}, not an object")
        return found
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no checkpoint of ours: it has no {path.name}") from None
    except (ValueError, OSError) as e:
        raise UserError(f"{path} is damaged ({e}): use an older checkpoint") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path.parent} is incomplete: it has no {path.name}") from None
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path} is damaged ({e}): use an older checkpoint") from None


def size(folder: Path) -> int:
    """Bytes of an adapter on disk."""
    return sum((folder / n).stat().st_size for n in ("adapter.json", "adapter.safetensors"))


def _model(adapted: Adapted) -> dict[str, Any]:
    """What loads a transformers base again: its class, where it came from, its dtype, the class names of a trained head."""
    config = getattr(adapted.model, "config", None)
    labels = getattr(config, "id2label", None) if len(adapted.adapter.trained) else None
    dtype = next((p.dtype for p in adapted.model.parameters() if p.is_floating_point()), None)
    return {
        "class": type(adapted.model).__name__,
        "source": getattr(config, "_name_or_path", None) or None,
        "dtype": str(dtype).removeprefix("torch."),
        "labels": [labels[i] for i in sorted(labels)] if labels else None,
    }


def _unshared(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tied tensors once, and which names are aliases of which."""
    first: dict[tuple, str] = {}
    aliases = {}
    for name, t in state.items():
        where = (t.data_ptr(), t.shape, t.stride())
        if t.numel() and where in first:
            aliases[name] = first[where]
        else:
            first[where if t.numel() else (name,)] = name
    return {n: t.detach().contiguous() for n, t in state.items() if n not in aliases}, aliases


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state_dict as tensors and JSON."""
    tensors, plain = {}, {}
    for i, entries in state["state"].items():
        for k, v in entries.items():
            if isinstance(v, Tensor):
                tensors[f"{i}.{k}"] = v.detach().contiguous()
            else:
                plain[f"{i}.{k}"] = v
    return tensors, {"plain": plain, "param_groups": state["param_groups"]}


def _unflatten(tensors: dict[str, Tensor], saved: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for name, v in (*tensors.items(), *saved["plain"].items()):
        i, _, k = name.partition(".")
        state.setdefault(int(i), {})[k] = v
    return {"state": state, "param_groups": saved["param_groups"]}


def write_files(folder: Path, files: dict[str, dict[str, Tensor]], texts: dict[str, dict[str, Any]]) -> None:
    """A folder of safetensors and JSON, written whole."""

    def write(where: Path) -> None:
        for name, tensors in files.items():
            save_file(tensors, where / name)
        for name, text in texts.items():
            (where / name).write_text(json.dumps(text, indent=1) + "\n")

    write_folder(folder, write)


def write_folder(folder: Path, write: Callable[[Path], Any]) -> None:
    """write(temporary folder), fsync, rename: a reader sees the old folder or the new one, never a half."""
    temporary = old = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        write(temporary)
        for file in temporary.rglob("*"):
            _fsync(file)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            os.rename(folder, old)
        os.rename(temporary, folder)
        _fsync(folder.parent)
    except (OSError, SafetensorError) as e:
        raise UserError(f"cannot write {folder}: {getattr(e, 'strerror', None) or e}") from None
    finally:
        if old is not None and not folder.exists():
            os.rename(old, folder)
        for left in (temporary, old):
            if left is not None:
                shutil.rmtree(left, ignore_errors=True)


def _fsync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
