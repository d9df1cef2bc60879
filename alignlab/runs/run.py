"""The run directory: what a run leaves behind, and how it is read back."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from alignlab.disk import (
    find_damage,
    is_sealed,
    read_lines,
    read_record,
    remove_left_behind,
    seal,
    sync,
    write_lines,
    write_record,
    write_text,
)
from alignlab.errors import RunError
from alignlab.recipe.fields import suggest
from alignlab.recipe.load import LONGEST_NAME
from alignlab.recipe.written import find_recipe
from alignlab.runs import typed
from alignlab.text.estimate import Estimate
from alignlab.text.tables import WinRate

log = logging.getLogger(__name__)

RUNS = Path("runs")  # holds a folder of runs for each recipe
EXAMINATION = "data.json"  # in the folder of a recipe's runs: what `alignlab data` has found
SWEEP = "sweep.json"  # beside it: the members of the last sweep, and the choice
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+-]*")  # of a run: a folder beside others, and nothing else
PACKAGES = ("alignlab", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class Base:
    """The base model, by a hash of a folder's weights or by the hub's commit."""

    name: str
    weights: str | None = None
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class Parent:
    """What a DPO run started from: an SFT run, or `model.start`."""

    run: str | None = None
    start: str | None = None
    weights: str | None = None  # a hash; none where they are the hub's

    def __str__(self) -> str:
        weights = f" (weights {self.weights})" if self.weights else ""
        return f"{self.run or self.start}{weights}"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows that were read, and what became of them."""

    rows: int | None = None
    kept: Mapping[str, int] = field(default_factory=dict)  # by split
    dropped: Mapping[str, int] = field(default_factory=dict)  # by reason
    repaired: Mapping[str, int] = field(default_factory=dict)  # by what was mended
    parts: Sequence[Mapping[str, Any]] = ()  # a source each
    fingerprint: str | None = None


@dataclass(frozen=True, kw_only=True)
class Machine:
    platform: str | None = None
    python: str | None = None
    cpus: int | None = None
    gpus: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of `monitor`: what its guards allowed."""

    max_kl: float | None = None
    max_accuracy: float | None = None
    action: str | None = None


@dataclass(frozen=True, kw_only=True)
class Warned:
    """What a guard has said."""

    guard: str
    step: int
    message: str


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures on the test split; of an SFT run the perplexity alone, and of how many replies."""

    margin: Annotated[Estimate | None, Field(alias="rewards/margins")] = None
    accuracy: Annotated[Estimate | None, Field(alias="rewards/accuracies")] = None
    chosen: Annotated[Estimate | None, Field(alias="rewards/chosen")] = None
    rejected: Annotated[Estimate | None, Field(alias="rewards/rejected")] = None
    loss: Estimate | None = None
    win_rate: Estimate | WinRate | None = None  # by the toy's rule
    perplexity: float | None = None
    reference_perplexity: float | None = None
    n: int | None = None
    kl: float | None = None
    kl_stderr: float | None = None
    reply_tokens: float | None = None
    reply_tokens_stderr: float | None = None
    eos_rate: float | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a run says of itself, in `manifest.json`; what it does not know yet is none or empty."""

    stage: Literal["sft", "dpo", "kto", "orpo"]
    status: Literal["running", "finished", "stopped", "failed"]
    stop_reason: str | None = None
    consumed: Mapping[str, Any] = field(default_factory=dict)  # the settings that its result depends on, by section
    command: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    git_commit: str | None = None
    machine: Machine = Machine()
    started: str | None = None  # 2026-01-31T12:00:00Z
    finished: str | None = None
    planned_gib: float | None = None
    peak_memory_gib: float | None = None
    made_from: Mapping[str, Any] = field(default_factory=dict)  # what else its result depends on, by content
    data: Rows | None = None
    sft_data: Rows | None = None  # where SFT learns from other data
    base: Base | None = None
    parent: Parent | None = None
    reference: str | None = None  # in a sentence
    stops: Sequence[str] = ()  # at which a sampled reply ends
    stored_reference: bool | None = None  # whether its log-probabilities came from the store
    limits: Limits | None = None
    warnings: Sequence[Warned] = ()
    wandb_id: str | None = None
    training_seconds: float | None = None
    sampling_seconds: float | None = None
    figures_seconds: float | None = None
    best_step: int | None = None  # whose weights were kept
    steps: int | None = None
    tokens: int | None = None  # that training has read, as TRL counts them
    world_size: int | None = None
    probe: Sequence[float] = ()  # log-probabilities of a few replies, by which the model is known again
    base_probe: Sequence[float] = ()  # the same replies' before SFT
    test: Figures | None = None


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Of texts, in tokens."""

    median: float
    p95: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How many texts lie in [edge, next edge) tokens; the last bin holds its upper edge."""

    edges: Sequence[int]
    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]

    def __post_init__(self):
        if not 0 < len(self.prompt) == len(self.chosen) == len(self.rejected) == len(self.edges) - 1:
            raise ValueError("a count is missing or too many: there is one less than edges")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A pair that shows a finding."""

    what: str
    file: str | None = None
    line: int | None = None


