"""The run directory: what a run leaves behind, and how it is read back."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from alignlab.disk import (
    find_damage,
    is_sealed,
    read_lines,
    read_record,
    remove_left_behind,
    seal,
    write_lines,
    write_record,
    write_text,
)
from alignlab.errors import RunError

EXAMINATION = "data.json"  # in the folder of a recipe's runs: what `alignlab data` has found
PACKAGES = ("alignlab", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory, named by stage and recipe: `runs/mistral/dpo-beta0.3`."""

    path: Path
    is_writer: bool = True  # false in all processes of a launch but the first

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def manifest_file(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples_file(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def scores_file(self) -> Path:
        return self.path / "scores.jsonl"

    @property
    def dropped_file(self) -> Path:
        return self.path / "dropped.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def manifest(self) -> dict[str, Any]:
        """What the run says of itself; empty before it starts."""
        if not self.manifest_file.is_file():
            return {}
        try:
            return read_record(self.manifest_file)
        except ValueError as e:
            raise RunError(f"{self.manifest_file} is {e}; remove {self.path} to start the run anew") from None

    @property
    def is_finished(self) -> bool:
        return self.manifest.get("status") == "finished"

    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.metrics_file)

    def samples(self) -> list[dict[str, Any]]:
        return read_lines(self.samples_file)

    def note(self, **facts: Any) -> None:
        """Adds facts to the manifest, whole or not at all."""
        if self.is_writer:
            write_record(self.manifest_file, {**self.manifest, **facts})


def seal_files(run: Run) -> None:
    """Writes down what the files of a finished run hold; its model has a seal of its own, its manifest a checksum."""
    files = (run.recipe_file, run.metrics_file, run.samples_file, run.scores_file, run.dropped_file)
    seal(run.path, [file.name for file in files])


def refuse_changed(run: Run) -> None:
    """Raises RunError where a file of a finished run is not what it was when the run finished."""
    if run.is_finished and is_sealed(run.path) and (name := find_damage(run.path)):
        raise RunError(
            f"{run.path / name} has changed since the run finished; bring it back from a copy, "
            f"or train the run again with --force"
        )


def cut_back(run: Run, step: int) -> None:
    """Leaves only what was logged up to `step`, which is where training goes on."""
    for file in (run.metrics_file, run.samples_file):
        if file.is_file():
            write_lines(file, [row for row in read_lines(file) if row["step"] <= step])
    if warnings := run.manifest.get("warnings"):
        run.note(warnings=[warning for warning in warnings if warning["step"] <= step])


@contextlib.contextmanager
def opened(
    path: Path, stage: str, consumed: Mapping[str, Any], recipe_yaml: str, *, force: bool = False
) -> Iterator[Run]:
    """A run directory to train in, locked while the context lasts; its status is kept whatever happens.

    Raises RunError where another process holds it, or where it was made from other settings than `consumed`. A run
    that is finished comes back as it is: ask `is_finished` before training. `force` moves an older run aside.
    """
    from filelock import FileLock, Timeout

    path.mkdir(parents=True, exist_ok=True)
    run = Run(path)
    if run.is_finished and not force:  # only read, by as many at once as start from it
        refuse_changed(run)
        _refuse_other_settings(run, stage, consumed)
        yield run
        return
    lock = FileLock(path.parent / f".{path.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"{path} is in use by another process; wait for it, or name this run with --run") from None
    try:
        if force and run.manifest:
            _move_aside(path)
        remove_left_behind(path)
        _refuse_other_settings(run, stage, consumed)
        if not run.is_finished:
            write_text(run.recipe_file, recipe_yaml)
            run.note(**_circumstances(stage, consumed))
        with _recorded(run):
            yield run
    finally:
        lock.release()


@contextlib.contextmanager
def _recorded(run: Run) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as e:
        with contextlib.suppress(OSError):  # a full disk must not hide the error itself
            run.note(status="failed", stop_reason=f"{type(e).__name__}: {e}".splitlines()[0])
        raise


def _move_aside(path: Path) -> None:
    aside = next(p for n in range(1, 10_000) if not (p := path.with_name(f"{path.name}.old{n}")).exists())
    path.rename(aside)
    path.mkdir()
    print(f"{path}: the older run is kept as {aside}", file=sys.stderr)


def _refuse_other_settings(run: Run, stage: str, consumed: Mapping[str, Any]) -> None:
    made_from = run.manifest.get("consumed")
    if made_from is None:
        return
    before, after = _flat(made_from), _flat(json.loads(json.dumps(consumed, default=str)))
    if changed := sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key)):
        named = ", ".join(f"{key} was {before.get(key)!r}, is {after.get(key)!r}" for key in changed)
        raise RunError(
            f"{run.path} was made from other settings: {named}; "
            f"name a new run with --run, or train it again with --force"
        )
    assert run.manifest["stage"] == stage, f"{run.path} holds a {run.manifest['stage']} run"


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    return {k: v for key in tree for k, v in _flat(tree[key], f"{prefix}.{key}" if prefix else key).items()}


def _circumstances(stage: str, consumed: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "stage": stage,
        "status": "running",
        "stop_reason": None,
        "consumed": consumed,
        "command": " ".join(["alignlab", *sys.argv[1:]]),
        "versions": package_versions(),
        "git_commit": _git_commit(),
        "machine": {"platform": platform.platform(), "python": platform.python_version(), "cpus": os.cpu_count()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def package_versions() -> dict[str, str]:
    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: found for name in PACKAGES if (found := version(name))}


def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def last_whole_checkpoint(run: Run) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint that is whole, and the newer ones that are not."""
    found = [p for p in run.checkpoints.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    damaged = []
    for checkpoint in sorted(found, key=step_of, reverse=True):
        if not find_damage(checkpoint):
            return checkpoint, damaged
        damaged.append(checkpoint)
    return None, damaged


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def remove_checkpoints(checkpoints: Iterable[Path]) -> None:
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint)
