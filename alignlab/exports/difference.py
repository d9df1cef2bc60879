"""How far the log-probabilities of an exported model are from those of the run it was made from."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignlab.data.format import Format
from alignlab.errors import RunError
from alignlab.measure.formulas import token_logps
from alignlab.measure.generate import batches, reply_logits
from alignlab.runs.logs import last_samples
from alignlab.runs.run import Run
from alignlab.text.estimate import Estimate, mean_estimate

EXACT, ROUNDING, BASE = "exact", "rounding", "base"  # what a difference may come from
EXACT_NATS = 1e-3  # a reply: what float32 arithmetic in another order may add up to
ROUNDING_NATS = 0.1  # a token, mean |difference|: three times what 16 bits did to a model of 260 K parameters
SCORED_TOGETHER = 4  # replies: the logits of as many are in memory at once


@dataclass(frozen=True)
class Rows:
    """Prompts and replies that no training saw, as token ids."""

    split: str
    prompts: list[list[int]]
    replies: list[list[int]]


@dataclass(frozen=True)
class Difference:
    """Of the log-probabilities of held-out replies, in nats: the exported model's less those of the run's own."""

    split: str
    cause: str  # EXACT, ROUNDING or BASE
    shift: Estimate  # a reply, with its sign
    reply: Estimate  # a reply, absolute
    reply_most: float
    token: Estimate  # a token, absolute; its n are replies, whose tokens are not independent
    token_most: float
    tokens: int

    @property
    def is_explained(self) -> bool:
        """Whether its cause accounts for its size; what another base does is measured, and has no limit."""
        if self.cause == EXACT:
            return self.reply_most <= EXACT_NATS
        return self.cause == BASE or self.token.mean <= ROUNDING_NATS


def held_out_rows(run: Run, form: Format, most: int) -> Rows:
    """The prompts of a run's last sampling with the replies that its model gave, at most so many."""
    samples = last_samples(run.samples_file)[:most]
    if not samples:
        raise RunError(
            f"{run.samples_file} holds no held-out replies to check an export with; copy it whole from where the run "
            f"was made"
        )
    texts = [sample["prompt"] for sample in samples]
    prompts = form.encoder.prompts(texts)
    replies = form.encoder.replies(texts, prompts, [sample["reply"] for sample in samples])
    found = [
        (prompt.tolist(), reply.tolist() if sample.get("ended", True) else reply.tolist()[:-1])
        for sample, prompt, reply in zip(samples, prompts, replies, strict=True)
        if reply is not None  # it would merge into a token with the prompt
    ]
    found = [(prompt, reply) for prompt, reply in found if reply]
    return Rows(str(samples[0].get("split")), [prompt for prompt, _ in found], [reply for _, reply in found])


@torch.no_grad()
def score_tokens(model: PreTrainedModel, rows: Rows, pad: int) -> list[Tensor]:
    """log p of each token of each reply, in nats: a tensor (T,) for each reply, on the CPU."""
    scores = []
    model.eval()
    for few in batches(range(len(rows.prompts)), SCORED_TOGETHER):
        prompts, replies = [rows.prompts[i] for i in few], [rows.replies[i] for i in few]
        logits, ids, mask = reply_logits(model, prompts, replies, pad)
        scores += [row[kept].cpu() for row, kept in zip(token_logps(logits, ids), mask, strict=True)]
    return scores


def release_memory() -> None:
    """Gives back what models that nobody holds any more have taken."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare(run: Sequence[Tensor], exported: Sequence[Tensor], split: str, cause: str) -> Difference:
    """The difference between two models' scores of the same replies; what is no number counts as infinitely far."""
    apart = [(b.double() - a.double()).nan_to_num(nan=torch.inf) for a, b in zip(run, exported, strict=True)]
    replies, tokens = torch.stack([row.sum() for row in apart]), torch.cat(apart)
    return Difference(
        split=split,
        cause=cause,
        shift=mean_estimate(replies),
        reply=mean_estimate(replies.abs()),
        reply_most=replies.abs().max().item(),
        token=_mean_per_token([row.abs() for row in apart]),
        token_most=tokens.abs().max().item(),
        tokens=len(tokens),
    )


def _mean_per_token(rows: Sequence[Tensor]) -> Estimate:
    """The mean over all tokens, with the standard error of a ratio of two sums over independent replies."""
    sums, lengths = torch.stack([row.sum() for row in rows]), torch.tensor([float(len(row)) for row in rows])
    mean = sums.sum() / lengths.sum()
    error = mean_estimate((sums - mean * lengths) / lengths.mean()).stderr
    return Estimate(mean.item(), error, len(rows))
