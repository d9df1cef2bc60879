"""Is it better, at what, how sure are we, and what did it cost: models on the same held-out prompts → `eval.json`.

Every figure is over the test split, which neither trained a model nor chose a checkpoint, or over prompt files.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from alignlab import model as models
from alignlab.disk import check_writable, digest, write_lines, write_record
from alignlab.errors import DataError, ModelError
from alignlab.evaluate import contests, preference, watch
from alignlab.evaluate.answers import Answers, Decoding
from alignlab.evaluate.benchmarks import benchmark_rows, check_benchmarks, identify_tasks, run_benchmarks
from alignlab.evaluate.candidates import Bench, Candidate, Lineup, line_up, model_facts, refuse_what_cannot_be_compared
from alignlab.evaluate.contests import Matches
from alignlab.evaluate.estimates import cluster_sums, perplexity_values, ratio_values, table_row
from alignlab.evaluate.harm import HarmClassifier
from alignlab.evaluate.safety import safety_rows
from alignlab.evaluate.stereotypes import prefers_stereotype, read_sentence_pairs, stereotype_rows
from alignlab.fields import library_settings
from alignlab.format import Format
from alignlab.generate import Reply
from alignlab.lineup import folder_of
from alignlab.prompts import Prompt, PromptSet, as_transcript, describe_sets, read_prompts, turns_of
from alignlab.refusals import stated
from alignlab.run import Run, package_versions
from alignlab.train import prepare_data

log = logging.getLogger(__name__)

HELD_OUT = "held-out"
CUT = 0.1  # share of replies cut at the limit from which a warning says so


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a command asks of an evaluation."""

    judge: str | None = None  # none: the toy's rule on the toy's dialogues, nobody on others
    url: str | None = None  # of an llm judge's endpoint
    max_requests: int | None = None
    prompts: Sequence[Path] = ()
    prompt_column: str | None = None  # of these files, where it is not found by its name
    bias: Path | None = None
    classifier: str | None = None
    harmful_labels: Sequence[str] = ()
    lm_eval: Sequence[str] = ()
    tasks_folder: Path | None = None
    greedy: bool = False
    max_new_tokens: int | None = None  # none: data.max_reply_tokens, the longest reply in training
    replies: int = 256  # held-out prompts that are answered
    limit: int | None = None  # of pairs, prompts and rows of each file: a quick look
    batch_size: int = 16
    seed: int = 0


def evaluate(runs: Sequence[Run], wishes: Wishes) -> Path:
    """Evaluates the runs' models side by side and returns the `eval.json` that says what came out."""
    _check_wishes(wishes)
    check_writable(folder_of(runs))
    evaluation = Evaluation(line_up(runs), wishes)
    began = time.monotonic()
    found = evaluation.measure()
    file = folder_of(runs) / "eval.json"
    write_lines(file.with_name("verdicts.jsonl"), evaluation.verdicts)
    write_record(file, {**found, "seconds": round(time.monotonic() - began, 1)})
    return file


def _check_wishes(wishes: Wishes) -> None:
    contests.read_judge(wishes.judge)
    check_benchmarks(wishes.lm_eval, wishes.tasks_folder)
    for file in (*wishes.prompts, *([wishes.bias] if wishes.bias else [])):
        if not file.is_file():
            raise DataError(f"{file}: no such file")


