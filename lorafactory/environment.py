"""Where a run was made: code, packages, machine. Without heavy imports, since every run pays for it."""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from .version import __version__

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "datasets", "hydra-core", "omegaconf", "accelerate", "evaluate", "safetensors",
            "numpy", "peft")  # fmt: skip
CODE = ("lorafactory", "configs", ":(exclude)configs/table")  # a table's spec changes no run
PLUGINS = ("lorafactory.variants", "lorafactory.tasks")  # entry points: the packages that bring further ones


def environment(device: Any = "cpu") -> dict[str, Any]:
    """For the record: commit, dirty, source, packages, device, cpu, threads, python, platform.

    commit: of lorafactory's own checkout, None for an installed copy. dirty: the code is not what that commit names.
    source: hash of the code itself, which tells one dirty tree from another. Code and packages are those of the
    first call, as a process keeps the code that it began with.
    """
    import torch

    place = torch.device(device)
    return {
        **_code(),
        "packages": dict(_packages()),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


@functools.cache
def _code() -> dict[str, Any]:
    return {**checkout(ROOT), "source": source(ROOT)}


def checkout(root: Path) -> dict[str, Any]:
    """{"commit", "dirty"} of the git checkout whose top is `root`; a repository further up is somebody else's.

    A checkout that git cannot name a commit for (none made yet, no git, not ours to read) counts as dirty.
    """
    if not (root / ".git").exists():
        return {"commit": None, "dirty": False}
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=all", "--", *CODE)
    return {"commit": commit, "dirty": commit is None or changes is None or bool(changes)}


def source(root: Path) -> str:
    """12 hex digits of the content of lorafactory's code and configs under `root`, tables' specs left out."""
    total = hashlib.sha256()
    for path in sorted(p for folder in ("lorafactory", "configs") for p in (root / folder).rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.suffix in (".py", ".yaml") and "configs/table/" not in name:
            total.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:12]


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@functools.cache
def _packages() -> dict[str, str]:
    plugins = {point.dist.name for group in PLUGINS for point in metadata.entry_points(group=group) if point.dist}
    found = {"lorafactory": __version__}
    for name in [*PACKAGES, *sorted(plugins - set(PACKAGES))]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # peft and plug-ins are optional; a checkout on the path has no version of its own
    return found


@functools.cache
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
