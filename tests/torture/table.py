"""What came of the campaigns, as the table of docs/reliability.md."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def print_table(folder: Path) -> None:
    print("| what | tried | as it should be |\n|---|---|---|")
    for line in (*_kills(read(folder / "kills.jsonl")), *_others(folder)):
        print(line)


def _kills(rows: list[dict]):
    kills = [row for row in rows if row["kill"] != "never"]
    by_chain = {}
    for row in kills:
        by_chain.setdefault(row["chain"], []).append(row)
    for name, its in by_chain.items():
        chains = {row["seed"]: row["same"] for row in its}
        yield f"| SIGKILL in {name} | {len(its)} kills in {len(chains)} chains | {sum(chains.values())} chains |"
    if kills:
        chains = {(row["chain"], row["seed"]): row["same"] for row in kills}
        behind = sum(row["behind_the_last_checkpoint"] for row in kills)
        whole = f"{len(kills)} kills in {len(chains)} chains, {behind} behind the last checkpoint"
        yield f"| SIGKILL, all | {whole} | {sum(chains.values())} chains |"


def _others(folder: Path):
    damaged = read(folder / "damage.jsonl")
    if damaged:
        by_wound = Counter(row["wound"] for row in damaged)
        fine = Counter(row["wound"] for row in damaged if not row["wrong"])
        for wound, count in by_wound.items():
            yield f"| a file {_WOUNDS[wound]}, read by seven commands | {count} files | {fine[wound]} |"
    for name, about in (("disks", "a disk that fills"), ("twice", "two at once"), ("ranks", "launches of two ranks")):
        if rows := read(folder / f"{name}.jsonl"):
            yield f"| {about} | {len(rows)} | {sum(row['same'] for row in rows)} |"
    fuzzed = read(folder / "fuzz.jsonl")
    for kind in ("recipes", "rows"):
        if rows := [row for row in fuzzed if row["kind"] == kind]:
            inputs, wrong = sum(row["inputs"] for row in rows), sum(len(row["wrong"]) for row in rows)
            yield f"| fuzzed {kind} | {inputs:,} | {inputs - wrong:,} |"


_WOUNDS = {
    "flip": "with one bit flipped",
    "cut": "cut short",
    "empty": "emptied",
    "gone": "removed",
    "hole": "with a damaged line",
    "retyped": "with a value of another type",
}
