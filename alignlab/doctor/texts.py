"""Signs of damage in single texts: role words, mojibake, control characters, replies that say nothing or stop short.

Each is a rule that a reader can apply by eye; every one of them looks at a text once from left to right, so that a
reply of megabytes costs no more than many short ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from alignlab.data.transcript import split_turns
from alignlab.doctor.finding import Level, left_out
from alignlab.measure.refusals import is_refusal
from alignlab.text.safe import one_line

COLUMNS = ("prompt", "chosen", "rejected")
REPLIES = ("chosen", "rejected")
EXCERPT = 100  # characters of a text around what is to be seen
REFUSAL_CHARACTERS = 2000  # of a reply in which its first sentences are looked for
FEW_WORDS = 25  # of a refusal beside which a reply holds nothing
SENTENCE_WORDS = 8  # of a reply that is expected to end as a sentence does: shorter answers often lack the full stop
CUT_ON_HH = 0.05  # of all replies in its harmless-base and helpful-base test files: 467 of 9,284

Span = tuple[int, int]

# Lower and upper case as transcripts write them; `### Instructions` heads a recipe as well, so a colon must follow
AT_LINE_START = re.compile(
    r"^[ \t]{0,8}(?:"
    r"(?:Human|HUMAN|human|Assistant|ASSISTANT|assistant|User|USER|user|System|SYSTEM|system) ?:"
    r"|\#{2,3} ?(?:Instruction|Response|Input|Human|Assistant|User|System) ?:)"
    r"|(?<=\n)(?:Human|Assistant)\Z",  # as far as a sampled reply came before it was stopped
    re.MULTILINE,
)
_MARKER = re.compile(
    r"<\|[A-Za-z_]{1,24}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>",
)
# C0 but \t, \n and \r, DEL and C1; bidirectional embeddings, overrides and isolates; word joiners and BOM; no width
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200d\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]+")
_NO_WIDTH = "\u200b\u200c\u200d"
_LAST_LATIN = "\u024f"
_MESSAGES = re.compile(r"\s*[\[{][^:]{0,40}[\"'](?:role|from|messages|conversations)[\"']\s*:")
_LETTER = re.compile(r"[^\W_]")
_LIST_ITEM = re.compile(r"[ \t]{0,20}(?:[-*•+|]|\d{1,3}[.):]|[A-Za-z][.)])\s")
_ALPACA_HEADING = re.compile(r"(?:\n\n|\A)### (?:Instruction|Input|Response):\n")


# One text → where the sign stands in it, if it does


def find_role_word(text: str) -> Span | None:
    """A role at a line's start, or a marker that templates write.

    >>> find_role_word("Yes.\\nHuman: Thanks"), find_role_word("As a human: yes.")
    ((5, 11), None)
    """
    found = AT_LINE_START.search(text) or _MARKER.search(text)
    return found and found.span()


def find_role_word_in_turns(text: str, format: str, own: frozenset[str]) -> Span | None:
    """The same in what a prompt's turns say; the roles by which the format itself tells turns apart do not count.

    Of a chat template these are the markers, and `own`: the line starts that its prompts share. Markers that the
    tokenizer knows are none of its text anyway: preparation drops such rows.
    """
    for start, said in _turns(text, format):
        if format in ("hh", "alpaca"):
            span = find_role_word(said)
        else:
            span = next((found.span() for found in AT_LINE_START.finditer(said) if found[0].strip() not in own), None)
            if format == "plain" and not span:
                span = _span(_MARKER.search(said))
        if span:
            return start + span[0], start + span[1]
    return None


def _turns(prompt: str, format: str) -> Iterator[tuple[int, str]]:
    """What is said in a prompt, each with where it begins."""
    if format == "hh":
        start = 0
        for turn in split_turns(prompt):
            start += len(f"\n\n{turn.role}:")
            yield start, turn.text
            start += len(turn.text)
    elif format == "alpaca":
        edges = [0, *(edge for found in _ALPACA_HEADING.finditer(prompt) for edge in found.span()), len(prompt)]
        yield from ((start, prompt[start:end]) for start, end in zip(edges[::2], edges[1::2], strict=True))
    else:
        yield 0, prompt


def find_mojibake(text: str) -> Span | None:
    """Characters that come of reading one encoding as another, by ftfy's heuristic, or U+FFFD in place of lost ones."""
    if text.isascii():
        return None
    from ftfy.badness import BADNESS_RE

    lost = text.find("\ufffd")
    return (lost, lost + 1) if lost >= 0 else _span(BADNESS_RE.search(text))


