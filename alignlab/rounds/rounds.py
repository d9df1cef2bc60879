"""Iterative DPO: each round samples from the policy before it, judges, trains, and is measured against SFT.

Every round is an ordinary run. The same command goes on where it was stopped: pairs come from result caches, a
finished run is left as it is, and one that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from alignlab.data.format import Format
from alignlab.data.prepare import Prepared
from alignlab.disk import write_record
from alignlab.errors import DataError, RecipeError, RunError
from alignlab.evaluation import watch
from alignlab.evaluation.candidates import ModelSet, choose_models
from alignlab.evaluation.evaluator import Evaluator, Options, evaluate_and_keep
from alignlab.evaluation.judge import Judge
from alignlab.recipe.load import Recipe, RoundsSection, SFTDataSection
from alignlab.rounds.pairs import Ask, Made, make_pairs, prompt_columns, write_pairs
from alignlab.rounds.scores import NOT_ASKED, Seat, judge_of
from alignlab.runs.evaluation import HELD_OUT, Comparison, Evaluation, only_by_length, read_evaluation
from alignlab.runs.run import Run, check_name
from alignlab.text.estimate import Estimate
from alignlab.text.tables import SHARE, Row, WinRate, as_text, paragraph
from alignlab.train.stages import prepare_data, train_dpo, train_sft

log = logging.getLogger(__name__)

NAME = "rounds"
VALIDATION = 0.1  # share of a round's own pairs that choose its checkpoint: the recipe's are not of this policy
Line = dict[str, Any]  # of a file of pairs


@dataclass(frozen=True, kw_only=True)
class Round:
    """What came of one round, on prompts that no round trains on."""

    k: int
    run: str  # its name beside the recipe's other runs
    win_rate_vs_sft: WinRate
    win_rate_vs_previous: WinRate
    at_equal_length: Estimate | None = None  # the win rate over SFT, were the replies as long
    kl: float  # from SFT, nats per reply, on the round's own samples
    kl_stderr: float | None = None
    tokens: float  # of a reply, the mean
    pairs: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    guards: Sequence[str] = ()  # signs that the round only pleases the judge

    @property
    def kl_estimate(self) -> Estimate:
        return Estimate(self.kl, self.kl_stderr, self.win_rate_vs_sft.n).with_interval()


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """What `rounds.json` holds."""

    recipe: str
    sft: str  # the name of the run that they began at
    judge: str
    settings: RoundsSection
    rounds: Sequence[Round]
    best: str | None  # a run's name
    why: str
    stopped: str | None = None  # why there are fewer rounds than were asked for


@dataclass(frozen=True)
class Work:
    """One call: the recipe, its SFT run, and how its rounds are named, judged and sampled."""

    recipe: Recipe
    sft: Run
    judge: Seat
    name: str = NAME

    @property
    def folder(self) -> Path:
        return self.sft.path.parent

    @property
    def file(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def section(self) -> RoundsSection:
        return self.recipe.rounds

    def run(self, k: int) -> Run:
        """The run of a round; of round 0 that is the SFT run."""
        return Run(self.folder / f"{self.name}-{k}") if k else self.sft

    def pairs_file(self, k: int) -> Path:
        return self.folder / "pairs" / f"{self.name}-{k}.jsonl"


def run_rounds(
    recipe: Recipe,
    *,
    root: Path = Path("runs"),
    name: str | None = None,
    judge: Judge | None = None,
    url: str | None = None,
    max_requests: int | None = None,
    force: bool = False,
) -> Rounds:
    """Trains `rounds.count` rounds, until a guard speaks, and writes `rounds.json` after each.

    `name` stands in place of "rounds" in the names of runs and of the file; `judge` is a function in place of the
    recipe's `rounds.judge`.
    """
    _refuse_what_has_no_rounds(recipe)
    named, seated = check_name(name or NAME), judge_of(recipe, judge or recipe.rounds.judge, url, max_requests)
    work = Work(recipe, train_sft(recipe, root=root), seated, named)
    done: list[Round] = []
    for k in range(1, recipe.rounds.count + 1):
        log.info("round %d of %d: %s", k, recipe.rounds.count, work.run(k).path)
        done.append(_round(work, k, force))
        found = _told(work, done)
        write_record(work.file, asdict(found))
        if found.stopped:
            log.warning("%s", found.stopped)
            break
    return found


def _refuse_what_has_no_rounds(recipe: Recipe) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("rounds run in one process; train each round's pairs with alignlab dpo --launch instead")
    if recipe.model.start or recipe.model.reference != "sft" or recipe.model.reference_folder:
        raise RecipeError(
            "rounds begin at the recipe's SFT run, and rounds.reference says what they are held to; "
            "leave model.start, model.reference and model.reference_folder out"
        )


def _round(work: Work, k: int, force: bool) -> Round:
    made = _pairs(work, k)
    train_dpo(_recipe_of(work, k), root=work.folder.parent, name=work.run(k).path.name, force=force)
    return _measured(work, k, made)


# What a round learns


def _pairs(work: Work, k: int) -> Made:
    """The round's pairs, in its file with what the recipe holds out."""
    section = work.section
    ask = Ask(limit=section.prompts, samples=section.samples, seed=1000 * section.seed + k)
    made = make_pairs(work.recipe, work.run(k - 1), ask, work.judge)
    if open_ := sum(count for why, count in made.dropped.items() if why.endswith(NOT_ASKED)):
        raise DataError(
            f"round {k}: the budget of requests is spent, and {open_} prompts are not judged; nothing is lost: "
            f"the same command goes on from there"
        )
    log.info("round %d: %s", k, str(made).replace("\n", "; "))
    tokenizer, pairs = prepare_data(work.recipe)
    form = Format(work.recipe.data.format, tokenizer)
    validation = max(1, round(VALIDATION * len(made.rows)))
    own = [{"split": "validation" if i < validation else "train", **row} for i, row in enumerate(made.rows)]
    own += _original(pairs, form, len(own) - validation, section.mix_original, ask.seed)
    write_pairs(work.pairs_file(k), [*own, *_lines(pairs, form, "test")])
    return made


