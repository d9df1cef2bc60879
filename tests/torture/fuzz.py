"""Random recipes, overrides and rows by the command line itself: one line and no control character, or it works."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import time
import traceback
from pathlib import Path

from workplace import append, parts

BLOCK = 500  # inputs to a line of results
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
NASTY = ["\x1b[31m", "\x07", "", "🜁", "null", "-1", "1e999", "[", "{a: 1}", "true", "'", '"', "\t", "../..", "x" * 300]
NASTY += ["5e6", "2020-13-13", "!!python/object:os.system", "&a", "*a", "# x", "|", "\x9b2J", "\u202e", "0x1F", "~"]
PAIR = {"prompt": "How?", "chosen": " So.", "rejected": " No."}
HH = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
OTHER = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]
ROWS = [
    PAIR,
    HH,
    {"chosen": MESSAGES, "rejected": OTHER},
    {"prompt": "q", "responses": ["a", "b"], "scores": [2, 1]},
    {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 6, "score_B": 3},
    {"conversations": [{"from": "human", "value": "q"}], "chosen": "a", "rejected": "b"},
]
VALUES = [
    None,
    "",
    7,
    -1.5,
    True,
    [],
    {},
    [[]],
    "\x1b[2J",
    "a" * 5000,
    "\ud800",
    {"role": "user"},
    "\n\nHuman:",
    "\x00",
]


def campaign(template: Path, root: Path, results: Path, minutes: float, thousands: int) -> None:
    """A line for every 500 inputs, half recipes with overrides, half rows; what went wrong stands in it whole."""
    began = time.monotonic()
    done = parts(results, lambda row: (row["kind"], row["seed"]))
    for seed in range(thousands * 1000 // (2 * BLOCK)):
        for kind, one in (("recipes", _recipe), ("rows", _rows)):
            if time.monotonic() - began > 60 * minutes:
                return
            if (kind, seed) in done:
                continue
            draw = random.Random(f"{kind}/{seed}")
            wrong = [found for _ in range(BLOCK) if (found := one(draw, template, root))]
            append(results, {"kind": kind, "seed": seed, "inputs": BLOCK, "wrong": wrong[:20]})
            print(f"{kind}, seed {seed}: {len(wrong)} wrong of {BLOCK}", flush=True)


def _recipe(draw: random.Random, template: Path, root: Path) -> str | None:
    text = (template / "recipes" / f"{draw.choice(['steps', 'patience', 'guard'])}.yaml").read_text()
    for _ in range(draw.randint(0, 3)):
        text = _mangled(text, draw)
    path = root / "fuzzed.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    keys = ["dpo.beta", "data.path", "model.lora.r", "sft.learning_rate", "monitor.kl.prompts", "about", "x.y", "dpo"]
    overrides = [f"{draw.choice(keys)}{draw.choice(NASTY)}={draw.choice(NASTY)}" for _ in range(draw.randint(0, 2))]
    return _said(["show", str(path), *overrides])


def _mangled(text: str, draw: random.Random) -> str:
    words = re.split(r"(\W)", text)
    at = draw.randrange(len(words))
    words[at] = draw.choice([*NASTY, words[draw.randrange(len(words))], words[at] * 2])
    return "".join(words)


def _rows(draw: random.Random, template: Path, root: Path) -> str | None:
    rows = [_row(draw, draw.choice(ROWS)) for _ in range(draw.randint(1, 6))]
    path = root / draw.choice(["fuzzed.jsonl", "fuzzed.json"])
    lines = [json.dumps(row) for row in rows]
    if draw.random() < 0.1:
        lines[-1] = lines[-1][: draw.randrange(len(lines[-1]))]
    text = "\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]"
    path.write_bytes(draw.choice([b"", b"", b"", b"\xef\xbb\xbf", b"\xff\xfe"]) + text.encode())
    return _prepared(path, template)


def _row(draw: random.Random, row: dict) -> dict:
    row = json.loads(json.dumps(row))
    for _ in range(draw.randint(0, 2)):
        key = draw.choice([*row, "system", "split", "\x1b[31mkey"])
        row[key] = draw.choice([*VALUES, *row.values()])
    return row


def _prepared(path: Path, template: Path) -> str | None:
    """What went wrong in preparing these rows, if anything; only faults of ours are wrong."""
    from alignlab.data.prepare import prepare
    from alignlab.errors import AlignlabError
    from alignlab.recipe.load import DataSection

    try:
        prepare(DataSection(path=str(path), validation_share=0.3, test_share=0.3), _tokenizer(template))
    except AlignlabError as error:
        return f"control character: {error!r}" if CONTROL.search(str(error)) and _shows_raw(error) else None
    except Exception:
        return f"{path.read_text(errors='replace')[:300]}\n{traceback.format_exc()[-1200:]}"
    return None


def _shows_raw(error: Exception) -> bool:
    """Whether the command line would print the error's control characters as they are."""
    from alignlab.cli import commands as cli

    class Debug:
        debug = False

    with contextlib.redirect_stderr(io.StringIO()) as said:
        cli._fail(str(error), Debug())
    return bool(CONTROL.search(said.getvalue().replace("\n", "")))


_kept = {}


def _tokenizer(template: Path):
    from transformers import AutoTokenizer

    if "tokenizer" not in _kept:
        _kept["tokenizer"] = AutoTokenizer.from_pretrained(template / "model")
    return _kept["tokenizer"]


def _said(arguments: list[str]) -> str | None:
    from alignlab.cli.commands import main

    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main(arguments)
        except SystemExit:
            pass
        except BaseException:
            return f"{arguments}\n{traceback.format_exc()[-1200:]}"
    said = out.getvalue() + err.getvalue()
    raw = CONTROL.search(said.replace("\t", " "))
    return f"{arguments}: control character {raw.group()!r}" if raw else None
