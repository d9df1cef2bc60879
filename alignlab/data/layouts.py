"""What a row is: each layout is told by the names of its columns, and read by a function of a few lines.

A row that holds no preference is refused with a `DataError`, whose text is the reason that is counted. `docs/data.md`
has a line for each layout; `Reader` is one of them with the names that its columns have in a file.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any, Literal

from alignlab.data.format import Dialogue
from alignlab.data.messages import (
    SYSTEM,
    is_json,
    read_history,
    read_json,
    read_prompt,
    read_reply,
    read_turns,
    spaced,
    unread_keys,
    whole_transcript,
)
from alignlab.data.transcript import HUMAN, Turn, split_pair, split_turns
from alignlab.errors import DataError
from alignlab.recipe.load import DataSection

Fields = Mapping[str, Any]  # a row by the names of this module
Sample = Mapping[str, Sequence[Any]]  # what some hundred rows hold in each column that is not empty
Columns = dict[str, str]  # a name of this module → the column's in the file


@dataclass(frozen=True, slots=True)
class Example:
    """A preference, a reply to learn (no `rejected`), or a reply with a label, as a row tells it."""

    dialogue: Dialogue
    chosen: Turn
    rejected: Turn | None = None
    confidence: float | None = None  # of the person who preferred it, where the row has one
    label: bool | None = None  # of `chosen`, where it stands alone


# --- names ---

# Of columns, as `plain_name` spells them; of several in one file the first counts
PROMPT = ("prompt", "question", "instruction", "query", "user_prompt", "user_query", "user_input", "prompt_text")
DIALOGUE = ("dialogue", "messages", "conversations", "conversation", "dialog", "chat")
INPUT, SYSTEMS, TOOLS = ("input", "context"), ("system", "system_prompt", "system_message"), ("tools", "functions")
REPLY = ("completion", "response", "output", "answer", "reply", "target", "assistant")
LABEL = ("label", "labels", "kto_tag", "thumbs", "thumbs_up", "feedback", "liked", "desirable", "is_desirable", "vote")
ANSWERS = ("answers", "responses", "completions", "replies", "candidates", "outputs", "generations")
ANSWER_TEXTS = ("text", "response", "content", "answer", "completion", "output", "value", "message")
HIGHER = ("score", "overall_score", "rating", "reward", "vote", "upvote", "like", "grade")  # the more, the better
LOWER = ("rank",)  # 1 is best
_NOUN = r"(?:response|answer|completion|text|output|reply|messages?|conversations?)"
_GOOD = r"(?:chosen|accepted|preferred|winning|better|positive)"
_BAD = r"(?:rejected|dispreferred|non_?preferred|unpreferred|losing|worse|negative)"
_SIDES = {
    "chosen": re.compile(
        rf"{_GOOD}(?:_{_NOUN})?|{_NOUN}_{_GOOD}|winner|win|response_j"
    ),  # stack-exchange-paired's j, k
    "rejected": re.compile(rf"{_BAD}(?:_{_NOUN})?|{_NOUN}_{_BAD}|loser|lose|response_k"),
}
_ONE_OF_TWO = re.compile(rf"(?P<before>\w*(?:{_NOUN}|summary|generation)_?)(?P<at>[0-9a-d])")
_NEXT = {"0": "1", "1": "2", "a": "b"}
_PREFERENCE = ("winner", "preference", "better", "preferred", "label", "choice", "chosen", "verdict", "vote")
_IDS = ("better_response_id", "preferred_id", "chosen_id", "best_response_id", "better_id")
_STRENGTH = ("strength", "preference_strength", "overall_preference")
TIES = {"draw", "both", "both_good", "both_bad", "bothbad", "neither", "none", "equal", "same"}
LABELS = {
    **dict.fromkeys(("true", "1", "good", "desirable", "like", "liked", "positive", "yes", "up", "👍"), True),
    **dict.fromkeys(("thumbs_up", "thumbsup", "accepted", "chosen"), True),
    **dict.fromkeys(("false", "0", "-1", "bad", "undesirable", "dislike", "disliked", "negative", "no", "👎"), False),
    **dict.fromkeys(("thumbs_down", "thumbsdown", "down", "rejected"), False),
}
NAMES = (  # that `data.columns` may give to columns
    *("prompt", "chosen", "rejected", "system", "history", "input", "tools", "messages", "completion", "label"),
    *("answers", "scores", "ranks", "first", "second", "winner", "index", "number", "strength"),
)
MOST = 0.9  # of the rows that are looked at: a few odd ones do not unmake a column


def plain_name(column: str) -> str:
    """`Chosen-Response` and `chosenResponse` → chosen_response."""
    spelled = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", column.strip())
    return re.sub(r"[\s\-.]+", "_", spelled).lower()


def _named(sample: Sample, names: Iterable[str]) -> str | None:
    """The column that has the first of these names, in any usual spelling."""
    spelled = {plain_name(column): column for column in sample}
    return next((sample_name for name in names if (sample_name := name if name in sample else spelled.get(name))), None)


def _columns(sample: Sample, **names: Iterable[str]) -> Columns:
    found = {name: _named(sample, spellings) for name, spellings in names.items()}
    return {name: column for name, column in found.items() if column is not None}


def _without(sample: Sample, columns: Iterable[str]) -> Sample:
    gone = {*columns}
    return {name: values for name, values in sample.items() if name not in gone}


def _mostly(values: Sequence[Any], holds: Callable[[Any], bool]) -> bool:
    return sum(map(holds, values)) >= MOST * len(values)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _asked_columns(sample: Sample) -> Columns:
    """The columns of a prompt, and of all that stands before it."""
    found = _columns(sample, prompt=PROMPT, system=SYSTEMS, history=["history"], tools=TOOLS)
    held = {"system": _is_text, "history": _is_history, "tools": lambda value: _tools(value) is not None}
    found = {name: c for name, c in found.items() if name not in held or _mostly(sample[c], held[name])}
    about, dialogue = _named(sample, INPUT), _columns(sample, dialogue=DIALOGUE)
    if "prompt" not in found and (dialogue or about):
        return found | (dialogue or {"prompt": about})  # OpenAI's input, HelpSteer 3's context
    if about and plain_name(found.get("prompt", "prompt")) != "prompt" and _mostly(sample[about], _is_text):
        found["input"] = about  # Alpaca's; a `prompt` beside it most often holds it already
    return found


# --- pairs ---


def find_sides(sample: Sample) -> Columns | None:
    """`chosen` and `rejected` in any usual spelling, with what they answer."""
    sides = {}
    for name, spellings in _SIDES.items():
        like = (column for column in sample if spellings.fullmatch(plain_name(column)))
        sides[name] = name if name in sample else next(like, None)
    if None in sides.values():
        return None
    return _asked_columns(_without(sample, sides.values())) | sides


def find_transcripts(sample: Sample) -> Columns | None:
    found = find_sides(sample)
    if found is None or found.keys() & {"prompt", "dialogue"}:
        return None
    return found if _mostly(sample[found["chosen"]], lambda text: _is_text(text) and not is_json(text)) else None


def hh_rlhf(fields: Fields, section: DataSection) -> Iterator[Example]:
    """Whole transcripts that differ in the last Assistant turn."""
    texts = [whole_transcript(_text(fields, name)) for name in ("chosen", "rejected")]
    prompt, *replies = split_pair(*texts)
    chosen, rejected = (Turn("Assistant", reply) for reply in replies)
    yield Example(_dialogue(fields, split_turns(prompt)[:-1]), chosen, rejected)


def pairs(fields: Fields, section: DataSection) -> Iterator[Example]:
    """Replies as text or messages; where they hold the dialogue before them, both hold the same one."""
    *head, chosen = read_reply(_field(fields, "chosen"), "chosen")
    *other_head, rejected = read_reply(_field(fields, "rejected"), "rejected")
    if head != other_head:
        raise DataError(OTHER_PROMPTS)
    prompt = fields.get("prompt")
    if _asks(head) and isinstance(prompt, list) and head[: len(prompt)] != read_turns(prompt, "prompt"):
        raise DataError("the dialogue in chosen does not begin with the prompt")
    yield Example(_dialogue(fields, head), chosen, rejected)


# Reasons for leaving a row out
OTHER_PROMPTS = "chosen and rejected answer different prompts"
SAME_SCORE, INVERTED = "the two replies have the same score", "the rejected reply has the higher score"
SIDES = ("score_chosen", "score_rejected")


def find_scored(sample: Sample) -> Columns | None:
    """`chosen` and `rejected` with a number for each: score_chosen, chosen_rating, chosen-avg_rating, rank_chosen, …"""
    found = find_sides(sample)
    if found is None:
        return None
    inside = next((value for value in sample.get("metadata", ()) if isinstance(value, Mapping)), {})
    if {*SIDES} <= inside.keys():
        return found | {"metadata": "metadata"}
    for words, name in ((HIGHER, "score"), (LOWER, "rank")):
        of_chosen, of_rejected = (_numbers_of(sample, side, words) for side in ("chosen", "rejected"))
        for rest in of_chosen.keys() & of_rejected.keys():
            return found | {f"{name}_chosen": of_chosen[rest], f"{name}_rejected": of_rejected[rest]}
    return None


def _numbers_of(sample: Sample, side: str, words: Sequence[str]) -> Columns:
    """The columns whose names hold a side and a word for a number, by the rest of the name."""
    parts = {column: plain_name(column).split("_") for column in sample}
    held = {column: of for column, of in parts.items() if side in of and {*map(_singular, of)} & {*words}}
    return {"_".join(part for part in of if part != side): column for column, of in held.items()}


def _singular(name: str) -> str:
    return name.removesuffix("s")


def ultrafeedback(fields: Fields, section: DataSection) -> Iterator[Example]:
    """Pairs with a score, rating or rank of each reply; equal ones hold no preference, inverted ones contradict it."""
    if "rank_chosen" in fields:
        chosen, rejected = (-_number(fields, f"rank_{side}") for side in ("chosen", "rejected"))
    else:
        inside = fields.get("metadata")
        scores = fields if "score_chosen" in fields or not isinstance(inside, Mapping) else inside
        chosen, rejected = (_number(scores, name) for name in SIDES)
    if chosen == rejected:
        raise DataError(SAME_SCORE)
    if chosen < rejected:
        raise DataError(INVERTED)
    yield from pairs(fields, section)


# --- two replies, and which is better ---


def find_summaries(sample: Sample) -> Columns | None:
    names = ("info", "summaries", "choice", "summary", "extra")
    found = {name: name for name in names if name in sample}
    return found if {"info", "summaries", "choice"} <= found.keys() or {"info", "summary"} <= found.keys() else None


def summarize_from_feedback(fields: Fields, section: DataSection) -> Iterator[Example]:
    """OpenAI's comparisons of two summaries of a Reddit post or a news article, with the worker's confidence (1–9)."""
    if "summary" in fields and not fields.get("summaries"):
        raise DataError("marks for one summary, which is no comparison")
    info, summaries = _field(fields, "info"), _field(fields, "summaries")
    if not isinstance(info, Mapping):
        raise DataError("the field 'info' is not a mapping")
    if not isinstance(summaries, Sequence) or len(summaries) != 2 or not all(isinstance(s, Mapping) for s in summaries):
        raise DataError("the field 'summaries' does not hold two summaries")
    replies = [Turn("Assistant", spaced(_text(summary, "text"))) for summary in summaries]
    choice = _zero_or_one(fields, "choice")
    extra = fields.get("extra")
    confidence = _number(extra, "confidence") if isinstance(extra, Mapping) and extra.get("confidence") else None
    asked = Dialogue([Turn("Human", spaced(tldr_prompt(info)))])
    yield Example(asked, replies[choice], replies[1 - choice], confidence)


def tldr_prompt(info: Fields) -> str:
    """OpenAI's query formats (openai/summarize-from-feedback); `data.format: plain` leaves them as they are."""
    if info.get("article") is not None:
        return f"Article:\n\n{_text(info, 'article')}\n\nTL;DR:"
    title, post = _text(info, "title"), _text(info, "post")
    return f"SUBREDDIT: r/{_text(info, 'subreddit')}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


