"""The laws of prepared data: ids as TRL makes them, nothing shared across splits, every dropped row counted."""

import gzip
import json
import logging
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from alignlab.data import preparation
from alignlab.data.layouts import find_reader
from alignlab.data.pairing import CUT, FOLDED, SHORTENED
from alignlab.data.prepare import prepare, sft_rows, write_pairs
from alignlab.data.rows import configs_named
from alignlab.data.splits import SPLITS
from alignlab.errors import DataError, MachineError, ModelError, RecipeError
from alignlab.recipe.load import DataSection, ToySection

SHARED = Path(__file__).parents[2] / "shared"
HH = SHARED / "data" / "hh-rlhf"
UNLIMITED = {"max_prompt_tokens": 10**6, "max_reply_tokens": 10**6}
CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

pytestmark = pytest.mark.filterwarnings("ignore")


def real_tokenizer(name):
    if not (SHARED / "tokenizers").exists():
        pytest.skip("needs the real tokenizers")
    return AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)


def hh_row(human="hi", chosen="yes", rejected="no", **more):
    prompt = f"\n\nHuman: {human}\n\nAssistant:"
    return {"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}", **more}


def dialogues(count):
    return [hh_row(f"question {number}") for number in range(count)]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def section(path, source="hh-rlhf", **settings):
    settings = {"validation_share": 0.2, "test_share": 0.2, **settings}
    return DataSection(source=source, path=str(path), **settings)


def prepare_rows(tmp_path, tokenizer, rows, source="hh-rlhf", **settings):
    return prepare(section(write_lines(tmp_path / "rows.jsonl", [*rows, *fill(source)]), source, **settings), tokenizer)


def fill(source):
    """Forty plain dialogues, so that no split comes out empty."""
    if source == "hh-rlhf":
        return dialogues(40)
    return [{"prompt": f"question {number}", "chosen": "yes", "rejected": "no"} for number in range(40)]


def all_pairs(prepared):
    return [pair for split in SPLITS for pair in getattr(prepared, split)]


def pair_of(prepared, word):
    return next(pair for pair in all_pairs(prepared) if word in pair["prompt"])


# As TRL does it


def trl_ids(pairs, tokenizer):
    from trl import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    args = DPOConfig(bf16=False, use_cpu=True, report_to=[], gradient_checkpointing=False, max_length=None)
    strings = pairs.select_columns(["prompt", "chosen", "rejected"])
    return DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), strings, tokenizer, args, "train")


@pytest.mark.parametrize("name", ["gpt2", "llama2", "mistral"])
def test_ids_are_those_that_trl_makes_of_the_same_strings(name):
    tokenizer = real_tokenizer(name)
    pairs = prepare(DataSection(source="hh-rlhf", path=str(HH), subset="helpful-base", max_pairs=600), tokenizer).train
    expected = trl_ids(pairs, tokenizer)
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert pairs[column][:] == expected[column][:]
    for pair in pairs:
        for reply in (pair["chosen_ids"], pair["rejected_ids"]):
            specials = [token for token in pair["prompt_ids"] + reply if token in tokenizer.all_special_ids]
            assert specials == tokenizer("")["input_ids"] + [tokenizer.eos_token_id] and reply[-1] == specials[-1]


@pytest.mark.skipif(not HH.exists(), reason="needs the HH-RLHF test files")
@pytest.mark.parametrize(("subset", "rows", "dropped"), [("harmless-base", 2312, 9), ("helpful-base", 2354, 15)])
def test_every_real_row_is_kept_whole_or_dropped_with_its_reason(subset, rows, dropped):
    tokenizer = real_tokenizer("gpt2")
    source = HH / f"{subset}.test.jsonl.gz"
    prepared = prepare(DataSection(source="hh-rlhf", path=str(source), **UNLIMITED), tokenizer)
    assert (prepared.rows, sum(prepared.dropped.values())) == (rows, dropped)
    assert sum(prepared.kept.values()) == rows - dropped and not prepared.repaired
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        raw = {(row["chosen"], row["rejected"]) for row in map(json.loads, lines)}
    assert all((p["prompt"] + p["chosen"], p["prompt"] + p["rejected"]) in raw for p in all_pairs(prepared))
    entries = [json.loads(line) for line in prepared.dropped_rows.read_text().splitlines()]
    assert len(entries) == dropped and {"reason", "file", "line", "row"} == set(entries[0])


