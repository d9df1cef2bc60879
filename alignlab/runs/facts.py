"""What a run directory says, as the report, the card and the terminal read it; imports no torch."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from alignlab.errors import RunError
from alignlab.recipe.load import TargetsSection
from alignlab.recipe.objectives import STAGES
from alignlab.runs import typed
from alignlab.runs.evaluation import (
    FILE,
    Evaluation,
    StoredEvaluation,
    Target,
    all_evaluations,
    judge_targets,
    read_evaluation,
)
from alignlab.runs.logs import MetricRow, last_samples, read_metrics
from alignlab.runs.run import EXAMINATION, Examination, Limits, Manifest, Run, Warned, parent_of, refuse_changed
from alignlab.text.estimate import Estimate, is_number
from alignlab.text.tables import Row, WinRate

COST_NOTE = "with the SFT run that it starts from; hours of one device"
OVER_REPLIES = ("kl", "reply_tokens", "eos_rate")  # whose n is the number of sampled replies


@dataclass(frozen=True, kw_only=True)
class OnTest:
    """A run's own figures on the test split, with their intervals as far as their errors are known."""

    accuracy: Estimate | None = None
    margin: Estimate | None = None
    perplexity: Estimate | None = None
    reference_perplexity: Estimate | None = None
    kl: Estimate | None = None
    reply_tokens: Estimate | None = None
    eos_rate: Estimate | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A run's own evaluation on validation pairs at one step."""

    step: int
    loss: float | None = None
    accuracy: float | None = None
    kl: float | None = None
    perplexity: float | None = None
    reply_tokens: float | None = None
    eos_rate: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """One run, whatever became of it."""

    name: str
    recipe: str
    folder: str
    manifest: Manifest
    label: str = ""  # its name beside other runs
    steps: int | None
    planned_steps: int | None
    silent_seconds: int | None  # since the last logged step
    test: OnTest
    win_rate: Estimate | WinRate | None  # over `versus`
    judge: str | None  # in words
    versus: str
    before: Evaluated | None  # the base model, where an SFT run says so
    first: Evaluated | None
    kept: Evaluated | None  # at the step whose weights were kept
    last: Evaluated | None
    evaluation: Evaluation | None
    others: Sequence[StoredEvaluation]  # evaluations that are not so full
    targets: Sequence[Target]
    examination: Examination | None
    settings: Mapping[str, str]  # every setting by its dotted name, as JSON
    recipe_text: str
    notices: Sequence[str]
    cost: Mapping[str, float] = field(default_factory=dict)  # see `cost_of`
    rows: Sequence[MetricRow] = field(repr=False)
    samples: Sequence[Mapping[str, Any]] = field(repr=False)  # its last replies

    @property
    def stage(self) -> str:
        return self.manifest.stage

    @property
    def status(self) -> str:
        return self.manifest.status

    @property
    def stop_reason(self) -> str | None:
        return self.manifest.stop_reason

    @property
    def best_step(self) -> int | None:
        return self.manifest.best_step

    @property
    def limits(self) -> Limits:
        return self.manifest.limits or Limits()

    @property
    def warnings(self) -> Sequence[Warned]:
        return self.manifest.warnings

    @property
    def fingerprint(self) -> str | None:
        """Of the data."""
        return self.manifest.data.fingerprint if self.manifest.data else None

    @property
    def reference_name(self) -> str:
        return "SFT" if self.versus == "SFT" else "reference"

    @property
    def ended(self) -> str | None:
        """What ended it before its plan: an interruption, a guard, or nothing."""
        reason = self.stop_reason or ""
        if self.status == "stopped" and reason.startswith("interrupted"):
            return "interrupted"
        stops = self.limits.action == "stop" and self.warnings and self.status in ("stopped", "finished")
        return "guard" if stops and not reason.startswith(("all ", "no better")) else None

    @property
    def ended_early(self) -> bool:
        if self.status == "running" or self.planned_steps is None or self.steps is None:
            return False
        return self.steps < self.planned_steps

    @property
    def kept_its_start(self) -> bool:
        """Whether a guard left no checkpoint, so that the weights are still those of the reference."""
        return self.stage != "sft" and self.ended == "guard" and not self.best_step

    @property
    def same_replies(self) -> tuple[int, int]:
        """How many of its last replies equal the reference's letter by letter, and of how many."""
        pairs = [(row["reply"], row["reference_reply"]) for row in self.samples if "reference_reply" in row]
        return sum(ours == theirs for ours, theirs in pairs), len(pairs)

    @property
    def repeat(self) -> str:
        return f"alignlab {self.stage} {shlex.quote(str(Run(Path(self.folder)).recipe_file))} --run again"

    @property
    def samples_split(self) -> str | None:
        return self.samples[0].get("split") if self.samples else None

    def as_json(self) -> dict[str, Any]:
        return {
            each.name: _plain(getattr(self, each.name)) for each in fields(self) if each.name not in ("rows", "samples")
        }


