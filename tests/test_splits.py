"""The laws of splits: what a name holds out is never trained on, what a recipe names is there, advice can be met."""

import json
import re
import shutil
from pathlib import Path

import pytest

from alignlab.data.prepare import prepare, prepare_replies
from alignlab.data.splits import OTHER, SPLITS, split_named
from alignlab.errors import DataError, RecipeError
from alignlab.recipe.load import DataSection, SFTDataSection

CASES = Path(__file__).parent / "cases"

pytestmark = pytest.mark.filterwarnings("ignore")


def write_rows(path, names, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"How is {name}?", "chosen": "Well.", "rejected": "Bad.", **more} for name in names]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(word, count):
    return [f"{word} {number}" for number in range(count)]


def read(tokenizer, path, **settings):
    path = [str(one) for one in path] if isinstance(path, list) else str(path)
    return prepare(DataSection(path=path, **{"validation_share": 0.3, "test_share": 0.3, **settings}), tokenizer)


def prompts(prepared, split):
    return "\n".join(getattr(prepared, split)["prompt"])


# Names


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("train_prefs", "train"),
        ("data/train/part-0.jsonl", "train"),
        ("hh_test.jsonl", "test"),
        ("data/test/part-0.jsonl", "test"),
        ("HHTest.csv", "test"),
        ("eval.jsonl", "test"),
        ("dev/a.jsonl", "validation"),
        ("my-val.json", "validation"),
        ("valid2.jsonl", "validation"),
        ("test/train-0.jsonl", "test"),
        ("train/dev.jsonl", "validation"),
        ("train_test_split/rows.jsonl", None),
        ("train_test_split/test.jsonl", "test"),
        ("contest.jsonl", None),
        ("latest_model/rows.jsonl", None),
        ("devices.jsonl", None),
        ("evaluated_values.csv", None),
        ("retrained/attestation.jsonl", None),
        ("data-00000-of-00001.arrow", None),
    ],
)
def test_a_name_is_a_split_where_it_holds_its_word(name, split):
    assert split_named(name, DataSection(path="x")) == split


def test_a_recipe_may_name_other_splits_than_these():
    section = DataSection(path="x", split="train_sft", test_split=None)
    found = {name: split_named(name, section) for name in ("train_sft", "train_prefs", "test_sft", "rows", "val")}
    assert found == {"train_sft": "train", "train_prefs": OTHER, "test_sft": OTHER, "rows": None, "val": "validation"}
    assert split_named("test", DataSection(path="x", split="test", test_split=None)) == "train"
    assert split_named("validation", DataSection(path="x", test_split="validation")) == "test"


@pytest.mark.parametrize(
    ("case", "train", "test"),
    [
        ("01-save-to-disk/dict", 12, 5),
        ("01-save-to-disk/hub-style", 12, 5),
        ("02-split-names/folders", 12, 5),
        ("02-split-names/names", 12, 5),
        ("02-split-names/uf", 12, 5),
    ],
)
def test_what_a_name_holds_out_is_not_trained_on(tokenizer, case, train, test):
    found = read(tokenizer, CASES / case, validation_share=0.2)
    assert found.kept["test"] == test and found.kept["train"] + found.kept["validation"] == train
    names = {split: {found.files[row["file"]] for row in getattr(found, split)} for split in SPLITS}
    assert all("test" in Path(name).parts[-2] + Path(name).name for name in names["test"])
    assert not names["test"] & (names["train"] | names["validation"])


def test_a_dataset_saved_alone_brings_no_split_and_its_cache_files_are_not_rows(tokenizer, tmp_path):
    shutil.copytree(CASES / "01-save-to-disk" / "single", tmp_path / "saved")
    shutil.copyfile(tmp_path / "saved" / "data-00000-of-00001.arrow", tmp_path / "saved" / "cache-1f3a.arrow")
    found = read(tokenizer, tmp_path / "saved")
    assert found.rows == 12 and all(found.kept.values())


def test_preferences_and_sft_of_one_dataset_are_not_mixed(tokenizer, caplog):
    uf = CASES / "02-split-names" / "uf"
    with caplog.at_level("INFO"):
        pairs = read(tokenizer, uf, validation_share=0.2)
    assert "not read, being of another split: test_sft.jsonl, train_sft.jsonl" in caplog.text
    assert {Path(name).stem for name in pairs.files} == {"train_prefs", "test_prefs"}
    section = DataSection(path=str(uf), validation_share=0.2, sft=SFTDataSection(path=str(uf)))
    replies = prepare_replies(section, tokenizer, pairs)
    assert {Path(name).stem for name in replies.files} == {"train_sft"}


