"""SIGKILL at a random moment, the same command again until it ends, and everything compared with a run never killed."""

from __future__ import annotations

import contextlib
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import workplace
from asked import JUDGE, CountingJudge, answers_on_disk
from workplace import append, copied, differences, outcome, parts, random_death, run_command

MOST_KILLS = 4  # of one chain


@dataclass(frozen=True)
class Kind:
    """A command, and the commands whose results it stands on."""

    name: str
    command: Sequence[str]
    before: Sequence[Sequence[str]] = ()
    run: str | None = None  # whose last checkpoint opens the window


def kinds() -> Iterator[Kind]:
    for recipe in workplace.RECIPES:
        yield Kind(f"dpo, ended by {recipe}", ("dpo", recipe), (("sft", recipe),), f"runs/{recipe}/dpo")
    for recipe in ("steps", "constant"):
        yield Kind(f"sft, {recipe}", ("sft", recipe), (), f"runs/{recipe}/sft")
    yield Kind("sft and dpo", ("dpo", "steps"), (), "runs/steps/dpo")
    yield Kind("sweep", ("sweep", "steps"), (("sft", "steps"),), "runs/steps/dpo-beta0.1")
    made = (("sft", "steps"), ("dpo", "steps"))
    yield Kind("eval", ("eval", "steps", "--replies", "8", "--max-new-tokens", "8"), made)
    yield Kind("export", ("export", "steps", "--to", "out", "--rows", "4"), made)
    yield Kind("data", ("data", "steps"), ())
    made = (("sft", "rounds"),)
    yield Kind("pairs", ("pairs", "rounds", "--judge", f"llm:{JUDGE}"), made)
    yield Kind("rounds", ("rounds", "rounds"), made, "runs/rounds/rounds-1")


@dataclass(frozen=True)
class Sound:
    """A kind's run that nobody killed."""

    start: Path  # the folder before it
    outcome: dict[str, str]
    changes: int
    window: int  # changes behind the last checkpoint
    last: str | None  # that checkpoint's marker
    seconds: float


def never_killed(kind: Kind, template: Path, root: Path) -> Sound:
    place = root / kind.name.replace(" ", "-").replace(",", "")
    start = copied(template, place / "start")
    for command in kind.before:
        done = run_command(start, command)
        assert done.code == 0, f"{kind.name}: {' '.join(command)} ended with {done.code}:\n{done.said[-2000:]}"
    folder = copied(start, place / "sound")
    done = run_command(folder, kind.command)
    assert done.code == 0, f"{kind.name} ended with {done.code}:\n{done.said[-2000:]}"
    markers = [at for at, line in enumerate(done.changes) if kind.run and f"{kind.run}/" in line and _is_marker(line)]
    last = done.changes[markers[-1]].partition(" ")[2] if markers else None
    last = last[last.index("runs/") :] if last else None
    window = len(done.changes) - markers[-1] - 1 if markers else 0
    return Sound(start, outcome(folder), len(done.changes), window, last, done.seconds)


def _is_marker(line: str) -> bool:
    return line.startswith("os.rename") and line.endswith("COMPLETE.json")


def campaign(
    template: Path,
    root: Path,
    results: Path,
    seeds: Sequence[int],
    minutes: float,
    wanted: int,
    only: Sequence[str] = (),
) -> None:
    """Chains of kills, kind after kind, seed after seed, until there are as many kills as wanted, or time is up."""
    judge = CountingJudge(root)
    try:
        _campaign(template, root, results, seeds, minutes, wanted, only, judge)
    finally:
        judge.stop()


def _campaign(template, root, results, seeds, minutes, wanted, only, judge: CountingJudge) -> None:
    began = time.monotonic()
    done = parts(results, lambda row: (row["chain"], row["seed"]))
    kills = sum(1 for _ in results.read_text().splitlines()) if results.is_file() else 0
    sound: dict[str, Sound] = {}
    for seed in seeds:
        for kind in kinds():
            if kills >= wanted or time.monotonic() - began > 60 * minutes:
                return
            if (kind.name, seed) in done or (only and kind.name not in only):
                continue
            if kind.name not in sound:
                sound[kind.name] = never_killed(kind, template, root)
            rows = chain(kind, sound[kind.name], root / "chain", seed, judge)
            for row in rows:
                append(results, row)
            kills += len(rows)
            bad = [row for row in rows if not row["same"]]
            print(
                f"{kind.name}, seed {seed}: {len(rows)} kills, {'DIFFERENT' if bad else 'as never killed'}", flush=True
            )
            if bad:
                print(f"  {bad[-1]['differences'] or bad[-1]['said']}", flush=True)


def chain(kind: Kind, sound: Sound, folder: Path, seed: int, judge: CountingJudge) -> list[dict]:
    """One line for each kill of one chain: seed, where, and whether what came out is what came out without."""
    draw = random.Random(f"{kind.name}/{seed}")
    copied(sound.start, folder)
    deaths: list[dict] = []
    asked_again: list[str] = []  # though the answer was on the disk
    for _ in range(draw.randint(1, MOST_KILLS)):
        behind = bool(sound.last and (folder / sound.last).exists())
        death = random_death(draw, sound.window if behind else sound.changes, sound.window, sound.seconds)
        with watching(folder, judge, asked_again):
            ending = run_command(folder, kind.command, death, sound.last)
        if not ending.killed:
            break
        behind = bool(sound.last and (folder / sound.last).exists())
        at = ending.changes[-1] if ending.changes else "before any change"
        deaths.append({"kill": str(death), "behind_the_last_checkpoint": behind, "last_change": at})
    with watching(folder, judge, asked_again):
        ending = run_command(folder, kind.command)
    found = outcome(folder)
    wrong = differences(sound.outcome, found) if ending.code == 0 else []
    left = left_behind(folder)
    facts = {
        "chain": kind.name,
        "seed": seed,
        "code": ending.code,
        "same": ending.code == 0 and not wrong and not left and not asked_again,
        "asked_again": len(asked_again),
        "differences": wrong[:10],
        "left_behind": left,
        "said": "" if ending.code == 0 else ending.said[-1500:],
        "hash": workplace._hash(found),
    }
    shutil.rmtree(folder, ignore_errors=True)
    return [{**facts, **death} for death in deaths] or [{**facts, "kill": "never", "behind_the_last_checkpoint": False}]


@contextlib.contextmanager
def watching(folder: Path, judge: CountingJudge, asked_again: list[str]) -> Iterator[None]:
    """Notes the requests of a command whose answers were on the disk before it."""
    stored, before = answers_on_disk(folder), len(judge.requests())
    yield
    asked_again += [key for key in judge.requests()[before:] if key in stored]


def left_behind(folder: Path) -> list[str]:
    """Files that are nobody's once the command has ended; locks are meant to stay."""
    names = [p for p in folder.rglob("*") if p.name.startswith((".", "tmp")) and p.suffix != ".lock"]
    ours = {".said", ".said-changes"}
    return sorted(str(p.relative_to(folder)) for p in names if p.name not in ours)[:10]
