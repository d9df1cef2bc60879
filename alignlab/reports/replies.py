"""Replies side by side: all of them in one table, and a few chosen by a stated rule, never by hand."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab.data.transcript import ASSISTANT
from alignlab.disk import read_lines
from alignlab.runs.evaluation import HELD_OUT, REPLIES, Evaluation
from alignlab.runs.facts import RunFacts
from alignlab.text.estimate import is_number
from alignlab.text.safe import harmless

SHOWN = 3  # of each kind
MOST_ROWS = 400  # of the table: a browser gets slow above, and replies.jsonl has them all
PROMPT_CHARACTERS = 700
REPLY_CHARACTERS = 900
SEED = "report"
TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Reply:
    who: str
    text: str
    facts: str = ""  # what was measured of it


@dataclass(frozen=True)
class Case:
    """A prompt, what each model answered, and who won."""

    prompt: str
    replies: Sequence[Reply]
    outcome: str = ""  # win, tie or loss of the last model against the one it is compared with; empty: not judged
    ahead: float = 0.0  # by how much: of the judge's scores, else of the outcome; or how far from the reference
    prompts: str = HELD_OUT

    @property
    def turns(self) -> list[tuple[str, str]]:
        """Role and text of the dialogue's turns, shortened to its end; a prompt that is no transcript is one turn."""
        text = shortened(self.prompt.removesuffix(ASSISTANT), PROMPT_CHARACTERS, keep_end=True)
        first, *rest = TURN.split(text)
        spoken = [("", first), *zip(rest[::2], rest[1::2], strict=True)]
        return [(role, said.strip()) for role, said in spoken if said.strip()]


@dataclass(frozen=True)
class CaseGroup:
    """A few cases under a title."""

    title: str
    cases: Sequence[Case]


@dataclass(frozen=True)
class Replies:
    """Every case, the few to read first, and the rule by which those were chosen."""

    rule: str
    cases: Sequence[Case] = ()
    picked: Sequence[CaseGroup] = ()

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(reply.who for case in self.cases for reply in case.replies))

    @property
    def sets(self) -> list[str]:
        return list(dict.fromkeys(case.prompts for case in self.cases))

    def count(self, outcome: str) -> int:
        return sum(case.outcome == outcome for case in self.cases)


def judged_replies(folder: Path, found: Evaluation) -> Replies | None:
    """What `alignlab eval` wrote beside its `eval.json`; none where it wrote no replies."""
    file = folder / REPLIES
    rows = read_lines(file)
    by_prompt: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault((row.get("prompts"), row.get("number")), []).append(row)
    cases = [_judged_case(its, found) for its in by_prompt.values()]
    if not cases:
        return None
    if found.judge is None:
        return Replies("From alignlab eval; nobody judged them (--judge)", cases, [_drawn(cases)])
    wins = [case for case in cases if case.outcome == "win"]
    losses = [case for case in cases if case.outcome == "loss"]
    best, worst = sorted(wins, key=lambda case: -case.ahead), sorted(losses, key=lambda case: case.ahead)
    picked = [_first("Largest wins", best), _first("Largest losses", worst), _drawn(cases)]
    rule = f"From alignlab eval, judge: {found.judge}; the largest wins and losses are those by its scores"
    return Replies(rule, cases, picked)


def _judged_case(rows: Sequence[Mapping[str, Any]], found: Evaluation) -> Case:
    ours = next((row for row in rows if row.get("model") == found.names[-1]), rows[-1])
    theirs = next((row for row in rows if row.get("model") == found.against), rows[0])
    outcome = (ours.get("outcomes") or {}).get(found.against)
    ahead = _total(ours) - _total(theirs) if ours.get("scores") and theirs.get("scores") else (outcome or 0.5) - 0.5
    replies = [Reply(str(row.get("model")), _reply_text(row.get("reply")), _scores(row)) for row in rows]
    return Case(str(rows[0].get("prompt")), replies, _outcome(outcome), ahead, str(rows[0].get("prompts")))


def _outcome(value: float | None) -> str:
    if value is None:
        return ""
    return "win" if value > 0.5 else "loss" if value < 0.5 else "tie"


def _total(row: Mapping[str, Any]) -> float:
    return sum(row["scores"].values())


def _scores(row: Mapping[str, Any]) -> str:
    said = [f"{name} {score:g}".replace("-", "−") for name, score in (row.get("scores") or {}).items()]
    said += [f"{row['tokens']} tokens"] if isinstance(row.get("tokens"), int) else []
    said += ["cut at the limit"] if row.get("ended") is False else []
    return ", ".join(said)


def sampled_replies(runs: Sequence[RunFacts]) -> Replies:
    """The last replies that were sampled in training, to the prompts that all the runs answered; nobody judged them."""
    answers = [{row["prompt"]: row for row in run.samples} for run in runs]
    prompts = [prompt for prompt in (answers[0] if answers else {}) if all(prompt in its for its in answers)]
    if not prompts:
        return Replies("No prompt was answered by every run" if len(runs) > 1 else "No replies were sampled")
    cases = [_sampled_case(runs, [its[prompt] for its in answers]) for prompt in prompts]
    rule = (
        f"To {len(cases)} {runs[0].samples_split} prompts, sampled in training; nobody judged them (alignlab eval does)"
    )
    far = sorted(cases, key=lambda case: -case.ahead) if any(case.ahead for case in cases) else []
    half = min(SHOWN, (len(far) + 1) // 2)
    picked = [CaseGroup("Furthest from the reference, by KL", far[:half])] if far else []
    picked += [CaseGroup("Nearest to the reference", far[half:][-half:][::-1])] if len(far) > 1 else []
    return Replies(rule, cases, [*picked, _drawn(cases)])


def _sampled_case(runs: Sequence[RunFacts], rows: Sequence[Mapping[str, Any]]) -> Case:
    first = rows[0]
    replies = (
        [Reply(runs[0].reference_name, _reply_text(first["reference_reply"]))] if "reference_reply" in first else []
    )
    for run, row in zip(runs, rows, strict=True):
        facts = [f"KL {row['kl']:.3g} nats"] if is_number(row.get("kl")) else []
        facts += [f"{row['tokens']} tokens"] if isinstance(row.get("tokens"), int) else []
        facts += ["cut at the limit"] if row.get("ended") is False else []
        who = (run.label or run.name) if len(runs) > 1 else run.stage.upper()
        replies.append(Reply(who, _reply_text(row["reply"]), ", ".join(facts)))
    return Case(first["prompt"], replies, ahead=first["kl"] if is_number(first.get("kl")) else 0.0)


def _first(title: str, cases: Sequence[Case]) -> CaseGroup:
    return CaseGroup(f"{title}, {min(SHOWN, len(cases))} of {len(cases)}", cases[:SHOWN])


def _drawn(cases: Sequence[Case]) -> CaseGroup:
    drawn = random.Random(SEED).sample(list(cases), min(SHOWN, len(cases)))
    return CaseGroup(f"A random draw of {len(drawn)}, with a fixed seed", drawn)


def _reply_text(text: Any) -> str:
    return shortened(str(text).strip(), REPLY_CHARACTERS) or "(empty)"


def shortened(text: str, most: int, keep_end: bool = False) -> str:
    """At most `most` characters of a text, its end where that matters, and how many more there are."""
    left_out = len(text) - most
    if left_out <= 0:
        return harmless(text)
    said = f"[{left_out:,} more characters]"
    return f"{said} … {harmless(text[-most:])}" if keep_end else f"{harmless(text[:most])} … {said}"
