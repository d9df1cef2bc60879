"""The laws of files: every kind gives the same rows with their lines, and a damaged one says where."""

import csv
import gzip
import io
import json
import time

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.data.files import READERS, read_file
from alignlab.data.prepare import prepare
from alignlab.errors import AlignlabError, DataError, MachineError
from alignlab.recipe.load import DataSection

ROWS = [{"prompt": f'say "{n}",\nplease', "chosen": "yes, é", "rejected": "no\u2028"} for n in range(5)]

ONE_PAIR = b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n'


def write(path, rows):
    kind = "".join(path.suffixes)
    text = io.StringIO(newline="")
    if kind.startswith((".jsonl", ".ndjson")):
        text.writelines(json.dumps(row) + "\n" for row in rows)
    elif kind.startswith(".json"):
        json.dump(rows, text, indent=1)
    elif kind.startswith((".csv", ".tsv")):
        writer = csv.DictWriter(text, rows[0], delimiter="\t" if kind == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    elif kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    else:
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.RecordBatchStreamWriter(path, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
        return path
    content = text.getvalue().encode("utf-8-sig")
    path.write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
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
    assert lines[".csv"] == lines[".csv.gz"] == lines[".tsv"] == [2, 4, 6, 8, 10]
    assert lines[".jsonl"] == lines[".jsonl.gz"] == lines[".parquet"] == lines[".arrow"] == [1, 2, 3, 4, 5]
    text = (tmp_path / "rows.json").read_text(encoding="utf-8-sig").splitlines()
    assert all(text[line - 1].strip() == "{" for line in lines[".json"])


def test_cells_of_a_csv_are_text_and_empty_ones_no_fields(tmp_path):
    path = tmp_path / "shp.csv"
    path.write_text("history,labels,score_A,extra\n42,1,7,\n43,maybe,high,x\n")
    assert [row.fields for row in read_file(path)] == [
        {"history": "42", "labels": "1", "score_A": "7"},
        {"history": "43", "labels": "maybe", "score_A": "high", "extra": "x"},
    ]


def test_numbers_in_a_csv_are_numbers_where_a_layout_wants_some(tmp_path, tokenizer):
    rows = [{"history": f"post {n}", "human_ref_A": "a", "human_ref_B": "b"} for n in range(60)]
    path = write(tmp_path / "shp.csv", [{**row, "labels": 1, "score_A": 6, "score_B": 3} for row in rows])
    found = prepare(DataSection(path=str(path), validation_share=0.2, test_share=0.2), tokenizer)
    assert sum(found.kept.values()) == 60 and set(found.train["chosen"]) == {" a"}
    lists = [{"prompt": f"q {n}", "responses": "['b', 'a']", "ratings": "[1.0, 2.0]"} for n in range(60)]
    path = write(tmp_path / "ranked.csv", lists)
    found = prepare(DataSection(path=str(path), validation_share=0.2, test_share=0.2), tokenizer)
    assert set(found.train["chosen"]) == {" a"}


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_csv_is_read_by_the_delimiter_of_its_header(tmp_path, delimiter):
    path = tmp_path / "rows.csv"
    lines = [delimiter.join(line) for line in (("prompt", "chosen", "rejected"), ("a;b, c|d"[:1], "e.", "f"))]
    path.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    assert [row.fields for row in read_file(path)] == [{"prompt": "a", "chosen": "e.", "rejected": "f"}]


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    "value",
    [
        {"data": [PAIR, PAIR]},
        {"version": "1.0", "rows": [PAIR, PAIR]},
        {"alpaca_gpt4": [PAIR, PAIR]},
        {name: [value] * 2 for name, value in PAIR.items()},
        {name: {"0": value, "1": value} for name, value in PAIR.items()},
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_that_wraps_the_rows_is_read(tmp_path, value, indent):
    path = tmp_path / "rows.json"
    path.write_text("\ufeff" + json.dumps(value, indent=indent), encoding="utf-8")
    assert [row.fields for row in read_file(path)] == [PAIR, PAIR]


def test_a_single_row_is_no_wrapper(tmp_path):
    for row in (
        PAIR,
        {"messages": [{"role": "user", "content": "q"}]},
        {"prompt": "q", "answers": [{"text": "a"}] * 2},
    ):
        (tmp_path / "row.json").write_text(json.dumps(row))
        assert [found.fields for found in read_file(tmp_path / "row.json")] == [row]


def test_splits_in_one_file_are_kept_apart(tmp_path, tokenizer):
    splits = {
        name: [{**PAIR, "prompt": f"{name} {n}"} for n in range(count)] for name, count in (("train", 40), ("test", 9))
    }
    (tmp_path / "rows.json").write_text(json.dumps(splits))
    found = prepare(DataSection(path=str(tmp_path / "rows.json"), validation_share=0.2), tokenizer)
    assert found.kept["test"] == 9 and all(" test " in prompt for prompt in found.test["prompt"])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_utf_16_is_named_with_the_remedy(tmp_path, name, encoding):
    (tmp_path / name).write_bytes("prompt,chosen\n".encode(encoding))
    with pytest.raises(DataError, match=rf"{name}: UTF-16 text; save it as UTF-8 \(iconv -f UTF-16"):
        list(read_file(tmp_path / name))


def test_a_path_may_hold_blanks_and_signs(tmp_path, tokenizer, monkeypatch):
    folder = tmp_path / "my data #1 [old]"
    folder.mkdir()
    write(folder / "the rows (2).jsonl", [{**PAIR, "prompt": f"q {n}"} for n in range(40)])
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (folder, folder / "the rows (2).jsonl", "~/my data #1 [old]"):
        assert prepare(DataSection(path=str(path), validation_share=0.2, test_share=0.2), tokenizer).rows == 40


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
