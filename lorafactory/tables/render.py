"""A Table as text, Markdown, LaTeX and CSV. No time stamps: equal records give equal bytes."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING

from .cells import SICK, Cell
from .notes import BOLD, EDGE, UNTUNED, point_of, sick_of

if TYPE_CHECKING:
    from .build import Row, Table

NONE = "—"
UNITS = {"bytes": "MiB", "seconds": "s"}
TEX = {"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
       "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
       "±": r"$\pm$", "†": r"$^\dagger$", "‡": r"$^\ddagger$", "—": "---", "–": "--", "×": r"$\times$",
       "≤": r"$\leq$", "·": r"$\cdot$", "…": r"\dots{}"}  # fmt: skip


def grid(table: Table) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Header, and rows of (text, bold)."""
    spec = table.spec
    cells = [c for row in table.rows for c in row.cells.values()]
    tuned = max((c.tried for c in cells), default=0) > 1
    sick, mean = any(row.sick for row in table.rows), any(row.mean for row in table.rows)
    points = len(spec.tasks) == 1 and tuned
    header = ["variant", *(column.label for column in spec.tasks)]
    header += ["mean"] * mean + [cost_label(name) for name in spec.costs]
    header += ["selected"] * points + ["points tried"] * tuned + ["not averaged"] * sick
    lines = []
    for row in table.rows:
        line = [(row.label, False)]
        shown = [*row.cells.values(), *([row.mean] if row.mean else [])]
        line += [(score(c, table), c.bold) for c in shown]
        line += [(cost(name, row.costs[name].mean), False) for name in spec.costs]
        line += [(point_of(next(iter(row.cells.values()))) or NONE, False)] * points
        line += [(_span(row), False)] * tuned + [(sick_of(row), False)] * sick
        lines.append(line)
    for name, scores in table.beside.items():
        line = [(name, False), *((_number(scores.get(column.label), table), False) for column in spec.tasks)]
        lines.append(line + [("", False)] * (len(header) - len(line)))
    return header, lines


def score(cell: Cell, table: Table) -> str:
    if cell.mean is None:
        return NONE
    text = _number(cell.mean, table)
    if cell.spread is not None:
        text += f" ± {_number(cell.spread, table)}"
    if len(cell.values) != cell.expected:
        text += f" ({len(cell.values)}/{cell.expected})"
    return text + EDGE * bool(cell.edge) + UNTUNED * cell.untuned


def _number(value: float | None, table: Table) -> str:
    return NONE if value is None else f"{value * table.spec.scale:.{table.spec.digits}f}"


def _span(row: Row) -> str:
    tried = sorted({c.tried for c in row.cells.values()})
    return str(tried[0]) if len(tried) == 1 else f"{tried[0]}–{tried[-1]}"


def cost_label(name: str) -> str:
    """'peak_bytes' -> 'peak MiB'."""
    words = name.split("_")
    return " ".join([*words[:-1], UNITS.get(words[-1], words[-1])]) if len(words) > 1 else name


def cost(name: str, value: float | None) -> str:
    if value is None:
        return NONE
    if name.endswith("bytes"):
        value /= 2**20
    if name.endswith("parameters"):
        for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if value >= size:
                return f"{value / size:.4g}{unit}"
        return f"{value:.0f}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def text(table: Table) -> str:
    """For the terminal."""
    header, rows = grid(table)
    lines = [header, *([f"{t} {BOLD}" if bold else t for t, bold in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def aligned(line: list[str]) -> str:
        first, rest = line[0].ljust(widths[0]), zip(line[1:], widths[1:], strict=True)
        return "  ".join([first, *(t.rjust(width) for t, width in rest)]).rstrip()

    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    shown = [aligned(line) for line in lines]
    if table.beside:
        shown.insert(-len(table.beside), rule)
    caption = [table.spec.caption.strip(), ""] if table.spec.caption.strip() else []
    again = {row.label: command for row, _, command in reversed(list(table.commands()))}
    ordered = [f"  {command}" for row in table.rows if (command := again.get(row.label))]
    return "\n".join([*caption, shown[0], rule, *shown[1:], rule, *table.notes, "Run a row again, with other seeds and "
                      f"tasks alike (all in {table.spec.name}.csv):", *ordered, ""])  # fmt: skip


def markdown(table: Table) -> str:
    header, rows = grid(table)

    def line(cells: list[str]) -> str:
        return f"| {' | '.join(cells)} |"

    body = [line([f"**{_md(t)}**" if bold else _md(t) for t, bold in row]) for row in rows]
    top = [line([_md(t) for t in header]), line([":--", *["--:"] * (len(header) - 1)])]
    commands = [f"# {row.label}, {label}\n{command}" for row, label, command in table.commands()]
    return "\n\n".join([
        f"# {_md(table.spec.caption.strip() or table.spec.name)}",
        "\n".join(top + body),
        "\n".join(f"- {_md(note)}" for note in table.notes),
        "Run it again (one seed of the selected point each):",
        "```bash\n" + "\n".join(commands) + "\n```\n",
    ])  # fmt: skip


def latex(table: Table) -> str:
    """A table environment that needs booktabs alone; the notes stand below it as small print."""
    header, rows = grid(table)
    body = [" & ".join(rf"\textbf{{{_tex(t)}}}" if bold else _tex(t) for t, bold in row) + r" \\" for row in rows]
    if table.beside:
        body.insert(-len(table.beside), r"\midrule")
    return "\n".join([
        *(f"% {row.label}, {label}: {' '.join(command.split())}" for row, label, command in table.commands()),
        r"\begin{table}", r"\centering",
        rf"\caption{{{_tex(' '.join(table.spec.caption.split()) or table.spec.name)}}}",
        rf"\label{{tab:{table.spec.name}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule",
        " & ".join(map(_tex, header)) + r" \\", r"\midrule", *body, r"\bottomrule", r"\end{tabular}",
        r"\par\smallskip\footnotesize\raggedright",
        *(_tex(note) + r"\par" for note in table.notes),
        r"\end{table}", "",
    ])  # fmt: skip


def numbers(table: Table) -> str:
    """CSV in full precision, a line for each row and column."""
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n").writerow
    write(["row", "variant", "column", "kind", "n", "expected", "mean", "sd", "values", "selected", "points_tried",
           "edge", "untuned", "bold", *SICK, "command"])  # fmt: skip
    for row in table.rows:
        shown = [(label, "score", c) for label, c in row.cells.items()]
        shown += [("mean", "mean", row.mean)] if row.mean else []
        shown += [(name, "cost", c) for name, c in row.costs.items()]
        for label, kind, c in shown:
            write([row.label, row.variant, label, kind, len(c.values), c.expected, _full(c.mean), _full(c.spread),
                   json.dumps(c.values), json.dumps(c.point), c.tried, " ".join(c.edge), int(c.untuned), int(c.bold),
                   *(c.sick.get(state, 0) for state in SICK), c.command])  # fmt: skip
    for name, scores in table.beside.items():
        for label, share in scores.items():
            write([name, "", label, "reference", "", "", _full(share), *[""] * (7 + len(SICK) + 1)])
    return out.getvalue()


def _full(value: float | None) -> str:
    return "" if value is None else repr(value)


def _md(text: str) -> str:
    return " ".join(text.replace("|", r"\|").replace("<", "&lt;").replace("*", r"\*").split())


def _tex(text: str) -> str:
    return "".join(TEX.get(letter, letter) for letter in text)
