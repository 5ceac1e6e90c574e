"""What a table claims, on numbers worked out by hand."""

import csv
import io
import math

import pytest
from fabricate import collapsed, diverged, fabricate, spec

from lorafactory.errors import UserError
from lorafactory.tables import build, fair, load, main, render, write
from lorafactory.tables.spec import available, parse

TASKS = ["cola", "mrpc"]


def row(table, label):
    return next(row for row in table.rows if row.label == label)


def one(table, label="lora", task="bbc"):
    return row(table, label).cells[task]


def shown(table, label):
    header, lines = render.grid(table)
    return dict(zip(header, (text for text, _ in next(x for x in lines if x[0][0] == label)), strict=True))


def note(table, word):
    return next((line for line in table.notes if word in line), None)


def at(lr):
    return {"train": {"lr": lr}}


# ---- cells


def test_mean_and_sample_spread(results):
    results.row("lora", [0.80, 0.82, 0.87])
    table = build(spec(costs=["adapter_parameters", "train_seconds", "peak_bytes"]), results.folder)
    cell = one(table)
    assert cell.values == {0: 0.80, 1: 0.82, 2: 0.87}
    assert cell.mean == pytest.approx(0.83)
    assert cell.spread == pytest.approx(math.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2))
    assert shown(table, "lora") == {"variant": "lora", "bbc": "83.0 ± 3.6", "adapter parameters": "1k", "train s": "10",
                                    "peak MiB": "256"}  # fmt: skip
    assert shown(table, "(majority class)")["bbc"] == "25.0"


def test_the_point_is_chosen_on_selection_and_scored_on_test(results):
    results.row("lora", [0.70, 0.70, 0.70], selection=0.90, config=at(1e-3))  # best on selection, not on test
    results.row("lora", [0.80, 0.80, 0.80], selection=0.80, config=at(3e-3))
    results.row("lora", [0.60, 0.60, 0.60], selection=0.85, config=at(1e-4))
    cell = one(build(spec(select={"over": ["train.lr"]}), results.folder))
    assert (cell.mean, cell.point, cell.tried, cell.edge) == (pytest.approx(0.70), {"train.lr": 1e-3}, 3, ())
    low = one(build(spec(select={"over": ["train.lr"], "mode": "min"}), results.folder))
    assert (low.point, low.edge) == ({"train.lr": 3e-3}, ("train.lr",))


def test_selection_is_by_the_mean_over_seeds(results):
    for seed, (first, second) in enumerate([(0.9, 0.7), (0.5, 0.8), (0.6, 0.7)]):  # means 0.667 and 0.733
        results.add("lora", seed=seed, score=0.1, selection=first, config=at(1e-3))
        results.add("lora", seed=seed, score=0.2, selection=second, config=at(2e-3))
    assert one(build(spec(select={"over": ["train.lr"]}), results.folder)).point == {"train.lr": 2e-3}
    only = spec(select={"over": ["train.lr"], "seeds": [0]})
    assert one(build(only, results.folder)).point == {"train.lr": 1e-3}


def test_selection_on_one_seed_and_scores_on_three(results):
    for lr, selection in ((1e-4, 0.7), (1e-3, 0.9), (1e-2, 0.8)):
        results.add("lora", seed=0, score=0.5, selection=selection, config=at(lr))
    for seed in (1, 2):
        results.add("lora", seed=seed, score=0.6, config=at(1e-3))
    cell = one(build(spec(select={"over": ["train.lr"], "seeds": [0]}), results.folder))
    assert (cell.point, cell.values, cell.tried) == ({"train.lr": 1e-3}, {0: 0.5, 1: 0.6, 2: 0.6}, 3)


def test_missing_names_the_seeds_that_selected_points_lack(results, capsys, tmp_path):
    for lr, selection in ((1e-4, 0.7), (1e-3, 0.9), (1e-2, 0.8)):
        results.add("lora", seed=0, selection=selection, config=at(lr))
    results.add("lora", seed=1, config=at(1e-3), **diverged())
    wanted = spec(select={"over": ["train.lr"], "seeds": [0]}, seeds=[0, 1, 2])
    table = build(wanted, results.folder)
    assert list(table.missing()) == ["lorafactory run -m variant=lora task=bbc train.lr=0.001 seed=2"], (
        "seed 1 was run there and diverged; running it again changes nothing"
    )
    results.add("lora", seed=2, config=at(1e-3))
    assert list(build(wanted, results.folder).missing()) == []


