"""What reading and the limits on length have done to the data: rows left out, prompts shortened, replies cut."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from alignlab.data.pairing import CUT, LONG_REPLY, SHORTENED
from alignlab.data.prepare import Prepared
from alignlab.doctor.finding import Finding, Shown, few

MANY_DROPPED = 0.05  # of the rows; above it the rest may no longer be a fair draw of the data
MANY_SHORTENED = 0.2


def limit_findings(prepared: Prepared) -> list[Finding]:
    kept = sum(prepared.kept.values())
    return [_dropped(prepared), _shortened(prepared, kept), _cut(prepared, kept)]


def _dropped(prepared: Prepared) -> Finding:
    count, seen = sum(prepared.dropped.values()), prepared.rows
    most = sorted(prepared.dropped.items(), key=lambda item: -item[1])[:3]
    why = ": " + ", ".join(f"{reason} ({n:,})" for reason, n in most) if most else ""
    keep = "; data.max_reply_tokens and data.long_replies=cut keep long replies"
    return Finding(
        name="dropped-rows",
        level="doubtful" if count > MANY_DROPPED * seen else "note",
        says=f"{count:,} of {seen:,} rows and pairs were left out{why}",
        count=count,
        of=max(seen, count),
        shown=few(_dropped_rows(prepared)),
        advice="dropped.jsonl of a run has each row with its reason" + keep * (LONG_REPLY in prepared.dropped),
    )


def _dropped_rows(prepared: Prepared) -> Iterator[Shown]:
    with prepared.dropped_rows.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield Shown("", 0, f"{Path(row['file']).name}:{row['line']} {row['reason']}")


def _shortened(prepared: Prepared, kept: int) -> Finding:
    count = prepared.repaired.get(SHORTENED, 0)
    return Finding(
        name="shortened-prompts",
        level="doubtful" if count > MANY_SHORTENED * kept else "note",
        says=f"{count:,} prompts lost their oldest turns to data.max_prompt_tokens",
        count=count,
        of=kept,
        advice="a larger data.max_prompt_tokens keeps them; alignlab plan says what that takes",
    )


def _cut(prepared: Prepared, kept: int) -> Finding:
    count = prepared.repaired.get(CUT, 0)
    return Finding(
        name="cut-replies",
        level="doubtful" if count else "note",
        says=f"{count:,} replies were cut at data.max_reply_tokens and teach no end",
        count=count,
        of=2 * kept,
        advice="a larger data.max_reply_tokens, or data.long_replies=drop",
    )