_SHP = ("history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B")


def find_comments(sample: Sample) -> Columns | None:
    found = {name: name for name in _SHP if name in sample}
    return found if {*_SHP[:3]} <= found.keys() else None


def shp(fields: Fields, section: DataSection) -> Iterator[Example]:
    """Stanford SHP: the comment with more votes; pairs with a ratio of votes below `min_score_ratio` are dropped."""
    replies = [Turn("Assistant", spaced(_text(fields, f"human_ref_{side}"))) for side in "AB"]
    scores = [_number(fields, f"score_{side}") for side in "AB"]
    best = 1 - _zero_or_one(fields, "labels")  # 1: A is preferred
    if scores[best] < scores[1 - best]:
        raise DataError("the label prefers the reply with the lower score")
    if scores[best] < section.min_score_ratio * max(scores[1 - best], 1):  # as SHP counts: a score is at least 1
        raise DataError(f"the scores' ratio is below data.min_score_ratio {section.min_score_ratio:g}")
    asked = Dialogue([Turn("Human", spaced(_text(fields, "history")))])
    yield Example(asked, replies[best], replies[1 - best])


def find_two(sample: Sample) -> Columns | None:
    """Two replies that are told apart by 0 and 1, 1 and 2, or A and B, and a column that says which is better."""
    both = {"first": "first", "second": "second"} if {"first", "second"} <= sample.keys() else None
    at = "0"
    spelled = {plain_name(column): column for column in sample}
    numbered = [found for name in spelled if (found := _ONE_OF_TWO.fullmatch(name))]
    for before, count in Counter(found["before"] for found in numbered).items():
        ends = sorted(found["at"] for found in numbered if found["before"] == before)
        if not both and count == 2 and _NEXT.get(ends[0]) == ends[1]:
            both, at = (
                {name: spelled[before + end] for name, end in zip(("first", "second"), ends, strict=True)},
                ends[0],
            )
    rest = _without(sample, (both or {}).values())
    preference = _find_preference(rest, at) if both else None
    return _asked_columns(_without(rest, preference.values())) | both | preference if preference else None


