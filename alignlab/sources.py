"""What a raw row means: each source is one function from a row to a preference.

A row that holds none is refused with a `DataError`, whose text is the reason that is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alignlab.errors import DataError
from alignlab.format import Dialogue
from alignlab.transcript import ASSISTANT, HUMAN, Turn, split_pair, split_turns


@dataclass(frozen=True, slots=True)
class Example:
    """A preference as a source tells it; replies begin with a space, as in a transcript."""

    dialogue: Dialogue
    chosen: str
    rejected: str


def hh_rlhf(fields: Mapping[str, Any]) -> Example:
    """HH-RLHF: `chosen` and `rejected` are whole transcripts that differ in the last Assistant turn."""
    pair = split_pair(_text(fields, "chosen"), _text(fields, "rejected"))
    return Example(Dialogue(split_turns(pair.prompt)[:-1]), pair.chosen, pair.rejected)


def plain_pairs(fields: Mapping[str, Any]) -> Example:
    """Rows of `prompt`, `chosen`, `rejected`, each as text or as chat messages.

    Replies as messages may hold the whole dialogue (UltraFeedback); `prompt` may then be left out, and as text is not
    looked at. A prompt as text is an HH transcript where it begins like one, and otherwise the one Human turn.
    """
    chosen, rejected = _field(fields, "chosen"), _field(fields, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return Example(_prompt_dialogue(_field(fields, "prompt")), _spaced(chosen), _spaced(rejected))
    head, chosen_reply = _split_messages(chosen, "chosen")
    other_head, rejected_reply = _split_messages(rejected, "rejected")
    if head != other_head:
        raise DataError("chosen and rejected answer different prompts")
    if not head:
        return Example(_prompt_dialogue(_field(fields, "prompt")), chosen_reply, rejected_reply)
    if isinstance(prompt := fields.get("prompt"), list) and head[: len(prompt)] != _messages(prompt, "prompt"):
        raise DataError("the dialogue in chosen does not begin with the prompt")
    return Example(_message_dialogue(head), chosen_reply, rejected_reply)


SOURCES = {"hh-rlhf": hh_rlhf, "pairs": plain_pairs, "toy": hh_rlhf}
NEEDS = {  # for the error that not one row is usable
    "hh-rlhf": "`chosen` and `rejected` as whole transcripts (rows with a `prompt` are data.source=pairs)",
    "pairs": "`prompt`, `chosen` and `rejected` (whole transcripts without a prompt are data.source=hh-rlhf)",
    "toy": "nothing",
}


def _field(fields: Mapping[str, Any], name: str) -> Any:
    if fields.get(name) is None:
        raise DataError(f"no field {name!r}")
    return fields[name]


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = _field(fields, name)
    if not isinstance(value, str):
        raise DataError(f"the field {name!r} is not text")
    return value


def _spaced(text: str) -> str:
    return text if text[:1].isspace() else " " + text


def _prompt_dialogue(prompt: Any) -> Dialogue:
    if not isinstance(prompt, str):
        return _message_dialogue(_messages(prompt, "prompt"))
    if not prompt.startswith((HUMAN, ASSISTANT)):
        return Dialogue([Turn("Human", _spaced(prompt))])
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