def _plain(value: Any) -> Any:
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


# --- reading a run ---


def read_run(path: Path) -> RunFacts:
    """The facts of a run; RunError where there is none."""
    run = Run(path)
    if not run.has_started:
        raise RunError(f"{path} holds no run (it has no manifest.json); name a run directory, such as runs/tiny/dpo")
    manifest = run.manifest
    refuse_changed(run)
    rows, notices = read_metrics(run.metrics_file)
    if manifest.status == "finished" and not rows:
        raise RunError(f"{path} is finished, but has no metrics.jsonl; copy it from where the run was made")
    samples, evaluation = last_samples(run.samples_file), read_evaluation(path / FILE)
    test, evaluated = _test(manifest, samples), [row for row in rows if "eval/loss" in row]
    kept = [row for row in evaluated if row["step"] == manifest.best_step]
    settings = _settings(run, manifest)
    examination, found_nothing = _examination(run, manifest)
    win_rate, judge, versus = _win_rate(manifest, evaluation)
    return RunFacts(
        name=path.resolve().name,
        recipe=path.resolve().parent.name,
        folder=str(path),
        manifest=manifest,
        steps=manifest.steps if manifest.steps is not None else rows[-1]["step"] if rows else None,
        planned_steps=_planned_steps(manifest, rows),
        silent_seconds=_silent_seconds(rows),
        test=test,
        win_rate=win_rate,
        judge=judge,
        versus=versus,
        before=_before(parent_of(run)),
        first=_evaluated(evaluated[:1]),
        kept=_evaluated(kept[-1:]),
        last=_evaluated(evaluated[-1:]),
        evaluation=evaluation,
        others=[each for each in all_evaluations(path) if each.found != evaluation],
        targets=_targets(manifest, test, win_rate, evaluation, settings),
        examination=examination,
        settings=settings,
        recipe_text=_recipe_text(run, manifest),
        notices=[*notices, *found_nothing],
        cost=cost_of(run),
        rows=rows,
        samples=samples,
    )


def cost_of(run: Run) -> dict[str, float]:
    """Steps, tokens and hours of training, with those of the run that it started from; what is known of them."""
    made, before = run.manifest, _started_from(run)
    hours = None if made.training_seconds is None else made.training_seconds * (made.world_size or 1) / 3600
    found: dict[str, Any] = {"steps": made.steps, "tokens": made.tokens, "hours": hours}
    earlier = cost_of(before) if before and before.has_started else dict.fromkeys(found, 0.0)
    if made.parent and made.parent.run and before is None:
        return {}
    return {name: its + earlier[name] for name, its in found.items() if its is not None and name in earlier}


def _started_from(run: Run) -> Run | None:
    """The run before it: its SFT run, or the one whose model `model.start` names, as a round's does."""
    parent = run.manifest.parent
    if not parent or not parent.start:
        return parent_of(run)
    model = Path(parent.start)
    places = (run.path.absolute().parent / model.parent.name, model.parent)
    return next((found for found in map(Run, places) if found.has_started and found.model.name == model.name), None)


