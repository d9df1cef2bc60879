"""Which of two replies is better: by a plain rule, a reward model, or human votes; a hosted judge is `endpoint`.

A judge is a function from contests to verdicts, in the same order. Where it could care which reply it is shown first,
it judges each pair in both orders.
"""

from __future__ import annotations

import csv
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignlab.data.hub import stay_offline_without_hub
from alignlab.data.toy import score
from alignlab.data.transcript import ASSISTANT, HUMAN, split_turns
from alignlab.errors import DataError, ModelError, RecipeError, need

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Scores = Mapping[str, float]
TIE, BOTH_BAD = "tie", "both_bad"  # people may find two replies bad, which counts as a tie
NOT_VOTED_ON = "not voted on"


@dataclass(frozen=True, slots=True)
class Contest:
    """Two models' replies to one prompt: a transcript up to its last `Assistant:`, or the user's words alone."""

    prompt: str
    reply_a: str
    reply_b: str

    @property
    def differs(self) -> bool:
        """Whether there is anything to judge."""
        return self.reply_a.strip() != self.reply_b.strip()

    def messages(self) -> list[dict[str, str]]:
        """The prompt as chat messages without the spaces around them; turns of one side in a row are one message."""
        if not self.prompt.startswith((HUMAN, ASSISTANT)):
            return [{"role": "user", "content": self.prompt.strip()}]
        spoken = groupby(split_turns(self.prompt.removesuffix(ASSISTANT)), key=lambda turn: turn.role)
        roles = {"Human": "user", "Assistant": "assistant"}
        return [{"role": roles[who], "content": "\n\n".join(t.text.strip() for t in turns)} for who, turns in spoken]


@dataclass(frozen=True)
class Judgement:
    """One answer of a judge that was shown the replies in one order; a and b are the models, whatever the order."""

    order: str  # ab or ba: whose reply was shown first
    preference: str | None  # a, b or tie; none where the answer cannot be read or there is none
    scores: Mapping[str, Scores] = field(default_factory=dict)  # of a and of b
    text: str | None = None  # what the judge wrote
    error: str | None = None  # why there is no answer, where the request failed


@dataclass(frozen=True)
class Verdict:
    """What came of one contest.

    `outcome` is 1 where a is better, 0 where b is, ½ for a tie, none where it was not judged. `how` is one of judged,
    disagreement (the two orders gave different answers: a tie), identical (equal replies: a tie, nobody asked),
    unparseable, failed, not asked, not voted on.
    """

    outcome: float | None
    how: str
    scores: Mapping[str, Scores] = field(default_factory=dict)  # of a and of b, the mean over both orders
    judgements: tuple[Judgement, ...] = ()


Judge = Callable[[Sequence[Contest]], list[Verdict]]
OUTCOMES = {"a": 1.0, "b": 0.0, TIE: 0.5}


KINDS = "rule, reward:NAME, votes:FILE or llm:MODEL"


def read_judge(said: str | None) -> tuple[str, str] | None:
    """The kind and the name of a judge, as `llm:MODEL`; RecipeError where there is no such kind."""
    if said is None or said == "none":
        return None
    kind, _, name = said.partition(":")
    if kind not in ("rule", "reward", "votes", "llm") or bool(name) == (kind == "rule"):
        meant = f"for a chat model write llm:{said}; otherwise " if not name else ""
        raise RecipeError(f"--judge {said} is no judge; {meant}write {KINDS}")
    if kind == "votes" and not Path(name).is_file():
        raise DataError(f"{name}: no such file of votes")
    if kind == "llm":
        need(f"--judge {said}", "judge", "openai")
    return kind, name


def judge_contests(judge: Judge, contests: Sequence[Contest]) -> list[Verdict]:
    """The judge's verdicts; equal replies are a tie without asking."""
    differ = [contest for contest in contests if contest.differs]
    verdicts = iter(judge(differ) if differ else [])
    same = Verdict(OUTCOMES[TIE], "identical")
    return [next(verdicts) if contest.differs else same for contest in contests]


def combine_orders(judgements: Sequence[Judgement]) -> Verdict:
    """One verdict from what a judge said in both orders; two different answers are a tie."""
    preferences = {judgement.preference for judgement in judgements}
    if None in preferences:
        return Verdict(None, _why_missing(judgements), judgements=tuple(judgements))
    agreed = len(preferences) == 1
    outcome = OUTCOMES[preferences.pop()] if agreed else OUTCOMES[TIE]
    return Verdict(outcome, "judged" if agreed else "disagreement", _mean_scores(judgements), tuple(judgements))


