"""Is it better, at what, how sure are we, and what did it cost: one evaluation, from the runs to `eval.json`.

Every figure is over the test split, which neither trained a model nor chose a checkpoint, or over prompt files.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from alignlab.data.format import Format
from alignlab.data.prepare import good_replies, is_labelled
from alignlab.data.prompts import Prompt, PromptSet, as_transcript, describe_sets, read_prompts, turns_of
from alignlab.disk import check_writable, digest
from alignlab.errors import DataError, ModelError, RecipeError
from alignlab.evaluation import contests, preference, watch
from alignlab.evaluation.answers import Answers, Decoding
from alignlab.evaluation.benchmarks import benchmark_rows, check_benchmarks, identify_tasks, run_benchmarks
from alignlab.evaluation.candidates import (
    Candidate,
    LoadedModels,
    ModelSet,
    choose_models,
    model_facts,
    refuse_what_cannot_be_compared,
    trained_by,
)
from alignlab.evaluation.contests import Matches
from alignlab.evaluation.estimates import cluster_sums, perplexity_values, ratio_values, table_row
from alignlab.evaluation.harm import HarmClassifier
from alignlab.evaluation.judge import KINDS, Judge, read_judge
from alignlab.evaluation.outputs import find_replies
from alignlab.evaluation.safety import safety_rows
from alignlab.evaluation.stereotypes import prefers_stereotype, read_sentence_pairs, stereotype_rows
from alignlab.measure.generate import Reply
from alignlab.measure.refusals import stated
from alignlab.models import load as models
from alignlab.recipe.fields import library_settings
from alignlab.recipe.load import TargetsSection
from alignlab.recipe.objectives import STAGES
from alignlab.runs.evaluation import (
    HELD_OUT,
    PERPLEXITY,
    Comparison,
    Evaluation,
    ModelFacts,
    Rating,
    judge_targets,
    keep,
    targets_figures,
)
from alignlab.runs.facts import cost_of, cost_rows
from alignlab.runs.run import Run, package_versions
from alignlab.runs.selection import folder_of
from alignlab.text.tables import Row
from alignlab.train.stages import prepare_data

log = logging.getLogger(__name__)

CUT = 0.1  # share of replies cut at the limit from which a warning says so


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a command asks of an evaluation."""

    judge: str | None = None  # none: the toy's rule on the toy's dialogues, nobody on others
    url: str | None = None  # of an llm judge's endpoint
    max_requests: int | None = None
    judge_tokens: int = 1024  # of an llm judge's answer, its thoughts among them
    prompts: Sequence[Path] = ()
    prompt_column: str | None = None  # of these files, where it is not found by its name
    bias: Path | None = None
    classifier: str | None = None
    harmful_labels: Sequence[str] = ()
    models: Sequence[tuple[str, str]] = ()  # that are no runs: a name and a folder each
    outputs: Sequence[tuple[str, str]] = ()  # of models that are not here: a name and a file each
    lm_eval: Sequence[str] = ()
    tasks_folder: Path | None = None
    greedy: bool = False
    max_new_tokens: int | None = None  # none: data.max_reply_tokens, the longest reply in training
    replies: int = 256  # held-out prompts that are answered
    limit: int | None = None  # of pairs, prompts and rows of each file: a quick look
    batch_size: int = 16
    seed: int = 0
    targets: TargetsSection | None = None  # none: those of the recipe that the run was made from

    @property
    def asked(self) -> dict[str, str]:
        """What tells this evaluation from another of the same models: what is not as it is by default."""
        unimportant = ("url", "max_requests", "judge_tokens", "targets")
        given = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in unimportant}
        return {name: str(value) for name, value in given.items() if value != getattr(Options, name)}


def evaluate(runs: Sequence[Run], options: Options) -> Path:
    """Evaluates the runs' models side by side and returns the file that says what came out, see `evaluation.keep`."""
    _check(options)
    check_writable(folder_of(runs))
    return evaluate_and_keep(
        Evaluator(choose_models(runs, dict(options.models)), options), folder_of(runs), options.asked
    )