def _original(pairs: Prepared, form: Format, own: int, share: float, seed: int) -> list[Line]:
    """So many of the recipe's own training pairs that they are this share of all."""
    lines = _lines(pairs, form, "train") if share else []
    wanted = min(len(lines), round(own * share / (1 - share)))
    return random.Random(f"original/{seed}").sample(lines, wanted)


def _lines(pairs: Prepared, form: Format, split: str) -> list[Line]:
    """Pairs of the recipe as a file has them; those whose turns cannot be told are left out."""
    found: list[Line] = []
    for pair in getattr(pairs, split).select_columns(["prompt", "chosen", "rejected"]):
        if (columns := prompt_columns(form, pair["prompt"])) is not None:
            replies = {side: form.bare(pair[side]) for side in ("chosen", "rejected")}
            found.append({"split": split, **columns, **replies})
    return found


def _recipe_of(work: Work, k: int) -> Recipe:
    """The recipe of a round: its pairs, from the round before, held to that or to SFT."""
    others: dict[str, Any] = {"subset": None, "config": None, "columns": {}, "sft": SFTDataSection(), "max_pairs": None}
    others |= {"split": "train", "test_split": "test", "max_pairs_per_prompt": None}
    data = replace(work.recipe.data, source="pairs", path=str(work.pairs_file(k)), **others)
    held_to_sft = k > 1 and work.section.reference == "sft"
    reference = str(work.sft.model) if held_to_sft else None
    model = replace(work.recipe.model, start=str(work.run(k - 1).model), reference_folder=reference)
    return replace(work.recipe, data=data, model=model)


# What came of it


def _measured(work: Work, k: int, made: Made) -> Round:
    """The round beside SFT and the round before, on the recipe's test split."""
    found = _evaluation(work, k)
    run, sft, previous = (each.path.name for each in (work.run(k), work.sft, work.run(k - 1)))
    against = {name: _comparison(found, run, name) for name in (sft, previous)}
    rates = {name: its.over(run, name) for name, its in against.items()}
    kl, tokens = found.value("KL per reply", run), found.value("length", run)
    over_sft, over_previous = rates[sft], rates[previous]
    assert kl and tokens and over_sft and over_previous, "an evaluation has a KL, lengths and win rates"
    return Round(
        k=k,
        run=run,
        win_rate_vs_sft=over_sft,
        win_rate_vs_previous=over_previous,
        at_equal_length=against[sft].length_controlled,
        kl=kl.mean,
        kl_stderr=kl.stderr,
        tokens=tokens.mean,
        pairs=len(made.rows),
        dropped=made.dropped,
        guards=list(dict.fromkeys(_guards(work, found, run, against, kl))),
    )


def _evaluation(work: Work, k: int) -> Evaluation:
    """Of SFT, the round before and this one; the KL of both is from SFT."""
    runs = [work.sft, *([work.run(k - 1)] if k > 1 else []), work.run(k)]
    found = choose_models(runs).candidates
    models = ModelSet([found[0], *(replace(each, reference=found[0]) for each in found[1:])], found[0])
    options = Options(judge=work.judge.name)
    evaluator = Evaluator(models, options, work.judge.judge)
    evaluator.warnings.clear()  # of other training data: what is held out is the same in all rounds
    asked = {**options.asked, "KL from": found[0].name}
    evaluation = read_evaluation(evaluate_and_keep(evaluator, work.folder, asked))
    assert evaluation is not None, "it was written just now"
    return evaluation