def test_a_point_with_lost_seeds_does_not_win_by_the_rest(results):
    results.row("lora", [0.80, 0.80, 0.80], config=at(1e-3))
    results.add("lora", seed=0, score=0.95, config=at(1e-2))
    for seed in (1, 2):
        results.add("lora", seed=seed, config=at(1e-2), **diverged())
    table = build(spec(select={"over": ["train.lr"]}), results.folder)
    assert one(table).point == {"train.lr": 1e-3}
    assert shown(table, "lora")["not averaged"] == "2 diverged"


@pytest.mark.parametrize("by", ["primary", "accuracy"])
def test_selection_metric(results, by):
    results.row("lora", [0.8, 0.8, 0.8])
    assert one(build(spec(select={"by": by}), results.folder)).mean == pytest.approx(0.8)


def test_an_unknown_metric_is_named(results):
    results.row("lora", [0.8])
    with pytest.raises(UserError, match="bbc has no metric 'accurcy' on selection; nearest: accuracy"):
        build(spec(select={"by": "accurcy"}), results.folder)
    with pytest.raises(UserError, match="no metric 'f1' on test"):
        build(spec(tasks=[{"task": "bbc", "metric": "f1"}]), results.folder)
    with pytest.raises(UserError, match="no cost 'adapter_parameter'; nearest: adapter_parameters"):
        build(spec(costs=["adapter_parameter"]), results.folder)


# ---- marks


def test_fewer_seeds_than_expected(results):
    results.row("lora", [0.80, 0.82])
    results.row("dora", [0.80])
    table = build(spec(), results.folder)
    assert shown(table, "lora")["bbc"] == "81.0 ± 1.4 (2/3)"
    assert shown(table, "dora")["bbc"] == "80.0 (1/3)"
    assert note(table, "(n/m)")
    assert "(n/m)" not in render.text(build(spec(seeds=[0, 1], rows=["lora"]), results.folder))


def test_listed_seeds_alone_are_read(results):
    results.row("lora", [0.5, 0.6, 0.7, 0.8])
    assert one(build(spec(seeds=[1, 3]), results.folder)).values == {1: 0.6, 3: 0.8}
    assert one(build(spec(seeds=0), results.folder)).expected == 4


@pytest.mark.parametrize("best, edge", [(1e-4, True), (1e-3, False), (1e-2, True)])
def test_the_edge_of_the_grid(results, best, edge):
    for lr in (1e-4, 1e-3, 1e-2):
        results.row("lora", [0.9 if lr == best else 0.8] * 3, config=at(lr))
    table = build(spec(select={"over": ["train.lr"]}), results.folder)
    assert ("†" in shown(table, "lora")["bbc"]) == edge == bool(note(table, "† the selected point"))
    assert shown(table, "lora")["selected"] == f"lr={best}" and shown(table, "lora")["points tried"] == "3"


def test_a_diverged_point_counts_as_tried(results):
    for lr in (1e-4, 1e-3):
        results.row("lora", [0.8 + lr] * 3, config=at(lr))
    results.row("lora", [0.0] * 3, config=at(1e-2), **diverged())
    cell = one(build(spec(select={"over": ["train.lr"]}), results.folder))
    assert (cell.point, cell.tried, cell.edge) == ({"train.lr": 1e-3}, 3, ())


def test_edges_of_two_settings(results):
    for lr in (1e-4, 1e-3, 1e-2):
        for steps in (20, 40):
            best = lr == 1e-3 and steps == 40
            results.row("lora", [0.9 if best else 0.8] * 3, config={"train": {"lr": lr, "steps": steps}})
    cell = one(build(spec(select={"over": ["train.lr", "train.steps"]}), results.folder))
    assert (cell.edge, cell.tried) == (("train.steps",), 6)