def evaluate_and_keep(evaluator: Evaluator, folder: Path, asked: Any) -> Path:
    """Measures, and writes what came out into a folder, see `evaluation.keep`; `asked` tells it from others there."""
    began = time.monotonic()
    found = evaluator.measure()
    found = replace(found, seconds=round(time.monotonic() - began, 1))
    return keep(folder, asked, found, evaluator.reply_lines, evaluator.verdict_lines)


def _check(options: Options) -> None:
    read_judge(options.judge)
    check_benchmarks(options.lm_eval, options.tasks_folder)
    for file in (*options.prompts, *([options.bias] if options.bias else [])):
        if not file.is_file():
            raise DataError(f"{file}: no such file")


@dataclass(frozen=True)
class JudgedReplies:
    """What a judge made of the replies."""

    rows: Sequence[Row] = ()
    comparisons: Sequence[Comparison] = ()
    ratings: Sequence[Rating] = ()
    ratings_note: str = ""


class Evaluator:
    """One evaluation: the models, the prompts they share, and what was found."""

    def __init__(self, chosen: ModelSet, options: Options, judge: Judge | None = None):
        """`judge` judges in place of the one that the options name, whose name stands for it."""
        self.own_judge = judge
        self.candidates, self.ours, self.against = chosen.candidates, chosen.ours, chosen.against
        self.options, self.recipe = options, chosen.ours.recipe
        self.warnings = refuse_what_cannot_be_compared(self.candidates)
        self.elsewhere = {name: Path(file) for name, file in options.outputs}
        self.outputs: Mapping[str, Mapping[str, Sequence[Reply]]] = {}  # what these say, by set of prompts
        self.warnings += [f"{name} is no run: what is held out here may have trained it" for name in self._others()]
        self.tokenizer, pairs = prepare_data(self.recipe, self.ours.run.manifest.stage)
        self.form = Format(self.recipe.data.format, self.tokenizer)
        self.pairs, self.files = self._drawn(good_replies(pairs.test), options.limit), pairs.files
        self.loaded = LoadedModels()
        self.answers = Answers(self.loaded, self.form)
        self.decoding = self._decoding()
        self.judge = self._judge()
        self.signs: dict[str, list[str]] = {}
        self.reply_lines: list[dict[str, Any]] = []
        self.verdict_lines: list[dict[str, Any]] = []

    def _others(self) -> list[str]:
        """The names of what is no run; RecipeError where a name stands for two."""
        others = [name for name, _ in (*self.options.models, *self.options.outputs)]
        names = [*self.elsewhere, *(candidate.name for candidate in self.candidates)]
        if twice := [name for name in names if names.count(name) + others.count(name) > 2 or names.count(name) > 1]:
            raise RecipeError(f"two models are called {twice[0]}; give --models and --outputs names of their own")
        return others

    def measure(self) -> Evaluation:
        """Everything that `eval.json` holds, but for the seconds it took."""
        sets = [self.held_out, *self.prompt_files()]
        self.outputs = find_replies(self.elsewhere, sets, self.tokenizer)
        self._announce(sets)
        preferences, length, slices, losses = self._preference()
        cost = self._perplexity()
        replies = {each.name: self.replies_to(each) for each in sets}
        looks = self._watch(replies[HELD_OUT], losses, cost)
        cost += self._kl()
        self.loaded.hold()
        judged = self._judged(sets, replies)
        others = self._safety(sets, replies) + looks + self._bias() + self._benchmarks()
        self._warn_of_a_quick_look()
        held_out = [each for each in judged.comparisons if each.prompts == HELD_OUT]
        found = Evaluation(
            models=[
                *(ModelFacts(name=name, path=str(file)) for name, file in self.elsewhere.items()),
                *(model_facts(candidate) for candidate in self.candidates),
            ],
            against=self.against.name,
            split="test",
            pairs=len(self.pairs),
            prompts=len(self.held_out.prompts),
            limit=self.options.limit,
            decoding=self.decoding.said(),
            stops=models.find_stops(self.recipe.model, self.form).said,
            judge=self.options.judge or (":".join(self.judge).rstrip(":") if self.judge else None),
            table=[*judged.rows, *preferences, *cost, *self._training(), *others, *preference.slices_as_table(slices)],
            win_rates=judged.comparisons,
            matrix=contests.matrix(held_out),
            ratings=judged.ratings,
            ratings_note=judged.ratings_note,
            length=length,
            slices=slices,
            refusals=stated(),
            prompt_files=[_about(each) for each in sets[1:]],
            signs=self.signs,
            warnings=self.warnings,
            versions=package_versions(),
            made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        reference = self.ours.reference
        from_sft = STAGES[self.ours.run.manifest.stage].from_sft
        if reference is None or reference.key != self.against.key or not from_sft:
            return found
        targets = self.options.targets or self.recipe.evaluate.targets
        return replace(found, targets=judge_targets(targets, targets_figures(found, self.ours.name)))

    def _warn_of_a_quick_look(self) -> None:
        if self.options.limit:
            self.warnings.append(f"a quick look at {self.options.limit} pairs and prompts at most, by --limit")
        if self.judge is None:
            self.warnings.append(f"nobody judged which replies are better; name a judge: --judge {KINDS}")

    # What is evaluated, on what

    def _drawn(self, pairs, limit: int | None):
        """The pairs in a seeded order, so that a limit takes a random draw, and a smaller one a part of it."""
        order = list(range(len(pairs)))
        random.Random(f"pairs/{self.options.seed}").shuffle(order)
        return pairs.select(order[:limit])

    def _decoding(self) -> Decoding:
        of = self.options
        return Decoding(of.greedy, of.max_new_tokens or self.recipe.data.max_reply_tokens, of.seed, of.batch_size)

    @cached_property
    def held_out(self) -> PromptSet:
        few = dict(zip(self.pairs["prompt"], self.pairs["prompt_ids"], strict=True))
        texts = list(few)[: self.options.replies]
        longest = max(len(few[text]) for text in texts)
        if longest > self._room:
            raise ModelError(
                f"--max-new-tokens {self.decoding.max_new_tokens} leaves room for prompts of {self._room} tokens, and "
                f"the longest has {longest}; lower it"
            )
        prompts = [Prompt(as_transcript(self.form, text), tuple(few[text])) for text in texts]
        return PromptSet(HELD_OUT, "the test split", prompts, {})

    @cached_property
    def _room(self) -> int:
        """Tokens of the longest prompt that can be answered."""
        positions = [
            getattr(models.load_config(c.recipe.model, c.weights).get_text_config(), "max_position_embeddings", None)
            for c in self.candidates
        ]
        return min((p for p in positions if p), default=1 << 20) - self.decoding.max_new_tokens

    def prompt_files(self) -> list[PromptSet]:
        column = self.options.prompt_column
        found = [read_prompts(file, self.form, self._room, column) for file in self.options.prompts]
        for line in describe_sets(found):
            log.info("%s", line)
        names = [each.name for each in found]
        if len(set(names)) < len(names) or HELD_OUT in names:
            raise DataError(f"prompt files need names of their own, and these are {', '.join(names)}; rename one")
        return [replace(each, prompts=self._few(each.name, each.prompts)) for each in found]

    def _few(self, of: str, items: Sequence[Any]) -> list[Any]:
        """All of them in their order, or a seeded draw of as many as the limit says."""
        if self.options.limit is None or len(items) <= self.options.limit:
            return list(items)
        numbers = random.Random(f"{of}/{self.options.seed}").sample(range(len(items)), self.options.limit)
        return [items[i] for i in sorted(numbers)]

    def _judge(self) -> tuple[str, str] | None:
        said = self.options.judge
        if said and self.own_judge:
            kind, _, name = said.partition(":")
            return kind, name
        if said is None and self.recipe.data.source == "toy":
            said = "rule"
        return read_judge(said)

    def _announce(self, sets: Sequence[PromptSet]) -> None:
        how = "greedy" if self.decoding.greedy else "sampled at temperature 1"
        log.info(
            "eval: %s on %d test pairs; replies to %d prompts, %s, at most %d tokens",
            ", ".join(candidate.name for candidate in self.candidates),
            len(self.pairs),
            sum(len(each.prompts) for each in sets),
            how,
            self.decoding.max_new_tokens,
        )

    # Log-probabilities of the pairs

    def _logps(self, candidate: Candidate, column: str) -> np.ndarray:
        prompts, texts = list(self.pairs["prompt_ids"]), list(self.pairs[f"{column}_ids"])
        return np.array(self.answers.logps(candidate, prompts, texts, f"{column} replies"))

    @cached_property
    def _pairs(self) -> preference.Pairs:
        there = [name for name in ("chosen", "rejected") if f"{name}_ids" in self.pairs.column_names]
        lengths = {name: np.array([len(ids) for ids in self.pairs[f"{name}_ids"]]) for name in there}
        prompts = list(self.pairs["prompt"])
        return preference.Pairs(
            prompts=prompts,
            turns=np.array([turns_of(as_transcript(self.form, prompt)) for prompt in prompts]),
            prompt_tokens=np.array([len(ids) for ids in self.pairs["prompt_ids"]]),
            chosen_tokens=lengths["chosen"],
            rejected_tokens=lengths.get("rejected", np.zeros(len(prompts), int)),
            parts=preference.subsets(self.files, list(self.pairs["file"])),
        )

    def _preference(self) -> tuple[list[Row], dict[str, Any], list[dict[str, Any]], dict[str, float]]:
        """Rows of the table; what length explains and the loss of each policy; and the slices. None without pairs."""
        policies = [] if is_labelled(self.pairs) else [c for c in self.candidates if c.reference]
        rewards = {c.name: self._rewards(c) for c in policies}
        length = {name: preference.length_facts(self._pairs, its) for name, its in rewards.items()}
        for name, its in length.items():
            self.warnings += preference.length_warnings(name, its)
        rows = preference.preference_rows(self._pairs, rewards, self.against.name) if rewards else []
        losses = {name: float(its.loss.mean()) for name, its in rewards.items()}
        return rows, length, preference.slice_rows(self._pairs, rewards), losses

    def _rewards(self, policy: Candidate) -> preference.Rewards:
        stage = policy.run.manifest.stage
        beta = getattr(policy.recipe, stage).get("beta", library_settings()[stage]["beta"].default)
        change = lambda column: beta * (self._logps(policy, column) - self._logps(policy.reference, column))
        return preference.Rewards(change("chosen"), change("rejected"))

    def _perplexity(self) -> list[Row]:
        prompts, tokens = self._pairs.prompts, cluster_sums(self._pairs.chosen_tokens, self._pairs.prompts)
        values = {
            c.name: perplexity_values(cluster_sums(self._logps(c, "chosen"), prompts), tokens) for c in self.candidates
        }
        means = {name: its.mean() for name, its in values.items()}
        before = means[self.against.name]
        changes = [f"{name} {its / before - 1:+.1%}" for name, its in means.items() if name != self.against.name]
        note = f"change from {self.against.name}: {', '.join(changes)}" if changes else ""
        return [table_row("cost", PERPLEXITY, values, self.against.name, better="lower", note=note)]

    # Replies

    def replies_to(self, prompts: PromptSet) -> dict[str, list[Reply]]:
        ids = [prompt.ids for prompt in prompts.prompts]
        drawn = {
            c.name: self.answers.replies(c, ids, self.decoding, f"replies, {prompts.name}") for c in self.candidates
        }
        return self.outputs.get(prompts.name, {}) | drawn

    def _kl(self) -> list[Row]:
        """KL on samples at temperature 1, whatever the other figures' replies are."""
        how, ids = replace(self.decoding, greedy=False), [prompt.ids for prompt in self.held_out.prompts]
        per_reply, per_token = {}, {}
        for policy in (c for c in self.candidates if c.reference):
            samples = self.answers.replies(policy, ids, how, "samples for KL")
            per_reply[policy.name] = self.answers.kl(policy, ids, samples, "KL")
            per_token[policy.name] = ratio_values(per_reply[policy.name], [len(reply.ids) for reply in samples])
        note = f"from the reference, on the policy's samples of at most {how.max_new_tokens} tokens"
        row: Callable[[str, Mapping[str, Any]], Row] = lambda of, values: table_row(
            "cost", f"KL per {of}", values, self.against.name, unit="nats", better="lower", note=note
        )
        return [row("reply", per_reply), row("token", per_token)] if per_reply else []

    def _watch(
        self, replies: Mapping[str, Sequence[Reply]], losses: Mapping[str, float], cost: Sequence[Row]
    ) -> list[Row]:
        """What the replies look like, and a warning where they got worse or were cut."""
        ids = [prompt.ids for prompt in self.held_out.prompts]
        rows = watch.watch_rows({name: watch.look_at(ids, its) for name, its in replies.items()}, self.against.name)
        for candidate in self.candidates:
            name, cut = candidate.name, sum(not reply.ended for reply in replies[candidate.name]) / len(ids)
            if candidate.name != "base" and cut > CUT:
                self.warnings.append(
                    f"{cut:.0%} of {name}'s replies were cut at {self.decoding.max_new_tokens} tokens: their lengths "
                    f"are at least what is said, and a judge saw no end; --max-new-tokens"
                )
            if candidate.reference and name != self.against.name:
                self.signs[name] = watch.what_got_worse([*rows, *cost], name, self.against.name)
                loss = losses.get(name)
                self.warnings += watch.worse_text(name, self.against.name, self.signs[name], loss, float(np.log(2)))
        return rows

    def _training(self) -> list[Row]:
        """What each run's training took; nothing where there is one alone."""
        spent = {c.name: cost_of(run) for c in self.candidates if (run := trained_by(c))}
        return cost_rows(spent) if len(spent) > 1 else []

    # Judging

    def _judged(self, sets: Sequence[PromptSet], replies: Mapping[str, Mapping[str, Sequence[Reply]]]) -> JudgedReplies:
        """Each two models on each set of prompts; the toy's rule knows nothing of other prompts than the toy's."""
        judged = [] if self.judge is None else sets[:1] if self.judge[0] == "rule" else sets
        matches = self._matches(judged, replies) if judged else {}
        rows, scores, found = [], [], []
        for each in sets:
            its = matches.get(each.name, [])
            self.reply_lines += contests.reply_lines(each, replies[each.name], its)
            self.verdict_lines += contests.verdict_lines(its, each)
            of_set = contests.comparisons(its, each.name)
            found += of_set
            rows += contests.win_rate_rows(of_set, self.against.name, each.name)
            group = "judge's scores" if each.name == HELD_OUT else f"judge's scores, {each.name}"
            scores += contests.score_rows(its, list(replies[each.name]), self.against.name, group)
        self._warn_of_judging(matches, found)
        return JudgedReplies([*rows, *scores], found, *contests.ratings(matches.get(HELD_OUT, []), self.against.name))

    def _matches(self, sets: Sequence[PromptSet], replies) -> dict[str, list[Matches]]:
        names = [*self.elsewhere, *(candidate.name for candidate in self.candidates)]
        texts = {each.name: [prompt.transcript for prompt in each.prompts] for each in sets}
        everything = [text for its in texts.values() for text in its]
        limits = {"max_requests": self.options.max_requests, "max_answer_tokens": self.options.judge_tokens}
        seat = lambda a, b: self.own_judge
        if self.own_judge is None:
            seat = contests.seat_judge(self.judge, everything, names, self.options.url, **limits)
        two = contests.every_two(names, self.ours.name, self.against.name)
        pairs = [(of, a, b) for a, b in two for of in texts if {a, b} <= replies[of].keys()]
        if self.judge[0] == "llm" and self.own_judge is None:
            asked = [contests.pair_replies(texts[of], replies[of], a, b) for of, a, b in pairs]
            seat(*two[0]).announce([contest for its in asked for contest in its])
        matches: dict[str, list[Matches]] = {each.name: [] for each in sets}
        for of, a, b in pairs:
            matches[of].append(contests.hold_contest(seat, texts[of], replies[of], a, b))
        return matches

    def _warn_of_judging(self, matches: Mapping[str, Sequence[Matches]], found: Sequence[Comparison]) -> None:
        """Of the models in question; a base model loses in ways that nobody need be warned of."""
        for of, its in matches.items():
            for match in its:
                self.warnings += contests.unjudged_warning(match, of)
        for each in found:
            if "base" not in (each.a, each.b):
                self.warnings += contests.judging_warnings(each)

    # Safety and what else was asked for

    def _safety(self, sets: Sequence[PromptSet], replies) -> list[Row]:
        name, labels = self.options.classifier, self.options.harmful_labels
        classifier = HarmClassifier(name, labels) if name else None

        def harm(name: str, texts: Sequence[str]) -> list[float]:
            candidate = next((c for c in self.candidates if c.name == name), self.ours)
            wanted = {digest(["harm", classifier.key, text]): text for text in texts}
            kept = self.answers.kept(candidate)
            kept.complete(wanted, classifier, at_once=64, about=f"{name}: harmful content")
            return [kept.values[digest(["harm", classifier.key, text])] for text in texts]

        rows = (safety_rows(each, replies[each.name], self.against.name, name, harm) for each in sets)
        return [row for of_set in rows for row in of_set]

    def _bias(self) -> list[Row]:
        if not self.options.bias:
            return []
        pairs = read_sentence_pairs(self.options.bias)
        kept = self._few("bias", range(len(pairs.more)))
        pairs = replace(
            pairs, **{name: [getattr(pairs, name)[i] for i in kept] for name in ("more", "less", "categories")}
        )
        first = self.tokenizer.bos_token_id
        first = self.tokenizer.eos_token_id if first is None else first
        encode = lambda texts: [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        more, less = encode(pairs.more), encode(pairs.less)
        outcomes = {}
        for candidate in self.candidates:
            both = self.answers.logps(candidate, [[first]] * 2 * len(more), more + less, "stereotypes")
            outcomes[candidate.name] = prefers_stereotype(both[: len(more)], both[len(more) :])
        return stereotype_rows(pairs, outcomes, self.against.name)

    def _benchmarks(self) -> list[Row]:
        if not self.options.lm_eval:
            return []
        figures, of = {}, self.options
        for candidate in self.candidates:
            kept = self.answers.kept(candidate)
            wanted = {digest(["lm-eval", *identify_tasks(of.lm_eval, of.tasks_folder, of.limit)]): candidate}

            def run(few: list[Candidate]) -> list[dict[str, Any]]:
                with self.loaded.on(few[0]) as model:
                    return [run_benchmarks(model, self.tokenizer, of.lm_eval, of.tasks_folder, of.limit, of.batch_size)]

            (figures[candidate.name],) = kept.complete(wanted, run, at_once=1, about=f"{candidate.name}: lm-eval")
        return benchmark_rows(figures)


def _about(prompts: PromptSet) -> dict[str, Any]:
    left_out = dict(prompts.left_out)
    counted = len(prompts.prompts)
    return {"name": prompts.name, "known_as": prompts.known_as, "prompts": counted, "left_out": left_out}