class Evaluation:
    """One evaluation: the models, the prompts they share, and what was found."""

    def __init__(self, lineup: Lineup, wishes: Wishes):
        self.candidates, self.ours, self.against = lineup.candidates, lineup.ours, lineup.against
        self.wishes, self.recipe = wishes, lineup.ours.recipe
        self.warnings = refuse_what_cannot_be_compared(self.candidates)
        self.tokenizer, pairs = prepare_data(self.recipe)
        self.form = Format(self.recipe.data.format, self.tokenizer)
        self.pairs, self.files = self._drawn(pairs.test, wishes.limit), pairs.files
        self.bench = Bench()
        self.answers = Answers(self.bench, self.form)
        self.decoding = self._decoding()
        self.judge = self._judge()
        self.verdicts: list[dict[str, Any]] = []

    def measure(self) -> dict[str, Any]:
        """Everything that `eval.json` holds."""
        sets = [self.held_out, *self._files()]
        self._announce(sets)
        rows, extra = self._preference()
        cost = self._perplexity()
        matches, judged = {}, None
        replies = {each.name: self._replies(each) for each in sets}
        looks = self._watch(replies[HELD_OUT], extra["losses"], cost)
        rows += cost + self._kl()
        self.bench.hold()
        if self.judge:
            matches, judged = self._contests(sets, replies)
        rows = (judged["table"] if judged else []) + rows + self._safety(sets, replies) + looks
        rows += self._bias() + self._benchmarks() + preference.slices_as_table(extra["slices"])
        match = self._of_interest(matches.get(HELD_OUT, []))
        if self.wishes.limit:
            self.warnings.append(f"a quick look at {self.wishes.limit} pairs and prompts at most, by --limit")
        transcripts = [prompt.transcript for prompt in self.held_out.prompts]
        if self.judge is None:
            self.warnings.append(f"nobody judged which replies are better; name a judge: --judge {contests.KINDS}")
        return {
            "models": [model_facts(candidate) for candidate in self.candidates],
            "against": self.against.name,
            "split": "test",
            "pairs": len(self.pairs),
            "prompts": len(self.held_out.prompts),
            "limit": self.wishes.limit,
            "decoding": self.decoding.said(),
            "stops": models.find_stops(self.recipe.model, self.form).said,
            "judge": self.wishes.judge or (":".join(self.judge).rstrip(":") if self.judge else None),
            "table": rows,
            "win_rates": judged["win_rates"] if judged else [],
            "matrix": judged["matrix"] if judged else {},
            "ratings": judged["ratings"] if judged else [],
            "ratings_note": judged["ratings_note"] if judged else "",
            "length": extra["length"],
            "slices": extra["slices"],
            "refusals": stated(),
            "prompt_files": [
                {"name": s.name, "known_as": s.known_as, "prompts": len(s.prompts), "left_out": dict(s.left_out)}
                for s in sets[1:]
            ],
            "cases": contests.choose_cases(match, transcripts, replies[HELD_OUT], self.ours.name, self.wishes.seed),
            "warnings": self.warnings,
            "versions": package_versions(),
        }

    # What is evaluated, on what

    def _drawn(self, pairs, limit: int | None):
        """The pairs in a seeded order, so that a limit takes a random draw, and a smaller one a part of it."""
        order = list(range(len(pairs)))
        random.Random(f"pairs/{self.wishes.seed}").shuffle(order)
        return pairs.select(order[:limit])

    def _decoding(self) -> Decoding:
        w = self.wishes
        return Decoding(w.greedy, w.max_new_tokens or self.recipe.data.max_reply_tokens, w.seed, w.batch_size)

    @cached_property
    def held_out(self) -> PromptSet:
        few = dict(zip(self.pairs["prompt"], self.pairs["prompt_ids"], strict=True))
        texts = list(few)[: self.wishes.replies]
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

    def _files(self) -> list[PromptSet]:
        found = [read_prompts(file, self.form, self._room, self.wishes.prompt_column) for file in self.wishes.prompts]
        for line in describe_sets(found):
            log.info("%s", line)
        names = [each.name for each in found]
        if len(set(names)) < len(names) or HELD_OUT in names:
            raise DataError(f"prompt files need names of their own, and these are {', '.join(names)}; rename one")
        return [replace(each, prompts=self._few(each.name, each.prompts)) for each in found]

    def _few(self, of: str, items: Sequence[Any]) -> list[Any]:
        """All of them in their order, or a seeded draw of as many as the limit says."""
        if self.wishes.limit is None or len(items) <= self.wishes.limit:
            return list(items)
        numbers = random.Random(f"{of}/{self.wishes.seed}").sample(range(len(items)), self.wishes.limit)
        return [items[i] for i in sorted(numbers)]

    def _judge(self) -> tuple[str, str] | None:
        said = self.wishes.judge
        if said is None and self.recipe.data.source == "toy":
            said = "rule"
        return contests.read_judge(said)

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
        lengths = {name: np.array([len(ids) for ids in self.pairs[f"{name}_ids"]]) for name in ("chosen", "rejected")}
        prompts = list(self.pairs["prompt"])
        return preference.Pairs(
            prompts=prompts,
            turns=np.array([turns_of(as_transcript(self.form, prompt)) for prompt in prompts]),
            prompt_tokens=np.array([len(ids) for ids in self.pairs["prompt_ids"]]),
            chosen_tokens=lengths["chosen"],
            rejected_tokens=lengths["rejected"],
            parts=preference.subsets(self.files, list(self.pairs["file"])),
        )

    def _preference(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        rewards = {c.name: self._rewards(c) for c in self.candidates if c.reference}
        facts = {name: preference.length_facts(self._pairs, its) for name, its in rewards.items()}
        for name, its in facts.items():
            self.warnings += preference.length_warnings(name, its)
        rows = preference.preference_rows(self._pairs, rewards, self.against.name) if rewards else []
        losses = {name: float(its.loss.mean()) for name, its in rewards.items()}
        return rows, {"length": facts, "slices": preference.slice_rows(self._pairs, rewards), "losses": losses}

    def _rewards(self, policy: Candidate) -> preference.Rewards:
        beta = policy.recipe.dpo.get("beta", library_settings()["dpo"]["beta"].default)
        change = lambda column: beta * (self._logps(policy, column) - self._logps(policy.reference, column))
        return preference.Rewards(change("chosen"), change("rejected"))

    def _perplexity(self) -> list[dict[str, Any]]:
        prompts, tokens = self._pairs.prompts, cluster_sums(self._pairs.chosen_tokens, self._pairs.prompts)
        values = {
            c.name: perplexity_values(cluster_sums(self._logps(c, "chosen"), prompts), tokens) for c in self.candidates
        }
        means = {name: its.mean() for name, its in values.items()}
        before = means[self.against.name]
        changes = [f"{name} {its / before - 1:+.1%}" for name, its in means.items() if name != self.against.name]
        note = f"change from {self.against.name}: {', '.join(changes)}" if changes else ""
        return [table_row("cost", watch.PERPLEXITY, values, self.against.name, better="lower", note=note)]

    # Replies

    def _replies(self, prompts: PromptSet) -> dict[str, list[Reply]]:
        ids = [prompt.ids for prompt in prompts.prompts]
        return {
            c.name: self.answers.replies(c, ids, self.decoding, f"replies, {prompts.name}") for c in self.candidates
        }

    def _kl(self) -> list[dict[str, Any]]:
        """KL on samples at temperature 1, whatever the other figures' replies are."""
        how, ids = replace(self.decoding, greedy=False), [prompt.ids for prompt in self.held_out.prompts]
        per_reply, per_token = {}, {}
        for policy in (c for c in self.candidates if c.reference):
            samples = self.answers.replies(policy, ids, how, "samples for KL")
            per_reply[policy.name] = self.answers.kl(policy, ids, samples, "KL")
            per_token[policy.name] = ratio_values(per_reply[policy.name], [len(reply.ids) for reply in samples])
        note = f"from the reference, on the policy's samples of at most {how.max_new_tokens} tokens"
        row: Callable[..., dict[str, Any]] = lambda of, values: table_row(
            "cost", f"KL per {of}", values, self.against.name, unit="nats", better="lower", note=note
        )
        return [row("reply", per_reply), row("token", per_token)] if per_reply else []

    def _watch(self, replies: Mapping[str, Sequence[Reply]], losses: Mapping[str, float], cost) -> list[dict[str, Any]]:
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
                signs = watch.what_got_worse([*rows, *cost], name, self.against.name)
                self.warnings += watch.worse_text(name, self.against.name, signs, losses.get(name), float(np.log(2)))
        return rows

    def _of_interest(self, matches: Sequence[Matches]) -> Matches | None:
        names = {self.ours.name, self.against.name}
        return next((match for match in matches if {match.a, match.b} == names), None)

    # Judging

    def _contests(self, sets: Sequence[PromptSet], replies) -> tuple[dict[str, list[Matches]], dict[str, Any]]:
        """Each two models on each set of prompts; the toy's rule knows nothing of other prompts than the toy's."""
        kind, _ = self.judge
        names = [candidate.name for candidate in self.candidates]
        judged = sets if kind != "rule" else sets[:1]
        everything = [prompt.transcript for each in judged for prompt in each.prompts]
        seat = contests.seat_judge(self.judge, everything, names, self.wishes.url, self.wishes.max_requests)
        texts = {each.name: [prompt.transcript for prompt in each.prompts] for each in judged}
        matches: dict[str, list[Matches]] = {each.name: [] for each in judged}
        for a, b in contests.every_two(names, self.ours.name, self.against.name):
            for of, its in matches.items():
                its.append(contests.hold_contest(seat, texts[of], replies[of], a, b))
        rows, scores, entries = [], [], []
        for of, its in matches.items():
            self.verdicts += contests.verdict_lines(its, texts[of], of)
            entries += contests.win_rates(its, of)
            rows += contests.win_rate_rows(its, self.against.name, of)
            group = "judge's scores" if of == HELD_OUT else f"judge's scores, {of}"
            scores += contests.score_rows(its, names, self.against.name, group)
        self._warn_of_judging(matches, entries)
        rated, note = contests.ratings(matches[HELD_OUT], self.against.name)
        held_out = [entry for entry in entries if entry["prompts"] == HELD_OUT]
        facts = {"matrix": contests.matrix(held_out), "ratings": rated, "ratings_note": note}
        return matches, {"table": rows + scores, "win_rates": entries, **facts}

    def _warn_of_judging(self, matches: Mapping[str, Sequence[Matches]], entries: Sequence[Mapping[str, Any]]) -> None:
        """Of the models in question; a base model loses in ways that nobody need be warned of."""
        for of, its in matches.items():
            for match in its:
                self.warnings += contests.unjudged_warning(match, of)
        for entry in entries:
            if "base" not in (entry["a"], entry["b"]):
                self.warnings += contests.judging_warnings(entry)

    # Safety and what else was asked for

    def _safety(self, sets: Sequence[PromptSet], replies) -> list[dict[str, Any]]:
        w = self.wishes
        classifier = HarmClassifier(w.classifier, w.harmful_labels) if w.classifier else None

        def harm(name: str, texts: Sequence[str]) -> list[float]:
            candidate = next(c for c in self.candidates if c.name == name)
            wanted = {digest(["harm", classifier.key, text]): text for text in texts}
            kept = self.answers.kept(candidate)
            kept.complete(wanted, classifier, at_once=64, about=f"{name}: harmful content")
            return [kept.values[digest(["harm", classifier.key, text])] for text in texts]

        return [
            row for each in sets for row in safety_rows(each, replies[each.name], self.against.name, w.classifier, harm)
        ]

    def _bias(self) -> list[dict[str, Any]]:
        if not self.wishes.bias:
            return []
        pairs = read_sentence_pairs(self.wishes.bias)
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

    def _benchmarks(self) -> list[dict[str, Any]]:
        if not self.wishes.lm_eval:
            return []
        figures, w = {}, self.wishes
        for candidate in self.candidates:
            kept = self.answers.kept(candidate)
            wanted = {digest(["lm-eval", *identify_tasks(w.lm_eval, w.tasks_folder, w.limit)]): candidate}

            def run(few: list[Candidate]) -> list[dict[str, Any]]:
                with self.bench.on(few[0]) as model:
                    return [run_benchmarks(model, self.tokenizer, w.lm_eval, w.tasks_folder, w.limit, w.batch_size)]

            (figures[candidate.name],) = kept.complete(wanted, run, at_once=1, about=f"{candidate.name}: lm-eval")
        return benchmark_rows(figures)
