"""What an evaluation found: the types of eval.json, where it lies, and which of several is shown; imports no torch."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, Field

from alignlab.disk import digest, write_lines, write_record, write_text
from alignlab.errors import RunError
from alignlab.recipe.load import TargetsSection
from alignlab.runs import typed
from alignlab.text.estimate import Estimate
from alignlab.text.tables import SHARE, Row, WinRate, number

log = logging.getLogger(__name__)

PERPLEXITY = "perplexity of chosen"  # the row of the table
TARGETS = {  # name in the recipe's evaluate.targets → what it is called, its unit, and on which side of it to be
    "win_rate": ("win rate", SHARE, "above"),
    "margin": ("reward margin", "", "above"),
    "accuracy": ("reward accuracy", SHARE, "above"),
    "kl": ("KL, nats per reply", "", "below"),
    "perplexity": ("change of perplexity", SHARE, "within"),
}
HELD_OUT = "held-out"  # the prompts of the test split
LESS_LIKELY = 1.25  # times the perplexity of the chosen replies from which it is a sign that text got worse
FILE, REPLIES, VERDICTS = "eval.json", "replies.jsonl", "verdicts.jsonl"
REMEDY = "make it anew with alignlab eval, or take it away"


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """One model of an evaluation: where it is from, which it is by content, and what its training cost."""

    name: str
    path: str = ""
    content: str = ""
    reference: str | None = None
    training_seconds: float | None = None
    peak_memory_gib: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models on the same prompts: how often the replies of `a` are better than those of `b`."""

    a: str
    b: str
    prompts: str = HELD_OUT
    wins: int | None = None
    ties: int | None = None
    losses: int | None = None
    n: int | None = None
    win_rate: Annotated[Estimate, Field(validation_alias=AliasChoices("win_rate", "raw"))]  # `raw` in older files
    length_controlled: Estimate | None = None  # none where all replies differ in length by the same amount
    disagreements: int = 0
    p_value: float | None = None  # of the sign test: two-sided, ties left out
    tally: Mapping[str, int] = field(default_factory=dict)  # how many verdicts came about in each way

    def over(self, a: str, b: str) -> WinRate | None:
        """The win rate of `a` over `b`, whichever of them comes first here; none where these are other models."""
        found = WinRate(**vars(self.win_rate), wins=self.wins, ties=self.ties, losses=self.losses)
        if (self.a, self.b) == (a, b):
            return found
        return found.turned() if (self.a, self.b) == (b, a) else None

    @property
    def identical(self) -> int:
        """Prompts to which both models gave the same reply."""
        return self.tally.get("identical", 0)


def only_by_length(found: Comparison) -> bool:
    """Whether a model wins beyond chance, but not at equal length: the judge may be counting words."""
    fair = found.length_controlled
    if fair is None or fair.low is None or found.win_rate.low is None:
        return False
    return found.win_rate.low > 0.5 >= fair.low


@dataclass(frozen=True)
class Rating:
    model: str
    elo: Estimate


