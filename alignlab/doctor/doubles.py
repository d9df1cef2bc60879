"""The same text where it should stand once: repeated pairs, labels against each other, and held-out data in training.

Texts are compared by their letters and digits: equal but for case, spaces and punctuation is equal here. What is only
alike is looked for in `near`.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import xxhash

from alignlab.data.prepare import Prepared
from alignlab.data.transcript import split_turns
from alignlab.doctor.finding import Finding, Level, Shown, few
from alignlab.errors import DataError
from alignlab.text.safe import one_line

QUOTED = 100  # characters of a text that are shown
_DROPPED = ("P", "Z", "Cc", "Cf")  # Unicode's punctuation, spaces, control and invisible characters

Transcript = Callable[[str], str]  # a prompt as the model sees it → its HH transcript


class Pair(NamedTuple):
    """A pair by its texts' numbers, which are equal where the texts are (see `letters`)."""

    split: str
    number: int  # in its split
    prompt: int
    chosen: int
    rejected: int
    opening: int  # of the first Human turn; a dialogue that was shortened opens with the first turn left
    spelling: int  # of prompt and both replies as they are spelled

    @property
    def name(self) -> str:
        return f"{self.split} pair {self.number}"


def double_findings(prepared: Prepared, transcript: Transcript = str) -> list[Finding]:
    """What is doubled or contradicts itself in the pairs of all splits, and what held-out pairs share with training.

    `transcript` reads the turns of a prompt in another format than HH (`partial(prompts.as_transcript, form)`).
    """
    pairs = list(_read_pairs(prepared, transcript))
    read = partial(_quoted, prepared)
    circles = _circles(pairs)
    return [
        _repeated(pairs, read),
        _like_replies(pairs, read),
        _both_orders(pairs, read),
        _contradictions(pairs, circles, read),
        _chosen_and_rejected(pairs, circles, read),
        _overlap(pairs, read),
        _dialogue_overlap(pairs, read),
    ]


# Texts


class _Letters(dict):
    """What `str.translate` makes of each character, found out when it is first met."""

    def __missing__(self, code: int) -> int | None:
        category = unicodedata.category(chr(code))
        self[code] = None if category.startswith(_DROPPED) else code
        return self[code]


_letters = _Letters()


def letters(text: str) -> str:
    """A text without case, spaces and punctuation; where nothing else is in it, the text itself.

    >>> letters("\\n\\nHuman: What's up?")
    'humanwhatsup'
    """
    folded = unicodedata.normalize("NFC", text.casefold())
    return folded.translate(_letters) or folded.strip()


def human_turns(transcript: str) -> list[str]:
    """What the human says in a transcript, turn by turn; the whole text where it is none."""
    try:
        return [turn.text for turn in split_turns(transcript) if turn.role == "Human"] or [transcript]
    except DataError:
        return [transcript]


def quote(text: str) -> str:
    """The beginning of a text on one line."""
    text = text.strip()
    begun = text if len(text) <= QUOTED else f"{text[: QUOTED - 1]}…"
    return f'"{one_line(begun)}"'


class Numbers:
    """A number for each different text, from 0."""

    def __init__(self) -> None:
        self._known: dict[bytes, int] = {}

    def of(self, text: str) -> int:
        return self._known.setdefault(xxhash.xxh3_128_digest(text.encode()), len(self._known))


def _read_pairs(prepared: Prepared, transcript: Transcript) -> Iterator[Pair]:
    texts, spellings = Numbers(), Numbers()
    for split, start, batch in prepared.batches(["prompt", "chosen", "rejected"]):
        for number, (prompt, *replies) in enumerate(zip(*batch.values(), strict=True), start):
            opening = human_turns(transcript(prompt))[0]
            yield Pair(
                split,
                number,
                *(texts.of(letters(text)) for text in (prompt, *replies, opening)),
                spellings.of(repr((prompt, *replies))),
            )


def _quoted(prepared: Prepared, pair: Pair, column: str) -> str:
    return quote(getattr(prepared, pair.split)[pair.number][column])


Read = Callable[[Pair, str], str]  # the beginning of a column of a pair, to be shown


# Findings


def verb(count: int, one: str, many: str) -> str:
    return one if count == 1 else many


def _finding(name: str, level: Level, says: str, found: int, of: int, shown: Iterable[Shown], advice: str) -> Finding:
    return Finding(name=name, level=level, says=says, count=found, of=of, shown=few(shown), advice=advice)


