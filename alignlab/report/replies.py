"""Replies side by side, chosen by a stated rule and never by hand, and dialogue text made harmless to show."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignlab import toy
from alignlab.text import harmless

SHOWN = 3  # of each kind
PROMPT_CHARACTERS = 700
REPLY_CHARACTERS = 900
SEED = "report"
TURN = re.compile(r"\n\n(Human|Assistant):")


def shortened(text: str, most: int, keep_end: bool = False) -> str:
    """At most `most` characters of a text, its end where that matters, and how many more there are."""
    left_out = len(text) - most
    if left_out <= 0:
        return harmless(text)
    said = f"[{left_out:,} more characters in samples.jsonl]"
    return f"{said} … {harmless(text[-most:])}" if keep_end else f"{harmless(text[:most])} … {said}"


def turns(prompt: str) -> list[tuple[str, str]]:
    """Role and text of a dialogue's turns, shortened to its end; a prompt that is no transcript is one turn."""
    text = shortened(prompt.removesuffix("\n\nAssistant:"), PROMPT_CHARACTERS, keep_end=True)
    first, *rest = TURN.split(text)
    spoken = [("", first.strip()), *((role, said.strip()) for role, said in zip(rest[::2], rest[1::2], strict=True))]
    return [turn for turn in spoken if turn[1]]


def last_samples(file: Path) -> tuple[list[dict[str, Any]], str | None]:
    """The rows of a run's last sampling, and the split they answer: test where there is one.

    Reads backwards and stops at the sampling before it, so that a long run's file costs no more than a short one's.
    """
    rows: list[dict[str, Any]] = []
    for line in _backwards(file):
        try:
            row = json.loads(line)
        except ValueError:  # cut off, or being written
            continue
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("prompt", "reply")):
            continue
        if rows and (row.get("step"), row.get("split")) != (rows[0].get("step"), rows[0].get("split")):
            break
        rows.append(row)
    return rows[::-1], rows[0].get("split") if rows else None


def _backwards(file: Path, block: int = 1 << 20) -> Iterator[bytes]:
    """The lines of a file, the last one first."""
    if not file.is_file():
        return
    with file.open("rb") as stream:
        at, pieces = stream.seek(0, 2), []  # pieces: of a line whose start is not read yet, the last one first
        while at > 0:
            size = min(block, at)
            at -= size
            stream.seek(at)
            head, *lines = stream.read(size).split(b"\n")
            if lines:
                yield b"".join([lines.pop(), *pieces[::-1]])
                yield from reversed(lines)
                pieces = []
            pieces.append(head)
        yield b"".join(pieces[::-1])


