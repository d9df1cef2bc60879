"""Replies to held-out prompts at each evaluation: how far they are from the reference, and what they look like."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignlab.generate import Reply, batches, reply_logits, sample_replies
from alignlab.measures import estimate, kl_per_reply
from alignlab.quality import distinct, repetition
from alignlab.run import Run, append_line

Reference = Callable[[], Iterator[PreTrainedModel]]  # a context in which the model answers as the reference does


@dataclass(frozen=True)
class HeldOutPrompts:
    """The prompts that are answered at each evaluation, always the same ones with the same seed."""

    split: str
    texts: list[str]
    ids: list[list[int]]
    max_new_tokens: int
    stops: tuple[str, ...]  # texts that end a reply: the other side's turn, in the recipe's format
    batch_size: int  # part of what fixes the replies, since each batch has its own seed
    seed: int


@dataclass(frozen=True)
class Answer:
    """A reply of the policy, its KL from the reference in nats, and the reference's own reply."""

    reply: Reply
    kl: float | None = None
    reference_reply: str | None = None


class Samples:
    """Replies of the policy to held-out prompts, and how far they are from the reference.

    All figures are over replies cut at `max_new_tokens`; the share that was cut is 1 − eos_rate. The processes of a
    launch share the batches out where `shared_by` says so: a batch has its own seed, whoever draws it.
    """

    def __init__(
        self,
        run: Run,
        tokenizer: PreTrainedTokenizerBase,
        prompts: HeldOutPrompts,
        shared_by: tuple[int, int] = (0, 1),  # this process, of how many
    ):
        self.run, self.tokenizer, self.prompts = run, tokenizer, prompts
        self.rank, self.world_size = shared_by
        self.reference_replies: dict[int, list[Reply]] = {}  # by batch
        self.seconds = 0.0

    def measure(self, model: PreTrainedModel, step: int, reference: Reference | None) -> dict[str, float]:
        """Samples, writes the replies to `samples.jsonl`, and returns the metrics of this evaluation."""
        began = time.monotonic()
        answers = self._answers(model, reference)
        for prompt, answer in zip(self.prompts.texts, answers, strict=True) if self.run.is_writer else ():
            row = {"step": step, "split": self.prompts.split, "prompt": prompt, **_facts(answer)}
            append_line(self.run.samples_file, row)
        self.seconds += time.monotonic() - began
        return {f"eval_{name}": value for name, value in _metrics(answers).items()}

    def _answers(self, model: PreTrainedModel, reference: Reference | None) -> list[Answer]:
        everyones = list(batches(range(len(self.prompts.ids)), self.prompts.batch_size))
        mine = range(self.rank, len(everyones), self.world_size)
        done = [(number, self._batch(model, number, everyones[number], reference)) for number in mine]
        if self.world_size > 1:
            done = gather_object(done)
        return [answer for _, batch in sorted(done, key=lambda each: each[0]) for answer in batch]

    def _batch(self, model, number: int, rows: range, reference: Reference | None) -> list[Answer]:
        prompts = [self.prompts.ids[i] for i in rows]
        replies = self._replies(model, number, prompts)
        if reference is None:
            return [Answer(reply) for reply in replies]
        kl = self._kl(model, prompts, replies, reference)
        if number not in self.reference_replies:
            self.reference_replies[number] = self._references_replies(replies, kl, number, prompts, reference)
        theirs = self.reference_replies[number]
        return [Answer(r, nats, t.text) for r, nats, t in zip(replies, kl, theirs, strict=True)]

    def _references_replies(self, replies, kl, number: int, prompts, reference: Reference) -> list[Reply]:
        if not any(kl):  # the same distributions under the same seed: before the first step nothing need be drawn again
            return replies
        with reference() as other:
            return self._replies(other, number, prompts)

    def _replies(self, model: PreTrainedModel, number: int, prompts: list[list[int]]) -> list[Reply]:
        p = self.prompts
        how = {
            "max_new_tokens": p.max_new_tokens,
            "seed": p.seed,
            "batch_size": p.batch_size,
            "first": number,
            "stops": p.stops,
        }
        return sample_replies(model, self.tokenizer, prompts, **how)

    @torch.no_grad()
    def _kl(self, model, prompts, replies: list[Reply], reference: Reference) -> list[float]:
        was_training, answers, pad = model.training, [r.ids for r in replies], self.tokenizer.pad_token_id
        model.eval()
        policy_logits, _, mask = reply_logits(model, prompts, answers, pad)
        with reference() as other:
            reference_logits, _, _ = reply_logits(other, prompts, answers, pad)
        model.train(was_training)
        return kl_per_reply(policy_logits, reference_logits, mask).tolist()


def _facts(answer: Answer) -> dict[str, Any]:
    facts = {"reply": answer.reply.text, "tokens": len(answer.reply.ids), "ended": answer.reply.ended}
    known = {"kl": answer.kl, "reference_reply": answer.reference_reply}
    return facts | {name: value for name, value in known.items() if value is not None}


def _metrics(answers: list[Answer]) -> dict[str, float]:
    replies = [answer.reply for answer in answers]
    tokens, repeated = estimate([len(r.ids) for r in replies]), estimate([repetition(r.ids) for r in replies])
    metrics = {
        "reply_tokens": tokens.mean,
        "reply_tokens_stderr": tokens.stderr,
        "eos_rate": sum(r.ended for r in replies) / len(replies),
        "distinct_2": distinct([r.ids for r in replies], 2),
        "repetition": repeated.mean,
        "repetition_stderr": repeated.stderr,
    }
    if answers[0].kl is None:
        return metrics
    kl = estimate([answer.kl for answer in answers])
    per_token = kl.mean * kl.n / sum(len(r.ids) for r in replies)
    return {**metrics, "kl": kl.mean, "kl_stderr": kl.stderr, "kl_per_token": per_token}