def cost_rows(spent: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """Of each model, by its name, what `cost_of` says: a row a figure."""
    found = []
    for name in ("steps", "tokens", "hours"):
        values = {of: Estimate(its[name]) for of, its in spent.items() if name in its}
        found.append(Row(group="cost of training", measure=name, better="lower", values=values, note=COST_NOTE))
    return [row for row in found if row.values]


def _test(manifest: Manifest, samples: Sequence[Mapping[str, Any]]) -> OnTest:
    test = manifest.test
    if test is None:
        return OnTest()
    replies = sum(row.get("split") == "test" for row in samples) or None

    def single(name: str) -> Estimate | None:
        value = getattr(test, name)
        n = replies if name in OVER_REPLIES else test.n
        error = getattr(test, f"{name}_stderr", None)
        return None if value is None else Estimate(value, error, n).with_interval(share=name == "eos_rate")

    names = ("perplexity", "reference_perplexity", *OVER_REPLIES)
    return OnTest(
        accuracy=test.accuracy and test.accuracy.with_interval(share=True),
        margin=test.margin and test.margin.with_interval(),
        **{name: single(name) for name in names},
    )


def _win_rate(manifest: Manifest, found: Evaluation | None) -> tuple[Estimate | None, str | None, str]:
    """How often the policy beats what it started from, who says so, and what that is called.

    As `alignlab eval` judged it, else by the toy's rule.
    """
    model = section(manifest, "model")
    start = "the model it started from" if model.get("start") else "SFT"
    if manifest.stage == "orpo":
        start = "the base model"
    judged = found.over(manifest.stage, found.against) if found and manifest.stage != "sft" else None
    if found and judged:
        return judged, _judge_in_words(found.judge), "the base model" if found.against == "base" else start
    versus = "the base model" if model.get("reference") == "base" else start
    if manifest.test and manifest.test.win_rate:
        return manifest.test.win_rate.with_interval(share=True), "by the toy's rule", versus
    return None, None, versus


def _judge_in_words(judge: str | None) -> str | None:
    kind, _, name = (judge or "").partition(":")
    words = {"rule": "by a rule", "llm": f"judged by {name}", "reward": f"scored by {name}", "votes": "by votes"}
    return words.get(kind, judge)


def section(manifest: Manifest, name: str) -> Mapping[str, Any]:
    found = manifest.consumed.get(name)
    return found if isinstance(found, Mapping) else {}


def _planned_steps(manifest: Manifest, rows: Sequence[MetricRow]) -> int | None:
    """`max_steps`, or what the epochs come to by the last logged step; none where neither is known."""
    settings = section(manifest, manifest.stage)
    if is_number(most := settings.get("max_steps")) and most > 0:
        return int(most)
    epochs = settings.get("num_train_epochs")
    last = next((row for row in reversed(rows) if is_number(row.get("train/epoch")) and row["train/epoch"] > 0), None)
    return round(last["step"] / last["train/epoch"] * epochs) if last and is_number(epochs) else None


def _silent_seconds(rows: Sequence[MetricRow]) -> int | None:
    logged = rows[-1].get("time") if rows else None
    return round(max(0.0, time.time() - logged)) if is_number(logged) else None


def _evaluated(rows: Sequence[MetricRow]) -> Evaluated | None:
    if not rows:
        return None
    names = {"accuracy": "rewards/accuracies"}
    figures = {each.name: rows[0].get(f"eval/{names.get(each.name, each.name)}") for each in fields(Evaluated)}
    known = {name: value for name, value in figures.items() if is_number(value)}
    return Evaluated(**{**known, "step": rows[0]["step"]})


def _before(parent: Run | None) -> Evaluated | None:
    """The SFT run's evaluation before its first step, which is the base model's."""
    rows, _ = read_metrics(parent.metrics_file) if parent else ([], [])
    return _evaluated(rows[:1]) if rows and rows[0]["step"] == 0 else None


def _targets(
    manifest: Manifest,
    test: OnTest,
    win_rate: Estimate | None,
    found: Evaluation | None,
    settings: Mapping[str, str],
) -> Sequence[Target]:
    """As `alignlab eval` judged them, else by the run's own figures."""
    if found and found.targets:
        return found.targets
    if not STAGES[manifest.stage].from_sft or manifest.test is None:
        return ()
    before, after = test.reference_perplexity, test.perplexity
    change = Estimate(after.mean / before.mean - 1) if before and after and before.mean else None
    figures = {"win_rate": win_rate, "margin": test.margin, "accuracy": test.accuracy, "kl": test.kl}
    return judge_targets(_written_targets(settings), {**figures, "perplexity": change})


def _written_targets(settings: Mapping[str, str]) -> TargetsSection:
    """Those of the run's recipe, alignlab's own where it has none."""
    written = {each.name: settings.get(f"evaluate.targets.{each.name}") for each in fields(TargetsSection)}
    return TargetsSection(**{name: json.loads(value) for name, value in written.items() if value is not None})


def _examination(run: Run, manifest: Manifest) -> tuple[Examination | None, list[str]]:
    """What `alignlab data` has found in these very rows, where it was asked; or why it cannot be shown."""
    file = run.path.parent / EXAMINATION
    if not manifest.data or not manifest.data.fingerprint or not file.is_file():
        return None, []
    try:
        found = typed.read_file(Examination, file, f"make it anew with alignlab data {run.path.parent.name}")
    except RunError as e:
        return None, [str(e)]
    return (found if found.fingerprint == manifest.data.fingerprint else None), []


def _recipe_text(run: Run, manifest: Manifest) -> str:
    try:
        return run.recipe_file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return yaml.safe_dump(json.loads(json.dumps(manifest.consumed)), sort_keys=False)


def _settings(run: Run, manifest: Manifest) -> dict[str, str]:
    try:
        tree = yaml.safe_load(_recipe_text(run, manifest))
    except yaml.YAMLError:
        tree = manifest.consumed
    written = _flat(tree if isinstance(tree, Mapping) else {})
    return {key: json.dumps(value, ensure_ascii=False, default=str) for key, value in written if key != "about"}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{key}.")
        else:
            yield key, value


def seconds_between(start: str | None, end: str | None) -> float | None:
    try:
        first, last = (datetime.strptime(str(moment), "%Y-%m-%dT%H:%M:%SZ") for moment in (start, end))
    except ValueError:
        return None
    return (last - first).total_seconds()


def judged_together(runs: Sequence[RunFacts]) -> tuple[StoredEvaluation | None, dict[str, str]]:
    """The evaluation in which most of these runs were judged side by side, and their names there.

    It is looked for with each run and in the folders that hold them, where `alignlab eval --runs` writes.
    """
    parents = {Path(run.folder).resolve().parent for run in runs}
    folders = {*(Path(run.folder) for run in runs), *parents, Path(os.path.commonpath(parents))}
    best: tuple[StoredEvaluation | None, dict[str, str]] = (None, {})
    for kept in (each for folder in sorted(folders) for each in all_evaluations(folder)):
        names = {run.name: name for run in runs if (name := _name_in(kept.found, run))}
        if kept.found.win_rates and (len(names), kept.fullness) > (len(best[1]), best[0].fullness if best[0] else ()):
            best = kept, names
    return best if len(best[1]) > 1 else (None, {})


def _name_in(found: Evaluation, run: RunFacts) -> str | None:
    """What an evaluation calls a run; none where it is not in it, or was trained again since."""
    if found.made and run.manifest.finished and run.manifest.finished > found.made:
        return None
    own = Path(run.folder).resolve().parts[-2:]
    return next((model.name for model in found.models if Path(model.path).parts[-2:] == own), None)