def _find_preference(sample: Sample, at: str) -> Columns | None:
    """The column that says which of two replies is better, under a name that tells how it says so."""
    if given := {name: name for name in ("index", "number") if name in sample}:
        return given
    if strength := _columns(sample, strength=_STRENGTH):
        return strength
    flags = _columns(sample, first_wins=["winner_model_a"], second_wins=["winner_model_b"])
    if len(flags) == 2:
        return flags
    column = _named(sample, (*_IDS, *_PREFERENCE))
    if column is None:
        return _two_numbers(sample, at)
    if not _mostly(sample[column], lambda value: _as_number(value) is None):
        return _numbered(column, sample[column], at)
    models = _columns(sample, first_model=["model_a", "model_0", "model_1"], second_model=["model_b", "model_2"])
    return {"winner_from_0" if at == "0" else "winner": column, **models}


def _numbered(column: str, values: Sequence[Any], at: str) -> Columns | None:
    """What numbers in a column mean: an index from 0 where 2 is a tie, or a number from 1 where 0 is a tie.

    None where they could mean either: 0, 1 and 2 of response_1 and response_2.
    """
    found = {_as_number(value) for value in values} - {None}
    if at == "0" and found <= {0, 1, 2}:
        return {"index": column}
    if found == {1, 2} or (at == "1" and found <= {1, 2}):
        return {"number": column}
    return {"index": column} if at == "a" and 0 in found and found <= {0, 1, 2} else None