def find_control(text: str) -> Span | None:
    """A character that is neither seen nor white space.

    What has no width is spelling in emoji, Persian, Indic scripts and Thai: beside a character that is not Latin it
    does not count.
    """
    for found in _UNSEEN.finditer(text):
        start, end = found.span()
        beside = text[max(start - 1, 0) : start] + text[end : end + 1]
        if found[0].strip(_NO_WIDTH) or all(character <= _LAST_LATIN for character in beside):
            return start, end
    return None


def find_nothing(text: str) -> Span | None:
    """All of a reply without a letter or digit: ` ...`, ` ?`, ` :-(`."""
    return None if _LETTER.search(text) else (0, len(text))


def find_one_word(text: str) -> Span | None:
    """All of a reply of one word, in a script that writes spaces between words."""
    words = text[:EXCERPT].split(maxsplit=1)
    alone = len(words) == 1 and len(text) <= EXCERPT and max(words[0]) < "\u0e00"
    return (0, len(text)) if alone and _LETTER.search(words[0]) else None


def find_cut(text: str) -> Span | None:
    """The end of a reply that stops as no sentence does: on a letter, digit, comma, dash or opening bracket.

    Only of replies of eight words or more, and not in an item of a list, a row of a table or a URL. A rule of writing,
    not of meaning: people and models leave out full stops as well, and Thai has none.
    """
    end = len(text.rstrip())
    if not end or not (text[end - 1].isalnum() or text[end - 1] in ",-–—([{/&"):
        return None
    line = text.rfind("\n", 0, end) + 1
    if _LIST_ITEM.match(text, line) or "://" in text[line:end].rpartition(" ")[2]:
        return None
    words = text.split(maxsplit=SENTENCE_WORDS - 1)
    return (end - 1, end) if len(words) == SENTENCE_WORDS else None


def find_messages(text: str) -> Span | None:
    """The beginning of a reply that is messages stored as JSON.

    >>> find_messages(' [{"role": "assistant", "content": "Yes."}]')
    (0, 12)
    """
    return _span(_MESSAGES.match(text))


def find_bare_refusal(text: str) -> Span | None:
    bare = len(text.split(maxsplit=FEW_WORDS)) <= FEW_WORDS and refuses(text)
    return (0, len(text)) if bare else None


def refuses(reply: str) -> bool:
    """As `is_refusal`, which reads first sentences, on as much of a reply as these can be expected to take."""
    return is_refusal(reply[:REFUSAL_CHARACTERS])


def _span(found: re.Match | None) -> Span | None:
    return found.span() if found else None