def _repeated(pairs: Sequence[Pair], read: Read) -> Finding:
    """Pairs with the prompt and both replies of an earlier one, in the same order."""
    first: dict[tuple[int, int, int], Pair] = {}
    earlier = [first.setdefault((pair.prompt, pair.chosen, pair.rejected), pair) for pair in pairs]
    found = [(pair, other) for pair, other in zip(pairs, earlier, strict=True) if other is not pair]
    spelled = len(pairs) - len({pair.spelling for pair in pairs})
    says = (
        f"{len(found):,} of {len(pairs):,} pairs {verb(len(found), 'repeats', 'repeat')} an earlier pair but for case, "
        f"spaces and punctuation, {spelled:,} of them letter for letter."
    )
    shown = (Shown(*pair[:2], f"repeats {other.name}: {read(pair, 'prompt')}") for pair, other in found)
    advice = "keep one of each: a pair counts as often as it stands in the data"
    return _finding("repeated-pairs", "doubtful", says, len(found), len(pairs), shown, advice)


def _like_replies(pairs: Sequence[Pair], read: Read) -> Finding:
    found = [pair for pair in pairs if pair.chosen == pair.rejected]
    says = (
        f"{len(found):,} of {len(pairs):,} pairs {verb(len(found), 'has', 'have')} two replies that differ in case, "
        "spaces or punctuation only."
    )
    shown = (Shown(*pair[:2], f"chosen {read(pair, 'chosen')}, rejected {read(pair, 'rejected')}") for pair in found)
    advice = "take them out of the data, unless case or punctuation is what is to be learned"
    return _finding("like-replies", "doubtful", says, len(found), len(pairs), shown, advice)


def _both_orders(pairs: Sequence[Pair], read: Read) -> Finding:
    """Pairs whose replies another pair of the same prompt has the other way round."""
    first: dict[tuple[int, int, int], int] = {}
    for place, pair in enumerate(pairs):
        first.setdefault((pair.prompt, pair.chosen, pair.rejected), place)
    turned = [first.get((pair.prompt, pair.rejected, pair.chosen)) for pair in pairs]
    found = [(n, other) for n, other in enumerate(turned) if other is not None and not _is_alike(pairs[n])]
    says = (
        f"{len(found):,} of {len(pairs):,} pairs {verb(len(found), 'has its', 'have their')} replies in the other "
        "order in another pair of the same prompt."
    )
    shown = (
        Shown(*pairs[place][:2], f"{pairs[other].name} rejects what is chosen here: {read(pairs[place], 'chosen')}")
        for place, other in found
        if other < place
    )
    advice = "keep the order that more people gave, or neither: in both orders a pair teaches nothing"
    return _finding("both-orders", "wrong", says, len(found), len(pairs), shown, advice)


def _is_alike(pair: Pair) -> bool:
    return pair.chosen == pair.rejected


def _contradictions(pairs: Sequence[Pair], circles: np.ndarray, read: Read) -> Finding:
    """Pairs that no order of their prompt's replies satisfies all at once: A before B, B before C, and C before A."""
    found = np.flatnonzero(circles >= 0).tolist()
    prompts = len({pairs[place].prompt for place in found})
    says = (
        f"{len(found):,} of {len(pairs):,} pairs {verb(len(found), 'contradicts', 'contradict')} each other: their "
        f"preferences run in a circle, at {prompts:,} {verb(prompts, 'prompt', 'prompts')}."
    )
    by_chosen = defaultdict(list)
    for place in found:
        by_chosen[pairs[place].prompt, pairs[place].chosen].append(pairs[place])
    firsts = {circles[place]: pairs[place] for place in reversed(found)}  # one of each circle, in order
    shown = (
        Shown(
            *pair[:2],
            f"{', '.join(other.name for other in _way_back(pair, by_chosen))} lead from what is rejected here back to "
            f"what is chosen: {read(pair, 'chosen')}",
        )
        for pair in reversed(firsts.values())
    )
    advice = "no order of the replies fits these pairs together: ask again, or leave out the weaker preferences"
    return _finding("contradictions", "wrong", says, len(found), len(pairs), shown, advice)


