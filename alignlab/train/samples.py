"""Replies to held-out prompts at each evaluation: how far they are from the reference, and what they look like."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignlab.data.format import Stops
from alignlab.disk import append_line
from alignlab.measure import generate
from alignlab.measure.formulas import kl_per_reply
from alignlab.measure.generate import Reply, batches, reply_logits, sample_replies
from alignlab.measure.quality import distinct, repetition
from alignlab.runs.run import Run
from alignlab.text.estimate import mean_estimate
from alignlab.train.store import ReferenceIdentity, read_replies, store_replies

log = logging.getLogger(__name__)

# A context in which the model answers as the reference does
Reference = Callable[[], AbstractContextManager[PreTrainedModel]]


@dataclass(frozen=True)
class HeldOutPrompts:
    """The prompts that are answered at each evaluation, always the same ones with the same seed."""

    split: str
    texts: list[str]
    ids: list[list[int]]
    max_new_tokens: int
    stops: Stops
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
    launch share the batches out where `shared_by` says so: a batch has its own seed, whoever draws it. The replies of
    a reference whose `identity` is known are drawn once, ever: they are in the store beside its log-probabilities.
    """

    def __init__(
        self,
        run: Run,
        tokenizer: PreTrainedTokenizerBase,
        prompts: HeldOutPrompts,
        shared_by: tuple[int, int] = (0, 1),  # this process, of how many
        identity: ReferenceIdentity | None = None,
    ):
        self.run, self.tokenizer, self.prompts, self.identity = run, tokenizer, prompts, identity
        self.rank, self.world_size = self.shared_by = shared_by
        self.reference_replies: dict[int, list[Reply]] = {}  # by batch
        self.rows: list[dict[str, Any]] = []  # of the last sampling, as `samples.jsonl` has them
        self.seconds = 0.0

    def on(self, prompts: HeldOutPrompts) -> Samples:
        """The same on other prompts."""
        return Samples(self.run, self.tokenizer, prompts, self.shared_by, self.identity)

    def measure(self, model: PreTrainedModel, step: int, reference: Reference | None) -> dict[str, float]:
        """Samples, writes the replies to `samples.jsonl`, and returns the metrics of this evaluation."""
        began = time.monotonic()
        answers = self._answers(model, reference, is_start=step == 0)
        about = {"step": step, "split": self.prompts.split}
        asked = zip(self.prompts.texts, answers, strict=True)
        self.rows = [{**about, "prompt": prompt, **_facts(answer)} for prompt, answer in asked]
        for row in self.rows if self.run.is_writer else ():
            append_line(self.run.samples_file, row)
        self.seconds += time.monotonic() - began
        return {f"eval_{name}": value for name, value in _metrics(answers).items()}

    def say_what_is_lost(self) -> None:
        """One line where the file holds fewer replies of an evaluation than were drawn: they do not come back."""
        drawn = [row["step"] for row in self.run.metrics() if "eval/reply_tokens" in row]
        there = Counter(row["step"] for row in self.run.samples())
        if lost := [str(step) for step in drawn if there[step] < len(self.prompts.texts)]:
            steps = f"step{'s' * (len(lost) > 1)} {', '.join(lost)}"
            log.warning("%s has lost replies of %s; the metrics are whole", self.run.samples_file, steps)

    def _answers(self, model: PreTrainedModel, reference: Reference | None, is_start: bool = False) -> list[Answer]:
        everyones = list(batches(range(len(self.prompts.ids)), self.prompts.batch_size))
        mine = range(self.rank, len(everyones), self.world_size)
        done = [(number, self._batch(model, number, everyones[number], reference, is_start)) for number in mine]
        if self.world_size > 1:
            done = gather_object(done)
        return [answer for _, batch in sorted(done, key=lambda each: each[0]) for answer in batch]

    def _batch(
        self, model, number: int, rows: Sequence[int], reference: Reference | None, is_start=False
    ) -> list[Answer]:
        prompts = [self.prompts.ids[i] for i in rows]
        if reference is None:
            return [Answer(reply) for reply in self._replies(model, number, prompts)]
        theirs = self._known(number, prompts)
        replies, kl = self._policys_own(model, number, prompts, reference, theirs if is_start else None)
        if theirs is None:
            theirs = self._references_own(number, prompts, reference) if any(kl) else replies
            self._keep(number, prompts, theirs)
        return [Answer(r, nats, t.text) for r, nats, t in zip(replies, kl, theirs, strict=True)]

    def _policys_own(
        self, model, number: int, prompts, reference: Reference, expected: list[Reply] | None
    ) -> tuple[list[Reply], list[float]]:
        """The policy's replies, and their KL; `expected` are the reference's, where the policy may still be it.

        Where the KL on them is 0, the two have the same distributions, and would draw the same under the same seed.
        """
        if expected and not any(kl := self._kl(model, prompts, expected, reference)):
            return expected, kl
        replies = self._replies(model, number, prompts)
        return replies, self._kl(model, prompts, replies, reference)

    def _references_own(self, number: int, prompts: list[list[int]], reference: Reference) -> list[Reply]:
        with reference() as other:
            return self._replies(other, number, prompts)

    def _replies(self, model: PreTrainedModel, number: int, prompts: list[list[int]]) -> list[Reply]:
        return sample_replies(model, self.tokenizer, prompts, **self._how(number))

    def _how(self, number: int) -> dict[str, Any]:
        p = self.prompts
        how = {"max_new_tokens": p.max_new_tokens, "seed": p.seed, "batch_size": p.batch_size}
        return {**how, "first": number, "stops": p.stops}

    def _known(self, number: int, prompts: list[list[int]]) -> list[Reply] | None:
        """The reference's replies, where they were drawn before: by this run, or by any with the same reference."""
        if number not in self.reference_replies and (identity := self._stored_under):
            stored = read_replies(identity, self._drawing(number, prompts))
            if stored is not None:
                self.reference_replies[number] = [Reply(**{**row, "ids": tuple(row["ids"])}) for row in stored]
        return self.reference_replies.get(number)

    def _keep(self, number: int, prompts: list[list[int]], replies: list[Reply]) -> None:
        self.reference_replies[number] = replies
        if identity := self._stored_under:
            store_replies(identity, self._drawing(number, prompts), [asdict(reply) for reply in replies])

    @property
    def _stored_under(self) -> ReferenceIdentity | None:
        return None if self._tokenizer_facts is None else self.identity

    @cached_property
    def _tokenizer_facts(self) -> list[Any] | None:
        """The tokenizer by its content; none where it cannot be told by that."""
        tokenizer = self.tokenizer
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
            return None
        state = backend.to_str()
        tokens = state[state.index('"added_tokens"') :]  # behind the padding and truncation of the last call
        own = [type(tokenizer).__name__, tokenizer.clean_up_tokenization_spaces]
        return [*own, xxhash.xxh3_128_hexdigest(tokens.encode()), tokenizer.eos_token_id, tokenizer.pad_token_id]

    def _drawing(self, number: int, prompts: list[list[int]]) -> dict[str, Any]:
        """What decides a batch of replies besides the model; rounding may decide a token, so threads are among it."""
        on_cpu = [torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()]
        how = self._how(number) | {"stops": asdict(self.prompts.stops)}
        facts: dict[str, Any] = {"prompts": xxhash.xxh3_128_hexdigest(json.dumps(prompts).encode()), "how": how}
        facts |= {"tokenizer": self._tokenizer_facts, "code": _code(), "on_cpu": on_cpu}
        return json.loads(json.dumps(facts))

    @torch.no_grad()
    def _kl(self, model, prompts, replies: list[Reply], reference: Reference) -> list[float]:
        was_training, answers, pad = model.training, [r.ids for r in replies], self.tokenizer.pad_token_id
        model.eval()
        policy_logits, _, mask = reply_logits(model, prompts, answers, pad)
        with reference() as other:
            reference_logits, _, _ = reply_logits(other, prompts, answers, pad)
        model.train(was_training)
        return kl_per_reply(policy_logits, reference_logits, mask).tolist()