def _two_numbers(sample: Sample, at: str) -> Columns | None:
    for words, name in ((HIGHER, "score"), (LOWER, "rank")):
        for word in words:
            both = _columns(sample, first=[f"{word}_{at}", f"{word}{at}"], second=[f"{word}_{_NEXT[at]}"])
            if len(both) == 2:
                return {f"{which}_{name}": column for which, column in both.items()}
    return None


def two_responses(fields: Fields, section: DataSection) -> Iterator[Example]:
    """Two replies and which is better: an index, a number, a letter, a model's name, a strength, scores or ranks."""
    best = _better(fields)
    if best is None:
        raise DataError("a tie, which holds no preference")
    replies = [_alone(_field(fields, name), name) for name in ("first", "second")]
    prompt = {} if fields.get("prompt") is None else {"prompt": _alone(fields["prompt"], "prompt")}
    sides = {"chosen": replies[best], "rejected": replies[1 - best]}
    yield from pairs({**fields, **prompt, **sides}, section)


def _alone(value: Any, name: str) -> Any:
    """The one text of a list, also of one in JSON (Chatbot Arena's); anything else as it is."""
    texts = read_json(value) if isinstance(value, str) and value.startswith(('["', "['", "[null")) else value
    if not isinstance(texts, list) or not all(isinstance(text, str | None) for text in texts):
        return value
    if len(texts) != 1:
        raise DataError(OTHER_PROMPTS)
    return texts[0] or ""


def _better(fields: Fields) -> int | None:
    """0 where the first reply is better, 1 where the second is, none where neither is."""
    if "strength" in fields:  # HelpSteer's: −3 the first is much better, 3 the second is
        return _sign(-_number(fields, "strength"))
    if "index" in fields:
        return _one_of(fields, "index", {0: 0, 1: 1, 2: None})
    if "number" in fields:
        return _one_of(fields, "number", {0: None, 1: 0, 2: 1})
    for name, sign in (("score", 1), ("wins", 1), ("rank", -1)):
        if f"first_{name}" in fields:
            return _sign(sign * (_number(fields, f"first_{name}") - _number(fields, f"second_{name}")))
    return _winner(fields)