def _why_missing(judgements: Sequence[Judgement]) -> str:
    if any(j.error for j in judgements):
        return "failed"
    return "unparseable" if any(j.preference is None and j.text is not None for j in judgements) else "not asked"


def _mean_scores(judgements: Sequence[Judgement]) -> dict[str, Scores]:
    def mean(model: str, name: str) -> float:
        return sum(j.scores[model][name] for j in judgements) / len(judgements)

    return {model: {name: mean(model, name) for name in scores} for model, scores in judgements[0].scores.items()}


def tally(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How many verdicts came about in each way, and among them the ties of whatever kind."""
    ties = sum(verdict.outcome == OUTCOMES[TIE] for verdict in verdicts)
    return {"ties": ties, **Counter(verdict.how for verdict in verdicts)}


def _by_score(name: str, score_a: float, score_b: float) -> Verdict:
    better = TIE if score_a == score_b else "a" if score_a > score_b else "b"
    return Verdict(OUTCOMES[better], "judged", {"a": {name: score_a}, "b": {name: score_b}})


# Rule


def judge_by_rule(contests: Sequence[Contest]) -> list[Verdict]:
    """The toy's own rule, which looks words up: it says nothing of replies to any other data."""
    return [_by_score("rule", score(c.prompt, c.reply_a), score(c.prompt, c.reply_b)) for c in contests]


# Reward model


class RewardJudge:
    """A sequence-classification reward model with one output: the reply with the higher reward is better.

    The dialogue is written with the tokenizer's chat template, or as the transcript it is where there is none. What is
    longer than the model takes loses its beginning, and is counted in a warning.
    """

    def __init__(self, name: str, batch_size: int = 8):
        self.name, self.batch_size = name, batch_size
        self.model, self.tokenizer = _load_reward_model(name)

    def __call__(self, contests: Sequence[Contest]) -> list[Verdict]:
        rewards = self._rewards([self._ids(c, reply) for c in contests for reply in (c.reply_a, c.reply_b)])
        return [_by_score("reward", a, b) for a, b in zip(rewards[::2], rewards[1::2], strict=True)]

    def _ids(self, contest: Contest, reply: str) -> list[int]:
        from jinja2 import TemplateError

        if self.tokenizer.chat_template is None:
            return self.tokenizer(contest.prompt + reply, verbose=False)["input_ids"]
        messages = [*contest.messages(), {"role": "assistant", "content": reply.strip()}]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError as e:
            raise DataError(
                f"{self.name}: its chat template refuses the prompt {contest.prompt.strip()[:60]!r} ({e});"
                " leave this prompt out, or judge with another model"
            ) from e
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _rewards(self, rows: Sequence[list[int]]) -> list[float]:
        """The reward of each row, computed in batches of like length."""
        import torch
        from huggingface_hub.utils import tqdm

        limit = _longest_input(self.model, self.tokenizer)
        if long := sum(len(ids) > limit for ids in rows):
            log.warning(
                "%s: %d of %d texts are longer than its %d tokens; cut in front", self.name, long, len(rows), limit
            )
        rewards = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        for batch in tqdm(batches, desc=f"judging with {self.name}", leave=False, disable=None):
            padded = self.tokenizer.pad(
                {"input_ids": [rows[i][-limit:] for i in batch]}, padding_side="right", return_tensors="pt"
            ).to(self.model.device)
            with torch.no_grad():
                logits = self.model(**padded).logits.float().squeeze(-1)
            for i, reward in zip(batch, logits.tolist(), strict=True):
                rewards[i] = reward
        return rewards


def _load_reward_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model, tokenizer, is_trained = load_classifier(name, "reward model")
    if model.config.num_labels != 1 or not is_trained:
        missing = f"has {model.config.num_labels} outputs" if model.config.num_labels != 1 else "has no trained head"
        raise ModelError(f"{name} is no reward model: it {missing}; name a sequence classifier trained with one output")
    return model, tokenizer


def load_classifier(name: str, what: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """A sequence classifier by name or path, its tokenizer, and whether its head was trained; an error calls it `what`.

    Where the tokenizer has no pad token, texts are padded with the EOS token.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if not Path(name).is_dir():
        stay_offline_without_hub()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else "auto"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, loading = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as e:
        if not Path(name).is_dir():
            raise ModelError(
                f"there is no folder {name} here, and no {what} of this name can be had from the hub; check the name, "
                f"or give the folder that holds the model"
            ) from e
        raise ModelError(f"the {what} in {name} cannot be loaded ({str(e).splitlines()[0]})") from e
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval(), tokenizer, not loading["missing_keys"]


def _longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    return min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 10**9)


# Votes


@dataclass(frozen=True)
class Votes:
    """Human votes from a `.jsonl` or `.csv` file, one row a voter and a prompt.

    A row has `prompt` (the text, or its number among the prompts, from 0), `winner` (a model's name, tie or both_bad)
    and, where more than two models are compared, `models` (the two names; in a .csv with a | between). Several votes
    on one prompt count with their mean: the outcome is then a share of voters, and its scatter over prompts is what
    the interval sees.
    """

    path: Path
    by_pair: Mapping[frozenset[str], Mapping[str, Mapping[str, int]]]  # models → prompt → winner → votes
    replies: Mapping[str, set[str]] = field(default_factory=dict)  # prompt → what was voted on, where votes hold it

    def judge(self, model_a: str, model_b: str) -> Judge:
        """The judge of these two models' contests; it warns where their replies are not those that were voted on."""
        votes = self.by_pair.get(frozenset((model_a, model_b)), {})

        def judged(contests: Sequence[Contest]) -> list[Verdict]:
            known = [c for c in contests if c.prompt in votes and c.prompt in self.replies]
            if other := sum(not {c.reply_a, c.reply_b} <= self.replies[c.prompt] for c in known):
                log.warning(
                    "%s: %d of %d prompts were voted on with other replies than these of %s and %s; vote again, or "
                    "evaluate as the replies were drawn",
                    self.path, other, len(known), model_a, model_b,
                )  # fmt: skip
            return [_by_votes(votes.get(c.prompt, {}), model_a) for c in contests]

        return judged


def _by_votes(winners: Mapping[str, int], model_a: str) -> Verdict:
    if not winners:
        return Verdict(None, NOT_VOTED_ON)
    total, ties = sum(winners.values()), winners.get(TIE, 0) + winners.get(BOTH_BAD, 0)
    return Verdict((winners.get(model_a, 0) + ties / 2) / total, "judged")


def read_votes(path: Path, prompts: Sequence[str], models: Sequence[str]) -> Votes:
    """The votes of a file; raises `DataError` with the line of a row about an unknown prompt or model."""
    found: dict[frozenset[str], dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    known, replies = set(prompts), defaultdict(set)
    for place, row in _vote_rows(path):
        for name in ("prompt", "winner"):
            if row.get(name) is None:
                raise DataError(f"{place}: {name} is missing; a vote has a prompt and a winner")
        pair = _voted_pair(place, row, models)
        prompt, winner = _voted_prompt(place, row, prompts, known), row["winner"]
        if winner not in (*pair, TIE, BOTH_BAD):
            names = ", ".join([*sorted(pair), TIE])
            raise DataError(f"{place}: winner is {winner!r}, and not one of {names} or {BOTH_BAD}")
        found[pair][prompt][winner] += 1
        if isinstance(said := row.get("replies"), Mapping):
            replies[prompt] |= {text for text in said.values() if isinstance(text, str)}
    if not found:
        raise DataError(f"{path}: no votes: the file is empty")
    return Votes(path, found, replies)


def _voted_pair(place: str, row: Mapping[str, Any], models: Sequence[str]) -> frozenset[str]:
    named = row.get("models") or (models if len(models) == 2 else None)
    if named is None:
        raise DataError(
            f"{place}: which two of {', '.join(models)} were compared? give `models` as a list of two names"
        )
    names = named.split("|") if isinstance(named, str) else named
    pair = frozenset(model for model in models if isinstance(names, Sequence) and model in names)
    if len(pair) != 2 or len(names) != 2:
        raise DataError(f"{place}: models are {named!r}, and not two of {', '.join(models)}")
    return pair


def _voted_prompt(place: str, row: Mapping[str, Any], prompts: Sequence[str], known: set[str]) -> str:
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt in known:
        return prompt
    if isinstance(prompt, int | str) and str(prompt).isdecimal() and int(prompt) < len(prompts):
        return prompts[int(prompt)]
    raise DataError(
        f"{place}: prompt {str(prompt)[:60]!r} is not one of the {len(prompts)} judged;"
        f" give its text or its number from 0 to {len(prompts) - 1}, or the file that it is from with --prompts"
    )


def _vote_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each row with its place, `votes.csv:3`."""
    from alignlab.data.rows import read_file

    if not path.is_file():
        raise DataError(f"{path}: no such file of votes")
    if path.suffix != ".csv":
        yield from ((f"{row.file}:{row.line}", row.fields) for row in read_file(path))
        return
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            yield from ((f"{path}:{reader.line_num}", row) for row in reader)
    except (OSError, ValueError, csv.Error) as e:
        raise DataError(f"{path}: not a readable .csv file ({e})") from e
