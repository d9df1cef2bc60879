"""Splits by dialogue: which of them a dialogue belongs to, and what to set where one comes out empty."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence

SPLITS = ("train", "validation", "test")

Shares = Mapping[str, float]


def dialogue_hash(key: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\n{key}".encode(), digest_size=8).digest()


def carve(key: bytes, shares: Shares) -> str:
    """The split of a dialogue: by its own text and the seed, whatever other rows there are."""
    place = _place(key)
    if place < shares["test"]:
        return "test"
    return "validation" if place < shares["test"] + shares["validation"] else "train"


def _place(key: bytes) -> float:
    """Where a dialogue stands between 0 and 1."""
    return int.from_bytes(key, "big") / 2**64


def larger_shares(keys: Iterable[bytes], empty: Sequence[str], shares: Shares, brought: Collection[str]) -> str:
    """What to set so that every split holds at least one dialogue of this data."""
    if "train" in empty:
        return "lower data.validation_share or data.test_share, or bring more rows"
    if any(split in brought or not shares[split] for split in empty):
        return "bring rows of that split, or let the dialogues' shares make it (data.test_split=null)"
    places = sorted(map(_place, keys))
    wanted, start = dict(shares), 0.0
    for split in ("test", "validation"):
        later = [place for place in places if place >= start]
        if split in empty and later:
            wanted[split] = math.ceil(100 * (later[0] - start) + 1e-9) / 100
        start += wanted[split]
    if start > 1 or not any(place >= start for place in places):
        return "bring more rows"
    return "set " + " and ".join(f"data.{split}_share={wanted[split]:g}" for split in empty) + ", or bring more rows"