def _sign(lead: float) -> int | None:
    return None if lead == 0 else int(lead < 0)


def _one_of(fields: Fields, name: str, meaning: Mapping[int, int | None]) -> int | None:
    value = _number(fields, name)
    if value not in meaning:
        raise DataError(f"the field {name!r} is none of {', '.join(map(str, meaning))}")
    return meaning[int(value)]


_PLACES = {"a": 0, "b": 1, "first": 0, "second": 1, "left": 0, "right": 1}


def _winner(fields: Fields) -> int | None:
    """What a name, a letter or a number says, such as `model_a`, `B`, `response_1` or `tie (bothbad)`."""
    counts = {"0": 0, "1": 1} if "winner_from_0" in fields else {"1": 0, "2": 1}
    said = _text(fields, "winner_from_0" if "winner_from_0" in fields else "winner").strip()
    models = [fields.get("first_model"), fields.get("second_model")]
    if said in models and models[0] != models[1]:
        return models.index(said)
    word = re.sub(r"[^a-z0-9]+", "_", said.lower()).strip("_")
    if word in TIES or word.startswith("tie"):
        return None
    last = word.rpartition("_")[2] if word not in _PLACES else word
    places = _PLACES | counts
    if last not in places:
        raise DataError(f"{said[:30]!r} names neither reply")
    return places[last]


# --- a list of answers ---


def find_ranked(sample: Sample) -> Columns | None:
    """A list of answers and, where there is one, a list of numbers beside it that a known name orders."""
    answers = _columns(sample, answers=ANSWERS)
    if not answers or not _mostly(sample[answers["answers"]], _is_list):
        return None
    rest = _without(sample, answers.values())
    asked = _asked_columns(rest)
    if not asked.keys() & {"prompt", "dialogue"}:
        return None
    beside = [column for column in _without(rest, asked.values()) if _mostly(rest[column], _is_list)]
    scores, ranks = _order_in(beside)
    found = {"scores": scores} if scores else {"ranks": ranks} if ranks else {}
    unknown = next((column for column in beside if _mostly(rest[column], _has_numbers)), None)
    return asked | answers | (found or ({"unknown": unknown} if unknown else {}))


def _is_list(value: Any) -> bool:
    return isinstance(_unpacked(value), list | Mapping)


def _unpacked(value: Any) -> Any:
    """A list that is stored as text, as CSV has it; anything else as it is."""
    return read_json(value) if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else value


def _has_numbers(value: Any) -> bool:
    return any(_as_number(item) is not None for item in _unpacked(value))


def _order_in(names: Iterable[str]) -> tuple[str | None, str | None]:
    """The name that says how good something is, and the one that says its rank; `rm_scores` by its last word."""
    plain = {name: plain_name(name) for name in names}
    found = []
    for words in (HIGHER, LOWER):
        exact = [name for word in words for name, of in plain.items() if _singular(of) == word]
        last = [name for name, of in plain.items() if _singular(of.rpartition("_")[2]) in words]
        found.append(next(iter(exact + last), None))
    return found[0], found[1]


UNORDERED = "the answers have no order that is known"


def ranked(fields: Fields, section: DataSection) -> Iterator[Example]:
    """A prompt with k answers and a score, rating, reward or rank of each; `data.source: ranked` alone: the best first.

    Equal scores make no pair. `data.ranked_pairs` says which two answers become one.
    """
    answers = _listed(_field(fields, "answers"))
    if len(answers) < 2:
        raise DataError("the field 'answers' does not list two or more answers")
    texts = [Turn("Assistant", spaced(_answer_text(answer))) for answer in answers]
    scores = _answer_scores(fields, answers, by_place=section.source == "ranked")
    order = sorted(range(len(texts)), key=lambda place: -scores[place])
    best = [(better, worse) for better, worse in _which(order, section.ranked_pairs) if scores[better] > scores[worse]]
    if not best:
        raise DataError("all answers have the same score")
    dialogue = _dialogue(fields, _asked(fields))
    yield from (Example(dialogue, texts[better], texts[worse]) for better, worse in best)


def _which(order: Sequence[int], rule: str) -> list[tuple[int, int]]:
    if rule == "adjacent":
        return list(pairwise(order))
    return list(combinations(order, 2)) if rule == "all" else [(order[0], other) for other in order[1:]]