@dataclass(frozen=True)
class Target:
    """A figure beside what it is to reach."""

    name: str
    unit: str
    limit: float
    wanted: str  # above, below or within
    found: Estimate | WinRate | None
    outcome: str  # met, missed, not decidable or not measured

    @property
    def limit_text(self) -> str:
        """`above 60%`."""
        return f"{self.wanted} {self._shown(self.limit)}"

    @property
    def found_text(self) -> str:
        """`75% (69% to 81%)`."""
        if self.found is None:
            return "–"
        if self.found.low is None or self.found.high is None:
            return self._shown(self.found.mean)
        edges = f"{self._shown(self.found.low)} to {self._shown(self.found.high)}"
        return f"{self._shown(self.found.mean)} ({edges})"

    def _shown(self, value: float) -> str:
        return f"{value:.1%}" if self.unit == SHARE else number(value)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `eval.json` holds."""

    models: Sequence[ModelFacts]
    against: str = ""
    split: str = "test"
    pairs: int = 0
    prompts: int = 0
    limit: int | None = None
    decoding: Mapping[str, Any] = field(default_factory=dict)
    stops: Sequence[str] = ()
    judge: str | None = None
    table: Sequence[Row] = ()
    win_rates: Sequence[Comparison] = ()
    matrix: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ratings: Sequence[Rating] = ()
    ratings_note: str = ""
    length: Mapping[str, Any] = field(default_factory=dict)
    slices: Sequence[Mapping[str, Any]] = ()
    refusals: Mapping[str, Any] | str = ""
    prompt_files: Sequence[Mapping[str, Any]] = ()
    signs: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of a model: how its replies got worse as text
    targets: Sequence[Target] = ()
    warnings: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    made: str = ""  # when, in UTC

    @property
    def names(self) -> list[str]:
        return [model.name for model in self.models]

    def over(self, a: str, b: str, prompts: str = HELD_OUT) -> WinRate | None:
        """The win rate of model `a` over model `b`; none where they were not judged side by side."""
        found = (each.over(a, b) for each in self.win_rates if each.prompts == prompts)
        return next((each for each in found if each), None)

    def value(self, measure: str, model: str) -> Estimate | None:
        row = next((row for row in self.table if row.measure == measure), None)
        return row.values.get(model) if row else None

    @property
    def about(self) -> str:
        """`117 prompts, judge: rule`."""
        limited = f", at most {self.limit} of each" if self.limit else ""
        return f"{self.prompts} prompts{limited}, judge: {self.judge or 'none'}"


@dataclass(frozen=True)
class StoredEvaluation:
    """An evaluation and the file it lies in."""

    file: Path
    found: Evaluation

    @property
    def fullness(self) -> tuple[Any, ...]:
        """Sorts a quick look before a full evaluation, and of two that are as full the older before the newer."""
        e = self.found
        others = sum(each.get("prompts", 0) for each in e.prompt_files)
        return e.limit is None, e.judge is not None, e.pairs, e.prompts + others, len(e.table), e.made


def read_evaluation(file: Path) -> Evaluation | None:
    """What `alignlab eval` wrote; none where it has not run, RunError where the file is no evaluation."""
    return typed.read_file(Evaluation, file, REMEDY) if file.is_file() else None


def all_evaluations(folder: Path) -> list[StoredEvaluation]:
    """The evaluations of a folder, the fullest first: those in its `eval/`, or the one eval.json of an older version.

    One that cannot be read is named and left out.
    """
    files = sorted((folder / "eval").glob("*.json")) or [file for file in [folder / FILE] if file.is_file()]
    found = []
    for file in files:
        try:
            found.append(StoredEvaluation(file, typed.read_file(Evaluation, file, REMEDY)))
        except RunError as e:
            log.warning("%s", e)
    return sorted(found, key=lambda each: each.fullness, reverse=True)


def keep(folder: Path, asked: Any, found: Evaluation, replies: Sequence[Any], verdicts: Sequence[Any]) -> Path:
    """Writes an evaluation into `eval/`, under a key of what was asked, and returns its file.

    `eval.json`, `replies.jsonl` and `verdicts.jsonl` beside that folder are those of the fullest evaluation of these
    models, so that a quick look does not take its place.
    """
    key = digest([[[model.name, model.content] for model in found.models], asked])[:12]
    file = folder / "eval" / f"{key}.json"
    if not file.parent.exists():
        file.parent.mkdir()
        _adopt(folder, file.parent / "earlier.json")
    write_lines(_beside(file, REPLIES), replies)
    write_lines(_beside(file, VERDICTS), verdicts)
    write_record(file, asdict(found))
    fullest = next(each for each in all_evaluations(folder) if not _is_outdated(each.found, found))
    _copy(fullest.file, folder / FILE)
    for name in (REPLIES, VERDICTS):
        _copy(_beside(fullest.file, name), folder / name)
    return file


def _adopt(folder: Path, file: Path) -> None:
    """Takes in the one eval.json of an older version."""
    _copy(folder / FILE, file)
    _copy(folder / VERDICTS, _beside(file, VERDICTS))


def _copy(source: Path, target: Path) -> None:
    if source.is_file():
        write_text(target, source.read_text(encoding="utf-8"))


def _beside(file: Path, name: str) -> Path:
    """`eval/KEY.replies.jsonl` beside `eval/KEY.json`."""
    return file.with_suffix(f".{name}")


def _is_outdated(older: Evaluation, newer: Evaluation) -> bool:
    """Whether a model has other weights than in a newer evaluation."""
    content = {model.name: model.content for model in newer.models}
    return any(content.get(model.name, model.content) != model.content for model in older.models)


# --- targets ---

MET, MISSED, OPEN, ABSENT = "met", "missed", "not decidable", "not measured"


def judge_targets(targets: TargetsSection, figures: Mapping[str, Estimate | None]) -> list[Target]:
    """Each target beside what was measured: met or missed where the whole 95 % interval lies on one side of it."""
    found = []
    for name, (called, unit, wanted) in TARGETS.items():
        limit, measured = getattr(targets, name), figures.get(name)
        if limit is not None:
            found.append(Target(called, unit, limit, wanted, measured, _outcome(measured, limit, wanted)))
    return found


def _outcome(found: Estimate | None, limit: float, wanted: str) -> str:
    if found is None:
        return ABSENT
    if found.low is None or found.high is None:
        return OPEN
    lowest = {"above": limit, "below": -math.inf, "within": -limit}[wanted]
    highest = math.inf if wanted == "above" else limit
    if lowest < found.low and found.high < highest:
        return MET
    return MISSED if found.high < lowest or found.low > highest else OPEN


def targets_figures(found: Evaluation, ours: str) -> dict[str, Estimate | None]:
    """What an evaluation measured of the figures that have a target."""
    perplexity = next((row for row in found.table if row.measure == PERPLEXITY), Row(group="", measure=""))
    change, before = perplexity.change.get(ours), perplexity.values.get(found.against)
    return {
        "win_rate": found.over(ours, found.against),
        "margin": found.value("margin", ours),
        "accuracy": found.value("accuracy", ours),
        "kl": found.value("KL per reply", ours),
        "perplexity": scaled(change, 1 / before.mean) if change and before else None,
    }


def scaled(of: Estimate, factor: float) -> Estimate:
    """The same in another unit; the factor is positive."""
    times = lambda value: None if value is None else factor * value
    return replace(of, mean=factor * of.mean, stderr=times(of.stderr), low=times(of.low), high=times(of.high))