def test_unequal_tuning_is_stated_and_not_ranked(results):
    for lr in (1e-4, 1e-3, 1e-2):
        results.row("lora", [0.9 if lr == 1e-3 else 0.5, 0.91, 0.92], config=at(lr))
    results.row("dora", [0.1, 0.2, 0.15])
    table = build(spec(select={"over": ["train.lr"]}), results.folder)
    assert [shown(table, r)["points tried"] for r in ("dora", "lora")] == ["1", "3"]
    assert shown(table, "dora")["bbc"].endswith("‡") and note(table, "‡ untuned")
    assert note(table, "bbc: no row is ranked: tuning budgets differ")
    assert not any(c.bold for r in table.rows for c in r.cells.values())


def test_equal_budgets_of_one_are_not_called_untuned(results):
    results.row("lora", [0.8] * 3, config=at(1e-3))
    results.row("full", [0.9] * 3, config=at(1e-4))
    table = build(spec(select={"over": ["train.lr"]}), results.folder)
    assert "‡" not in render.text(table) and "points tried" not in render.text(table)
    assert note(table, "Tuning budget: one point per row")


# ---- sick runs


@pytest.mark.parametrize("kind, change", [
    ("diverged", diverged()),
    ("collapsed", collapsed()),
    ("collapsed", {"metrics": {"selection": {"constant_prediction": True}}}),
    ("undefined", {"metrics": {"test": {"accuracy": None, "accuracy_undefined": "why"}}}),
    ("undefined", {"metrics": {"selection": {"accuracy": math.nan}}}),
])  # fmt: skip
def test_a_sick_run_is_counted_and_never_averaged(results, kind, change):
    results.row("lora", [0.80, 0.82])
    results.add("lora", seed=2, score=0.99, **change)
    table = build(spec(), results.folder)
    assert one(table).values == {0: 0.80, 1: 0.82} and one(table).sick == {kind: 1}
    assert shown(table, "lora") == {"variant": "lora", "bbc": "81.0 ± 1.4 (2/3)", "not averaged": f"1 {kind}"}
    assert note(table, f"lora: 1 {kind}")


def test_a_row_of_sick_runs_has_no_score_and_is_never_best(results):
    for seed in range(3):
        results.add("lora", seed=seed, **collapsed())
    results.row("dora", [0.3, 0.3, 0.3])
    table = build(spec(), results.folder)
    assert one(table).mean is None and shown(table, "lora")["bbc"] == "—"
    assert shown(table, "lora")["not averaged"] == "3 collapsed"
    assert row(table, "lora").cells["bbc"].command  # it can be run again all the same


# ---- rows and means


def test_a_row_that_lacks_a_task_has_no_mean(results):
    """B71: complete, a task missing, a seed failed."""
    for variant, cola, mrpc in (("lora", [0.2, 0.3, 0.4], [0.7, 0.8, 0.9]), ("dora", [], [0.9, 0.9, 0.9]),
                                ("pissa", [0.2, 0.4], [0.6, 0.8, 0.7])):  # fmt: skip
        results.row(variant, cola, "cola")
        results.row(variant, mrpc, "mrpc")
    results.add("pissa", "cola", 2, **diverged())
    table = build(spec(tasks=TASKS, costs=["train_seconds"]), results.folder)
    assert row(table, "lora").mean.values == pytest.approx({0: 0.45, 1: 0.55, 2: 0.65})
    assert shown(table, "lora")["mean"] == "55.0 ± 10.0"
    assert shown(table, "dora")["mean"] == shown(table, "dora")["train s"] == shown(table, "dora")["cola"] == "—"
    assert row(table, "pissa").mean.values == pytest.approx({0: 0.4, 1: 0.6})
    assert shown(table, "pissa")["mean"] == "50.0 ± 14.1 (2/3)"
    assert shown(table, "pissa")["not averaged"] == "1 diverged"
    assert note(table, "A row that lacks a task has no mean")


