"""Preference pairs from a run's own replies: sampled, judged, the better one chosen; nothing is asked twice.

What was sampled and judged is in result caches, by content: the same call goes on where it was stopped, and what it
writes does not depend on how often that was.
"""

from __future__ import annotations

import logging
import random
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from alignlab.data.format import Format
from alignlab.data.prepare import Prepared
from alignlab.data.prompts import Prompt, as_transcript, dialogue_in, read_prompts
from alignlab.data.splits import dialogue_hash
from alignlab.data.transcript import ASSISTANT, dialogue_key, join_turns, split_turns
from alignlab.disk import check_writable, write_lines
from alignlab.errors import DataError, RecipeError
from alignlab.evaluation.answers import Answers, Decoding
from alignlab.evaluation.candidates import Candidate, LoadedModels, choose_models
from alignlab.evaluation.judge import Judge
from alignlab.measure.generate import Reply
from alignlab.models.load import weights_hash
from alignlab.recipe.load import Recipe
from alignlab.rounds.scores import Scores, Seat, judge_of
from alignlab.runs.run import Run, finished
from alignlab.text.tables import paragraph
from alignlab.train.stages import prepare_data

log = logging.getLogger(__name__)

HELD_OUT = ("validation", "test")
Choose = Callable[[Sequence[float]], list[tuple[int, int]]]  # scores → the places of better and worse replies


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a command asks of `make_pairs`."""

    judge: str | Judge | None = None
    prompts: Path | None = None  # none: the prompts that the recipe trains on
    prompt_column: str | None = None  # of that file, where it is not found by its name
    limit: int | None = None  # of prompts: a seeded draw
    samples: int | None = None  # replies to each prompt; none: four to judge, one to revise
    keep: str = "best-worst"  # or all, or margin=X
    url: str | None = None  # of an llm judge's endpoint
    max_requests: int | None = None
    seed: int = 0  # of the draw of prompts and of the replies
    batch_size: int | None = None  # replies sampled together; none: monitor.kl.batch_size. With the seed it fixes them


@dataclass(frozen=True)
class Made:
    """The rows, and what became of all that was asked."""

    rows: Sequence[Mapping[str, Any]]
    run: str
    judge: str
    prompts: int
    replies: int
    dropped: Mapping[str, int] = field(default_factory=dict)  # replies and prompts, by reason

    def __str__(self) -> str:
        lines = paragraph(
            f"{len(self.rows):,} pairs from {self.replies:,} replies of {self.run} to {self.prompts:,} prompts, "
            f"judge: {self.judge}"
        )
        for reason, count in self.dropped.items():
            lines += paragraph(f"dropped, {reason}: {count:,}", more="  ")
        return "\n".join(lines)


@dataclass(frozen=True)
class Sampled:
    """The replies to one prompt that a judge can be asked about."""

    transcript: str  # the prompt as a judge reads it
    columns: Mapping[str, str]  # the prompt as a row has it
    replies: Sequence[str]
    ended: Sequence[bool]  # by itself; a reply that was cut may be rejected, and is never chosen


def make_pairs(recipe: Recipe, run: Run, ask: Ask, judge: Seat | None = None) -> Made:
    """Pairs of `run`'s replies to prompts of `recipe`; raises DataError where a prompt is held out, or none remain.

    `judge` is one that is there already, in place of the one that `ask` names.

    A reply that is empty or there already is left out. One that was cut may be rejected, and is never chosen: it would
    teach to stop anywhere. A prompt whose replies are all as good gives no pair. All of them are counted.
    """
    choose = read_keep(ask.keep)
    judge, samples = judge or judge_of(recipe, ask.judge, ask.url, ask.max_requests), ask.samples or 4
    source = Source(recipe, run)
    prompts = source.prompts(ask)
    replies = source.sample(prompts, samples, ask)
    dropped: Counter[str] = Counter()
    sampled = list(usable_replies(source.form, prompts, replies, recipe.data.max_reply_tokens, dropped))
    several = [each for each in sampled if len(each.replies) > 1]
    dropped["prompts with fewer than two different replies"] += len(sampled) - len(several)
    transcripts, texts = [each.transcript for each in several], [each.replies for each in several]
    scores = judge.score(transcripts, texts, source.candidate.home.with_name("scores.jsonl"))
    meta = {**source.facts, "judge": judge.name, "seed": ask.seed}
    rows = [row for each, its in zip(several, scores, strict=True) for row in _rows(each, its, choose, meta, dropped)]
    return source.made(rows, judge.name, prompts, samples, dropped)


def write_pairs(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the rows whole; `data.path` reads them."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_lines(out, rows)


def check_out(out: Path) -> None:
    """Raises where the file cannot be written: better before the work than after it."""
    if out.is_dir():
        raise RecipeError(f"--out {out} is a folder; name a file")
    check_writable(out.parent)


# Which pairs


def read_keep(said: str) -> Choose:
    """Which replies to a prompt make pairs: the best and the worst, every two that differ, or that differ by X."""
    if said == "best-worst":
        return _best_and_worst
    if said == "all":
        return lambda scores: _apart(scores, 0)
    kind, _, number = said.partition("=")
    try:
        least = float(number) if kind == "margin" else 0
    except ValueError:
        least = 0
    if not 0 < least < float("inf"):
        raise RecipeError(f"--keep {said} is not known; write best-worst, all, or margin=X with X above 0")
    return lambda scores: _apart(scores, least)


def _best_and_worst(scores: Sequence[float]) -> list[tuple[int, int]]:
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    return [(best, worst)] if scores[best] > scores[worst] else []


def _apart(scores: Sequence[float], least: float) -> list[tuple[int, int]]:
    found = []
    for one, other in combinations(range(len(scores)), 2):
        better, worse = (one, other) if scores[one] > scores[other] else (other, one)
        if scores[better] > scores[worse] and scores[better] - scores[worse] >= least:
            found.append((better, worse))
    return found


def _rows(each: Sampled, scores: Scores, choose: Choose, meta: Mapping[str, Any], dropped: Counter) -> Iterator[dict]:
    if isinstance(scores, str):
        dropped[f"prompts with a contest that is {scores}"] += 1
        return
    chosen = choose(scores)
    if not chosen:
        dropped["prompts whose replies are as good, or nearly so"] += 1
    for better, worse in chosen:
        if not each.ended[better]:
            dropped["pairs whose better reply was cut, and would teach to stop anywhere"] += 1
            continue
        yield {
            **each.columns,
            "chosen": each.replies[better],
            "rejected": each.replies[worse],
            "score_chosen": scores[better],
            "score_rejected": scores[worse],
            "meta": dict(meta),
        }


def usable_replies(
    form: Format, prompts: Sequence[Prompt], replies: Sequence[Sequence[Reply]], most_tokens: int, dropped: Counter
) -> Iterator[Sampled]:
    """Each prompt with those of its replies that can be judged and learned; the others are counted by reason."""
    for prompt, its in zip(prompts, replies, strict=True):
        columns = prompt_columns(form, prompt.text)
        if columns is None:
            dropped["prompts whose turns cannot be told from how they are written"] += 1
        else:
            kept = _usable(form, prompt, its, most_tokens, dropped)
            yield Sampled(prompt.transcript, columns, [r.text for r in kept], [r.ended for r in kept])


def _usable(form: Format, prompt: Prompt, replies: Sequence[Reply], most_tokens: int, dropped: Counter) -> list[Reply]:
    kept: dict[str, Reply] = {}
    prompts, ids_of_prompt = [prompt.text] * len(replies), [np.array(prompt.ids)] * len(replies)
    read = form.encoder.replies(prompts, ids_of_prompt, [reply.text for reply in replies])
    for reply, ids in zip(replies, read, strict=True):
        if not reply.text.strip():
            dropped["replies that are empty"] += 1
        elif form.special_token_in(reply.text):
            dropped["replies that spell a special token"] += 1
        elif ids is None or len(ids) > most_tokens:
            dropped["replies with more tokens once they are read as text"] += 1
        elif reply.text.strip() in kept:
            dropped["replies that another sample gave too"] += 1
        else:
            kept[reply.text.strip()] = reply
    return [*kept.values()]


def prompt_columns(form: Format, text: str) -> dict[str, str] | None:
    """A prompt as a row has it, from which `data.path` makes the same prompt; none where its turns cannot be told."""
    if form.name in ("hh", "plain"):
        return {"prompt": text}
    if (dialogue := dialogue_in(form, text)) is None:
        return None
    system = {"system": dialogue.system} if dialogue.system else {}
    return {"prompt": join_turns(dialogue.turns) + ASSISTANT, **system}


# What is asked of whom


class Source:
    """The run whose replies are asked for, and the prompts that it may be asked."""

    def __init__(self, recipe: Recipe, run: Run):
        self.recipe, self.run = recipe, finished(run)
        self.candidate: Candidate = choose_models([run]).ours
        self.tokenizer, self.pairs = prepare_data(recipe)
        self.form = Format(recipe.data.format, self.tokenizer)
        self.answers = Answers(LoadedModels(), self.form)

    @property
    def facts(self) -> dict[str, str]:
        """Of a row's `meta`: whose replies these are."""
        return {"run": str(self.run.path), "weights": weights_hash(self.run.model)}

    def prompts(self, ask: Ask) -> list[Prompt]:
        """The prompts of a file or of the training split, in a seeded order; refused where one is held out."""
        if ask.prompts:
            found = self._of_file(ask.prompts, ask.prompt_column)
        else:
            few = dict(zip(self.pairs.train["prompt"], self.pairs.train["prompt_ids"], strict=True))
            found = [Prompt(as_transcript(self.form, text), tuple(ids), text=text) for text, ids in few.items()]
        random.Random(f"prompts/{ask.seed}").shuffle(found)
        return found[: ask.limit]

    def _of_file(self, file: Path, column: str | None) -> list[Prompt]:
        found = list(read_prompts(file, self.form, self.recipe.data.max_prompt_tokens, column).prompts)
        is_held_out = held_out_in(self.pairs, self.form, self.recipe.data.seed)
        if refused := [prompt.transcript for prompt in found if is_held_out(prompt.transcript)]:
            raise DataError(
                f"{file}: {len(refused)} of its {len(found)} prompts are held out by {self.recipe.name}, such as "
                f"{' '.join(refused[0].split())[:80]!r}; take them out: what is trained on cannot be evaluated on"
            )
        return found

    def sample(self, prompts: Sequence[Prompt], samples: int, ask: Ask) -> list[list[Reply]]:
        """So many replies to each prompt, at temperature 1."""
        together = ask.batch_size or self.recipe.monitor.kl.batch_size
        limit = self.recipe.data.max_reply_tokens - 1  # the end that a row's reply gets is a token too
        how = Decoding(False, limit, ask.seed, together)
        ids = [prompt.ids for prompt in prompts for _ in range(samples)]
        log.info("pairs: %d replies of %s to each of %d prompts", samples, self.run.path, len(prompts))
        replies = self.answers.replies(self.candidate, ids, how, "replies")
        return [replies[start : start + samples] for start in range(0, len(replies), samples)]

    def made(self, rows: list, judge: str, prompts: Sequence[Prompt], samples: int, dropped: Counter) -> Made:
        """What came of it; DataError where that is nothing."""
        counts = {reason: count for reason, count in sorted(dropped.items()) if count}
        if not rows:
            why = ", ".join(f"{count} {reason}" for reason, count in counts.items())
            raise DataError(f"none of {len(prompts)} prompts gave a pair ({why}); what was judged is kept")
        return Made(rows, str(self.run.path), judge, len(prompts), len(prompts) * samples, counts)


def held_out_in(pairs: Prepared, form: Format, seed: int) -> Callable[[str], bool]:
    """Whether a transcript up to its last `Assistant:` is a prompt or a dialogue that the pairs hold out."""
    texts = {as_transcript(form, text).strip() for split in HELD_OUT for text in getattr(pairs, split)["prompt"]}
    keys = frozenset().union(*(pairs.dialogues[split] for split in HELD_OUT))

    def is_held_out(transcript: str) -> bool:
        if transcript.strip() in texts:
            return True
        turns = split_turns(transcript.removesuffix(ASSISTANT)) if transcript.startswith("\n\n") else []
        named = [repr(turns), dialogue_key(turns)] if turns else []
        return any(dialogue_hash(key, seed) in keys for key in named)

    return is_held_out


def next_command(recipe: Recipe, run: Run, out: Path) -> str:
    """The line that trains on the pairs, from the run whose replies they are."""
    source = "" if recipe.data.source is None else " data.source=pairs"
    words = [f"data.path={shlex.quote(str(out))}{source}", f"model.start={shlex.quote(str(run.model))}"]
    return f"alignlab dpo {shlex.quote(recipe.name)} {' '.join(words)}"
