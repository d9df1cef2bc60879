"""Where a batch's tokens stand once pairs are packed, and which of them each may see.

Each pair is one segment [common prefix, rest of chosen, rest of rejected]. Segments are packed first-fit into rows,
with a mask that keeps pairs and branches apart and positions that start again at each.

Shapes: B pairs, S = 2B sequences ([chosen; rejected]) of T tokens as TRL pads them, R packed rows of W positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Sizes = list[list[int]]

PREFIX, CHOSEN, REJECTED, NOTHING = 0, 1, 2, -1
SEGMENT_REACH = 50_000  # attention by segment costs the same in any row, but the mask grows with the row's width


@dataclass(frozen=True)
class Layout:
    """The batch in packed rows, and where each of its tokens stands there."""

    ids_RW: Tensor
    position_RW: Tensor  # each token's position in its own sequence
    pair_RW: Tensor  # whose token it is, or NOTHING
    branch_RW: Tensor  # PREFIX, CHOSEN or REJECTED
    place_ST: Tensor  # of each token of the batch: row × W + column; 0 at padding
    sizes: Sizes  # of the pairs and gaps that make up each row


def lay_out(ids_ST: Tensor, lengths_S: Tensor, reach: float) -> Layout:
    """The layout of right-padded sequences on the CPU, of which i and B + i are the two branches of pair i."""
    pairs, longest = len(ids_ST) // 2, ids_ST.shape[1]
    column_T = torch.arange(longest)
    chosen_B, rejected_B = lengths_S.chunk(2)
    equal_BT = (ids_ST[:pairs] == ids_ST[pairs:]) & (column_T < torch.minimum(chosen_B, rejected_B)[:, None])
    prefix_B = equal_BT.long().cumprod(1).sum(1)
    start_B, (rows, width) = place_segments(chosen_B + rejected_B - prefix_B, reach)

    real_ST = column_T < lengths_S[:, None]
    in_prefix_BT = column_T < prefix_B[:, None]
    chosen_BT = start_B[:, None] + column_T
    rejected_BT = torch.where(in_prefix_BT, chosen_BT, chosen_BT + (chosen_B - prefix_B)[:, None])
    place_ST = torch.cat([chosen_BT, rejected_BT]) * real_ST
    branch_ST = torch.cat([torch.where(in_prefix_BT, PREFIX, branch) for branch in (CHOSEN, REJECTED)])

    def pack(value_ST: Tensor, empty: int = 0) -> Tensor:  # a prefix is written twice, with equal values
        flat = torch.full((rows * width,), empty)
        return flat.index_copy_(0, place_ST[real_ST], value_ST.expand_as(place_ST)[real_ST]).view(rows, width)

    pair_RW = pack(torch.arange(pairs).repeat(2)[:, None], empty=NOTHING)
    return Layout(
        ids_RW=pack(ids_ST),
        position_RW=pack(column_T),
        pair_RW=pair_RW,
        branch_RW=pack(branch_ST),
        place_ST=place_ST,
        sizes=[torch.unique_consecutive(pair_W, return_counts=True)[1].tolist() for pair_W in pair_RW],
    )


def place_segments(sizes_B: Tensor, reach: float) -> tuple[Tensor, tuple[int, int]]:
    """Where each segment starts (row × width + column), and the (rows, width) that cost least.

    Of a row of W positions, attention takes W / reach of the time of everything else: one long row has no gaps, but
    each of its tokens is compared with all the others.
    """
    sizes = sizes_B.tolist()
    longest, total = max(sizes), sum(sizes)
    widths = {longest, *(max(longest, total * step // 32) for step in range(1, 33))}
    cost = lambda packed: packed[1][0] * packed[1][1] * (1 + packed[1][1] / reach)
    spots, (rows, width) = min((first_fit(sizes, width) for width in sorted(widths)), key=cost)
    return torch.tensor([row * width + column for row, column in spots]), (rows, width)


def first_fit(sizes: list[int], width: int) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Each segment's (row, column), the longest placed first, and the (rows, width) that were used."""
    used, spots = [], [(0, 0)] * len(sizes)
    for size, i in sorted(((size, i) for i, size in enumerate(sizes)), reverse=True):
        row = next((row for row, end in enumerate(used) if end + size <= width), len(used))
        used += [0] * (row == len(used))
        spots[i] = row, used[row]
        used[row] += size
    return spots, (len(used), max(used))