def test_rows_that_were_asked_for_and_never_run(results):
    results.row("lora", [0.8, 0.8, 0.8])
    results.row("pissa", [0.8, 0.8, 0.8])
    table = build(spec(rows=["lora", "vera"]), results.folder)
    assert [r.label for r in table.rows] == ["lora", "vera"]
    assert shown(table, "vera")["bbc"] == "—" and note(table, "No records at all: vera.")


def test_split_rows_stand_in_numeric_order(results):
    for rank in (16, 4, 8):
        results.row("lora", [0.8 + rank / 1000] * 3, config={"variant": {"rank": rank}})
    table = build(spec(split=["variant.rank"]), results.folder)
    assert [r.label for r in table.rows] == ["lora rank=4", "lora rank=8", "lora rank=16"]
    only = build(spec(where={"variant.rank": 8}), results.folder)
    assert [(r.label, r.cells["bbc"].mean) for r in only.rows] == [("lora", pytest.approx(0.808))]


# ---- bold


def test_bold_where_a_paired_test_supports_it(results):
    results.row("lora", [0.800, 0.850, 0.900])
    results.row("dora", [0.9001, 0.9502, 1.0])  # ahead by 0.1001, 0.1002, 0.1000
    table = build(spec(), results.folder)
    assert one(table, "dora").bold and not one(table).bold
    assert "**95.0 ± 5.0**" in render.markdown(table) and r"\textbf{95.0 $\pm$ 5.0}" in render.latex(table)
    assert "95.0 ± 5.0 *" in render.text(table)
    assert not one(build(spec(bold=False), results.folder), "dora").bold
    results.row("pissa", [0.9, 0.9, 0.9])  # ahead by 0.05 on the mean, but not on every seed
    table = build(spec(), results.folder)
    assert not one(table, "dora").bold and note(table, "dora is not told apart from pissa")


def test_the_paired_test_by_hand():
    """t = 2 / (1 / sqrt 3) = 3.4641 on 2 degrees of freedom, whose two-sided p is 1 - t / sqrt(t^2 + 2)."""
    t = 2 * math.sqrt(3)
    assert fair.paired({0: 1, 1: 2, 2: 3}, {0: 0, 1: 0, 2: 0}) == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert fair.paired({0: 1, 1: 2, 5: 9}, {0: 0, 1: 0, 2: 0}) == 1  # two shared seeds
    assert fair.paired({0: 1, 1: 2, 2: 3}, {0: 0, 1: 1, 2: 2}) == 1  # equal differences are chance on a small test set
    assert fair.paired({0: 1, 1: 1, 2: 1}, {0: 1, 1: 1, 2: 1}) == 1


def test_holm_by_hand():
    assert fair.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert fair.holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize("scores, why", [([0.8, 0.9], "2 shared seeds"), ([0.8, 0.9, 0.95], "nothing to compare")])
def test_no_ranking_without_enough(results, scores, why):
    results.row("lora", scores)
    if len(scores) == 2:
        results.row("dora", [0.1, 0.1])
    assert note(build(spec(), results.folder), why)


# ---- nothing mixed


def environment(**changes):
    return {"environment": changes}


MIXED = [
    ("device", environment(device="NVIDIA H100"), {}),
    ("packages", environment(packages={"torch": "2.14.0"}), {}),
    ("packages", environment(packages={"transformers": "6.0"}), {}),
    ("cpu", environment(cpu="EPYC"), {"costs": ["train_seconds"]}),
    ("threads", environment(threads=8), {"costs": ["peak_bytes"]}),
    ("base", {"base": {"fingerprint": "b1"}}, {}),
    ("base", {"base": {"dtype": "bfloat16"}}, {}),
    ("base", {"base": {"processor": "ViTImageProcessorFast 224"}}, {}),
    ("kernels", {"kernels": {"chosen": "triton", "used": {}}}, {}),
    ("data", {"data": {"fingerprint": "other"}}, {}),
    ("data", {"data": {"sizes": {"test": 249}}}, {}),
    ("train.steps", {"config": {"train": {"steps": 80}}}, {}),
    ("train.clip", {"config": {"train": {"clip": 0.5}}}, {}),
    ("model.name", {"config": {"model": {"name": "bert"}}}, {}),
    ("task.template", {"config": {"task": {"template": "b7"}}}, {}),
    ("train.lr", {"config": {"train": {"lr": 2e-3}}}, {}),
]