def _comparison(found: Evaluation, run: str, other: str) -> Comparison:
    """How the round did against another; DataError where the budget left some of it open, or nothing was judged."""
    its = next((c for c in found.win_rates if c.prompts == HELD_OUT and c.over(run, other)), None)
    if its is None or its.tally.get(NOT_ASKED):
        why = "the budget of requests is spent" if its else "nothing could be judged, or the budget is spent"
        raise DataError(f"{run} against {other}: {why}; nothing is lost: the same command goes on from there")
    return its


def _guards(work: Work, found: Evaluation, run: str, against: Mapping[str, Comparison], kl: Estimate) -> list[str]:
    """Signs that a round only gets longer, repeats itself or collapses."""
    form = [row for row in found.table if row.group == watch.GROUP]  # without the perplexity of others' replies
    signs = watch.what_got_worse(form, run, work.sft.path.name) if form else []
    said = [f"replies got worse than SFT's: {sign}" for sign in signs]
    for name, its in against.items():
        if (fair := its.length_controlled) and only_by_length(its):
            said.append(
                f"it beats {name} by length alone: {its.win_rate.mean:.0%} as judged, and {fair.mean:.0%} "
                f"({fair.low:.0%} to {fair.high:.0%}) at equal length"
            )
    limit = work.recipe.monitor.max_kl
    if limit is not None and kl.mean - 2 * (kl.stderr or 0) > limit:
        said.append(f"its KL from SFT is {kl.plus_minus()}, above monitor.max_kl {limit:g}")
    return said


def _told(work: Work, done: Sequence[Round]) -> Rounds:
    """All rounds so far, the best of them, and why no more follow where a guard has spoken."""
    sound = [each for each in done if not each.guards]
    best = max(sound, key=lambda each: each.win_rate_vs_sft.mean, default=None)
    why = "no round is free of guards: the SFT run stays"
    if best:
        why = f"the highest win rate over SFT, {best.win_rate_vs_sft.in_words()}, of rounds without a guard"
    last = done[-1]
    stopped = f"round {last.k} ends the rounds: {'; '.join(last.guards)}" if last.guards else None
    return Rounds(
        recipe=work.recipe.name,
        sft=work.sft.path.name,
        judge=work.judge.name,
        settings=work.section,
        rounds=list(done),
        best=best.run if best else None,
        why=why,
        stopped=stopped,
    )


# As people read it


def render(found: Rounds, file: Path) -> str:
    """The table of the rounds, the best one and why, 80 columns wide."""
    names = [each.run for each in found.rounds]
    lines = [*as_text(round_rows(found), names), *paragraph(f"judge: {found.judge}; prompts that no round trains on")]
    for each in found.rounds:
        for guard in each.guards:
            lines += paragraph(f"guard, {each.run}: {guard}", more="  ")
    if found.stopped:
        lines += paragraph(f"stopped after round {found.rounds[-1].k}", more="  ")
    chosen = f"best: {found.best}, {found.why}" if found.best else f"none is best: {found.why}"
    return "\n".join([*lines, "", *paragraph(chosen, more="  "), str(file)])


def round_rows(found: Rounds) -> list[Row]:
    """One column a round."""
    measures = {
        "over SFT": ("win rate", SHARE, "higher", lambda each: each.win_rate_vs_sft),
        "over the one before": ("win rate", SHARE, "higher", lambda each: each.win_rate_vs_previous),
        "at equal length": ("win rate", SHARE, "higher", lambda each: each.at_equal_length),
        "KL from SFT": ("cost", "nats", "lower", lambda each: each.kl_estimate),
        "tokens a reply": ("cost", "", "", lambda each: Estimate(each.tokens)),
    }
    return [
        Row(
            group=group,
            measure=measure,
            unit=unit,
            better=better or None,
            values={each.run: value for each in found.rounds if (value := of(each)) is not None},
        )
        for measure, (group, unit, better, of) in measures.items()
    ]


def write_page(found: Rounds, folder: Path, file: Path) -> Path:
    """The rounds side by side on one HTML page, with the SFT run they began at."""
    from alignlab.reports.page import write_comparison

    names = [found.sft, *(each.run for each in found.rounds)]
    return write_comparison([folder / name for name in names], file.with_suffix(".html"))
