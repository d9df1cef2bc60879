"""What a raw row means: each source is one function from a row to one or more preferences.

A row that holds none is refused with a `DataError`, whose text is the reason that is counted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any

from alignlab.data.rows import Part
from alignlab.errors import DataError
from alignlab.files import Row
from alignlab.format import Dialogue
from alignlab.recipe import DataSection
from alignlab.transcript import ASSISTANT, HUMAN, Turn, split_pair, split_turns

log = logging.getLogger(__name__)

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """A preference as a source tells it; replies begin with a space, as in a transcript."""

    dialogue: Dialogue
    chosen: str
    rejected: str | None  # none: a reply to learn, and no preference
    confidence: float | None = None  # of the person who preferred it, where the source has one


# --- the sources ---


def hh_rlhf(fields: Fields, section: DataSection) -> Iterator[Example]:
    """HH-RLHF: `chosen` and `rejected` are whole transcripts that differ in the last Assistant turn."""
    if is_red_team(fields):
        raise DataError("a red-team transcript, which is no pair")
    pair = split_pair(_text(fields, "chosen"), _text(fields, "rejected"))
    yield Example(Dialogue(split_turns(pair.prompt)[:-1]), pair.chosen, pair.rejected)


def is_red_team(fields: Fields) -> bool:
    """Whether a row is of HH-RLHF's red-team file: rated single transcripts."""
    return "transcript" in fields and "chosen" not in fields


def summarize_from_feedback(fields: Fields, section: DataSection) -> Iterator[Example]:
    """OpenAI's comparisons of two summaries of a Reddit post or a news article, with the worker's confidence (1–9)."""
    if "summary" in fields and not fields.get("summaries"):
        raise DataError("marks for one summary, which is no comparison")
    info, summaries = _field(fields, "info"), _field(fields, "summaries")
    if not isinstance(info, Mapping):
        raise DataError("the field 'info' is not a mapping")
    if not isinstance(summaries, Sequence) or len(summaries) != 2 or not all(isinstance(s, Mapping) for s in summaries):
        raise DataError("the field 'summaries' does not hold two summaries")
    replies = [_spaced(_text(summary, "text")) for summary in summaries]
    choice = _zero_or_one(fields, "choice")
    extra = fields.get("extra")
    confidence = _number(extra, "confidence") if isinstance(extra, Mapping) and extra.get("confidence") else None
    yield Example(_asked(tldr_prompt(info)), replies[choice], replies[1 - choice], confidence)


def tldr_prompt(info: Fields) -> str:
    """OpenAI's query formats (openai/summarize-from-feedback); `data.format: plain` leaves them as they are."""
    if info.get("article") is not None:
        return f"Article:\n\n{_text(info, 'article')}\n\nTL;DR:"
    title, post = _text(info, "title"), _text(info, "post")
    return f"SUBREDDIT: r/{_text(info, 'subreddit')}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def shp(fields: Fields, section: DataSection) -> Iterator[Example]:
    """Stanford SHP: the comment with more votes; pairs with a ratio of votes below `min_score_ratio` are dropped."""
    replies = [_spaced(_text(fields, f"human_ref_{side}")) for side in "AB"]
    scores = [_number(fields, f"score_{side}") for side in "AB"]
    best = 1 - _zero_or_one(fields, "labels")  # 1: A is preferred
    if scores[best] < scores[1 - best]:
        raise DataError("the label prefers the reply with the lower score")
    if scores[best] < section.min_score_ratio * max(scores[1 - best], 1):  # as SHP counts: a score is at least 1
        raise DataError(f"the scores' ratio is below data.min_score_ratio {section.min_score_ratio:g}")
    yield Example(_asked(_text(fields, "history")), replies[best], replies[1 - best])


def ultrafeedback(fields: Fields, section: DataSection) -> Iterator[Example]:
    """UltraFeedback with a score for each reply: binarized (chat messages) or flat (text); ties hold no preference."""
    scores = _ultrafeedback_scores(fields)
    chosen, rejected = _number(scores, "score_chosen"), _number(scores, "score_rejected")
    if chosen == rejected:
        raise DataError("the two replies have the same score")
    if chosen < rejected:
        raise DataError("the rejected reply has the higher score")
    yield from plain_pairs(fields, section)


def _ultrafeedback_scores(fields: Fields) -> Fields:
    inside = fields.get("metadata")
    return fields if "score_chosen" in fields or not isinstance(inside, Mapping) else inside


