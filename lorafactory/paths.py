"""Where the data files of the package lie: inside it when installed from a wheel, beside it in a source checkout."""

from __future__ import annotations

from pathlib import Path


def configs() -> Path:
    """The folder of the shipped Hydra configs."""
    package = Path(__file__).resolve().parent
    shipped = package / "configs"
    return shipped if shipped.is_dir() else package.parent / "configs"