@dataclass(frozen=True, kw_only=True)
class DataFinding:
    """A sign that something is wrong with the data, or that it was looked for in vain: a count of 0."""

    name: str
    level: str
    says: str
    count: int  # of pairs
    of: int | None = None  # pairs that were looked at
    share: float | None = None
    shown: Sequence[Example] = ()
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """How often the reply that has more of something is the chosen one; none where no pair differs in it."""

    name: str
    n: int
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What `alignlab data` has found, as far as a report shows it; in `data.json`."""

    fingerprint: str | None
    tokens: Mapping[str, Lengths]
    histogram: Histogram
    findings: Sequence[DataFinding]
    features: Sequence[Feature]


@dataclass(frozen=True, kw_only=True)
class SweepMember:
    """A run of a sweep as `sweep.json` has it; its figures are those of the step whose weights it kept."""

    run: str  # its name
    path: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)  # what is its own: "dpo.beta" → 0.3
    status: str = "missing"
    error: str | None = None
    margin: Estimate | None = None
    margin_over_beta: Estimate | None = None
    accuracy: Estimate | None = None
    kl: Estimate | None = None  # nats per reply
    win_rate: Estimate | WinRate | None = None  # on the test split
    perplexity_change: float | None = None  # a share of what it was before training


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What `alignlab sweep` wrote: the members, and the choice among them; in `sweep.json`."""

    members: Sequence[SweepMember]
    recipe: str = ""
    rule: str = ""
    max_kl: float | None = None
    split: str | None = None  # that the choice was made on
    overrides: Sequence[str] | None = None  # that all members share
    choice: str | None = None  # a member's name
    why: str | None = None
    test: Mapping[str, Estimate | None] | None = None  # of the chosen run, on pairs that chose nothing
    warnings: Sequence[str] = ()


FACTS = {each.name for each in dataclasses.fields(Manifest)}


@dataclass(frozen=True)
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
    def has_started(self) -> bool:
        return self.manifest_file.is_file()

    @property
    def manifest(self) -> Manifest:
        """What the run says of itself; RunError where there is no run, or what is there cannot be read."""
        if not self.has_started:
            raise RunError(f"there is no run at {self.path} (it has no manifest.json)")
        return typed.read_file(Manifest, self.manifest_file, f"remove {self.path} to start the run anew")

    @property
    def is_finished(self) -> bool:
        return self.has_started and self.manifest.status == "finished"

    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.metrics_file, step=int)

    def samples(self) -> list[dict[str, Any]]:
        return read_lines(self.samples_file, step=int, split=str, prompt=str, reply=str)

    def scores(self) -> list[dict[str, Any]]:
        return read_lines(self.scores_file, split=str, pair=int, chosen=float, rejected=float)

    def note(self, **facts: Any) -> None:
        """Adds facts to the manifest, whole or not at all; what another version has written there stays."""
        assert facts.keys() <= FACTS, facts.keys() - FACTS
        if self.is_writer:
            before = read_record(self.manifest_file) if self.has_started else {}
            write_record(self.manifest_file, {**before, **{name: _plain(value) for name, value in facts.items()}})


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


def check_name(name: str, where: str = "--run") -> str:
    """The name; RunError where it is not one that a run can have."""
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        shown = repr(name) if len(name) <= 100 else f"{name[:20]!r}… of {len(name)} characters"
        raise RunError(
            f"{where} {shown} is no name of a run; write at most {LONGEST_NAME} letters, digits and ._=+-, "
            f"with a letter or digit first"
        )
    return name


# --- finding a run ---