# Lengths


def test_a_long_prompt_loses_whole_oldest_turns(tmp_path, words):
    r"""BOS 1 + "\n\nHuman: bb" 11 + "\n\nAssistant:" 12 = 24; with the two older turns it would be 48."""
    row = hh_row("aa\n\nAssistant: cc\n\nHuman: bb")
    prepared = prepare_rows(tmp_path, words, [row], max_prompt_tokens=40)
    pair = pair_of(prepared, " bb")
    assert (pair["prompt"], len(pair["prompt_ids"])) == ("\n\nHuman: bb\n\nAssistant:", 24)
    assert prepared.repaired == {SHORTENED: 1}


def test_a_prompt_whose_last_turn_alone_is_too_long_is_dropped(tmp_path, words):
    assert prepare_rows(tmp_path, words, [hh_row("x" * 50)], max_prompt_tokens=40).dropped == {"prompt too long": 1}


def test_a_long_reply_is_dropped_or_cut_without_an_eos(tmp_path, words):
    """ " yes" and the EOS are 5 tokens; " a longer reply" is cut behind 5 of its characters."""
    rows = [hh_row("long", "a longer reply", "no")]
    assert prepare_rows(tmp_path, words, rows, max_reply_tokens=5).dropped == {"reply too long": 1}
    prepared = prepare_rows(tmp_path, words, rows, max_reply_tokens=5, long_replies="cut")
    pair = pair_of(prepared, "long")
    assert (pair["chosen"], pair["rejected"]) == (" a lo", " no")
    assert words.decode(pair["chosen_ids"]) == " a lo" and pair["rejected_ids"][-1] == words.eos_token_id
    assert prepared.repaired == {CUT: 1}


def test_replies_that_are_the_same_once_cut_are_dropped(tmp_path, words):
    prepared = prepare_rows(
        tmp_path, words, [hh_row("x", "same start a", "same start b")], max_reply_tokens=8, long_replies="cut"
    )
    assert prepared.dropped == {"the two replies are identical once cut": 1}


@pytest.mark.parametrize("name", ["gpt2", "llama2", "mistral"])
def test_a_cut_reply_ends_with_a_whole_character_and_is_the_beginning_of_the_reply(tmp_path, name):
    tokenizer = real_tokenizer(name)
    reply = "🦖é𝄞 " * 20
    for limit in range(5, 14):
        prepared = prepare_rows(
            tmp_path, tokenizer, [hh_row("cut", reply, "no")], max_reply_tokens=limit, long_replies="cut"
        )
        pair = pair_of(prepared, "cut")
        assert f" {reply}".startswith(pair["chosen"]) and len(pair["chosen"]) > 1
        assert limit - 4 <= len(pair["chosen_ids"]) <= limit


def test_a_tokenizer_that_merges_prompt_and_reply_loses_the_row_with_that_reason(tmp_path, words):
    from tokenizers import Tokenizer

    state = json.loads(words.backend_tokenizer.to_str())
    state["model"]["vocab"][":y"] = len(state["model"]["vocab"])
    state["model"]["merges"] = [[":", "y"]]
    state["pre_tokenizer"]["use_regex"] = False
    merging = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>"
    )
    rows = [{"chosen": "\n\nHuman: a\n\nAssistant:yes", "rejected": "\n\nHuman: a\n\nAssistant: no"}]
    assert prepare_rows(tmp_path, merging, rows).dropped == {"prompt and reply merge into one token": 1}


# Special tokens


def test_text_that_spells_a_special_token_is_dropped(tmp_path, words):
    rows = [hh_row("a </s> b"), hh_row("c", "d <s> e")]
    dropped = prepare_rows(tmp_path, words, rows).dropped
    assert dropped == {"the text spells the special token </s>": 1, "the text spells the special token <s>": 1}


def test_a_reply_that_ends_with_the_eos_ends_with_one_eos(tmp_path, words):
    pair = pair_of(prepare_rows(tmp_path, words, [hh_row("ends", "yes</s>", "no")]), "ends")
    assert (pair["chosen"], pair["chosen_ids"].count(words.eos_token_id)) == (" yes", 1)


def test_a_lone_surrogate_is_dropped(tmp_path, words):
    assert prepare_rows(tmp_path, words, [hh_row("\ud800")]).dropped == {"the text is not valid Unicode": 1}


