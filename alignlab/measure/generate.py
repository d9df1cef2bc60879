"""Batched sampling of replies, and the log-probabilities a model gives to replies."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)

from alignlab.data.format import Stops
from alignlab.measure.formulas import token_logps


@dataclass(frozen=True)
class Reply:
    ids: tuple[int, ...]  # what ends it included
    text: str  # without what ends it
    ended: bool  # by itself, not by the limit


def sample_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seed: int,
    stops: Stops,
    greedy: bool = False,
    batch_size: int = 16,
    first: int = 0,
) -> list[Reply]:
    """One reply to each prompt (token ids), sampled at temperature 1 without top-k or top-p.

    Each batch has its own seed, so that the replies do not depend on which process draws a batch, nor on what was
    drawn before; `first` is the number of the first batch. The caller's random state is left as it was.
    """
    replies = []
    for number, batch in enumerate(batches(prompts, batch_size), first):
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed * 1_000_003 + number)
            replies += _sample(model, tokenizer, batch, max_new_tokens, greedy, stops)
    return replies


def batches(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[i : i + size] for i in range(0, len(items), size))


@torch.no_grad()
def _sample(model, tokenizer, prompts, max_new_tokens, greedy, stops: Stops) -> list[Reply]:
    ids_BT, mask_BT = pad_left(prompts, tokenizer.pad_token_id, model.device)
    choice = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    how = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stops.ids),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        **choice,
    )
    ends = _stop_criteria(tokenizer, stops.texts, len(tokenizer))
    was_training = model.training
    model.eval()
    with _own_settings_off(model):
        out_BT = model.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=how, stopping_criteria=ends)
    model.train(was_training)
    return [_reply(tokenizer, row, stops) for row in out_BT[:, ids_BT.shape[1] :].tolist()]


@functools.lru_cache(maxsize=4)
def _stop_criteria(tokenizer: PreTrainedTokenizerBase, stops: tuple[str, ...], _words: int) -> StoppingCriteriaList:
    """What `generate` makes of `stop_strings`, made once: a third of a second at 32,000 words.

    The cache of transformers 5.23 never hits, since its key is the vocabulary in an order that changes at each call.
    """
    return StoppingCriteriaList([StopStringCriteria(tokenizer, list(stops))] if stops else [])


@contextlib.contextmanager
def _own_settings_off(model: PreTrainedModel) -> Iterator[None]:
    """Without the penalties and cut-offs of the model's `generation_config.json`, which `generate` would fill in.

    Replies drawn with them are not samples of the model, and a KL over such replies is no estimate of its KL.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    own, inner.generation_config = inner.generation_config, GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


def _reply(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: Stops) -> Reply:
    end = next((place for place, token in enumerate(ids) if token in stops.ids), len(ids))
    kept, ended = end + 1, end < len(ids)
    text = tokenizer.decode(ids[:end])
    if found := [stop for stop in stops.texts if stop in text]:
        first = min(found, key=text.index)
        kept, ended = next(n for n in range(1, end + 1) if first in tokenizer.decode(ids[:n])), True
        text = text[: text.index(first)]
    return Reply(tuple(ids[:kept]), text.removeprefix(stops.opening), ended)


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, each (B, T), every row ending at the right edge."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def reply_logits(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], pad: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The logits that predict each reply's tokens (B, T, V), the replies' ids (B, T) and their mask (B, T).

    Rows are padded on the left, so that the LM head runs on reply positions only.
    """
    ids_BT, mask_BT = pad_left([[*p, *r] for p, r in zip(prompts, replies, strict=True)], pad, model.device)
    longest = max(map(len, replies))
    position_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    logits_BTV = model(
        input_ids=ids_BT, attention_mask=mask_BT, position_ids=position_BT, logits_to_keep=longest + 1, use_cache=False
    ).logits
    from_end = torch.arange(longest, 0, -1, device=model.device)
    lengths = torch.tensor([len(r) for r in replies], device=model.device)
    return logits_BTV[:, :-1], ids_BT[:, -longest:], from_end[None] <= lengths[:, None]


@torch.no_grad()
def reply_logps(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[int]],
    pad: int,
    batch_size: int = 8,
) -> Tensor:
    """log p(reply | prompt) of each reply, in nats, shape (N,), float32: by logits and a gather, without TRL."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]) - len(replies[i]))
    logps = torch.zeros(len(prompts))
    was_training = model.training
    model.eval()
    for rows in batches(order, batch_size):
        logits, ids, mask = reply_logits(model, [prompts[i] for i in rows], [replies[i] for i in rows], pad)
        logps[list(rows)] = (token_logps(logits, ids) * mask).sum(-1).cpu()
    model.train(was_training)
    return logps