def find_run(recipe: str, name: str | None = None, *, best: bool = False, root: Path = RUNS) -> Run:
    """The run that a command is about: NAME, or the best of the sweep, else the last run that is not SFT's.

    RECIPE is a run directory itself, a folder of runs, or a recipe's name or file, whose runs are under `root`; the
    recipe need not be there. RunError says what is there instead.
    """
    folder = runs_folder(recipe, root)
    if Run(folder).has_started:
        if name is not None or best:
            raise RunError(f"{recipe} is a run itself; leave --run, --runs and --best out, or name its recipe")
        return Run(folder)
    if best:
        return _chosen(folder)
    if name is not None:
        return _there(folder / check_name(name), recipe)
    if not (runs := runs_in(folder)):
        return _there(folder, recipe)
    return max(runs, key=lambda run: (run.manifest.stage != "sft", run.manifest.started or ""))


def runs_folder(recipe: str, root: Path = RUNS) -> Path:
    """Where the runs of RECIPE are: `runs/NAME` for a recipe's name or file; a folder is itself."""
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        return root / path.stem
    holds_runs = Run(path).has_started or runs_in(path) or (path / SWEEP).is_file()
    return path if holds_runs or len(path.parts) > 1 else root / recipe


def runs_in(folder: Path) -> list[Run]:
    return sorted((Run(file.parent) for file in folder.glob("*/manifest.json")), key=lambda run: run.path)


def read_sweep(folder: Path) -> Sweep | None:
    """The sweep whose members are in this folder, none where there was no sweep."""
    file = folder / SWEEP
    if not file.is_file():
        return None
    sweep = typed.read_file(Sweep, file, "make it anew with alignlab sweep")
    for name in (*(member.run for member in sweep.members), *([sweep.choice] if sweep.choice else [])):
        check_name(name, f"{file}:")
    return sweep


def parent_of(run: Run) -> Run | None:
    """The SFT run that a DPO run started from: beside it, as folders may be moved, or where its manifest says.

    None where it started from `model.start`, or the SFT run is not there any more.
    """
    parent = run.manifest.parent
    if not parent or not parent.run:
        return None
    places = (run.path.absolute().parent / Path(parent.run).name, Path(parent.run))
    return next((found for found in map(Run, places) if found.path.is_dir()), None)


def finished(run: Run) -> Run:
    """The run; RunError where it has not finished, its model is gone, or its files have changed since."""
    if not run.is_finished:
        command = run.manifest.command
        goes_on = f"`{command}`" if command else "the command that made it"
        raise RunError(f"{run.path} is not finished (it is {run.manifest.status}); {goes_on} goes on from there")
    if not run.model.is_dir():
        raise RunError(f"{run.path} has no model/; copy the run whole from where it was made")
    refuse_changed(run)
    return run


def _chosen(folder: Path) -> Run:
    sweep = read_sweep(folder)
    if sweep is None:
        raise RunError(f"there is no {folder / SWEEP} with a best run; make it with alignlab sweep, or name a run")
    if sweep.choice is None:
        raise RunError(f"{folder / SWEEP} has chosen no member: {sweep.why}; name a run with --run")
    return _there(folder / sweep.choice)


def _there(path: Path, recipe: str | None = None) -> Run:
    """The run at a path; where there is none, RunError says which are beside it, and how RECIPE's are made."""
    if (run := Run(path)).has_started:
        return run
    if run.metrics_file.is_file():
        raise RunError(f"{path} has no manifest.json, so it is no run directory; copy it whole from where it was made")
    if beside := [other.path.name for other in runs_in(path.parent)]:
        raise RunError(f"there is no run at {path} (there: {', '.join(beside)}){suggest(path.name, beside)}")
    if (
        recipe is None
        or path.is_dir()
        or (len(Path(recipe).parts) > 1 and Path(recipe).suffix not in (".yaml", ".yml"))
    ):
        raise RunError(f"there is no run at {path}; `alignlab dpo RECIPE` makes one in runs/RECIPE")
    find_recipe(recipe)  # says which recipes there are
    raise RunError(f"there is no run of {recipe} yet (looked in {path}); make one with alignlab dpo {recipe}")