def _listed(answers: Any) -> list[Any]:
    """A list, also where it is kept as one object of lists, which `datasets` makes of a list of objects."""
    answers = _unpacked(answers)
    if isinstance(answers, Mapping):
        lists = {name: values for name, values in answers.items() if isinstance(values, list)}
        if len({len(values) for values in lists.values()}) == 1:
            return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    if not isinstance(answers, list):
        raise DataError("the field 'answers' does not list two or more answers")
    return answers


def _answer_text(answer: Any) -> str:
    if isinstance(answer, Mapping):
        answer = next((answer[key] for key in ANSWER_TEXTS if answer.get(key) is not None), None)
    if not isinstance(answer, str):
        raise DataError("an answer in 'answers' is not text")
    return answer


def _answer_scores(fields: Fields, answers: Sequence[Any], by_place: bool) -> list[float]:
    """A number for each answer, the higher the better."""
    for name, sign in (("scores", 1), ("ranks", -1)):
        if fields.get(name) is not None:
            numbers = _unpacked(fields[name])
            if not isinstance(numbers, list) or len(numbers) != len(answers):
                raise DataError(f"the field {name!r} does not hold a number for each of 'answers'")
            return [sign * _score({name: value}, name) for value in numbers]
    objects = [answer for answer in answers if isinstance(answer, Mapping)]
    keys = dict.fromkeys(key for answer in objects for key in answer if key not in ANSWER_TEXTS)
    score, rank = _order_in(keys)
    if score or rank:
        sign = 1 if score else -1
        return [sign * _score(answer if isinstance(answer, Mapping) else {}, score or rank) for answer in answers]
    has_numbers = any(all(_as_number(answer.get(key)) is not None for answer in objects) for key in keys)
    if not by_place or has_numbers or "unknown" in fields:
        raise DataError(UNORDERED)
    return [float(-place) for place in range(len(answers))]


def _score(fields: Fields, name: str) -> float:
    if _as_number(fields.get(name)) is None:
        raise DataError("an answer has no score")
    return _number(fields, name)


# --- replies to learn, and replies with a label ---


def find_task(sample: Sample) -> Columns | None:
    return find_completion(sample) if "instruction" in sample or _named(sample, ["instruction"]) else None


def find_completion(sample: Sample) -> Columns | None:
    reply = _columns(sample, completion=REPLY)
    asked = _asked_columns(_without(sample, reply.values()))
    return asked | reply if reply and "prompt" in asked else None


def completion(fields: Fields, section: DataSection) -> Iterator[Example]:
    """A prompt, or `instruction` and `input`, with a reply to learn."""
    *head, reply = read_reply(_field(fields, "completion"), "completion")
    yield Example(_dialogue(fields, head), reply)


def find_messages(sample: Sample) -> Columns | None:
    found = _columns(sample, messages=[*DIALOGUE, "text"], system=SYSTEMS, tools=TOOLS)
    return found if "messages" in found and _mostly(sample[found["messages"]], _holds_turns) else None


def _holds_turns(value: Any) -> bool:
    if isinstance(value, str):
        return is_json(value) or whole_transcript(value).startswith(HUMAN)
    return isinstance(value, list | Mapping)


def messages(fields: Fields, section: DataSection) -> Iterator[Example]:
    """A whole dialogue: its last turn is the reply to learn."""
    *head, last = read_turns(_field(fields, "messages"), "messages")
    if last.role != "Assistant":
        raise DataError("the dialogue ends with a user turn")
    yield Example(_dialogue(fields, head), last)


def find_labelled(sample: Sample) -> Columns | None:
    label = _columns(sample, label=LABEL)
    if not label or not _mostly(sample[label["label"]], lambda value: _label_of(value) is not None):
        return None
    rest = _without(sample, label.values())
    found = find_completion(rest) or find_messages(rest)
    return found | label if found else None


def _label_of(value: Any) -> bool | None:
    word = re.sub(r"[\s\-]+", "_", str(value).strip().lower().removesuffix(".0"))
    return LABELS.get(word)


def kto(fields: Fields, section: DataSection) -> Iterator[Example]:
    """A prompt, one reply, and whether that is good: what KTO learns from."""
    label = _label_of(_field(fields, "label"))
    if label is None:
        raise DataError("the field 'label' says neither good nor bad")
    read = completion if "completion" in fields else messages
    yield from (replace(example, label=label) for example in read(fields, section))


# --- the table ---

Kind = Literal["pairs", "replies", "labels"]