def visible(layout: Layout, window: int | None = None) -> Tensor:
    """Which key each query may see, shape (R, 1, W, W): its own prefix and branch, not later, within the window."""
    rows, width = layout.pair_RW.shape
    mask_R1WW = torch.zeros(rows, 1, width, width, dtype=torch.bool)
    for row, sizes in enumerate(layout.sizes):  # block by block: pairs never see each other
        branches, positions = layout.branch_RW[row].split(sizes), layout.position_RW[row].int().split(sizes)
        for branch_N, position_N, end in zip(branches, positions, accumulate(sizes), strict=True):
            distance_NN = position_N[:, None] - position_N
            seen_NN = (distance_NN >= 0) & ((branch_N == PREFIX) | (branch_N == branch_N[:, None]))
            block = slice(end - len(branch_N), end)
            mask_R1WW[row, 0, block, block] = seen_NN if window is None else seen_NN & (distance_NN < window)
    return mask_R1WW


def attention_masks(layout: Layout, model: PreTrainedModel) -> Tensor | dict[str, Tensor]:
    """The mask that `model` takes in place of its own: one, or one for each kind of layer where kinds are mixed."""
    config = model.config.get_text_config()
    window = sliding_window(model)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    sees = {kind: visible(layout, window if kind == "sliding_attention" else None) for kind in kinds}
    masks = {kind: mask.to(model.device) for kind, mask in sees.items()}
    if config._attn_implementation == "eager":  # adds its mask to the scores
        masks = {kind: _additive(mask, model.dtype) for kind, mask in masks.items()}
    elif attends_by_segment(model):
        masks = {kind: SegmentMask.of(mask, layout.sizes) for kind, mask in masks.items()}
    return masks if len(masks) > 1 else masks.popitem()[1]


def attends_by_segment(model: PreTrainedModel) -> bool:
    """Whether attention runs segment by segment: on a CPU nothing is lost by the many small calls."""
    return model.device.type == "cpu" and model.config.get_text_config()._attn_implementation == "sdpa"


class SegmentMask(Tensor):
    """A block mask that `scaled_dot_product_attention` takes block by block, which is the same and does less.

    It is a whole mask all the same: an operation that loses the sizes makes it slower, not wrong.
    """

    sizes: Sizes

    @staticmethod
    def of(mask_R1WW: Tensor, sizes: Sizes) -> SegmentMask:
        mask = mask_R1WW.as_subclass(SegmentMask)
        mask.sizes = sizes
        return mask

    @classmethod
    def __torch_function__(cls, function: Callable, kinds: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        mask = (kwargs or {}).get("attn_mask")
        if function is nn.functional.scaled_dot_product_attention and hasattr(mask, "sizes"):
            return attend_by_segment(*args, **(kwargs or {}))
        result = super().__torch_function__(function, kinds, args, kwargs or {})
        if function is Tensor.detach and hasattr(args[0], "sizes"):  # as reentrant checkpointing does
            result.sizes = args[0].sizes
        return result


def attend_by_segment(query: Tensor, key: Tensor, value: Tensor, *, attn_mask: SegmentMask, **others: Any) -> Tensor:
    """`scaled_dot_product_attention` of (R, heads, W, features), in one call a segment."""
    attend, rows = nn.functional.scaled_dot_product_attention, []
    for row, sizes in enumerate(attn_mask.sizes):
        mask_WW, last = attn_mask.as_subclass(Tensor)[row, 0], [*accumulate(sizes)]
        blocks = [mask_WW[end - size : end, end - size : end] for size, end in zip(sizes, last, strict=True)]
        parts = zip(*(x[row, None].split(sizes, dim=2) for x in (query, key, value)), strict=True)
        done = [attend(q, k, v, attn_mask=block, **others) for (q, k, v), block in zip(parts, blocks, strict=True)]
        rows.append(torch.cat(done, dim=2))
    return torch.cat(rows)


def attention_reach(model: PreTrainedModel) -> float:
    """The row width at which attention takes as long as the rest of a layer, for `place_segments`.

    A layer is 12 h² products a token, attention 2 h a key, at half the speed (measured on two CPU cores).
    """
    return SEGMENT_REACH if attends_by_segment(model) else 3 * model.config.get_text_config().hidden_size


def sliding_window(model: PreTrainedModel) -> int | None:
    """How many tokens back a query sees, itself included, in layers that slide; None where all is seen."""
    return getattr(model.config.get_text_config(), "sliding_window", None)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