def plain_pairs(fields: Fields, section: DataSection) -> Iterator[Example]:
    """Rows of `prompt`, `chosen`, `rejected`, each as text or as chat messages.

    Replies as messages may hold the whole dialogue (UltraFeedback); `prompt` may then be left out, and as text is not
    looked at. A prompt as text is an HH transcript where it begins like one, and otherwise the one Human turn;
    `instruction` and `input` may stand in its place.
    """
    chosen, rejected = _field(fields, "chosen"), _field(fields, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        yield Example(_prompt_of(fields), _spaced(chosen), _spaced(rejected))
        return
    head, chosen_reply = _split_messages(chosen, "chosen")
    other_head, rejected_reply = _split_messages(rejected, "rejected")
    if head != other_head:
        raise DataError("chosen and rejected answer different prompts")
    if not head:
        yield Example(_prompt_of(fields), chosen_reply, rejected_reply)
        return
    if isinstance(prompt := fields.get("prompt"), list) and head[: len(prompt)] != _messages(prompt, "prompt"):
        raise DataError("the dialogue in chosen does not begin with the prompt")
    yield Example(_message_dialogue(head), chosen_reply, rejected_reply)


ANSWERS = ("answers", "responses", "completions", "replies")
ANSWER_TEXTS, ANSWER_SCORES = ("text", "response", "content", "answer"), ("score", "overall_score", "rating")


def ranked(fields: Fields, section: DataSection) -> Iterator[Example]:
    """A prompt with k answers, the best first, or with scores, the highest best; equal scores make no pair.

    Answers are texts with a list `scores` beside them, or objects that hold their own. `data.ranked_pairs` says which
    two of them become a pair.
    """
    dialogue = _prompt_of(fields)
    name = next((name for name in ANSWERS if fields.get(name) is not None), None)
    if name is None:
        raise DataError(f"no field {ANSWERS[0]!r}")
    answers = fields[name]
    if not isinstance(answers, list) or len(answers) < 2:
        raise DataError(f"the field {name!r} does not list two or more answers")
    texts = [_spaced(_answer_text(answer, name)) for answer in answers]
    scores = _answer_scores(fields, answers, name)
    order = sorted(range(len(texts)), key=lambda place: -scores[place])
    pairs = [(better, worse) for better, worse in _which(order, section.ranked_pairs) if scores[better] > scores[worse]]
    if not pairs:
        raise DataError("all answers have the same score")
    yield from (Example(dialogue, texts[better], texts[worse]) for better, worse in pairs)


def _which(order: Sequence[int], rule: str) -> list[tuple[int, int]]:
    if rule == "adjacent":
        return list(pairwise(order))
    return list(combinations(order, 2)) if rule == "all" else [(order[0], other) for other in order[1:]]


def _answer_text(answer: Any, name: str) -> str:
    if isinstance(answer, Mapping):
        answer = next((answer[key] for key in ANSWER_TEXTS if answer.get(key) is not None), None)
    if not isinstance(answer, str):
        raise DataError(f"an answer in {name!r} is not text")
    return answer


def _answer_scores(fields: Fields, answers: Sequence[Any], name: str) -> list[float]:
    """A number for each answer, the higher the better; by place where there are no scores."""
    if fields.get("scores") is not None:
        if not isinstance(fields["scores"], list) or len(fields["scores"]) != len(answers):
            raise DataError(f"the field 'scores' does not hold a number for each of {name!r}")
        return [_number({"scores": score}, "scores") for score in fields["scores"]]
    key = next((k for k in ANSWER_SCORES if isinstance(answers[0], Mapping) and answers[0].get(k) is not None), None)
    if key is None:
        return [float(-place) for place in range(len(answers))]
    if not all(isinstance(answer, Mapping) for answer in answers):
        raise DataError(f"an answer in {name!r} has no score")
    return [_number(answer, key) for answer in answers]


def alpaca(fields: Fields, section: DataSection) -> Iterator[Example]:
    """Alpaca: `instruction`, `input` (may be empty) and `output`, a reply to learn."""
    yield Example(_instruction(fields), _spaced(_text(fields, "output")), None)


SOURCES: dict[str, Callable[[Fields, DataSection], Iterator[Example]]] = {
    "hh-rlhf": hh_rlhf,
    "summarize-from-feedback": summarize_from_feedback,
    "shp": shp,
    "ultrafeedback": ultrafeedback,
    "pairs": plain_pairs,
    "ranked": ranked,
    "alpaca": alpaca,
    "toy": hh_rlhf,
}
NEEDS = {  # for the error that not one row is usable
    "hh-rlhf": "`chosen` and `rejected` as whole transcripts (rows with a `prompt` are data.source=pairs)",
    "summarize-from-feedback": "`info`, two `summaries` and `choice`",
    "shp": "`history`, `human_ref_A`, `human_ref_B`, `labels`, `score_A` and `score_B`",
    "ultrafeedback": "`prompt`, `chosen` and `rejected`, with `score_chosen` and `score_rejected`",
    "pairs": "`prompt`, `chosen` and `rejected` (whole transcripts without a prompt are data.source=hh-rlhf)",
    "ranked": "`prompt` and `answers`, the best first or with `scores`",
    "alpaca": "`instruction` and `output`",
    "toy": "nothing",
}
PROMPT_CAPS = {"shp": 5}  # pairs of one prompt where the recipe says nothing: SHP's own advice


def recognise(fields: Fields) -> str | None:
    """The source that a row of these columns is of, if any."""
    has = fields.keys() if isinstance(fields, dict) else set(fields)
    has = {name for name in has if fields[name] is not None}
    if {"chosen", "rejected"} <= has:
        if {"score_chosen", "score_rejected"} <= _ultrafeedback_scores(fields).keys():
            return "ultrafeedback"
        transcripts = isinstance(fields["chosen"], str) and not has & {"prompt", "instruction"}
        return "hh-rlhf" if transcripts else "pairs"
    if {"info", "summaries", "choice"} <= has or {"info", "summary"} <= has:
        return "summarize-from-feedback"
    if {"history", "human_ref_A", "human_ref_B"} <= has:
        return "shp"
    if has & {*ANSWERS} and has & {"prompt", "instruction"}:
        return "ranked"
    return "alpaca" if {"instruction", "output"} <= has else None


def understand_parts(parts: Sequence[Part], source: str | None, key: str = "data.source") -> list[Part]:
    """The parts with what their rows mean: `source`, or what each first row's columns say.

    HH-RLHF's red-team file is left out beside others, and refused alone.
    """
    found, red_team = [], []
    for part in parts:
        first = None if part.source == "toy" else next(part.rows(), None)
        if first is not None and is_red_team(first.fields):
            red_team.append(part)
        else:
            means = source or part.source or (_recognised(first, key) if first else None)
            found.append(replace(part, source=means))
    if red_team and not any(found):
        raise DataError(
            f"{red_team[0].name}: HH-RLHF's red-team transcripts hold no pairs; set data.subset to harmless-base,"
            " helpful-base, helpful-online or helpful-rejection-sampled"
        )
    for part in red_team:
        log.info("%s: not read: red-team transcripts hold no pairs", part.name)
    for path, means in dict.fromkeys((part.path, part.source) for part in found if part.source) if not source else ():
        log.info("%s: %s=%s, by its columns", path, key, means)
    return found


def _recognised(row: Row, key: str) -> str:
    means = recognise(row.fields)
    if means is None:
        raise DataError(
            f"{row.file}:{row.line}: no source has the columns {', '.join(row.fields) or '(none)'};"
            f" set {key} to one of {', '.join(name for name in SOURCES if name != 'toy')}, or rename the columns"
        )
    if means == "alpaca" and key == "data.source":
        raise DataError(
            f"{row.file}:{row.line}: instruction and output are replies to learn and no pairs;"
            " write data.sft: {source: alpaca, path: …}"
        )
    return means


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


def _number(fields: Fields, name: str) -> float:
    value = _field(fields, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"the field {name!r} is not a number")
    return float(value)


def _zero_or_one(fields: Fields, name: str) -> int:
    value = _field(fields, name)
    if isinstance(value, bool) or value not in (0, 1):
        raise DataError(f"the field {name!r} is neither 0 nor 1")
    return int(value)


def _spaced(text: str) -> str:
    return text if text[:1].isspace() else " " + text


# --- prompts ---


def _asked(text: str) -> Dialogue:
    return Dialogue([Turn("Human", _spaced(text))])


def _instruction(fields: Fields) -> Dialogue:
    given = fields.get("input") or None
    if given is not None and not isinstance(given, str):
        raise DataError("the field 'input' is not text")
    return replace(_asked(_text(fields, "instruction")), input=given)


def _prompt_of(fields: Fields) -> Dialogue:
    if fields.get("prompt") is None and fields.get("instruction") is not None:
        return _instruction(fields)
    prompt = _field(fields, "prompt")
    if not isinstance(prompt, str):
        return _message_dialogue(_messages(prompt, "prompt"))
    if not prompt.startswith((HUMAN, ASSISTANT)):
        return _asked(prompt)
    turns = split_turns(prompt)
    if turns[-1].role == "Assistant" and turns.pop().text.strip():
        raise DataError("the prompt ends in the middle of an Assistant turn")
    return Dialogue(turns)


def _split_messages(messages: Any, name: str) -> tuple[list[dict], str]:
    *head, last = _messages(messages, name)
    if last["role"] != "assistant":
        raise DataError("the dialogue ends with a user turn")
    return head, _spaced(last["content"])


def _messages(messages: Any, name: str) -> list[dict]:
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"the field {name!r} is neither text nor a list of messages")
    for message in messages:
        if message.get("role") in ("tool", "function") or message.get("tool_calls"):
            raise DataError("a tool turn: only text between a user and an assistant can be trained on")
        if message.get("role") not in ("system", "user", "assistant"):
            raise DataError("a message's role is none of system, user, assistant")
        if not isinstance(message.get("content"), str):
            raise DataError("a message's content is not text")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _message_dialogue(messages: list[dict]) -> Dialogue:
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    said = messages[system is not None :]
    if any(message["role"] == "system" for message in said):
        raise DataError("a system turn stands after the first message")
    if not said or said[0]["role"] != "user" or said[-1]["role"] != "user":
        raise DataError("the prompt does not begin and end with a user turn")
    roles = {"user": "Human", "assistant": "Assistant"}
    return Dialogue([Turn(roles[message["role"]], _spaced(message["content"])) for message in said], system or None)