@dataclass(frozen=True)
class Layout:
    """One way in which rows hold what a stage learns from."""

    kind: Kind
    holds: str  # the columns, for the error that not one row is usable
    find: Callable[[Sample], Columns | None]
    read: Callable[[Fields, DataSection], Iterator[Example]]
    needs: tuple[str, ...]  # without one of them a row is none of this layout


LAYOUTS = {  # by `data.source`; of those that fit about as many rows the first counts
    "summarize-from-feedback": Layout(
        "pairs", "`info`, two `summaries` and `choice`", find_summaries, summarize_from_feedback, ("info",)
    ),
    "shp": Layout(
        "pairs",
        "`history`, `human_ref_A`, `human_ref_B`, `labels`, `score_A` and `score_B`",
        find_comments,
        shp,
        ("history", "human_ref_A", "human_ref_B"),
    ),
    "ultrafeedback": Layout(
        "pairs",
        "`prompt`, `chosen` and `rejected`, with `score_chosen` and `score_rejected`",
        find_scored,
        ultrafeedback,
        ("chosen", "rejected"),
    ),
    "hh-rlhf": Layout(
        "pairs",
        "`chosen` and `rejected` as whole transcripts (rows with a `prompt` are data.source=pairs)",
        find_transcripts,
        hh_rlhf,
        ("chosen", "rejected"),
    ),
    "pairs": Layout(
        "pairs",
        "`prompt`, `chosen` and `rejected` (whole transcripts without a prompt are data.source=hh-rlhf)",
        find_sides,
        pairs,
        ("chosen", "rejected"),
    ),
    "two-responses": Layout(
        "pairs",
        "two replies such as `response_0` and `response_1`, and which of them is better",
        find_two,
        two_responses,
        ("first", "second"),
    ),
    "ranked": Layout("pairs", "`prompt` and `answers`, with `scores` or `ranks`", find_ranked, ranked, ("answers",)),
    "kto": Layout("labels", "`prompt`, `completion` and `label`", find_labelled, kto, ("label",)),
    "alpaca": Layout("replies", "`instruction` and `output`", find_task, completion, ("completion",)),
    "prompt-completion": Layout("replies", "`prompt` and `completion`", find_completion, completion, ("completion",)),
    "messages": Layout("replies", "`messages`", find_messages, messages, ("messages",)),
}


@dataclass(frozen=True)
class Reader:
    """A layout with the names that its columns have in a file."""

    source: str  # the layout's name
    layout: Layout
    columns: Columns

    def read(self, row: Fields, section: DataSection) -> Iterator[Example]:
        """What the row holds; raises a DataError where it is nothing that can be learned from."""
        values = {name: row.get(column) for name, column in self.columns.items()}
        return self.layout.read({name: value for name, value in values.items() if value is not None}, section)

    def unread(self, row: Fields) -> set[str]:
        """The columns, and the keys of messages, that hold something and are not looked at."""
        read = {*self.columns.values(), SPLIT, *(OURS if "meta" in row else ())}
        names = {name for name in row if name not in read and row[name] not in EMPTY}
        for column in self.columns.values():
            names.update(unread_keys(row.get(column)))
        return names


SPLIT = "split"  # a column that `alignlab.data.splits` reads
OURS = ("meta", "score_chosen", "score_rejected")  # columns of `alignlab pairs` that say how a pair came about
EMPTY = (None, "", [], {})


def find_reader(rows: Sequence[Fields], source: str | None, columns: Mapping[str, str]) -> Reader | None:
    """The reader of some hundred rows: of `source`, or of the layout that fits most of them; none where none does.

    `columns` are a recipe's own names (`data.columns`): a name of this module → the column's.
    """
    sample = _sample(rows, columns)
    found = {name: layout.find(sample) for name, layout in LAYOUTS.items() if source in (None, name)}
    if source is not None:
        there = found[source] or {name: name for name in (*LAYOUTS[source].needs, *NAMES)}
        return Reader(source, LAYOUTS[source], {name: columns.get(column, column) for name, column in there.items()})
    fits = {name: _fitting(rows, LAYOUTS[name], of, columns) for name, of in found.items() if of is not None}
    name = next((name for name, count in fits.items() if 2 * count >= max(fits.values())), None)
    return name and find_reader(rows, name, columns)


def _sample(rows: Sequence[Fields], columns: Mapping[str, str]) -> Sample:
    called = {column: name for name, column in columns.items()}
    sample: dict[str, list[Any]] = {}
    for row in rows:
        for column, value in row.items():
            if value is not None and (column in called or column not in columns):
                sample.setdefault(called.get(column, column), []).append(value)
    return sample