@pytest.mark.parametrize("facet, change, extra", MIXED, ids=lambda value: str(value)[:30])
def test_a_mixture_is_refused_unless_allowed(results, facet, change, extra):
    results.row("lora", [0.8, 0.8, 0.8])
    results.row("dora", [0.9, 0.9, 0.9], **change)
    with pytest.raises(UserError) as error:
        build(spec(**extra), results.folder)
    assert f"allow_mixed: [{facet}]" in str(error.value) and "runs/demo/dora" in str(error.value)
    allowed = build(spec(allow_mixed=[facet], **extra), results.folder)
    assert note(allowed, "(the spec allows it)") and one(allowed, "dora").mean == pytest.approx(0.9)


def test_the_processor_matters_for_timed_costs_only(results):
    results.row("lora", [0.8, 0.8, 0.8])
    results.row("dora", [0.9, 0.9, 0.9], **environment(cpu="EPYC", threads=8))
    build(spec(costs=["adapter_parameters"]), results.folder)


def test_a_group_of_settings_may_be_allowed(results):
    results.row("lora", [0.8, 0.8, 0.8])
    results.row("dora", [0.9, 0.9, 0.9], config={"train": {"lr": 2e-3, "steps": 80}})
    assert len([n for n in build(spec(allow_mixed=["train"]), results.folder).notes if "allows it" in n]) == 2


def test_one_row_is_one_setting_of_its_variant(results):
    results.row("lora", [0.8, 0.8, 0.8], config={"variant": {"rank": 4}})
    results.row("lora", [0.9, 0.9, 0.9], config={"variant": {"rank": 8}})
    with pytest.raises(UserError, match=r"row lora mixes settings: variant.rank: 4, 8 .* divide by `split`"):
        build(spec(), results.folder)
    with pytest.raises(UserError, match="two runs of one cell and seed"):
        build(spec(allow_mixed=["variant.rank"]), results.folder)


def test_a_method_that_never_acted_is_refused(results):
    """B69: the record proves that the method did something."""
    results.row("lora", [0.8, 0.8, 0.8])
    results.row("relora", [0.8, 0.8, 0.8], optimizer={"method": {"restarts": 0}})
    with pytest.raises(UserError, match=r"relora never acted \(restarts 0\)"):
        build(spec(), results.folder)
    build(spec(allow_mixed=["method"]), results.folder)
    results.row("relora", [0.8, 0.8, 0.8], optimizer={"method": {"restarts": 3}})
    build(spec(), results.folder)


# ---- which records


def test_duplicates(results):
    results.row("lora", [0.8, 0.8, 0.8])
    results.row("lora", [0.8, 0.8, 0.8], experiment="again")  # the same runs under another name: equal ids
    both = spec(experiments=["demo", "again"])
    assert len(one(build(both, results.folder)).values) == 3
    results.add("lora", seed=1, score=0.81, experiment="again")
    with pytest.raises(UserError, match="runs/again/lora/.* and runs/demo/lora/.* have one id and different metrics"):
        build(both, results.folder)


def test_a_committed_run_goes_before_scratch_and_a_finished_one_before_a_failed_one(results):
    results.row("lora", [0.8, 0.8, 0.8])
    results.add("lora", seed=0, score=0.1, environment={"dirty": True})
    results.add("lora", seed=1, status="failed", reason="killed")
    results.add("lora", seed=3, experiment="again", status="failed", reason="killed")
    results.add("lora", seed=3, score=0.5, environment={"dirty": True})
    both = spec(experiments=["demo", "again"], seeds=4)
    assert one(build(both, results.folder, scratch=True)).values == {0: 0.8, 1: 0.8, 2: 0.8, 3: 0.5}


