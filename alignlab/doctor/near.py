"""Prompts that are nearly the same: within training, between held-out data and training, and in files of prompts.

How alike two texts are is the Jaccard similarity of their shingles (Broder 1997, "On the resemblance and containment of
documents"): of all runs of `GRAM` characters in either, once `letters` has taken out case, spaces and punctuation and
the role words are gone, the share that both have. Near is `NEAR` or more. No word boundaries are needed, so that
Chinese is compared like English. A text with fewer letters than a shingle is compared exactly only, and in a short one
a small change weighs much: one changed letter inside fewer than 49 is not near any more.

Candidates come from datasketch's MinHashLSH with BANDS bands of ROWS permutations. Two texts of similarity s share no
band with probability (1 - s**ROWS)**BANDS: 5e-5 at 0.8, less above (Leskovec, Rajaraman, Ullman, "Mining of Massive
Datasets", 3.4). The CHECKED candidates whose signatures are most alike are compared by their real shingles, so that
nothing is called near which is not; where more are about as alike and none of the first is near, one may be missed.

Texts that are alike by construction (a template, one question edited a hundred times) would all be candidates of each
other. So a text that has CROWD candidates is compared and not indexed: those before it stand for it. Then no band holds
more than CROWD texts under one key, and time grows with the number of texts, not with its square. What is near such a
text only is missed. What is counted is therefore texts that are near some earlier one, not pairs of texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import xxhash

from alignlab.data.prepare import Prepared
from alignlab.data.transcript import split_turns
from alignlab.doctor.doubles import APART, QUOTED, Transcript, human_turns, letters, quote, verb
from alignlab.doctor.finding import Finding, Shown, few, left_out
from alignlab.errors import DataError

NEAR = 0.8  # Jaccard similarity
GRAM = 5  # characters of a shingle (Mining of Massive Datasets, 3.2.2: five for short texts)
BANDS, ROWS = 25, 5  # of a signature
MARGIN = 0.15  # below NEAR, of the similarity that signatures estimate: four standard errors
CHECKED = 8  # candidates of one text that are compared by their shingles
CROWD = 64  # candidates of one text, with which it is not indexed itself


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
    reads the turns of a prompt in another format than HH (`partial(alignlab.prompts.as_transcript, form)`). Nothing is
    looked for without datasketch, which is optional.
    """
    if "near-overlap" in left_out():
        return []
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
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    sketch = MinHash(BANDS * ROWS, hashfunc=xxhash.xxh32_intdigest)
    signatures: dict[int, np.ndarray] = {}
    shingles_of = lru_cache(maxsize=256)(lambda number: shingles(texts[number]))
    found = {}
    for number, text in enumerate(texts):
        if len(text) < GRAM:
            continue
        sketch.clear()
        sketch.update_batch(shingles_of(number))
        candidates = index.query(sketch)
        if number >= asking:
            for other in _most_alike(sketch.hashvalues, candidates, signatures):
                similarity = jaccard(shingles_of(number), shingles_of(other))
                if similarity >= NEAR and not (number < indexed and apart(text, texts[other])):
                    found[number] = Match(other, similarity)
                    break
        if number < indexed and len(candidates) < CROWD:
            index.insert(number, sketch)
            signatures[number] = sketch.hashvalues
    return found


def _most_alike(signature: np.ndarray, candidates: Sequence[int], signatures: Mapping[int, np.ndarray]) -> list[int]:
    """Of a text's candidates those that may be near it, the likeliest first."""
    if not candidates:
        return []
    numbers = np.sort(candidates)
    alike = (np.stack([signatures[number] for number in numbers]) == signature).mean(axis=1)
    order = np.argsort(-alike, kind="stable")[:CHECKED]
    return [int(numbers[place]) for place in order if alike[place] >= NEAR - MARGIN]


def shingles(text: str) -> frozenset[bytes]:
    """All runs of `GRAM` characters, four bytes each."""
    coded = text.encode("utf-32-le", "surrogatepass")
    return frozenset(coded[start : start + 4 * GRAM] for start in range(0, len(coded) - 4 * GRAM + 1, 4))


def jaccard(one: frozenset[bytes], other: frozenset[bytes]) -> float:
    shared = len(one & other)
    return shared / max(len(one) + len(other) - shared, 1)
