"""What reading has made of the rows: what was not read, replies that hold more than the reply, how much there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from alignlab.data.layouts import OTHER_PROMPTS
from alignlab.data.prepare import Prepared
from alignlab.data.transcript import ASSISTANT, HUMAN
from alignlab.doctor.finding import Finding, Shown, few
from alignlab.doctor.scan import scan

# Advice of the course on DPO that this project grew out of, as are 50,000 to 100,000 pairs and balanced sources
FEW_PAIRS = 10_000
ONE_SOURCE = 0.8  # of the pairs; ours: above it the others hardly count
SHORT = 12  # characters of a question, with which an answer may well begin
OFTEN = 0.05  # of the pairs; above it a question before the answer is no turn of phrase

Transcript = Callable[[str], str]


def reading_findings(prepared: Prepared, transcript: Transcript) -> Iterator[Finding]:
    """`transcript` gives a prompt as HH turns (`partial(alignlab.prompts.as_transcript, form)`)."""
    yield _not_read(prepared)
    yield _different_prompts(prepared)
    yield _prompt_in_reply(prepared, transcript)
    yield _few_pairs(prepared)
    yield _one_source(prepared)


def _not_read(prepared: Prepared) -> Finding:
    named = ", ".join(f"{name} ({count:,})" for name, count in prepared.not_read.items())
    return Finding(
        name="not-read",
        level="note",
        says=f"columns, or keys of messages, that are not read, with their rows: {named or 'none'}",
        count=max(prepared.not_read.values(), default=0),
        of=prepared.rows,
        advice="data.columns names a column that should be read; what the format or chat template leaves out cannot be",
    )


def _different_prompts(prepared: Prepared) -> Finding:
    count = prepared.dropped.get(OTHER_PROMPTS, 0)
    return Finding(
        name="different-prompts",
        level="doubtful" if count > OFTEN * prepared.rows else "note",
        says=f"the two dialogues of {count:,} rows part before the last turn: their replies answer different prompts",
        count=count,
        of=prepared.rows,
        advice="DPO needs two replies to one prompt: cut such dialogues behind the first turn in which they differ",
    )


def _prompt_in_reply(prepared: Prepared, transcript: Transcript) -> Finding:
    shown, pairs = [], sum(prepared.kept.values())
    for split, start, found in scan(prepared, ("prompt", "chosen", "rejected"), partial(find_echoes, transcript)):
        shown += [Shown(split, start + number, what) for number, what in found]
    return Finding(
        name="prompt-in-reply",
        level="wrong" if len(shown) > OFTEN * pairs else "note",
        says=f"a reply of {len(shown):,} pairs begins with the prompt, which the policy learns to repeat",
        count=len(shown),
        of=pairs,
        shown=few(shown),
        advice="take the prompt off the replies in the file",
    )


def find_echoes(transcript: Transcript, batch: Mapping[str, Sequence[Any]]) -> list[tuple[int, str]]:
    """The pairs of a batch in which a reply begins with what the last user turn says, and that turn."""
    found = []
    for number, (prompt, *replies) in enumerate(zip(batch["prompt"], batch["chosen"], batch["rejected"], strict=True)):
        starts = [reply.lstrip() for reply in replies]
        if any(start[:SHORT] in prompt for start in starts if len(start) > SHORT):
            asked = transcript(prompt).removesuffix(ASSISTANT).rpartition(HUMAN)[2].strip()
            if len(asked) > SHORT and any(start.startswith(asked) for start in starts):
                found.append((number, f"{asked[:60]!r}"))
    return found


def _few_pairs(prepared: Prepared) -> Finding:
    pairs = sum(prepared.kept.values())
    return Finding(
        name="few-pairs",
        level="note",
        says=f"{pairs:,} pairs; the course on DPO advises at least {FEW_PAIRS:,}, better 50,000 to 100,000",
        count=pairs if pairs < FEW_PAIRS else 0,
        of=pairs,
        advice="bring more pairs, or expect a small effect",
    )


def _one_source(prepared: Prepared) -> Finding:
    kept = {part["path"]: part["kept"] for part in prepared.parts}
    pairs, largest = sum(kept.values()), max(kept, key=kept.get)
    is_one = len(kept) > 1 and kept[largest] > ONE_SOURCE * pairs
    return Finding(
        name="unbalanced-sources",
        level="note",
        says=f"{kept[largest]:,} of {pairs:,} pairs come from {largest}; the course on DPO advises to balance sources",
        count=kept[largest] if is_one else 0,
        of=pairs,
        advice="bring more pairs of the other paths, or fewer of this one",
    )