def test_scratch_is_read_on_demand_only_and_shows(results):
    results.row("lora", [0.8, 0.9])
    results.add("lora", seed=2, score=0.7, environment={"dirty": True})
    results.add("dora", seed=0, status="failed", reason="out of memory")
    clean = build(spec(), results.folder)
    assert len(one(clean).values) == 2 and [r.label for r in clean.rows] == ["lora"]
    assert not note(clean, "NOT FOR PUBLICATION")
    table = build(spec(), results.folder, scratch=True)
    assert len(one(table).values) == 3 and shown(table, "dora")["not averaged"] == "1 failed"
    assert "NOT FOR PUBLICATION: 2 of 4 runs" in render.text(table)
    for rendered in (render.markdown(table), render.latex(table)):
        assert "NOT FOR PUBLICATION" in rendered


def test_a_dirty_record_among_the_committed_ones_is_left_out_by_name(results):
    results.row("lora", [0.8, 0.8])
    path = results.put(fabricate("lora", seed=2, environment={"dirty": True}), scratch=False)
    table = build(spec(), results.folder)
    assert len(one(table).values) == 2 and path.name in table.left_out[0] and note(table, path.name)


def test_a_cut_record_is_left_out_by_name(results):
    results.row("lora", [0.8, 0.8])
    path = results.add("lora", seed=2)
    path.write_text(path.read_text()[:300])
    table = build(spec(), results.folder)
    assert shown(table, "lora")["bbc"] == "80.0 ± 0.0 (2/3)" and path.name in render.text(table)


def test_no_records(results):
    with pytest.raises(UserError, match="no records under .*demo; there are none at all"):
        build(spec(), results.folder)
    results.row("lora", [0.8])
    with pytest.raises(UserError, match="no records under .*demos; nearest: demo"):
        build(spec(experiments=["demos"]), results.folder)
    results.add("lora", experiment="mine", environment={"dirty": True})
    with pytest.raises(UserError, match="no records under .*mine; there are some .*: --with-scratch"):
        build(spec(experiments=["mine"]), results.folder)
    with pytest.raises(UserError, match="none of 1 records"):
        build(spec(rows=["vera"]), results.folder)
    with pytest.raises(UserError, match="no record has a setting 'train.lrr'; nearest: train.lr"):
        build(spec(select={"over": ["train.lrr"]}), results.folder)
    with pytest.raises(UserError, match="no record has a setting 'train.lrr'"):
        build(spec(where={"train.lrr": 1}), results.folder)
    with pytest.raises(UserError, match="allow_mixed cannot name 'divice'; nearest: device"):
        build(spec(allow_mixed=["divice"]), results.folder)


# ---- what is written


def test_the_csv_is_exact(results):
    results.row("lora", [0.1, 0.2, 0.4], config=at(1e-3))
    results.row("lora", [0.1, 0.1, 0.1], config=at(2e-3))
    table = build(spec(select={"over": ["train.lr"]}), results.folder)
    lines = list(csv.DictReader(io.StringIO(render.numbers(table))))
    assert float(lines[0]["mean"]) == one(table).mean
    wanted = {"row": "lora", "column": "bbc", "n": "3", "expected": "3", "selected": '{"train.lr": 0.001}',
              "points_tried": "2", "edge": "train.lr", "values": '{"0": 0.1, "1": 0.2, "2": 0.4}', "diverged": "0",
              "command": "lorafactory run variant=lora task=bbc train.lr=0.001 seed=0"}  # fmt: skip
    assert {key: lines[0][key] for key in wanted} == wanted


def test_latex_is_escaped(results):
    results.row("lora_plus", [0.8, 0.8, 0.8])
    caption = r"50% of $x_1 & #2 {a} ~b ^c \d"
    table = build(spec(caption=caption, tasks=[{"task": "bbc", "label": "BBC_&"}]), results.folder)
    text = render.latex(table)
    assert (r"\caption{50\% of \$x\_1 \& \#2 \{a\} \textasciitilde{}b \textasciicircum{}c \textbackslash{}d}") in text
    assert r"variant & BBC\_\& \\" in text and r"lora\_plus & 80.0 $\pm$ 0.0 \\" in text
    body = [line for line in text.splitlines() if not line.startswith("%")]
    assert "\n".join(body).isascii()
    assert "% lora_plus, BBC_&: lorafactory run variant=lora_plus" in text