def excerpt(text: str, start: int, end: int) -> str:
    """About a hundred characters around a place, on one line and safe to print.

    >>> excerpt("Stop\\x1b[2J now", 4, 5)
    'Stop⟨U+001B⟩[2J now'
    """
    begin = max(0, min(start - EXCERPT // 3, len(text) - EXCERPT))
    seen = one_line(text[begin : begin + EXCERPT])
    return "…" * (begin > 0) + seen + "…" * (begin + EXCERPT < len(text))


# What is looked for


@dataclass(frozen=True)
class TextRule:
    """One rule on some columns; `says` takes the counts of `prompt`, `chosen` and `rejected` texts and of `pairs`."""

    name: str
    level: Level
    columns: Sequence[str]
    says: str
    advice: str
    find: Callable[[str], Span | None]


_ROLE = "A role at a line's start, such as `Human:`, or a template's marker, such as `</s>`,"
_MEND = "mend or remove these rows in the file; `file` and `line` of each pair say where they stand"


SIGNS = (
    TextRule(
        "role-words",
        "wrong",
        ["chosen"],
        f"{_ROLE} stands in {{chosen}}: the policy learns to write it.",
        f"{_MEND}: cut the reply before the role, or take the label off its beginning",
        find_role_word,
    ),
    TextRule(
        "role-words-rejected",
        "doubtful",
        ["rejected"],
        f"{_ROLE} stands in {{rejected}}: an easy sign to tell them by, where fewer chosen ones hold it.",
        f"compare with role-words; {_MEND} where the marker is all that makes them the worse ones",
        find_role_word,
    ),
    TextRule(
        "role-words-prompts",
        "doubtful",
        ["prompt"],
        f"{_ROLE} stands inside a turn of {{prompt}}: a label written twice, turns that the source did not split,"
        " or a quoted dialogue.",
        "look whether the source splits turns (data.source) and writes them as data.format does; quoted dialogues"
        " can stay",
        find_role_word,  # in what its turns say, see `signs`
    ),
    TextRule(
        "mojibake",
        "doubtful",
        COLUMNS,
        "Text that was read in the wrong encoding (by ftfy's heuristic), or U+FFFD, stands in {pairs}: in {prompt},"
        " {chosen} and {rejected}.",
        "write the file again as UTF-8 from its origin, or run its texts through `ftfy.fix_text`; U+FFFD cannot be"
        " mended",
        find_mojibake,
    ),
    TextRule(
        "control-characters",
        "doubtful",
        COLUMNS,
        "Characters that cannot be seen (controls, bidirectional overrides, zero width, BOM) stand in {pairs}: in"
        " {prompt}, {chosen} and {rejected}.",
        "strip them from the file's texts: they are tokens that the policy learns to write",
        find_control,
    ),
    TextRule(
        "empty-replies",
        "wrong",
        REPLIES,
        "Neither a letter nor a digit stands in {chosen} and {rejected}.",
        "remove the pairs whose chosen reply says nothing; alignlab drops only replies of white space",
        find_nothing,
    ),
    TextRule(
        "messages-in-replies",
        "wrong",
        REPLIES,
        "Messages stored as JSON are all of {chosen} and {rejected}: the policy learns to write JSON.",
        "store messages as lists, or as JSON text that can be read to its end",
        find_messages,
    ),
    TextRule(
        "one-word-replies",
        "note",
        REPLIES,
        "A single word is all of {chosen} and {rejected}.",
        "fine where the prompts ask for one word; otherwise remove the pairs whose chosen reply is one",
        find_one_word,
    ),
    TextRule(
        "refusal-only-replies",
        "note",
        REPLIES,
        f"A refusal of at most {FEW_WORDS} words is all of {{chosen}} and {{rejected}}.",
        "if the policy should explain or offer something else when it refuses, replace these chosen replies",
        find_bare_refusal,
    ),
    TextRule(
        "cut-off-replies",
        "note",
        REPLIES,
        f"A letter, digit, comma, dash or opening bracket ends {{chosen}} and {{rejected}} of {SENTENCE_WORDS}"
        f" words or more, outside lists; so it does {CUT_ON_HH:.0%} of HH-RLHF's, often for want of a full stop.",
        "replies that stop at one length were cut where they were made: make them again with a higher limit;"
        " data.long_replies: drop leaves out those longer than data.max_reply_tokens",
        find_cut,
    ),
)


def signs(format: str, own: frozenset[str]) -> list[TextRule]:
    """All rules that can be looked for here, for prompts written in this format."""
    there = [sign for sign in SIGNS if sign.name not in left_out()]
    in_turns = partial(find_role_word_in_turns, format=format, own=own)
    return [replace(sign, find=in_turns) if sign.columns == ["prompt"] else sign for sign in there]
