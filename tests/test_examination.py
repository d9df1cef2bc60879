"""`alignlab data` as its users see it: damage planted in a file is found, shown by line, and closes the gate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import alignlab

from alignlab.cli.commands import main
from alignlab.disk import read_record
from alignlab.doctor.finding import LEVELS, NAMES
from alignlab.doctor.page import render
from alignlab.runs.facts import read_run
from alignlab.runs.run import EXAMINATION

ESCAPE = "\x1b[31m"
RECIPE = "about: rows of one file\nextends: tiny\ndata: {source: hh-rlhf, path: rows.jsonl}\n"
VERSES = (
    "The river keeps the colour of the evening long after the hills have given theirs away",
    "Nobody in the village could remember who had built the second bridge or why it was narrow",
    "A lantern was left on the wall each night until the boats with the grey sails came home",
)


def row(human: str, chosen: str, rejected: str, split: str = "train") -> dict[str, str]:
    prompt = f"\n\nHuman: {human}\n\nAssistant:"
    return {"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}", "split": split}


SOUND = [
    row(f"What is {n} times {n + 3}? {VERSES[n % 3][: 20 + n]}", f"It is {n * (n + 3)}.", "I cannot count.", split)
    for split, numbers in (("train", range(30)), ("validation", range(30, 34)), ("test", range(34, 38)))
    for n in numbers
]
DAMAGE = {
    "contradictions": [
        row("Tea or coffee?", "Tea it is.", "Coffee, please."),
        row("Tea or coffee?", "Coffee, please.", "Tea it is."),
    ],
    "role-words": [row("Tell me more of it.", "Here it is.\n\nUser: And then?\n\nUser: thanks", "No more.")],
    "mojibake": [row("Where is it?", "In the cafÃ© that youâ€™d like.", "No idea of that.")],
    "control-characters": [row("What colour do you like?", f"{ESCAPE}Red, I would say.", "None that I know of.")],
    "near-overlap": [
        row(f"{VERSES[0]}. {VERSES[1]}.", "So it was.", "Was it?"),
        row(f"{VERSES[0]}. {VERSES[1]}".replace("evening", "evenings"), "So it was, yes.", "Was it so?", "test"),
    ],
}


def examined(folder: Path, rows: list[dict], *options: str) -> tuple[int, dict]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (folder / "mine.yaml").write_text(RECIPE)
    code = main(["data", "mine.yaml", *options])
    return code, read_record(folder / "runs" / "mine" / EXAMINATION)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def by_name(examination: dict) -> dict[str, dict]:
    return {finding["name"]: finding for finding in examination["findings"]}


def test_everything_that_can_be_named_is_looked_for_in_any_data(folder, capsys):
    (folder / "asked.jsonl").write_text(json.dumps({"prompt": "What is 3 times 6?"}) + "\n")
    _, examination = examined(folder, SOUND, "--prompts", "asked.jsonl")
    found = [finding["name"].partition(":")[0] for finding in examination["findings"]]
    assert sorted(found) == sorted(NAMES)
    levels = [finding["level"] for finding in examination["findings"]]
    assert levels == sorted(levels, key=LEVELS.index), "the worst come first"


@pytest.mark.parametrize("name", DAMAGE)
def test_planted_damage_is_found_and_shown_by_file_and_line(folder, capsys, name):
    before = by_name(examined(folder, SOUND)[1])
    code, examination = examined(folder, [*SOUND, *DAMAGE[name]], "--fail-on", name)
    found = by_name(examination)[name]
    assert not before[name]["count"] and found["count"] in (1, 2)
    places = {(Path(one["file"]).name, one["line"]) for one in found["shown"]}
    assert places & {("rows.jsonl", len(SOUND) + 1), ("rows.jsonl", len(SOUND) + 2)}
    assert found["advice"]
    said = capsys.readouterr()
    assert ESCAPE not in said.out + said.err, "no terminal is steered by the data"
    assert code == 1 and f"data: {name}" in said.err


def test_sound_data_passes_the_gate(folder, capsys):
    assert examined(folder, SOUND, "--fail-on", "wrong", "mojibake", "contradictions")[0] == 0


def test_a_name_that_is_no_finding_is_said_before_anything_is_read(folder):
    done = alignlab(folder, "data", "tiny", "--fail-on", "contradiction")
    assert done.returncode == 2 and done.stderr.count("\n") <= 2
    assert "did you mean 'contradictions'?" in done.stderr and not (folder / "runs").exists()


def test_dropped_rows_are_shown_by_their_line(folder, capsys):
    _, examination = examined(folder, [*SOUND, row("Which?", "The same.", "The same.")])
    dropped = by_name(examination)["dropped-rows"]
    assert dropped["count"] == 1 and f"rows.jsonl:{len(SOUND) + 1}" in dropped["shown"][0]["what"]


def test_replies_dropped_for_their_length_come_with_the_settings_that_keep_them(folder, capsys):
    settings = "data.max_reply_tokens", "data.long_replies=cut"
    _, examination = examined(folder, [*SOUND, row("Which?", "The same.", "The same.")])
    assert not any(setting in by_name(examination)["dropped-rows"]["advice"] for setting in settings)
    _, examination = examined(folder, [*SOUND, row("Which?", "This one. " * 200, "That one.")])
    assert all(setting in by_name(examination)["dropped-rows"]["advice"] for setting in settings)


def test_json_and_the_file_and_the_page_say_the_same(folder, capsys):
    code, kept = examined(folder, SOUND, "--json")
    said = capsys.readouterr().out
    assert code == 0 and json.loads(said) == kept
    page = render(kept)
    for finding in kept["findings"]:
        assert finding["name"] in " ".join(page.replace("-\n", "-").split())
    assert f"{kept['length_bias']['longer_is_chosen']:.3f} ±" in page


def test_a_run_on_other_rows_does_not_show_it(folder, capsys):
    _, examination = examined(folder, SOUND)
    run = folder / "runs" / "mine" / "dpo"
    run.mkdir()
    manifest = {"stage": "dpo", "status": "running", "data": {"fingerprint": examination["fingerprint"]}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    said = [(found.name, found.says, found.count) for found in read_run(run).examination.findings]
    assert said == [(found["name"], found["says"], found["count"]) for found in examination["findings"]]
    manifest["data"]["fingerprint"] = "of other rows"
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert read_run(run).examination is None