def test_markdown_is_escaped(results):
    results.row("lora", [0.8, 0.8, 0.8])
    text = render.markdown(build(spec(tasks=[{"task": "bbc", "label": "a|b<c"}]), results.folder))
    assert r"| variant | a\|b&lt;c |" in text


def test_every_row_says_how_to_run_it_again(results):
    for variant in ("lora", "dora"):
        for task in TASKS:
            results.row(variant, [0.7, 0.8, 0.9], task)
    table = build(spec(tasks=TASKS), results.folder)
    for variant in ("lora", "dora"):
        assert f"lorafactory run variant={variant} task=cola" in render.text(table)
        for rendered in (render.markdown(table), render.numbers(table), render.latex(table)):
            assert all(f"lorafactory run variant={variant} task={task} " in rendered for task in TASKS)


def test_equal_records_give_equal_bytes(results, tmp_path):
    for i, variant in enumerate(("lora", "dora", "head_only", "vera")):
        results.row(variant, [0.7, 0.8, 0.75 + i / 100], cost={"adapter_parameters": i * 1000})
    given = spec(plot="adapter_parameters", caption="A table")
    first = write(build(given, results.folder), tmp_path / "a")
    second = write(build(given, results.folder), tmp_path / "b")
    assert [p.name for p in first] == ["mine.md", "mine.tex", "mine.csv", "mine.png", "mine.pdf"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_a_folder_that_cannot_be_written(results, tmp_path):
    results.row("lora", [0.8, 0.8, 0.8])
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write(build(spec(), results.folder), tmp_path / "out")


# ---- specs and the command


def test_the_command(results, tmp_path, capsys):
    results.row("lora", [0.8, 0.9, 0.7])
    (tmp_path / "my.yaml").write_text("experiments: demo\ntasks: bbc\nbold: 1e-2\nplot: false\n")
    arguments = [str(tmp_path / "my.yaml"), "--results", str(results.folder)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "80.0 ± 10.0" in out and f"wrote {results.folder / 'tables' / 'my.csv'}" in out
    assert main([*arguments, "--with-scratch"]) == 0
    assert str(results.folder / "scratch" / "tables" / "my.md") in capsys.readouterr().out
    assert main([*arguments, "--out", str(tmp_path / "o")]) == 0
    assert (tmp_path / "o" / "my.tex").exists()


def test_an_unknown_spec(results):
    with pytest.raises(UserError, match="no table 'gleu'; nearest: glue"):
        main(["gleu"])
    with pytest.raises(UserError, match="cannot read table spec nowhere.yaml"):
        main(["nowhere.yaml"])


@pytest.mark.parametrize("name", sorted(available()))
def test_the_shipped_specs_load(name):
    assert load(name).experiments and load(name).caption


@pytest.mark.parametrize("content, message", [
    ({}, "experiments is missing"),
    ({"experiments": ["demo"]}, "tasks is missing"),
    ([], "a spec is a mapping"),
    ({"captoin": ""}, "has no key 'captoin'; nearest: caption"),
    ({"select": {"ovr": []}}, "select has no key 'ovr'; nearest: over"),
    ({"select": {"mode": "best"}}, "mode is max or min"),
    ({"tasks": [{"metric": "f1"}]}, "must name a task"),
    ({"experiments": ["a"], "tasks": ["cola", "cola"]}, "two columns are called 'cola'"),
    ({"seeds": "three"}, "seeds is 'three'"),
    ({"seeds": [0, 0]}, "each once"),
    ({"seeds": True}, "seeds is True"),
    ({"bold": 5}, "out of range"),
    ({"rows": [1]}, "it takes names"),
    ({"mean": "yes"}, "mean is 'yes'"),
])  # fmt: skip
def test_a_wrong_spec_is_one_line(content, message):
    with pytest.raises(UserError, match=message) as error:
        parse("t", content)
    assert "\n" not in str(error.value)


def test_yaml_that_is_none(tmp_path):
    (tmp_path / "t.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="is no YAML") as error:
        load(tmp_path / "t.yaml")
    assert "\n" not in str(error.value)