def test_a_tokenizer_without_an_eos_is_refused(tmp_path, words):
    without = PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer, bos_token="<s>")
    with pytest.raises(ModelError, match="no EOS token"):
        prepare_rows(tmp_path, without, [])


def test_a_tokenizer_that_ends_every_text_with_an_eos_is_refused(tmp_path, words):
    from tokenizers import Tokenizer, processors

    backend = Tokenizer.from_str(words.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    with pytest.raises(ModelError, match="add_eos_token"):
        prepare_rows(tmp_path, PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), [])


# Splits


def test_rows_of_one_dialogue_stand_in_one_split(tmp_path, words):
    rows = [hh_row(f"question {number % 30}", f"yes {number}") for number in range(200)]
    prepared = prepare(section(write_lines(tmp_path / "rows.jsonl", rows)), words)
    prompts = [set(getattr(prepared, split)["prompt"]) for split in SPLITS]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 30


def test_splits_stay_as_they_are_when_rows_are_added(tmp_path, words):
    few = prepare(section(write_lines(tmp_path / "few.jsonl", dialogues(60))), words)
    many = prepare(section(write_lines(tmp_path / "many.jsonl", dialogues(120)[::-1])), words)
    for split in SPLITS:
        assert set(getattr(few, split)["prompt"]) <= set(getattr(many, split)["prompt"])


def test_a_row_that_names_its_split_keeps_it(tmp_path, words):
    rows = [hh_row(f"{split} {number}", split=split) for split in SPLITS for number in range(3)]
    prepared = prepare(section(write_lines(tmp_path / "rows.jsonl", rows)), words)
    assert prepared.kept == dict.fromkeys(SPLITS, 3)
    assert all(" test" in prompt for prompt in prepared.test["prompt"])


def test_test_dialogues_of_the_data_are_taken_out_of_training(tmp_path, words):
    write_lines(tmp_path / "hh" / "base" / "train.jsonl.gz", dialogues(40))
    write_lines(tmp_path / "hh" / "base" / "test.jsonl.gz", dialogues(3))
    prepared = prepare(section(tmp_path / "hh", subset="base"), words)
    assert prepared.kept["test"] == 3 and prepared.dropped == {"dialogue also in the test split": 3}


def test_an_empty_split_names_shares_that_work(tmp_path, words):
    path = write_lines(tmp_path / "rows.jsonl", dialogues(6))
    with pytest.raises(DataError, match=r"no validation and no test rows among 6 pairs") as error:
        prepare(section(path, validation_share=0.001, test_share=0.001), words)
    shares = dict(part.split("=") for part in str(error.value).split() if part.startswith("data."))
    shares = {name.removeprefix("data."): float(value.rstrip(",")) for name, value in shares.items()}
    assert all(prepare(section(path, **shares), words).kept.values())


def test_too_few_dialogues_for_three_splits_ask_for_more_rows(tmp_path, words):
    with pytest.raises(DataError, match="bring rows of more prompts"):
        prepare(section(write_lines(tmp_path / "rows.jsonl", dialogues(1))), words)


def test_max_pairs_reads_so_many_rows_of_each_split(tmp_path, words):
    for split, count in (("train", 40), ("validation", 9), ("test", 9)):
        write_lines(tmp_path / "hh" / f"{split}.jsonl", [hh_row(f"{split} {n}") for n in range(count)])
    assert prepare(section(tmp_path / "hh", max_pairs=5), words).kept == dict.fromkeys(SPLITS, 5)


def test_the_fingerprint_is_that_of_the_prepared_rows(tmp_path, words):
    path = write_lines(tmp_path / "rows.jsonl", dialogues(60))
    again = write_lines(tmp_path / "again.jsonl.gz", dialogues(60))
    first = prepare(section(path), words).fingerprint
    assert prepare(section(again, max_prompt_tokens=500), words).fingerprint == first
    assert prepare(section(path, seed=1), words).fingerprint != first
    assert prepare(section(path, test_share=0.5), words).fingerprint != first


# Sources and formats


def read_pair(row):
    return list(find_reader([row], "pairs", {}).read(row, DataSection()))


def message(role, content):
    return {"role": role, "content": content}


def answer(content):
    return [message("assistant", content)]