def _fitting(rows: Sequence[Fields], layout: Layout, found: Columns, columns: Mapping[str, str]) -> int:
    """How many rows have all that the layout cannot do without."""
    needed = [columns.get(found[name], found[name]) for name in layout.needs]
    return sum(all(row.get(column) is not None for column in needed) for row in rows)


def is_red_team(row: Fields) -> bool:
    """Whether a row is of HH-RLHF's red-team file: rated single transcripts."""
    return "transcript" in row and "chosen" not in row


# --- prompts alone ---

ALONE = ("forbidden_prompt", "goal", "behavior", "turns", "text", *INPUT)  # names of prompts in files of nothing else


def find_asked(sample: Sample, column: str | None = None) -> Columns | None:
    """The columns of prompts, and of what stands before them; `column` is that of an unusual name."""
    if column is not None:
        return _asked_columns({**_without(sample, ["prompt"]), "prompt": sample.get(column, [])}) | {"prompt": column}
    found = _asked_columns(sample)
    if not found.keys() & {"prompt", "dialogue"}:
        found |= _columns(sample, prompt=ALONE)
    return found if found.keys() & {"prompt", "dialogue"} else None


def read_asked(row: Fields, columns: Columns) -> Dialogue:
    """What a row of a file of prompts asks; of several turns that are texts the first one."""
    fields = {name: row[column] for name, column in columns.items() if row.get(column) is not None}
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(turn, str) for turn in prompt):
        fields["prompt"] = prompt[0]
    dialogue = _dialogue(fields)
    turns = [Turn(turn.role, spaced(turn.text.strip())) for turn in dialogue.turns]
    return replace(dialogue, turns=turns)


# --- fields ---


def _field(fields: Fields, name: str) -> Any:
    if fields.get(name) is None:
        raise DataError(f"no field {name!r}")
    return fields[name]


def _text(fields: Fields, name: str) -> str:
    value = _field(fields, name)
    if not isinstance(value, str):
        raise DataError(f"the field {name!r} is not text")
    return value


def _as_number(value: Any) -> float | None:
    """The number that a value is, or spells."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _number(fields: Fields, name: str) -> float:
    number = _as_number(_field(fields, name))
    if number is None:
        raise DataError(f"the field {name!r} is not a number")
    return number


def _zero_or_one(fields: Fields, name: str) -> int:
    number = _as_number(_field(fields, name))
    if number not in (0, 1):
        raise DataError(f"the field {name!r} is neither 0 nor 1")
    return int(number)


# --- what a reply answers ---


def _dialogue(fields: Fields, head: Sequence[Turn] = ()) -> Dialogue:
    """The turns before a reply, where it holds them, else the prompt; with system text, earlier turns and tools."""
    asked = [] if _asks(head) else _asked(fields)
    history = read_history(fields["history"], "history") if fields.get("history") else []
    systems, said = [_text(fields, "system")] if fields.get("system") else [], []
    for turns in (history, asked, head):
        first = turns[:1]
        systems += [turn.text.removeprefix(" ") for turn in first if turn.role == SYSTEM]
        said += turns[1:] if first and first[0].role == SYSTEM else turns
    if any(turn.role == SYSTEM for turn in said):
        raise DataError("a system turn stands after the first message")
    system = "\n\n".join(dict.fromkeys(text for text in systems if text)) or None
    return Dialogue(said, system, _input(fields) if asked else None, _tools(_tools_of(fields)))


def _asks(head: Sequence[Turn]) -> bool:
    return any(turn.role == "Human" for turn in head)


def _asked(fields: Fields) -> list[Turn]:
    if fields.get("prompt") is None and fields.get("dialogue") is not None:
        return read_prompt(fields["dialogue"], "dialogue")
    return read_prompt(_field(fields, "prompt"), "prompt")


def _input(fields: Fields) -> str | None:
    given = fields.get("input") or None
    return given if given is None else _text(fields, "input")


def _tools_of(fields: Fields) -> Any:
    """The column, or what stands beside the messages of OpenAI's `input`."""
    prompt = fields.get("prompt")
    return fields.get("tools") or (prompt.get("tools") if isinstance(prompt, Mapping) else None)


def _tools(value: Any) -> list[Mapping[str, Any]] | None:
    """Functions as a list of objects, also where it is stored as JSON; none where it holds none."""
    found = read_json(value) if isinstance(value, str) else value
    return found if isinstance(found, list) and found and all(isinstance(one, Mapping) for one in found) else None


def _is_history(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and is_json(value))
