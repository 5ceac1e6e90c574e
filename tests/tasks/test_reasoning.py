"""reasoning-gym's puzzles: no prompt twice, verified by their own rules, the same on every machine."""

import pytest
from samples import loaded, make, refused

pytest.importorskip("reasoning_gym", reason="no reasoning-gym: pip install reasoning-gym")
SIZES = {"train_size": 40, "selection_size": 10, "test_size": 15}
PRESETS = {
    "needle_haystack": {"min_num_statements": 3, "max_num_statements": 5},
    "family_relationships": {},
    "chain_sum": {"min_terms": 2, "max_terms": 3},
    "gsm_symbolic": {"difficulty": 1.0},
}


def puzzles(generator, **options):
    return loaded("reasoning", name=generator, generator=generator, options=PRESETS[generator], **{**SIZES, **options})


@pytest.mark.parametrize("generator", PRESETS)
def test_splits(generator):
    task = puzzles(generator)
    assert {s: len(p) for s, p in task.pairs.items()} == {"train": 40, "selection": 10, "test": 15}
    prompts = [p.prompt for rows in task.pairs.values() for p in rows]
    assert len(set(prompts)) == len(prompts)
    more = puzzles(generator, train_size=60)
    for split in ("selection", "test"):  # however many train, the scored rows are the same
        assert [p.prompt for p in more.pairs[split]] == [p.prompt for p in task.pairs[split]]
    assert puzzles(generator).fingerprint == task.fingerprint != puzzles(generator, split_seed=1).fingerprint


def test_a_generator_of_few_puzzles():
    """One-digit sums: 100 in all. Rows are never repeated to fill a split."""
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    few = {"generator": "chain_sum", "options": options, "selection_size": 20, "test_size": 20}
    task = loaded("reasoning", **few, train_size=100)
    assert len({p.prompt for rows in task.pairs.values() for p in rows}) == 140
    refused(lambda: loaded("reasoning", **few, train_size=1000), "task.train_size=1000", "chain_sum", "only")


def test_answers_are_verified():
    task = puzzles("family_relationships")
    right = [p.reference["answer"] for p in task.pairs["test"]]
    rows = [{"log_likelihood": -1.0, "tokens": 1, "new_tokens": [1], "ended": [True]} for _ in right]
    good = [r | {"texts": [f" {a.upper()}\n"]} for r, a in zip(rows, right, strict=True)]
    scores = task.metrics(good, task.references("test"))
    assert scores["exact_match"] == scores["score"] == 1 and scores["no_answer"] == 0
    bad = [r | {"texts": [" "]} for r in rows[:5]] + [r | {"texts": ["stranger"]} for r in rows[5:]]
    scores = task.metrics(bad, task.references("test"))
    assert scores["exact_match"] == 0 and scores["no_answer"] == pytest.approx(5 / 15)


def test_a_part_of_the_score_is_not_a_match():
    task = puzzles("chain_sum")
    entry = task.pairs["test"][0].reference
    row = {"log_likelihood": -1.0, "tokens": 1, "texts": [f"it is {entry['answer']}"], "new_tokens": [1], "ended": [True]}
    scores = task.metrics([row], [entry])
    assert scores["exact_match"] == 0 < scores["score"] < 1


def test_mistakes_are_named():
    refused(lambda: loaded("reasoning", generator="chain_sums"), "task.generator='chain_sums'", "chain_sum")
    refused(lambda: loaded("reasoning", generator="chain_sum", options={"terms": 3}), "task.options={'terms': 3}", "chain_sum")
    refused(lambda: loaded("reasoning", generator="chain_sum", options={"min_terms": 0}), "task.options", "min_terms")
    refused(lambda: make("reasoning", generator="chain_sum", train_size=0), "task.train_size=0")
    refused(lambda: make("reasoning", generator="chain_sum", scorer="number"), "task.scorer=number", "no effect")
    refused(lambda: make("reasoning", generator="chain_sum", selection_split="train"), "task.selection_split=train", "no effect")
