"""Prompts that are nearly the same: within training, between held-out data and training, and in files of prompts.

How alike two texts are is the Jaccard similarity of their shingles (Broder 1997, "On the resemblance and containment of
documents"): of all runs of `GRAM` characters in either, once `letters` has taken out case, spaces and punctuation and
the role words are gone, the share that both have. Near is `NEAR` or more. No word boundaries are needed, so that
Chinese is compared like English. A text with fewer letters than a shingle is compared exactly only, and in a short one
a small change weighs much: one changed letter inside fewer than 49 is not near any more.

Candidates come from MinHash signatures of `BANDS * ROWS` permutations by datasketch, grouped by equal bands (Leskovec,
Rajaraman, Ullman, "Mining of Massive Datasets", 3.4). Two texts of similarity s share no band with probability
(1 - s**ROWS)**BANDS: 5e-5 at 0.8, less above. Of the candidates only those whose signatures agree in `NEAR - MARGIN`
of their places are looked at (four standard errors of that estimate), and each of these by its real shingles, so that
nothing is called near which is not; at most `CHECKED` for one text, and one for each text that is left once `REFUTED`
have come to nothing: in data made of a long template, with similarities just below 0.8, some near texts are missed.

Texts that are alike by construction (a template, one question edited a hundred times) fill whole bands with one group.
So a text is compared with the `WINDOW` texts before it in its group and with the `FIRST` of it, and no further once it
is found to be near an earlier one: time grows with the number of texts, not with its square. A text that is near one
further back only, in each crowded group that they share, is missed. What is counted is therefore texts that are near
some earlier one, not pairs of texts. Groups are sorted in arrays, not kept in datasketch's own index, which takes 6 KiB
a text; what is kept is a signature (500 bytes) and the letters of each different text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from alignlab.data import Prepared
from alignlab.data.preparation import BATCH_ROWS
from alignlab.doctor.doubles import APART, QUOTED, Transcript, human_turns, letters, quote, verb
from alignlab.doctor.finding import Finding, Shown, few
from alignlab.errors import DataError
from alignlab.transcript import split_turns

NEAR = 0.8  # Jaccard similarity
GRAM = 5  # characters of a shingle (Mining of Massive Datasets, 3.2.2: five for short texts)
BANDS, ROWS = 25, 5  # of a signature
SEED = 1  # of the permutations
MARGIN = 0.15  # below NEAR, of the similarity that signatures estimate
WINDOW, FIRST = 16, 4  # texts of a group that one is compared with
CHECKED = 16  # candidates of one text that are compared by their shingles
REFUTED = 100_000  # comparisons that find two texts not near, about 20 s of them, before each text has one only
PIECE = 4096  # shingles sketched at once, and rows of signatures compared at once: what is held in memory


class Match(NamedTuple):
    """An earlier text that one is near: its place, and the similarity."""

    other: int
    jaccard: float


class Row(NamedTuple):
    split: str
    number: int  # in its split
    text: int  # the number of its text


Asks = tuple[tuple[int, str], str, str]  # a training pair and its turn, a file's prompt, and how alike they are
Apart = Callable[[str, str], bool]  # whether two texts that look near are not to be called so


def near_findings(
    prepared: Prepared, asked: Mapping[str, Sequence[str]] | None = None, transcript: Transcript = str
) -> list[Finding]:
    """Training prompts near one another, held-out prompts near training, and prompts of files that training asks.

    `asked` are prompts to be evaluated on, as text or HH transcripts, by the name of their file. `transcript`
    reads the turns of a prompt in another format than HH (`partial(alignlab.prompts.as_transcript, form)`).
    """
    found = _among_prompts(prepared, transcript)
    return [*found, *(_in_files(prepared, asked, transcript) if asked else ())]


# Findings


def _among_prompts(prepared: Prepared, transcript: Transcript) -> Iterator[Finding]:
    texts: dict[str, int] = {}
    rows, indexed = [], 0
    for split, number, prompt in _prompts(prepared):
        rows.append(Row(split, number, texts.setdefault(_spoken(transcript(prompt)), len(texts))))
        indexed = len(texts) if split == "train" else indexed  # training comes first
    matches = near_earlier(list(texts), indexed, apart=_goes_on)
    firsts = {row.text: row for row in reversed(rows)}
    for name, held_out in (("near-duplicates", False), ("near-overlap", True)):
        looked_at = [row for row in rows if (row.split != "train") == held_out]
        found = [row for row in looked_at if row.text in matches and (row.text >= indexed) == held_out]
        shown = (_alike(prepared, row, firsts[matches[row.text].other], matches[row.text]) for row in _different(found))
        yield Finding(
            name=name,
            level="doubtful" if held_out else "note",
            says=_SAYS[held_out].format(
                count=len(found), of=len(looked_at), have=verb(len(found), "has", "have"), near=NEAR, gram=GRAM
            ),
            count=len(found),
            of=len(looked_at),
            shown=few(shown),
            advice=APART if held_out else "keep one of each where they are copies with small edits",
        )


_SAYS = (
    "{count:,} of {of:,} training pairs {have} a prompt nearly like that of an earlier one (Jaccard similarity of "
    "{near} or more by runs of {gram} letters; a dialogue that merely goes on is not counted).",
    "{count:,} of {of:,} validation and test pairs {have} a prompt that is not in training and yet nearly like one "
    "that is (Jaccard similarity of {near} or more by runs of {gram} letters).",
)


def _prompts(prepared: Prepared) -> Iterator[tuple[str, int, str]]:
    for split, start, batch in prepared.batches(["prompt"]):
        for number, prompt in enumerate(batch["prompt"], start):
            yield split, number, prompt


def _spoken(transcript: str) -> str:
    """The letters of a prompt, a line for each turn; without the role words where it is a transcript."""
    try:
        return "\n".join(letters(turn.text) for turn in split_turns(transcript)).rstrip("\n")
    except DataError:
        return letters(transcript)


def _goes_on(one: str, other: str) -> bool:
    """Whether one prompt is the other, some turns later."""
    return one.startswith(f"{other}\n") or other.startswith(f"{one}\n")


def _different(rows: Sequence[Row]) -> Iterator[Row]:
    seen = set()
    for row in rows:
        if row.text not in seen:
            seen.add(row.text)
            yield row


def _alike(prepared: Prepared, row: Row, other: Row, match: Match) -> Shown:
    here, there = (getattr(prepared, each.split)[each.number]["prompt"] for each in (row, other))
    here, there = _where_they_part(here, there)
    what = f"{quote(here)} is like {other.split} pair {other.number} (Jaccard {match.jaccard:.2f}): {quote(there)}"
    return Shown(row.split, row.number, what)


def _where_they_part(one: str, other: str) -> tuple[str, str]:
    """Both texts from shortly before they differ, where that would not be seen otherwise."""
    begin = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0) - QUOTED // 2
    return (one, other) if begin <= 0 else (f"…{one[begin:]}", f"…{other[begin:]}")


def _in_files(prepared: Prepared, asked: Mapping[str, Sequence[str]], transcript: Transcript) -> Iterator[Finding]:
    """A finding for each file: which of its prompts a Human turn of training asks too."""
    turns: dict[str, tuple[int, str]] = {}  # the training pair that has it, and how it reads there
    for split, number, prompt in _prompts(prepared):
        for turn in human_turns(transcript(prompt)) if split == "train" else ():
            turns.setdefault(letters(turn), (number, turn))
    files = {name: {letters(human_turns(prompt)[0]): prompt for prompt in prompts} for name, prompts in asked.items()}
    new = list(dict.fromkeys(text for prompts in files.values() for text in prompts if text not in turns))
    matches = near_earlier([*turns, *new], len(turns), asking=len(turns))
    places = list(turns.values())
    near = {text: (places[matches[n].other], matches[n]) for n, text in enumerate(new, len(turns)) if n in matches}
    for name, prompts in files.items():
        exact = [(turns[text], prompt, "") for text, prompt in prompts.items() if text in turns]
        alike = [(text, prompt) for text, prompt in prompts.items() if text in near]
        alike = [(near[text][0], prompt, f" (Jaccard {near[text][1].jaccard:.2f})") for text, prompt in alike]
        yield _file_finding(name, len(prompts), exact, alike)


def _file_finding(name: str, of: int, exact: Sequence[Asks], alike: Sequence[Asks]) -> Finding:
    return Finding(
        name=f"prompt-overlap:{name}",
        level="doubtful" if alike and not exact else "wrong",
        says=f"Training asks {len(exact):,} of the {of:,} prompts of {name} as they stand, but for case, spaces and "
        f"punctuation, and {len(alike):,} more nearly so (Jaccard similarity of {NEAR} or more).",
        count=len(exact) + len(alike),
        of=of,
        shown=few(
            Shown("train", number, f"asks {quote(turn)}, {name} {quote(prompt)}{how}")
            for (number, turn), prompt, how in (*exact, *alike)
        ),
        advice=f"take these rows out of training, or these prompts out of {name}: it is to be asked what is new",
    )


# Texts near earlier texts


def near_earlier(
    texts: Sequence[str], indexed: int, *, asking: int = 0, apart: Apart = lambda one, other: False
) -> dict[int, Match]:
    """For each text from number `asking` on that is near an earlier one of the first `indexed`: one such.

    Texts must differ. `apart` says of two of the indexed texts that they are not to be matched.
    """
    numbers = np.array([number for number, text in enumerate(texts) if len(text) >= GRAM], np.int64)
    signatures = _signatures([texts[number] for number in numbers])
    shingles_of = lru_cache(maxsize=128)(lambda number: shingles(texts[number]))
    tries = np.where(numbers >= asking, CHECKED, 0)
    found, refuted = {}, set()
    for band in range(BANDS):
        groups = _Groups(signatures[:, band * ROWS : (band + 1) * ROWS], int((numbers < indexed).sum()))
        for place, earlier in groups.candidates(signatures, tries):
            if not tries[place] or (place, earlier) in refuted:
                continue
            one, other = int(numbers[place]), int(numbers[earlier])
            similarity = jaccard(shingles_of(one), shingles_of(other))
            if similarity >= NEAR and not (one < indexed and apart(texts[one], texts[other])):
                found[one] = Match(other, similarity)
                tries[place] = 0
            else:
                refuted.add((place, earlier))
                tries[place] -= 1
                if len(refuted) == REFUTED:
                    tries[:] = np.where(tries == CHECKED, 1, 0)
    return found


def shingles(text: str) -> frozenset[str]:
    return frozenset(text[start : start + GRAM] for start in range(len(text) - GRAM + 1))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    shared = len(one & other)
    return shared / max(len(one) + len(other) - shared, 1)


def _signatures(texts: Sequence[str]) -> np.ndarray:
    """The MinHash signature of each text, a row each."""
    from datasketch import MinHash

    sketch = MinHash(BANDS * ROWS, seed=SEED, hashfunc=int, scheme="affine32")  # int: the shingles are hashed already
    signatures = np.empty((len(texts), BANDS * ROWS), np.uint32)
    hashes = (each for start in range(0, len(texts), BATCH_ROWS) for each in _hashes(texts[start : start + BATCH_ROWS]))
    for row, of_text in zip(signatures, hashes, strict=True):
        sketch.clear()
        for start in range(0, len(of_text), PIECE):
            sketch.update_batch(of_text[start : start + PIECE].tolist())
        row[:] = sketch.hashvalues
    return signatures


def _hashes(texts: Sequence[str]) -> Iterator[np.ndarray]:
    """The shingles of each text, hashed to 32 bits: multiplied and shifted once for each character."""
    whole = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    count = len(whole) - GRAM + 1
    hashes = np.zeros(count, np.uint64)
    for start in range(GRAM):
        hashes = (hashes ^ whole[start : start + count]) * _ODD
        hashes ^= hashes >> _HALF
    hashes = (hashes >> _HALF).astype(np.uint32)
    begin = 0
    for text in texts:  # without those that reach into the next one
        yield hashes[begin : begin + len(text) - GRAM + 1]
        begin += len(text)


_ODD, _HALF = np.uint64(0x9E3779B97F4A7C15), np.uint64(32)  # 2**64 over the golden ratio, and half of 64 bits


class _Groups:
    """The texts whose signatures are equal in one band, next to each other and in their order."""

    def __init__(self, band: np.ndarray, indexed: int):
        keys = np.zeros(len(band), np.uint64)
        for column in band.T:
            keys = (keys ^ column) * _ODD
            keys ^= keys >> _HALF
        self.order = np.argsort(keys, kind="stable")
        keys, places = keys[self.order], np.arange(len(band))
        begins = np.append(True, keys[1:] != keys[:-1])[: len(band)]
        self.begin = np.maximum.accumulate(np.where(begins, places, 0))
        last = np.maximum.accumulate(np.where(self.order < indexed, places, -1))
        self.last = np.append(-1, last)[: len(band)]  # the last of the indexed texts before each

    def candidates(self, signatures: np.ndarray, tries: np.ndarray) -> Iterator[tuple[int, int]]:
        """A text that has tries left, and an earlier one whose signature is like its own; the nearest before first."""
        for at, there in self._steps():
            ask = np.flatnonzero(there & (tries[self.order] > 0))
            for start in range(0, len(ask), PIECE):
                some = ask[start : start + PIECE]
                ones, others = self.order[some], self.order[at[some]]
                alike = (signatures[ones] == signatures[others]).mean(axis=1) >= NEAR - MARGIN
                yield from zip(ones[alike].tolist(), others[alike].tolist(), strict=True)

    def _steps(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Where each text's next candidate stands in the order, and whether there is one."""
        for back in range(WINDOW):
            yield self.last - back, self.last - back >= self.begin
        for ahead in range(FIRST):
            yield self.begin + ahead, self.begin + ahead <= self.last - WINDOW