def _plain(value: Any) -> Any:
    """What JSON can hold, without what is not known."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: its for name, its in asdict(value).items() if its is not None}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def cut_back(run: Run, step: int, logged: Sequence[Mapping[str, Any]]) -> None:
    """Leaves of the logs what training goes on from: the rows of `logged`, and replies up to `step`.

    A row that the file has lost is written again, without its time. Replies on the test split go, since they are drawn
    after training, and would be there twice.
    """
    found = {_timeless(row): row for row in run.metrics()}
    rows = [found.get(_timeless(row), row) for row in logged]
    if lost := sum("time" not in row for row in rows):
        log.warning("%s had lost %d of %d rows; they are back, without their times", run.metrics_file, lost, len(rows))
    write_lines(run.metrics_file, rows)
    write_lines(run.samples_file, [row for row in run.samples() if row["step"] <= step and row["split"] != "test"])
    if run.has_started and run.manifest.warnings:
        run.note(warnings=[warning for warning in run.manifest.warnings if warning.step <= step])


def _timeless(row: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in row.items() if key != "time"}, sort_keys=True)


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
        if force and run.has_started:
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
    log.info("%s: the older run is kept as %s", path, aside)


def _refuse_other_settings(run: Run, stage: str, consumed: Mapping[str, Any]) -> None:
    if not run.has_started or not (manifest := run.manifest).consumed:
        return
    if changed := changed_settings(run, consumed):
        raise RunError(
            f"{run.path} was made from other settings: {changed}; "
            f"name a new run with --run, or train it again with --force"
        )
    assert manifest.stage == stage, f"{run.path} holds a {manifest.stage} run"


def changed_settings(run: Run, consumed: Mapping[str, Any]) -> str:
    """The settings in which `consumed` differs from what the run was made with, as text; empty where none does.

    A setting that the version which made the run did not have counts as not set.
    """
    before, after = _flat(run.manifest.consumed), _flat(json.loads(json.dumps(consumed, default=str)))
    unset = {key for key in after.keys() - before.keys() if after[key] in (None, {}, [])}
    return _changed(before, after, (before.keys() | after.keys()) - unset)


def refuse_other_origin(run: Run, made_from: Mapping[str, Any]) -> None:
    """Refuses a run whose data, weights or way of writing have changed since it was made or begun."""
    before = run.manifest.made_from
    if changed := _changed(before, made_from, before.keys()):
        raise RunError(
            f"{run.path} was made from something else: {changed}; "
            f"bring that back, or train it again (alignlab {run.manifest.stage} --force)"
        )


def _changed(before: Mapping[str, Any], after: Mapping[str, Any], keys: Iterable[str]) -> str:
    changed = sorted(key for key in keys if before.get(key) != after.get(key))
    return ", ".join(f"{key} was {before.get(key)!r}, is {after.get(key)!r}" for key in changed)


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
        "command": _command(),
        "versions": package_versions(),
        "git_commit": _git_commit(),
        "machine": {"platform": platform.platform(), "python": platform.python_version(), "cpus": os.cpu_count()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _command() -> str:
    """The command line that began the run; that of a notebook's kernel would say nothing."""
    script = Path(sys.argv[0])
    if script.name == "ipykernel_launcher.py":
        return "python, in a notebook"
    is_ours = script.stem == "alignlab" or script.parent.name == "alignlab"
    return " ".join([*(["alignlab"] if is_ours else ["python", script.name]), *sys.argv[1:]])


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


def mark_complete(checkpoint: Path) -> None:
    """Writes the marker that makes a checkpoint count, once its files are on the disk."""
    for file in checkpoint.rglob("*"):
        if file.is_file():
            sync(file)
    seal(checkpoint)


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of the checkpoint is as it was when the marker was written."""
    return not find_damage(checkpoint)


def last_whole_checkpoint(run: Run) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint that is whole, with the best one that it names, and the newer ones that are not."""
    found = [p for p in run.checkpoints.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    damaged = []
    for checkpoint in sorted(found, key=step_of, reverse=True):
        if is_whole(checkpoint) and is_whole(best_of(checkpoint)):
            return checkpoint, damaged
        damaged.append(checkpoint)
    return None, damaged


def best_of(checkpoint: Path) -> Path:
    """The best checkpoint up to this one, which is beside it; itself where there is none."""
    best = read_state(checkpoint)["best_global_step"]
    return checkpoint.with_name(f"checkpoint-{best}") if best else checkpoint


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What the trainer knew when it wrote the checkpoint: `log_history`, `best_global_step` and more."""
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def remove_checkpoints(checkpoints: Iterable[Path]) -> None:
    for checkpoint in checkpoints:
        shutil.rmtree(checkpoint)