def test_the_path_itself_is_no_split(tokenizer, tmp_path):
    """/…/dev/test/train.jsonl, and the folder above it: rows of one file are carved."""
    file = write_rows(tmp_path / "dev" / "test" / "train.jsonl", numbered("bread", 40))
    for path in (file, file.parent):
        found = read(tokenizer, path)
        assert found.rows == 40 and all(found.kept[split] for split in SPLITS)
    alone = write_rows(tmp_path / "test.jsonl", numbered("bread", 40))
    assert all(read(tokenizer, alone).kept.values())


def test_files_in_a_list_that_tell_training_from_test_are_splits(tokenizer, tmp_path):
    one = write_rows(tmp_path / "a" / "train.jsonl", numbered("bread", 40))
    other = write_rows(tmp_path / "b" / "train.jsonl", numbered("soup", 40))
    test = write_rows(tmp_path / "b" / "test.jsonl", numbered("rice", 9))
    found = read(tokenizer, [one, other, test])
    assert found.kept["test"] == 9 and "rice" not in prompts(found, "train") + prompts(found, "validation")
    tests = [write_rows(tmp_path / f"{name}.test.jsonl", numbered(name, 40)) for name in ("milk", "wine")]
    assert read(tokenizer, tests).rows == 80


# What is named and not there


@pytest.mark.parametrize(
    ("case", "settings", "names"),
    [
        ("02-split-names/folders", {"split": "trian"}, "test/part-0.jsonl, train/part-0.jsonl"),
        ("02-split-names/names", {"split": "hh_trian"}, "hh_test.jsonl, hh_train.jsonl"),
        ("02-split-names/uf", {"split": "train_pref", "test_split": "test_prefs"}, "test_prefs.jsonl, test_sft.jsonl"),
        ("02-split-names/uf", {"test_split": "test_pref"}, "test_prefs.jsonl, test_sft.jsonl"),
        ("01-save-to-disk/dict", {"test_split": "tset"}, "test/data-00000-of-00001.arrow"),
    ],
)
def test_a_split_that_is_named_and_not_there_lists_those_that_are(tokenizer, case, settings, names):
    with pytest.raises(DataError, match=re.escape(names)) as error:
        read(tokenizer, CASES / case, **settings)
    setting, name = next(iter(settings.items()))
    assert f"no split {name!r}" in str(error.value) and f"set data.{setting} to one of them" in str(error.value)


@pytest.mark.parametrize("name", ["validation.jsonl", "eval.jsonl", "dev/rows.jsonl"])
def test_held_out_rows_alone_are_not_trained_on(tokenizer, tmp_path, name):
    write_rows(tmp_path / name, numbered("bread", 40))
    with pytest.raises(DataError, match=f"no split 'train' among {name}; set data.split"):
        read(tokenizer, tmp_path)
    write_rows(tmp_path / "rows.jsonl", numbered("soup", 40))
    assert "bread" not in prompts(read(tokenizer, tmp_path), "train")


