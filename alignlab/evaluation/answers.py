"""What each model answers and how likely it finds texts, computed once, kept on disk, and taken up where it stopped.

Keys are contents: the model's (its file is named after it), the token ids, the seed, the stops and the way of
sampling. Another judge samples nothing again, and a model that has changed shares nothing with what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from alignlab.data.format import Format
from alignlab.disk import ResultCache, digest
from alignlab.evaluation.candidates import Candidate, LoadedModels
from alignlab.measure.formulas import kl_per_reply
from alignlab.measure.generate import Reply, batches, reply_logits, reply_logps, sample_replies
from alignlab.models.load import find_stops

Ids = Sequence[int]
PAIRS_AT_ONCE = 64  # scored between two lines of the file
KL_LOGITS = 1 << 27  # numbers in a batch's logits of both models together: half a GiB in float32


@dataclass(frozen=True)
class Decoding:
    """How replies are drawn: a batch of prompts shares a seed, so that all models answer under the same luck."""

    greedy: bool
    max_new_tokens: int
    seed: int
    batch_size: int

    def said(self) -> dict[str, object]:
        """What stands in eval.json."""
        how = {"temperature": 0.0} if self.greedy else {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        return {"sampled": not self.greedy, **how, **asdict(self)}


class Answers:
    """What a chosen of models makes of prompts and texts."""

    def __init__(self, loaded: LoadedModels, form: Format):
        self.loaded, self.form, self.tokenizer = loaded, form, form.tokenizer
        self._files: dict[str, ResultCache] = {}

    def kept(self, candidate: Candidate) -> ResultCache:
        return self._files.setdefault(candidate.key, ResultCache(candidate.home))

    def replies(self, candidate: Candidate, prompts: Sequence[Ids], how: Decoding, about: str) -> list[Reply]:
        """One reply to each prompt."""
        stops = find_stops(candidate.recipe.model, self.form)
        facts = {**asdict(how), "stops": asdict(stops)}
        several = enumerate(batches([list(ids) for ids in prompts], how.batch_size))
        wanted = {digest(["replies", number, facts, batch]): (number, batch) for number, batch in several}

        def sample(few: list[tuple[int, list[Ids]]]) -> list[list[dict]]:
            ((number, batch),) = few
            with self.loaded.on(candidate) as model:
                found = sample_replies(
                    model,
                    self.tokenizer,
                    batch,
                    max_new_tokens=how.max_new_tokens,
                    seed=how.seed,
                    stops=stops,
                    greedy=how.greedy,
                    batch_size=how.batch_size,
                    first=number,
                )
            return [[asdict(reply) for reply in found]]

        found = self.kept(candidate).complete(wanted, sample, at_once=1, about=f"{candidate.name}: {about}")
        return [Reply(tuple(row["ids"]), row["text"], row["ended"]) for batch in found for row in batch]

    def logps(self, candidate: Candidate, prompts: Sequence[Ids], texts: Sequence[Ids], about: str) -> list[float]:
        """log p(text | prompt) of each, in nats."""
        rows = [(list(prompt), list(text)) for prompt, text in zip(prompts, texts, strict=True)]
        wanted = {digest(["logp", *row]): row for row in longest_first(rows)}

        def score(few: list[tuple[Ids, Ids]]) -> list[float]:
            with self.loaded.on(candidate) as model:
                prompts, texts = zip(*few, strict=True)
                return reply_logps(model, prompts, texts, self.tokenizer.pad_token_id).tolist()

        known = self.kept(candidate)
        known.complete(wanted, score, at_once=PAIRS_AT_ONCE, about=f"{candidate.name}: {about}")
        return [known.values[digest(["logp", *row])] for row in rows]

    def kl(self, policy: Candidate, prompts: Sequence[Ids], replies: Sequence[Reply], about: str) -> list[float]:
        """KL(policy ‖ its reference) of each reply, in nats; the replies must be the policy's samples.

        Both models are in memory at once, as in training; with adapters that is one base.
        """
        reference = policy.reference
        assert reference is not None
        rows = [(list(prompt), list(reply.ids)) for prompt, reply in zip(prompts, replies, strict=True)]
        wanted = {digest(["kl", reference.key, *row]): row for row in longest_first(rows)}

        def measure(few: list[tuple[Ids, Ids]]) -> list[float]:
            self.loaded.hold(policy, reference)
            return self._kl(policy, reference, few)

        known = self.kept(policy)
        longest = max((len(reply) for _, reply in rows), default=1)
        at_once = max(1, min(16, KL_LOGITS // (2 * longest * len(self.tokenizer))))
        known.complete(wanted, measure, at_once=at_once, about=f"{policy.name}: {about}")
        return [known.values[digest(["kl", reference.key, *row])] for row in rows]

    @torch.no_grad()
    def _kl(self, policy: Candidate, reference: Candidate, rows: Sequence[tuple[Ids, Ids]]) -> list[float]:
        prompts, replies = zip(*rows, strict=True)
        pad = self.tokenizer.pad_token_id
        with self.loaded.on(policy) as model:
            ours, _, mask = reply_logits(model, prompts, replies, pad)
        with self.loaded.on(reference) as model:
            theirs, _, _ = reply_logits(model, prompts, replies, pad)
        return kl_per_reply(ours, theirs, mask).tolist()


def longest_first(rows: Sequence[tuple[Ids, Ids]]) -> list[tuple[Ids, Ids]]:
    """Prompts and texts by their tokens, so that batches hold little padding."""
    return sorted(rows, key=lambda row: -len(row[0]) - len(row[1]))
