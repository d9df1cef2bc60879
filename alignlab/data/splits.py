"""Splits: which of them a file, a row or a dialogue belongs to, and what to set where one comes out empty.

A name stands for a split where it holds the split's word as a word of its own: `hh_test`, `train_prefs`,
`test-00000-of-00001`, but not `contest` or `latest_model`. What a name holds out is never trained on.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from alignlab.recipe.load import DataSection

SPLITS = ("train", "validation", "test")
HELD_OUT = ("test", "validation")
OTHER = "other"  # of a name that stands for a split which the recipe does not ask for
WORDS = {  # as `datasets` reads file names
    "training": "train",
    **dict.fromkeys(("valid", "val", "dev"), "validation"),
    **dict.fromkeys(("testing", "eval", "evaluation"), "test"),
}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_a-zA-Z]+")
_OPENAI = {"valid1": "validation", "valid2": "test"}  # summarize-from-feedback's names, in a field of each row
# HuggingFaceH4's train_prefs, train_sft, train_gen: what DPO learns from, what SFT does, and what neither does
OTHERS = {"data": ("sft", "gen"), "data.sft": ("prefs", "gen")}  # by the settings' section: what is not for it

LARGER_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4)

Shares = Mapping[str, float]


# By name


def words_of(name: str) -> list[str]:
    """The words of a name in lower case, those of a split as that split's name.

    >>> words_of("hh_dev-00000-of-00002")
    ['hh', 'validation', '00000', 'of', '00002']
    """
    words = [word.lower() for word in _WORD.findall(name)]
    return [WORDS.get(word, word) for word in words]


def split_named(name: str, section: DataSection) -> str | None:
    """The split that a path below `data.path`, a hub split or a field of a row stands for, if any."""
    if name in _OPENAI and section.split == "train" and section.test_split == "test":
        return _OPENAI[name]
    parts = [words_of(part) for part in name.split("/")]
    parts = [words for words in parts if len({*words} & {*SPLITS}) < 2]  # train_test_split/ says nothing
    asked = {"test": section.test_split, "validation": "validation", "train": section.split}
    found = [split for split, wish in asked.items() if wish and _is_held(words_of(wish), parts)]
    spoken = {word for words in parts for word in words} & {*SPLITS}
    if "train" in found and spoken <= {*words_of(section.split)}:
        return "train"
    if held_out := [split for split in found if split in HELD_OUT]:
        return held_out[0]
    if spoken:
        return "train" if "train" in found and not spoken & {*HELD_OUT} else OTHER
    return "train" if "train" in found else None


def _is_held(wish: Sequence[str], parts: Iterable[Sequence[str]]) -> bool:
    """Whether a part holds all words of a wish, one behind the other."""
    size = len(wish)
    return any(words[at : at + size] == wish for words in parts for at in range(len(words) - size + 1))


def splits_named(names: Iterable[str], section: DataSection, key: str) -> dict[str, str | None]:
    """The split of each name of one path; where names tell `prefs` from `sft`, only those for this stage count."""
    found = {name: split_named(name, section) for name in sorted(names)}
    for split in SPLITS:
        named = [name for name, of in found.items() if of == split]
        others = [name for name in named if any(_is_for(other, name, split) for other in OTHERS[key])]
        if len(others) < len(named):
            found.update(dict.fromkeys(others, OTHER))
    return found


def _is_for(purpose: str, name: str, split: str) -> bool:
    """Holds for `train_sft.parquet` and `sft/train.parquet`."""
    parts = [words_of(part) for part in name.split("/")]
    return [purpose] in parts or _is_held([split, purpose], parts)


def absent_split(found: Mapping[str, str | None], section: DataSection) -> str | None:
    """`split` or `test_split`, where a recipe names one that no name stands for; the defaults name none."""
    there = {*found.values()}
    if "train" not in there and (section.split != "train" or (there and None not in there)):
        return "split"
    if "test" not in there and section.test_split not in (None, "test"):
        return "test_split"
    return None


# By dialogue


def dialogue_hash(key: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\n{key}".encode(), digest_size=8).digest()


def carve(key: bytes, shares: Shares) -> str:
    """The split of a dialogue: by its own text and the seed, whatever other rows there are."""
    place = int.from_bytes(key, "big") / 2**64
    if place < shares["test"]:
        return "test"
    return "validation" if place < shares["test"] + shares["validation"] else "train"


def larger_shares(keys: Collection[bytes], empty: Sequence[str], shares: Shares, brought: Collection[str]) -> str:
    """What to set so that every split holds at least one dialogue of this data."""
    if "train" in empty:
        return "lower data.validation_share or data.test_share, or bring more rows"
    if lost := [split for split in empty if split in brought]:
        instead = ", or let the dialogues' shares make it (data.test_split=null)" if lost == ["test"] else ""
        return f"bring {' and '.join(lost)} rows that can be read{instead}"
    for share in LARGER_SHARES:
        wanted = {**shares, **{split: max(share, shares[split]) for split in empty}}
        if {*empty, "train"} <= {carve(key, wanted) for key in keys}:
            settings = " and ".join(f"data.{split}_share={wanted[split]:g}" for split in empty)
            return f"bring more rows, or set {settings}"
    few = "one prompt" if len(keys) == 1 else f"{len(keys)} prompts"
    return f"bring rows of more prompts: these have {few}, and all rows of a prompt are of one split"
