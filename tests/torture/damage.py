"""Damage to each file that a finished run and its cache hold, and what every command that reads it then says."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from workplace import Ending, append, copied, parts, run_command

WEIGHTS = (".safetensors", ".arrow", ".logps", ".replies", ".pt", ".pth", ".bin")
READERS = (
    ("report", "steps"),
    ("compare", "runs/steps/sft", "runs/steps/dpo"),
    ("eval", "steps", "--replies", "4", "--max-new-tokens", "4", "--limit", "4"),
    ("export", "steps", "--to", "out", "--rows", "2"),
    ("dpo", "steps"),
    ("dpo", "steps", "--run", "again"),
    ("data", "steps"),
)


def flip(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content) // 2, len(content))  # behind a header
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def hole(content: bytes, draw: random.Random) -> bytes:
    """A line inside is damaged."""
    lines = content.split(b"\n")
    lines[draw.randrange(max(len(lines) // 2, 1))] = b'{"step": 2, "x'
    return b"\n".join(lines)


def retyped(content: bytes, draw: random.Random) -> bytes:
    """JSON in which one value is of another type, or gone."""
    tree = json.loads(content)
    at = tree
    while isinstance(at, (dict, list)) and at:
        key = draw.choice(list(at) if isinstance(at, dict) else range(len(at)))
        if not isinstance(at[key], (dict, list)) or not at[key] or draw.random() < 0.4:
            at[key] = draw.choice(["x", 7, None, [], {}, True, -1.5])
            break
        at = at[key]
    return json.dumps(tree).encode()


def wounds(file: Path) -> dict:
    found = {"cut": cut, "empty": lambda content, draw: b"", "gone": None}
    if file.suffix in WEIGHTS:
        return {**found, "flip": flip}
    if file.suffix == ".jsonl":
        return {**found, "hole": hole}
    return {**found, "retyped": retyped} if file.suffix == ".json" else found


def campaign(template: Path, root: Path, results: Path, minutes: float, seed: int = 0) -> None:
    """One line for each file and wound: what every reader said; wrong is a traceback, or damage used in silence."""
    import time

    began, start = time.monotonic(), copied(template, root / "finished")
    for command in (("sft", "steps"), ("dpo", "steps"), READERS[2], ("data", "steps")):
        done = run_command(start, command)
        assert done.code == 0, done.said
    done = parts(results, lambda row: (row["file"], row["wound"]))
    for file in _files(start):
        for name, wound in wounds(start / file).items():
            if time.monotonic() - began > 60 * minutes:
                return
            if (_shown(file), name) not in done and (start / file).stat().st_size:
                append(results, _damaged(start, root / "hurt", file, name, wound, seed))


def _files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        if file.is_file() and inside.parts[0] in ("runs", "cache", "model") and file.suffix not in (".lock", ".html"):
            yield inside


def _shown(file: Path) -> str:
    """The same for each campaign: names in the cache are hashes."""
    return str(file)


def _damaged(start: Path, folder: Path, file: Path, name: str, wound, seed: int) -> dict:
    said = {}
    draw = random.Random(f"{file}/{name}/{seed}")
    copied(start, folder)
    content = (start / file).read_bytes()
    for command in READERS:
        _hurt(folder / file, content, wound, draw)
        ending = run_command(folder, command)
        said[" ".join(command[:2])] = _judged(ending)
        shutil.rmtree(folder / "out", ignore_errors=True)
    wrong = sorted(command for command, verdict in said.items() if verdict == "traceback")
    return {"file": _shown(file), "wound": name, "said": said, "wrong": wrong}


def _hurt(path: Path, content: bytes, wound, draw: random.Random) -> None:
    if wound is None:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(wound(content, draw))


def _judged(ending: Ending) -> str:
    if ending.traceback or ending.code not in (0, 1, 2):
        return "traceback"
    last = ending.said.strip().splitlines()[-1:] or [""]
    return f"{ending.code}: {last[0][:160]}" if ending.code else "0"
