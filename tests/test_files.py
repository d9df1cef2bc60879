"""The laws of files: every kind gives the same rows with their lines, and a damaged one says where."""

import csv
import gzip
import json
import time

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.data import prepare
from alignlab.errors import AlignlabError, DataError, MachineError
from alignlab.files import READERS, read_file
from alignlab.recipe import DataSection

ROWS = [{"prompt": f'say "{n}",\nplease', "chosen": "yes, é", "rejected": "no\u2028"} for n in range(5)]

ONE_PAIR = b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n'


def write(path, rows):
    kind = "".join(path.suffixes)
    if kind in (".jsonl", ".jsonl.gz"):
        with gzip.open(path, "wt") if kind == ".jsonl.gz" else path.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    elif kind == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == ".csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        table = pyarrow.Table.from_pylist(rows)
        if kind == ".parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pyarrow.RecordBatchStreamWriter(path, table.schema) as stream:
                stream.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize("kind", READERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    assert [row.fields for row in read_file(write(tmp_path / f"rows{kind}", ROWS))] == ROWS


def test_both_of_arrows_formats_are_read(tmp_path):
    pyarrow.feather.write_feather(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.arrow", compression="zstd")
    assert [row.fields for row in read_file(tmp_path / "rows.arrow")] == ROWS


def test_lines_are_those_of_an_editor(tmp_path):
    """A CSV row of ROWS takes two lines, behind the header; a table counts rows."""
    lines = {kind: [row.line for row in read_file(write(tmp_path / f"rows{kind}", ROWS))] for kind in READERS}
    assert lines[".csv"] == [2, 4, 6, 8, 10]
    assert lines[".jsonl"] == lines[".jsonl.gz"] == lines[".parquet"] == lines[".arrow"] == [1, 2, 3, 4, 5]
    text = (tmp_path / "rows.json").read_text().splitlines()
    assert all(text[line - 1].strip() == "{" for line in lines[".json"])


def test_numbers_in_a_csv_are_numbers_and_other_cells_are_text(tmp_path):
    path = tmp_path / "shp.csv"
    path.write_text("history,labels,score_A,score_B,extra\n42,1,7,2.5,\n43,maybe,high,1,x\n")
    assert [row.fields for row in read_file(path)] == [
        {"history": "42", "labels": 1, "score_A": 7, "score_B": 2.5},
        {"history": "43", "labels": "maybe", "score_A": "high", "score_B": 1, "extra": "x"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"", "rows.csv: no rows: the data is empty"),
        ("rows.csv", b"prompt,chosen,rejected\n", "rows.csv: no rows: the data is empty"),
        ("rows.csv", b"prompt,chosen,rejected\nq,a,b\nq,a\n", "rows.csv:3: 2 cells under 3 column names"),
        ("rows.csv", b"prompt,chosen,rejected\nq,a,b,c\n", "rows.csv:2: 4 cells under 3 column names"),
        ("rows.csv", b"prompt,chosen,rejected\nq,a,\xff\n", r"rows.csv:\d+: not CSV"),
        ("rows.csv", b'prompt,chosen,rejected\nq,a,"b\n', r"rows.csv:\d+: not CSV"),
        ("rows.arrow", b"no arrow", "rows.arrow: not a whole Arrow file"),
        ("rows.arrow", b"", "rows.arrow: not a whole Arrow file"),
        ("rows.arrow", b"ARROW1\0\0cut", "rows.arrow: not a whole Arrow file"),
        ("rows.parquet", b"", "rows.parquet: not a whole parquet file"),
        ("rows.json", b"", "rows.json: no rows: the data is empty"),
        ("rows.json", b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n{"prompt"', "rows.json:2: not JSON"),
        ("rows.jsonl", b'{"prompt": "q", "chosen": "a"', "rows.jsonl:1: not JSON"),
        ("rows.jsonl", b'{"a": ' + b"[" * 100_000, "rows.jsonl:1: not JSON"),
        ("rows.jsonl.gz", gzip.compress(ONE_PAIR, mtime=0)[:40], "gz:1.*cut short"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line_that_says_where(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        prepare(DataSection(path=str(tmp_path / name)), tokenizer)
    assert "\n" not in str(error.value)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(READERS)), st.integers(0, 400), st.binary(max_size=3))
def test_a_file_cut_and_scribbled_on_anywhere_is_read_or_refused(tmp_path_factory, kind, at, scribble):
    path = write(tmp_path_factory.mktemp("damaged") / f"rows{kind}", ROWS)
    content = path.read_bytes()
    path.write_bytes(content[:at] + scribble)
    try:
        rows = list(read_file(path))
    except DataError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert all(isinstance(row.fields, dict) for row in rows)


def test_wrong_column_types_name_the_first_row(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [{"prompt": 1, "chosen": 2, "rejected": 3}] * 3)
    with pytest.raises(DataError, match=r"neither text nor a list of messages \(3\).*rows.jsonl:1 has prompt, chosen"):
        prepare(DataSection(path=str(path)), tokenizer)


def test_an_unknown_dataset_while_offline_says_how_to_point_at_a_copy(tokenizer, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(AlignlabError, match=r"download it elsewhere and point data\.path at the folder") as error:
        prepare(DataSection(path="nobody/no-such-data"), tokenizer)
    assert isinstance(error.value, MachineError) and "\n" not in str(error.value)


def test_a_dialogue_of_ten_megabytes_is_prepared_in_time_linear_in_its_length(tmp_path, tokenizer):
    """Ten megabytes may take three times as long as five: linear, and a margin for a busy machine."""
    seconds = []
    for megabytes in (5, 10):
        turn = "\n\nHuman: " + "why so, " * 60 + "\n\nAssistant: " + "because of it. " * 30
        prompt = turn * (megabytes * 10**6 // len(turn)) + "\n\nHuman: end?\n\nAssistant:"
        long = {"chosen": f"{prompt} yes", "rejected": f"{prompt} no"}
        few = [{name: f"\n\nHuman: {n}?\n\nAssistant: {name}" for name in ("chosen", "rejected")} for n in range(20)]
        path = write(tmp_path / f"{megabytes}.jsonl", [long, *few])
        began = time.process_time()
        section = DataSection(path=str(path), max_prompt_tokens=64, validation_share=0.3, test_share=0.3)
        assert prepare(section, tokenizer).repaired == {"prompt shortened by whole turns": 1}
        seconds.append(time.process_time() - began)
    assert seconds[1] < max(3 * seconds[0], 2)