TRANSCRIPT = "\n\nHuman: first\n\nAssistant: well\n\nHuman: ask"
ASKED = [message("user", "first"), message("assistant", "well"), message("user", "ask")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "chosen": "yes", "rejected": "no"},
        {"prompt": ASKED, "chosen": answer("yes"), "rejected": answer("no")},
        {
            "prompt": "ask",
            "chosen": [*ASKED, message("assistant", "yes")],
            "rejected": [*ASKED, message("assistant", "no")],
        },
        {
            "prompt": "\n\nHuman: first\n\nAssistant: well\n\nHuman: ask\n\nAssistant:",
            "chosen": "yes",
            "rejected": " no",
        },
        {"prompt": "\n\nHuman: first\n\nAssistant: well\n\nHuman: ask", "chosen": " yes", "rejected": "no"},
    ],
)
def test_pairs_as_text_or_messages_read_the_same(tmp_path, words, row):
    pair = pair_of(prepare_rows(tmp_path, words, [row], "pairs"), "first")
    assert pair["prompt"] == "\n\nHuman: first\n\nAssistant: well\n\nHuman: ask\n\nAssistant:"
    assert (pair["chosen"], pair["rejected"]) == (" yes", " no")


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (None, "no field 'prompt'"),
        (3, "neither text nor a list"),
        ([], "neither text nor a list"),
        ([message("tool", "42")], "a tool turn"),
        ([message("user", "q"), {"role": "assistant", "content": "", "tool_calls": [1]}], "a tool turn"),
        ([message("wizard", "q")], "role is none of"),
        ([message("user", 3)], "content is not text"),
        ([message("user", [{"type": "image", "url": "x"}])], "a message holds 'image'"),
        ([message("user", "q"), message("system", "s"), message("user", "q")], "a system turn stands after"),
        ([message("user", "q"), message("assistant", "a")], "does not end with a user turn"),
        (f"{TRANSCRIPT}\n\nAssistant: begun", "in the middle of an Assistant turn"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused_with_the_reason(prompt, reason):
    with pytest.raises(DataError, match=reason):
        read_pair({"prompt": prompt, "chosen": "a", "rejected": "b"})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": 3}, "neither text nor a list"),
        ({"chosen": ASKED, "rejected": ASKED}, "ends with a user turn"),
        ({"chosen": ASKED[:2], "rejected": [message("user", "other"), *answer("a")]}, "different prompts"),
        (
            {"prompt": ASKED, "chosen": ASKED[:2], "rejected": [ASKED[0], *answer("b")]},
            "does not begin with the prompt",
        ),
    ],
)
def test_replies_that_answer_no_common_prompt_are_refused_with_the_reason(row, reason):
    with pytest.raises(DataError, match=reason):
        read_pair(row)


def test_a_reply_that_would_read_as_further_turns_is_dropped(tmp_path, words):
    rows = [{"prompt": "q", "chosen": "a\n\nHuman: thanks", "rejected": "b"}]
    assert prepare_rows(tmp_path, words, rows, "pairs").dropped == {"a turn holds the beginning of another turn": 1}


def test_a_system_turn_opens_the_first_human_turn_that_is_left(tmp_path, words):
    rows = [{"prompt": [message("system", "Be kind."), *ASKED], "chosen": "yes", "rejected": "no"}]
    whole = prepare_rows(tmp_path, words, rows, "pairs")
    assert pair_of(whole, "first")["prompt"].startswith("\n\nHuman: Be kind.\n\nfirst\n\nAssistant: well\n\nHuman: ask")
    short = prepare_rows(tmp_path, words, rows, "pairs", max_prompt_tokens=40)
    assert pair_of(short, "ask")["prompt"] == "\n\nHuman: Be kind.\n\nask\n\nAssistant:"
    assert short.repaired == {FOLDED: 1, SHORTENED: 1}


def test_a_chat_template_writes_the_prompt_with_one_bos_and_the_reply_up_to_its_eos(tmp_path, words):
    """The template ends a reply with EOS and a newline; TRL keeps that newline, here the reply ends with the EOS."""
    rows = [{"prompt": [message("system", "Be kind."), *ASKED], "chosen": "yes", "rejected": "no"}]
    path = write_lines(tmp_path / "rows.jsonl", rows + fill("pairs"))
    prepared = prepare(section(path, "pairs", format="chat"), words, CHATML)
    pair = pair_of(prepared, "Be kind")
    assert pair["prompt"] == "<s><system>Be kind.\n<user>first\n<assistant>well</s>\n<user>ask\n<assistant>"
    assert (pair["chosen"], words.decode(pair["chosen_ids"])) == ("yes", "yes</s>")
    assert pair["prompt_ids"].count(words.bos_token_id) == 1
    rendered = words.apply_chat_template(
        [*rows[0]["prompt"], message("assistant", "yes")], chat_template=CHATML, return_dict=False
    )
    assert (pair["prompt_ids"] + pair["chosen_ids"]) == rendered[:-1]