def side_by_side(runs: Sequence[Mapping[str, Any]], samples: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Groups of cases for prompts that all the runs answered, and the rule by which they were chosen.

    The first run is the one whose wins and losses against its reference are shown.
    """
    answers = [{row["prompt"]: row for row in rows} for rows in samples]
    prompts = [p for p in (answers[0] if answers else {}) if all(p in its for its in answers)]
    if not prompts:
        return {
            "rule": "no prompt was answered by every run" if len(runs) > 1 else "no replies were sampled",
            "groups": [],
        }
    lead = [answers[0][prompt] for prompt in prompts]
    judged = all(run["data_from"].get("source") == "toy" for run in runs) and all(
        "reference_reply" in row for row in lead
    )
    rule, groups = _by_the_toys_rule(lead) if judged else _without_a_judge(lead)
    drawn = random.Random(SEED).sample(lead, min(SHOWN, len(lead)))
    groups.append((f"A random draw of {len(drawn)}", drawn, "one reply"))
    split = f"{len(lead)} {runs[0]['samples_split']} prompts"
    if len(runs) > 1 and judged:
        rule += f"; it is {runs[0]['name']} whose replies are ranked"
    shown = [
        {"title": title, "none": none, "cases": [_case(runs, answers, row["prompt"], judged) for row in rows]}
        for title, rows, none in groups
    ]
    return {"rule": f"from {split}: {rule}; the draw is random with a fixed seed", "groups": shown}


def _by_the_toys_rule(rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[str, list, str]]]:
    ahead = {
        id(row): toy.score(row["prompt"], row["reply"]) - toy.score(row["prompt"], row["reference_reply"])
        for row in rows
    }
    ranked = sorted(rows, key=lambda row: -ahead[id(row)])
    wins = [row for row in ranked if ahead[id(row)] > 0]
    losses = [row for row in reversed(ranked) if ahead[id(row)] < 0]
    groups = [
        (
            f"Largest wins, {min(SHOWN, len(wins))} of {len(wins)}",
            wins[:SHOWN],
            "no reply is better than the reference's",
        ),
        (
            f"Largest losses, {min(SHOWN, len(losses))} of {len(losses)}",
            losses[:SHOWN],
            "no reply is worse than the reference's",
        ),
    ]
    return "wins and losses by the difference in points of the toy's rule, ties in the file's order", groups


def _without_a_judge(rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[str, list, str]]]:
    """Where nobody judged, no reply is called a win: the furthest and the nearest to the reference are shown."""
    far = [row for row in rows if isinstance(row.get("kl"), int | float)]
    if not far:
        return "nobody judged them", []
    far = sorted(far, key=lambda row: -row["kl"])
    half = min(SHOWN, (len(far) + 1) // 2)
    groups = [
        ("Furthest from the reference", far[:half], ""),
        ("Nearest to the reference", far[half:][-half:][::-1], ""),
    ]
    return "nobody judged them, so they are ranked by their KL from the reference (alignlab eval judges)", groups


def _case(runs, answers, prompt: str, judged: bool) -> dict[str, Any]:
    shown = []
    first = answers[0][prompt]
    if "reference_reply" in first:
        shown.append(_reply(runs[0]["reference_name"], prompt, first["reference_reply"], judged))
    for run, its in zip(runs, answers, strict=True):
        row = its[prompt]
        facts = [f"KL {row['kl']:.3g} nats"] if isinstance(row.get("kl"), int | float) else []
        facts += [f"{row['tokens']} tokens"] if isinstance(row.get("tokens"), int) else []
        facts += ["cut at the cap"] if row.get("ended") is False else []
        name = run.get("label", run["name"]) if len(runs) > 1 else run["stage"].upper()
        shown.append(_reply(name, prompt, row["reply"], judged, facts))
    return {"turns": turns(prompt), "replies": shown, "outcome": None}


def _reply(who: str, prompt: str, text: str, judged: bool, facts: Sequence[str] = ()) -> dict[str, str]:
    points = [f"{toy.score(prompt, text)} points".replace("-", "−")] if judged else []
    return {
        "who": who,
        "text": shortened(text.strip(), REPLY_CHARACTERS) or "(empty)",
        "facts": ", ".join([*points, *facts]),
    }


def judged_cases(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """The cases that `alignlab eval` chose, as `side_by_side` gives them; None where it chose none."""
    cases = evaluation.get("cases") or []
    titles = {"win": "Largest wins", "loss": "Largest losses", "random": "A random draw"}
    groups = []
    for kind, title in titles.items():
        of_kind = [case for case in cases if case.get("kind") == kind]
        shown = [_judged(case) for case in of_kind[:SHOWN]]
        groups.append({"title": title, "none": "none", "cases": shown})
    rule = f"chosen by alignlab eval, judge: {evaluation.get('judge') or 'none'}"
    return {"rule": rule, "groups": groups} if cases else None


def _judged(case: Mapping[str, Any]) -> dict[str, Any]:
    replies = [_reply(str(name), "", str(text), False) for name, text in (case.get("replies") or {}).items()]
    return {"turns": turns(str(case.get("prompt", ""))), "replies": replies, "outcome": case.get("outcome")}
