"""Labelled texts: every way to spell a label, held-out shares, notes, and one line for each mistake."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from hfkit.data.labels import Example, load_labelled
from hfkit.settings import BadInput, LabelDataConfig

ROWS = [("a fine day", 1), ("a sad day", 0), ("so fine", 1), ("so sad", 0)]


def write(path: Path, rows: list[tuple[Any, Any]]) -> str:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return str(path)


def config(folder: Path, train: list, validation: list | None = None, **fields: Any) -> LabelDataConfig:
    files = {"train_files": write(folder / "train.jsonl", train)}
    if validation is not None:
        files["validation_files"] = write(folder / "validation.jsonl", validation)
    return LabelDataConfig(**files, **fields)


def test_numbers_get_the_given_names_in_order(tmp_path: Path) -> None:
    data = load_labelled(config(tmp_path, ROWS, ROWS[:2], label_names=["negative", "positive"]))
    assert data.label_names == ["negative", "positive"]
    assert data.train == [
        Example("a fine day", 1),
        Example("a sad day", 0),
        Example("so fine", 1),
        Example("so sad", 0),
    ]
    assert data.validation == data.train[:2]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([1, 0, 10, 2], ["0", "1", "2", "10"]),  # by value, not by spelling
        (["neg", "pos", "neg", " pos "], ["neg", "pos"]),
        (["1", "0", 1.0, 0], ["0", "1"]),
        ([True, False, True, False], ["False", "True"]),
    ],
)
def test_names_are_read_from_the_labels(tmp_path: Path, labels: list, names: list[str]) -> None:
    rows = [(f"text {number}", label) for number, label in enumerate(labels)]
    assert load_labelled(config(tmp_path, rows, rows)).label_names == names


@pytest.mark.parametrize("unlabelled", [-1, "-1", None, ""])
def test_rows_without_a_label_are_set_aside(tmp_path: Path, unlabelled: Any) -> None:
    data = load_labelled(config(tmp_path, [*ROWS, ("no idea", unlabelled)], ROWS))
    assert (len(data.train), data.unlabelled, data.label_names) == (4, ["no idea"], ["0", "1"])


def test_names_that_a_dataset_declares_are_used(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = {"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    data = load_labelled(LabelDataConfig(dataset=str(tmp_path / "saved"), validation_share=0.3))
    assert data.label_names == ["bad", "good"]


def save(folder: Path, names: list[str], labels: list[int]) -> datasets.Dataset:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    rows = {"text": [f"{folder.name} {number}" for number in range(len(labels))], "label": labels}
    return datasets.Dataset.from_dict(rows, features=features)


def test_a_datasets_numbers_are_names_before_they_are_compared(tmp_path: Path) -> None:
    splits = {
        "train": save(tmp_path, ["1", "0"], [0, 0, 1]),  # the first class is called 1
        "validation": save(tmp_path, ["0", "1"], [0, 1, -1]),
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    data = load_labelled(LabelDataConfig(dataset=str(tmp_path / "saved"), validation_split="validation"))
    assert data.label_names == ["1", "0"]
    assert (data.labels["train"], data.labels["validation"]) == ([0, 0, 1], [1, 0])
    named = LabelDataConfig(
        dataset=str(tmp_path / "saved"), validation_split="validation", label_names=["first", "second"]
    )
    assert load_labelled(named).labels["train"] == [0, 0, 1]


def test_minus_one_is_a_class_where_it_is_named(tmp_path: Path) -> None:
    rows = [("so sad", -1), ("so so", 0), ("so fine", 1), ("who knows", None)]
    data = load_labelled(config(tmp_path, rows, rows[:3], label_names=["-1", "0", "1"]))
    assert (data.labels["train"], data.labels["validation"], data.unlabelled) == ([0, 1, 2], [0, 1, 2], ["who knows"])


def test_unlabelled_rows_are_told_by_split(tmp_path: Path) -> None:
    data = load_labelled(config(tmp_path, [*ROWS, ("hm", -1), ("so", None)], [("c", 0), ("d", 1), ("e", "")]))
    assert data.notes == ["2 of 6 train texts have no label", "1 of 3 validation texts have no label"]


def test_equal_numbers_keep_their_order(tmp_path: Path) -> None:
    rows = [(f"text {number}", label) for number, label in enumerate(["1", "001", "01", "0"])]
    assert load_labelled(config(tmp_path, rows, rows)).label_names == ["0", "001", "01", "1"]


def test_the_same_texts_are_held_out_whatever_their_order(tmp_path: Path) -> None:
    rows = [(f"text {number}", number % 2) for number in range(40)]
    first = load_labelled(config(tmp_path, rows))
    second = load_labelled(config(tmp_path, rows[::-1]))
    assert len(first.validation) == 4
    assert sorted(first.validation) == sorted(second.validation)
    assert sorted(first.train + first.validation) == sorted(second.train + second.validation)


def test_differences_between_splits_are_told(tmp_path: Path) -> None:
    data = load_labelled(config(tmp_path, ROWS, [("a fine day", 1), ("new", 1)]))
    assert data.notes == [
        "the validation data have no example of 0",
        "1 of 2 validation texts are in the training data, too",
    ]


def test_unreadable_rows_are_skipped_when_asked(tmp_path: Path) -> None:
    data = load_labelled(config(tmp_path, [*ROWS, ("", 1)], ROWS, on_error="skip"))
    assert len(data.train) == 4
    assert "1 rows could not be read" in data.notes[0] and "the text is empty" in data.notes[0]


@pytest.mark.parametrize(
    ("train", "validation", "fields", "message"),
    [
        (ROWS, ROWS, {"label_column": "stars"}, r"train.jsonl:1: no column 'stars'; the columns are text, label. Set"),
        (ROWS, ROWS, {"text_column": "body"}, r"train.jsonl:1: no column 'body'; the columns are text, label. Set"),
        ([("a", 1), ("b", 1)], ROWS, {}, r"two classes or more; of the training texts all 2 are '1'"),
        ([("a", -1)], ROWS, {}, r"two classes or more; of the training texts none has a label"),
        (ROWS, [("c", 2)], {}, r"validation.jsonl:1: label '2' does not occur in the training data; its labels are"),
        (ROWS, [("c", 2)], {"label_names": ["x", "y", "z"]}, r"validation.jsonl:1: label '2' does not occur in the tr"),
        ([("a", "neg"), ("b", "pos")], ROWS, {}, r"validation.jsonl:1: label '1' does not occur in the training data"),
        ([("a", 1), ("b", "unknown")], [("c", 0)], {}, r"validation.jsonl:1: label '0' does not occur in the training"),
        (ROWS, [("c", 2)], {"label_names": ["0", "1", "x"]}, r"label '2' does not occur"),
        (ROWS, [("c", -1), ("d", None)], {}, r"none of the 2 validation texts has a label .*leave them out"),
        (ROWS, None, {"validation_share": 0.0}, r"nothing to choose the best step by: give --data.validation_files"),
        ([*ROWS, (" ", 1)], ROWS, {}, r"train.jsonl:5: text: the text is empty"),
        ([*ROWS, ("x", [1])], ROWS, {}, r"train.jsonl:5: label: is \[1\], not the name or number of a class"),
        ([*ROWS, ("x", "meh")], ROWS, {"label_names": ["neg", "pos"]}, r"train.jsonl:5: label 'meh' does not occur"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, train: list, validation: list | None, fields: dict, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        load_labelled(config(tmp_path, train, validation, **fields))


def test_without_any_file_the_built_in_reviews_are_read() -> None:
    data = load_labelled(LabelDataConfig())
    assert data.label_names == ["negative", "positive"]
    assert [len(part) for part in data.splits.values()] == [6000, 600, 1200]
    fewer = load_labelled(LabelDataConfig(max_documents=40))
    assert [len(part) for part in fewer.splits.values()] == [40, 600, 1200]