def _circles(pairs: Sequence[Pair]) -> np.ndarray:
    """For each pair the number of the circle of preferences that it is on, or -1.

    Replies are nodes and preferences are edges: an edge is on a circle where both its ends are in one strongly
    connected component.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    nodes: dict[tuple[int, int], int] = {}
    ends = np.array(
        [[nodes.setdefault((p.prompt, reply), len(nodes)) for reply in (p.chosen, p.rejected)] for p in pairs],
        np.int64,
    ).reshape(-1, 2)
    edges = coo_array((np.ones(len(pairs)), (ends[:, 0], ends[:, 1])), shape=(len(nodes),) * 2)
    _, labels = connected_components(edges, directed=True, connection="strong")
    first, second = labels[ends[:, 0]], labels[ends[:, 1]]
    return np.where((first == second) & (ends[:, 0] != ends[:, 1]), first, -1)


def _way_back(pair: Pair, by_chosen: Mapping[tuple[int, int], Sequence[Pair]]) -> list[Pair]:
    """The fewest pairs that lead from a pair's rejected reply to its chosen one."""
    ways, seen = deque([[other] for other in by_chosen[pair.prompt, pair.rejected]]), {pair.rejected}
    while ways[0][-1].rejected != pair.chosen:
        way = ways.popleft()
        if (reply := way[-1].rejected) not in seen:
            seen.add(reply)
            ways.extend([*way, other] for other in by_chosen[pair.prompt, reply])
    return ways[0]


def _chosen_and_rejected(pairs: Sequence[Pair], circles: np.ndarray, read: Read) -> Finding:
    """Pairs whose chosen reply another pair rejects, without a contradiction: answers in an order do so."""
    rejecting = {(pair.prompt, pair.rejected): pair for pair in reversed(pairs) if not _is_alike(pair)}
    found = [
        (pair, rejecting[pair.prompt, pair.chosen])
        for pair, circle in zip(pairs, circles.tolist(), strict=True)
        if circle < 0 and (pair.prompt, pair.chosen) in rejecting and not _is_alike(pair)
    ]
    says = (
        f"{len(found):,} of {len(pairs):,} pairs {verb(len(found), 'prefers a reply', 'prefer a reply')} that another "
        "pair of the same prompt rejects, without contradicting it: so do answers in an order."
    )
    shown = (Shown(*pair[:2], f"{other.name} rejects {read(pair, 'chosen')}") for pair, other in found)
    advice = "nothing where answers were ranked; data.ranked_pairs=best takes only the best of a prompt's answers"
    return _finding("chosen-and-rejected", "note", says, len(found), len(pairs), shown, advice)


def _overlap(pairs: Sequence[Pair], read: Read) -> Finding:
    """Held-out pairs with a prompt that training has."""
    training = {pair.prompt: pair for pair in reversed(pairs) if pair.split == "train"}
    held_out = [pair for pair in pairs if pair.split != "train"]
    found = [(pair, training[pair.prompt]) for pair in held_out if pair.prompt in training]
    says = (
        f"{len(found):,} of {len(held_out):,} validation and test pairs {verb(len(found), 'has', 'have')} a prompt "
        "that training has too, but for case, spaces and punctuation."
    )
    return _finding("overlap", "wrong", says, len(found), len(held_out), _beside(found, read), APART)


def _dialogue_overlap(pairs: Sequence[Pair], read: Read) -> Finding:
    """Held-out pairs whose dialogue opens like one of training and then goes on in another way."""
    prompts = {pair.prompt for pair in pairs if pair.split == "train"}
    training = {pair.opening: pair for pair in reversed(pairs) if pair.split == "train"}
    held_out = [pair for pair in pairs if pair.split != "train"]
    found = [
        (pair, training[pair.opening]) for pair in held_out if pair.prompt not in prompts and pair.opening in training
    ]
    says = (
        f"{len(found):,} of {len(held_out):,} validation and test pairs {verb(len(found), 'is', 'are')} of a dialogue "
        "that opens as one of training does, with another prompt: the same dialogue further on, or a common greeting."
    )
    return _finding("dialogue-overlap", "doubtful", says, len(found), len(held_out), _beside(found, read), APART)


APART = (
    "take these rows out of training, or of what is held out; alignlab itself carves splits by the exact first Human "
    "turn, and a field `split` in every row (train, validation or test) says otherwise"
)


def _beside(found: Iterable[tuple[Pair, Pair]], read: Read) -> Iterator[Shown]:
    return (Shown(*pair[:2], f"beside {other.name}: {read(pair, 'prompt')}") for pair, other in found)
