"""The measurements as a Markdown page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MIB = 2**20
ALIKE = 0.03  # two measurements of one side's peak differ by as much


def page(found: dict[str, Any]) -> str:
    rows = found["rows"]
    good, bad = [r for r in rows if "error" not in r], [r for r in rows if "error" in r]
    parts = ["# Step time and peak memory", *_how(found), "## Time", *_time(good), "## Memory", *_memory(good)]
    parts += ["## Where ours takes more", *_more(good)]
    if bad:
        parts += ["## Failed", *(f"- `{r['variant']}`: {r['error']}" for r in bad)]
    return "\n".join(_spaced(parts)) + "\n"


def _spaced(parts: list[str]) -> Iterable[str]:
    """An empty line around headings and paragraphs, none between the lines of a list or a table."""
    last = ""
    for part in parts:
        if last and not (part[:1] == last[:1] and part[:1] in "|-"):
            yield ""
        yield part
        last = part


def _how(found: dict[str, Any]) -> list[str]:
    s, e = found["settings"], found["environment"]
    rows, tokens = s["batch"]
    packages = ", ".join(f"{k} {e['packages'][k]}" for k in ("torch", "transformers", "peft") if k in e["packages"])
    code = f"{e['commit'] or 'none'}{' and uncommitted changes' if e['dirty'] else ''}, code {e['source']}"
    optimizer = ", ".join(f"{k}={v}" for k, v in s["optimizer"].items())
    return [
        f"Written by `{found['command']}`.",
        f"A step is forward, backward and optimiser step of a text classifier on {rows} x {tokens} tokens, float32, "
        f"torch's AdamW ({optimizer}), in the same plain loop on every side. Rank {s['rank']} where a variant has a rank; "
        "other options stand at our defaults, and the counterpart is given them and the very layers that ours adapts. "
        "The bare model trains its head alone: its backward pass ends there, while its dropout is on as in any plain loop "
        "(`head_only` turns it off). Norms: it trains its norms and head, so that gradients pass through every layer, which "
        "no adapter can do without. Dense: ours with each layer's whole weight formed in every pass, where it has one.",
        f"Time: bare, norms, ours, dense and the counterpart take turns in one process, {s['rounds']} rounds after "
        f"{s['warmup']} that do not count, each round in another order. A ratio is the median of the rounds' ratios, with "
        "their 10th and 90th percentile; below 1, ours is faster. Start: attaching, data-driven starts included, once. What "
        "a method does in few steps only (restarts, projectors) a median does not show.",
        f"Memory: what a process of its own grows by beyond the loaded model (VmHWM) over the start and {s['steps']} steps. "
        f"Once a side: a repeat differs by up to {ALIKE:.0%}.",
        f"- processor: {e['cpu']}, {e['threads']} threads; load average before the run {s['load_before']:.2f}",
        f"- matrix instructions: {' '.join(e['matrix_instructions']) or 'none of AVX2, AVX-512, AMX'}",
        f"- versions: {packages}, Python {e['python']}",
        f"- model: {s['model']}; commit {code}",
    ]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _time(rows: list[dict[str, Any]]) -> list[str]:
    head = ["variant", "layers", "trained", "ms a step", "/ bare", "/ norms", "/ dense", "counterpart", "its trained",
            "/ counterpart", "start, s", "its start, s"]  # fmt: skip
    return _table(head, [[
        f"`{r['variant']}`", str(r["layers"]), f"{r['trainable']['ours']:,}", f"{1e3 * r['step_seconds']['ours']:.0f}",
        *(_ratio(r["time"].get(side)) for side in ("bare", "norms", "dense")), r.get("counterpart", "none"),
        _number(r["trainable"].get("theirs")), _ratio(r["time"].get("theirs")), _seconds(r["start_seconds"].get("ours")),
        _seconds(r["start_seconds"].get("theirs")),
    ] for r in rows])  # fmt: skip


def _memory(rows: list[dict[str, Any]]) -> list[str]:
    head = ["variant", "peak, MiB", "bare's", "/ bare", "counterpart's", "/ counterpart"]
    return _table(head, [[
        f"`{r['variant']}`", _mib(r["peak_bytes"]["ours"]), _mib(r["peak_bytes"]["bare"]), f"{r['memory']['bare']:.2f}",
        _mib(r["peak_bytes"].get("theirs")), f"{r['memory']['theirs']:.2f}" if "theirs" in r["memory"] else "",
    ] for r in rows])  # fmt: skip


def _more(rows: list[dict[str, Any]]) -> list[str]:
    """Every variant whose median time is above its counterpart's, and whether the rounds agree; or whose memory is,
    beyond what a repeat may differ by."""
    found = []
    for r in rows:
        time, memory = r["time"].get("theirs"), r["memory"].get("theirs", 0.0)
        said = []
        if time and time["median"] > 1:
            agreed = "" if time["low"] > 1 else ", within the spread of the rounds"
            said.append(f"{_ratio(time)} times the time{agreed}")
        if memory > 1 + ALIKE:
            said.append(f"{memory:.2f} times the memory")
        if said:
            note = f" ({r['note']})" if r.get("note") else ""
            found.append(f"- `{r['variant']}`: {' and '.join(said)} of {r['counterpart']}{note}")
    return found or ["Nowhere."]


def _ratio(r: dict[str, float] | None) -> str:
    return f"{r['median']:.2f} ({r['low']:.2f}-{r['high']:.2f})" if r else ""


def _number(n: int | None) -> str:
    return "" if n is None else f"{n:,}"


def _seconds(s: float | None) -> str:
    return "" if s is None else f"{s:.2f}"


def _mib(n: int | None) -> str:
    return "" if n is None else f"{n / MIB:.0f}"