@cache
def _code() -> str:
    """A hash of what draws replies, so that a change in it leaves older ones unread."""
    return xxhash.xxh3_128_hexdigest(Path(generate.__file__).read_bytes())


def _facts(answer: Answer) -> dict[str, Any]:
    facts = {"reply": answer.reply.text, "tokens": len(answer.reply.ids), "ended": answer.reply.ended}
    known = {"kl": answer.kl, "reference_reply": answer.reference_reply}
    return facts | {name: value for name, value in known.items() if value is not None}


def _metrics(answers: list[Answer]) -> dict[str, float]:
    replies = [answer.reply for answer in answers]
    estimates = {
        "reply_tokens": mean_estimate([len(reply.ids) for reply in replies]),
        "repetition": mean_estimate([repetition(reply.ids) for reply in replies]),
    }
    metrics = {
        "eos_rate": sum(reply.ended for reply in replies) / len(replies),
        "distinct_2": distinct([reply.ids for reply in replies], 2),
    }
    if kls := [answer.kl for answer in answers if answer.kl is not None]:
        estimates["kl"] = mean_estimate(kls)
        metrics["kl_per_token"] = sum(kls) / sum(len(reply.ids) for reply in replies)
    for name, of in estimates.items():
        metrics[name] = of.mean
        if of.stderr is not None:
            metrics[f"{name}_stderr"] = of.stderr
    return metrics