def test_a_split_of_a_single_file_is_one_that_its_rows_name(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", numbered("bread", 40))
    with pytest.raises(DataError, match=r"data\.split names a split, and this is one file .*leave it out"):
        read(tokenizer, path, split="trian")
    named = write_rows(tmp_path / "named.jsonl", numbered("bread", 40), split="train_a")
    assert read(tokenizer, named, split="train_a").rows == 40
    with pytest.raises(DataError, match=r"no split 'train_b' among train_a; set data\.split"):
        read(tokenizer, named, split="train_b")


def test_a_share_of_a_split_is_refused_with_what_to_set(tokenizer):
    for path in (CASES / "02-split-names" / "folders", CASES / "13-end-of-turn" / "yes.jsonl"):
        with pytest.raises(RecipeError, match=r"data\.split is 'train\[:10%\]'.*set data\.max_pairs"):
            read(tokenizer, path, split="train[:10%]")


# Rows that name their split


def rows_of(splits):
    return [
        {"prompt": f"How is {name}?", "chosen": "Well.", "rejected": "Bad.", "split": split}
        for split, names in splits.items()
        for name in names
    ]


@pytest.mark.parametrize("value", [["test"], {"name": "test"}, 7, None])
def test_a_field_split_that_is_no_text_names_no_split(value, tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    named = rows_of({"train": numbered("bread", 30), "test": numbered("rice", 9)})
    rows = [*named, *({**row, "split": value} for row in rows_of({"": ["tea"]}))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read(tokenizer, path)
    assert sum(found.kept.values()) == 40 and found.kept["test"] == 9


def test_a_field_split_is_said_and_what_it_leaves_out_is_carved(tokenizer, tmp_path, caplog):
    """300 training rows come before the test rows: more than are read to tell what a file holds."""
    path = tmp_path / "rows.jsonl"
    rows = rows_of({"train": numbered("bread", 300), "test": numbered("rice", 9)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level("INFO"):
        found = read(tokenizer, path)
    assert "rows.jsonl: the field split says what its rows are for: train 300, test 9" in caplog.text
    assert found.kept["test"] == 9 and found.kept["validation"] > 30
    assert "rice" not in prompts(found, "train") + prompts(found, "validation")


def test_rows_of_a_split_that_is_not_asked_for_are_not_read(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = rows_of({"train_prefs": numbered("bread", 40), "train_sft": numbered("soup", 9), "gen": numbered("tea", 1)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(tokenizer, path).rows == 41
    assert read(tokenizer, path, split="train_sft", validation_share=0.4, test_share=0.2).rows == 10


def test_a_held_out_file_stays_held_out_whatever_its_rows_say(tokenizer, tmp_path):
    write_rows(tmp_path / "train.jsonl", numbered("bread", 40), split="train")
    write_rows(tmp_path / "test.jsonl", numbered("rice", 9), split="train")
    found = read(tokenizer, tmp_path)
    assert found.kept["test"] == 9 and "rice" not in prompts(found, "train") + prompts(found, "validation")


def test_a_field_of_another_meaning_decides_nothing(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", numbered("bread", 40), split="helpful")
    assert all(read(tokenizer, path).kept.values())


# Advice


@pytest.mark.parametrize("count", [6, 20])
def test_the_shares_that_an_error_names_work(tokenizer, tmp_path, count):
    path = write_rows(tmp_path / "rows.jsonl", numbered("bread", count))
    with pytest.raises(DataError, match=r"no validation and no test rows among \d+ pairs") as error:
        read(tokenizer, path, validation_share=0.001, test_share=0.001)
    named = dict(re.findall(r"data\.(\w+_share)=([\d.]+)", str(error.value)))
    assert str(error.value).count("bring more rows") == 1
    assert all(read(tokenizer, path, **{name: float(share) for name, share in named.items()}).kept.values())


def test_sft_learns_the_prompts_that_the_pairs_train_on(tokenizer, tmp_path):
    """The same 60 prompts in both: what the pairs validate on is for validation, what they test on is left out."""
    names = numbered("bread", 60)
    pairs = write_rows(tmp_path / "pairs.jsonl", names)
    tasks = [{"instruction": f"How is {name}?", "output": "Fine."} for name in names]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    sft = SFTDataSection(path=str(tmp_path / "sft.jsonl"))
    section = DataSection(path=str(pairs), validation_share=0.2, test_share=0.2, sft=sft)
    found = prepare(section, tokenizer)
    replies = prepare_replies(section, tokenizer, found)
    for split in ("train", "validation"):
        assert set(getattr(replies, split)["prompt"]) == set(getattr(found, split)["prompt"])
    assert replies.dropped == {"dialogue also in the test split of the pairs": found.kept["test"]}


def test_sft_rows_of_held_out_prompts_alone_get_an_advice_that_can_be_met(tokenizer, tmp_path):
    write_rows(tmp_path / "pairs" / "train.jsonl", numbered("bread", 60))
    write_rows(tmp_path / "pairs" / "test.jsonl", numbered("rice", 20))
    tasks = [{"instruction": f"How is {name}?", "output": "Fine."} for name in numbered("rice", 20)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    section = DataSection(path=str(tmp_path / "pairs"), sft=SFTDataSection(path=str(tmp_path / "sft.jsonl")))
    with pytest.raises(DataError, match=r"bring rows with other prompts, or leave data\.sft\.path out"):
        prepare_replies(section, tokenizer, prepare(section, tokenizer))