def test_transcripts_become_messages_for_a_chat_template(tmp_path, words):
    row = hh_row("first\n\nAssistant: well\n\nHuman: ask")
    path = write_lines(tmp_path / "rows.jsonl", [row, *dialogues(40)])
    prepared = prepare(section(path, format="chat", max_prompt_tokens=35), words, CHATML)
    assert prepared.repaired == {SHORTENED: 1}
    assert pair_of(prepared, ">ask")["prompt"] == "<s><user>ask\n<assistant>"


def test_a_template_that_writes_no_bos_leaves_it_to_the_tokenizer(tmp_path, words):
    path = write_lines(tmp_path / "rows.jsonl", dialogues(40))
    pair = prepare(section(path, format="chat"), words, CHATML.replace("{{ bos_token }}", "")).train[0]
    assert pair["prompt_ids"][0] == words.bos_token_id and not pair["prompt"].startswith("<s>")


def test_a_template_that_writes_no_eos_gets_one(tmp_path, words):
    path = write_lines(tmp_path / "rows.jsonl", dialogues(40))
    pair = prepare(section(path, format="chat"), words, CHATML.replace("{{ eos_token }}", "")).train[0]
    assert words.decode(pair["chosen_ids"]) == "yes\n</s>"


def test_rows_that_a_chat_template_refuses_or_rewrites_are_dropped(tmp_path, words):
    path = write_lines(tmp_path / "rows.jsonl", dialogues(40))
    refuses = "{% if messages[0]['content'] == 'question 7' %}{{ raise_exception('no sevens') }}{% endif %}" + CHATML
    assert prepare(section(path, format="chat"), words, refuses).dropped == {
        "the chat template refuses the dialogue: no sevens": 1
    }
    rewrites = CHATML.replace("'<assistant>' }}{% endif %}", "'<assistant>think:' }}{% endif %}")
    with pytest.raises(DataError, match="not one usable row of 40: the chat template writes the prompt differently"):
        prepare(section(path, format="chat"), words, rewrites)


def test_chat_format_without_a_template_is_refused(tmp_path, words):
    with pytest.raises(ModelError, match=r"model\.chat_template"):
        prepare(section(write_lines(tmp_path / "rows.jsonl", dialogues(9)), format="chat"), words)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the UltraFeedback sample")
def test_real_ultrafeedback_rows_are_dropped_for_counted_reasons_only():
    path = SHARED / "data" / "preference" / "ultrafeedback-1000.jsonl"
    prepared = prepare(section(path, "pairs", **UNLIMITED), real_tokenizer("mistral"))
    assert prepared.dropped == {
        "the text spells the special token </s>": 4,
        "the two replies are identical": 4,
        "a reply is empty": 2,
        "a turn holds the beginning of another turn": 1,
    }
    assert prepared.rows == sum(prepared.kept.values()) + 11 == 1000


def test_the_toy_dialogues_are_a_source_like_any_other(words):
    prepared = prepare(DataSection(source="toy", toy=ToySection(pairs=100)), words)
    assert prepared.kept == {"train": 100, "validation": 60, "test": 60} and not prepared.dropped


# Files


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
def test_every_kind_of_file_gives_the_same_pairs(tmp_path, words, suffix):
    rows, path = dialogues(40), tmp_path / f"rows{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows, indent=2))
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write_lines(path, rows)
    plain = prepare(section(write_lines(tmp_path / "plain.jsonl", rows)), words)
    assert prepare(section(path), words).fingerprint == plain.fingerprint


def test_dropped_rows_name_their_file_and_line(tmp_path, words):
    prepared = prepare_rows(tmp_path, words, [hh_row("a"), hh_row("b", "same", "same")])
    (entry,) = map(json.loads, prepared.dropped_rows.read_text().splitlines())
    assert entry == {
        "reason": "the two replies are identical",
        "file": str(tmp_path / "rows.jsonl"),
        "line": 2,
        "row": hh_row("b", "same", "same"),
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b'{"chosen": "a"}\n{"chosen": \n', r"rows.jsonl:2: not JSON"),
        ("rows.jsonl", b'{"chosen": "a"}\n\xff\n', r"rows.jsonl:2: not JSON"),
        ("rows.jsonl", b"[1]\n", r"rows.jsonl:1: a row must be a JSON object, not \[1\]"),
        ("rows.json", b'[\n{"chosen": "a"},\n{"cho', r"rows.json:3: not JSON"),
        ("rows.jsonl.gz", gzip.compress(b'{"chosen": "a"}\n' * 9, mtime=0)[:-9], r"gz:\d+: the gzip stream is damaged"),
        ("rows.jsonl.gz", b"no gzip", r"rows.jsonl.gz:1: the gzip stream is damaged"),
        ("rows.parquet", b"no parquet", r"rows.parquet: not a whole parquet file"),
        ("rows.jsonl", b"", r"rows.jsonl: no rows: the data is empty"),
        ("rows.jsonl", b'{"text": "a"}\n', r"not one usable row of 1: no field 'chosen'.*needs `chosen`.*:1 has text"),
        ("rows.txt", b"text", r"rows.txt: not a kind of file"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_one_line_that_says_where(tmp_path, words, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        prepare(section(tmp_path / name), words)
    assert "\n" not in str(error.value)


def test_a_path_that_is_not_there_is_answered_with_the_nearest_name(tmp_path, words):
    write_lines(tmp_path / "pairs.jsonl", dialogues(9))
    with pytest.raises(DataError, match=r"pears.jsonl': no such file or folder in .*; did you mean .*pairs.jsonl\?"):
        prepare(section(tmp_path / "pears.jsonl"), words)
    with pytest.raises(DataError, match=r"no folder 'helpful' inside \(there are pairs.jsonl\)"):
        prepare(section(tmp_path, subset="helpful"), words)
    with pytest.raises(DataError, match=r"no split 'train' among test\.jsonl"):
        write_lines(tmp_path / "only" / "test.jsonl", dialogues(9))
        prepare(section(tmp_path / "only"), words)
    with pytest.raises(RecipeError, match=r"data\.path is not set"):
        prepare(DataSection(source="pairs"), words)


# Hub


def hub_error(path, **environment):
    """What find_parts says about a hub id, in a process that talks to another hub."""
    code = (
        "import sys\nfrom alignlab.recipe.load import DataSection\nfrom alignlab.data.rows import find_parts\n"
        "try:\n    find_parts(DataSection(source='pairs', path=sys.argv[1]))\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", **environment}
    done = subprocess.run([sys.executable, "-c", code, path], env=environment, capture_output=True, text=True)
    return done.stdout.strip()


def test_a_hub_that_cannot_be_reached_and_one_that_refuses_say_what_to_do(refusing_hub, tmp_path):
    endpoint = {"HF_ENDPOINT": refusing_hub, "HF_HOME": str(tmp_path)}
    gated, unknown = hub_error("some/gated", **endpoint), hub_error("some/thing", **endpoint)
    offline = hub_error("some/thing", **{**endpoint, "HF_HUB_OFFLINE": "1"})
    assert gated.startswith(MachineError.__name__) and "hf auth login" in gated and "data.path" in gated
    assert unknown.startswith(DataError.__name__) and "data.path" in unknown
    assert offline.startswith(MachineError.__name__) and "cannot be reached" in offline and "data.path" in offline
    assert not any("\n" in answer for answer in (gated, unknown, offline))


def test_a_hub_that_gives_no_answer_is_one_line_within_seconds(tmp_path):
    """A port that refuses, and one that takes the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        for port in (9, silent.getsockname()[1]):
            said = hub_error("some/thing", HF_ENDPOINT=f"http://127.0.0.1:{port}", HF_HOME=str(tmp_path))
            assert said.startswith(MachineError.__name__) and "cannot be reached" in said and "\n" not in said
        assert time.monotonic() - began < 40, "each takes the libraries' imports and at most 5 s"


def test_a_dataset_of_several_configs_lists_them_all(tmp_path):
    import datasets

    front = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("en", "fr", "de"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{front}---\n")
    for name in ("en", "fr", "de"):
        write_lines(tmp_path / f"{name}.jsonl", dialogues(1))
    for config in (None, "es"):
        with pytest.raises(ValueError) as error:
            datasets.load_dataset(str(tmp_path), config)
        assert sorted(configs_named(str(error.value))) == ["de", "en", "fr"]


# What is made of the pairs


def test_a_pair_says_which_line_of_which_file_it_comes_from(tmp_path, words):
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    write_lines(one, [hh_row("a", "yes", "yes"), hh_row("b", "yes", "no", split="train")])
    write_lines(other, [hh_row("c", "yes", "no", split="test"), hh_row("d", "yes", "no", split="validation")])
    prepared = prepare(replace(section(one), path=[str(one), str(other)]), words)
    found = {
        row["prompt"].split()[1]: (Path(prepared.files[row["file"]]).name, row["line"])
        for split in SPLITS
        for row in getattr(prepared, split)
    }
    assert found == {"b": ("one.jsonl", 2), "c": ("other.jsonl", 1), "d": ("other.jsonl", 2)}


def test_sft_rows_hold_each_chosen_reply_once_and_learn_the_reply_alone(tmp_path, words):
    rows = [hh_row("twice", "yes", "no", split="train"), hh_row("twice", "yes", "never", split="train")]
    pairs = prepare_rows(tmp_path, words, rows).train
    rows = sft_rows(pairs)
    assert len(pairs) - len(rows) == 1
    for row in rows:
        reply = [label for label in row["labels"] if label != -100]
        assert row["input_ids"][-len(reply) :] == reply and words.decode(reply) == " yes</s>"
        assert row["labels"][: -len(reply)] == [-100] * (len(row["input_ids"]) - len(reply))


def test_written_pairs_read_back_as_the_same_data(tmp_path, words):
    prepared = prepare_rows(tmp_path, words, [hh_row("x\n\nAssistant: y\n\nAssistant: z\n\nHuman: \n w", " \n yes ")])
    write_pairs(prepared, tmp_path / "pairs.jsonl")
    again = prepare(section(tmp_path / "pairs.jsonl", "pairs"), words)
    assert again.kept == prepared.kept and not again.dropped
    for split in SPLITS:
        one, other = (getattr(pairs, split).remove_columns(["file", "line"]) for pairs in (again, prepared))
        assert one[:] == other[:]
    assert [path.name for path in tmp_path.iterdir() if ".tmp" in path.name] == []


def test_preparing_leaves_torch_and_transformers_to_those_who_need_them():
    code = "import sys, alignlab.data.prepare; print({'torch', 'trl', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_one_line_of_log_says_how_many_rows_were_kept(tmp_path, words, caplog):
    with caplog.at_level(logging.INFO, "alignlab.data.prepare"):
        prepare_rows(tmp_path, words, [hh_row("same", "a", "a")])
    assert "41 rows read: 40 kept, 1 dropped" in caplog.text


def test_several_processes_prepare_what_one_does(tmp_path, words, monkeypatch):
    rows = [hh_row(f"question {n % 900} of many", f"yes {n}", "no" if n % 50 else f"yes {n}") for n in range(3000)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    monkeypatch.setattr(preparation, "BATCH_ROWS", 100)
    found = []
    for processes, serial in ((1, 0), (3, 200)):
        monkeypatch.setattr(preparation, "spare_processes", lambda processes=processes: processes)
        monkeypatch.setattr(preparation, "SERIAL_ROWS", serial)
        monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / f"cache{processes}"))
        found.append(prepare(section(path), words))
    one, several = found
    assert one.fingerprint == several.fingerprint and one.dropped_rows.read_text() == several.dropped_rows.read_text()
    assert several.dropped == {"the two replies are identical": 60} and several.rows == 3000


def test_a_fault_in_the_middle_of_many_rows_ends_the_helping_processes(tmp_path, words, monkeypatch):
    monkeypatch.setattr(preparation, "BATCH_ROWS", 10)
    monkeypatch.setattr(preparation, "SERIAL_ROWS", 10)
    monkeypatch.setattr(preparation, "spare_processes", lambda: 2)
    path = write_lines(tmp_path / "rows.jsonl", dialogues(500))
    path.write_text(path.read_text() + "{cut")
    with pytest.raises(DataError, match=r"rows.jsonl:501: not JSON"):
        prepare(section(path), words)
    assert not multiprocessing.active_children()
