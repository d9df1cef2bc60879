"""Whatever holds a conversation → its turns: text, transcripts, messages in any usual words, messages as JSON text.

>>> read_turns([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}], "conversations")
[Turn(role='Human', text=' Hi'), Turn(role='Assistant', text=' Hello.')]
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignlab.data.transcript import ASSISTANT, HUMAN, Turn, split_turns
from alignlab.errors import DataError

SYSTEM = "System"  # a turn that only comes first, and that a Dialogue keeps apart
ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "question", "customer", "student", "usr"), "Human"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "chatbot", "ai", "model", "bing", "bard"), "Assistant"),
    **dict.fromkeys(("claude", "answer", "agent", "tutor"), "Assistant"),
    **dict.fromkeys(("system", "developer"), SYSTEM),
}
TOOL_ROLES = {"tool", "function", "ipython", "observation", "function_call", "function_response", "tool_call"}
ROLE_KEYS, CONTENT_KEYS = ("role", "from", "speaker", "author", "sender"), ("content", "value", "text", "message")
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
CALL_KEYS = ("tool_calls", "function_call")
READ_KEYS = {*ROLE_KEYS, *CONTENT_KEYS, *THOUGHT_KEYS, *CALL_KEYS}  # of a message
LISTS = ("messages", "conversations", "conversation")  # keys under which an object holds its messages
BARE_KEYS = (*CONTENT_KEYS, "full_text")  # under which an object without a role holds a text
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_PLAIN = re.compile(r"\s*(?:Human|User):")
_PLAIN_TURN = r"(Human|User|Assistant):"
_JSON_MESSAGES = re.compile(r"\s*[\[{].{0,300}?[\"'](?:role|from|content|value|messages|conversations)[\"']\s*:", re.S)


def spaced(text: str) -> str:
    """The text as a transcript has it behind a colon: it begins with white space."""
    return text if text[:1].isspace() else f" {text}"


def read_turns(value: Any, name: str) -> list[Turn]:
    """The turns of a conversation: messages in any usual words, as JSON text too, or a transcript; else a DataError."""
    if isinstance(value, str):
        turns = _json_turns(value) or split_transcript(value)
        if turns is None:
            raise DataError(f"the field {name!r} is text, and neither a transcript nor messages")
        return turns
    return [_turn(message) for message in _messages(value, name)]


def read_prompt(value: Any, name: str) -> list[Turn]:
    """The turns of a prompt; text that is neither transcript nor messages is what a person asks."""
    value = _bare_text(value)
    if not isinstance(value, str):
        turns = read_turns(value, name)
        if turns[-1].role != "Human":
            raise DataError("the prompt does not end with a user turn")
        return turns
    turns = split_transcript(value)
    if turns is None:
        return _json_turns(value) or [Turn("Human", spaced(value))]
    if turns[-1].role == "Assistant" and turns.pop().text.strip():
        raise DataError("the prompt ends in the middle of an Assistant turn")
    return turns


def read_reply(value: Any, name: str) -> list[Turn]:
    """A reply, with the turns before it where the field holds them; other text is the reply alone."""
    value = _bare_text(value)
    if isinstance(value, str):
        turns = split_turns(value) if value.startswith(HUMAN) else _json_turns(value)
        turns = turns or [Turn("Assistant", spaced(value))]
    else:
        turns = read_turns(value, name)
    if turns[-1].role != "Assistant":
        raise DataError("the dialogue ends with a user turn")
    if len(turns) > 1 and turns[-2].role == "Assistant" and not isinstance(value, str):
        raise DataError("the prompt does not end with a user turn")
    return turns


def _bare_text(value: Any) -> Any:
    """The text of an object that says no role; anything else as it is."""
    if not isinstance(value, Mapping) or _key(value, (*ROLE_KEYS, *LISTS)):
        return value
    key = _key(value, BARE_KEYS)
    return value[key] if key and isinstance(value[key], str) else value


def read_history(value: Any, name: str) -> list[Turn]:
    """Earlier turns: messages, or pairs of what a person said and the answer."""
    if isinstance(value, list) and all(_is_exchange(pair) for pair in value):
        turns = (
            Turn(role, spaced(text)) for pair in value for role, text in zip(("Human", "Assistant"), pair, strict=True)
        )
        return [turn for turn in turns if turn.text.strip()]
    return read_turns(value, name)


def _is_exchange(pair: Any) -> bool:
    is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2
    return is_pair and all(isinstance(text, str) for text in pair)


# Text


def split_transcript(text: str) -> list[Turn] | None:
    """The turns of a transcript, with or without the blank lines before them; none where the text is none."""
    text = whole_transcript(text)
    return split_turns(text) if text.startswith((HUMAN, ASSISTANT)) else None


def whole_transcript(text: str) -> str:
    """A transcript that begins with a bare `Human:` or `User:`, as HH writes it; other text as it is.

    >>> whole_transcript("Human: Hi\\nAssistant: Hello.")
    '\\n\\nHuman: Hi\\n\\nAssistant: Hello.'
    """
    if text.startswith((HUMAN, ASSISTANT)) or not _PLAIN.match(text):
        return text
    text = f"\n\n{text.lstrip()}"
    before = r"\n\n" if ASSISTANT in text else r"\n+"  # where turns have blank lines, a role behind one line is text
    return re.sub(before + _PLAIN_TURN, lambda found: f"\n\n{found[1].replace('User', 'Human')}:", text)


def is_json(text: str) -> bool:
    """Whether a text looks like messages that were stored as JSON."""
    return _JSON_MESSAGES.match(text) is not None


def _json_turns(text: str) -> list[Turn] | None:
    """The turns of messages that were stored as JSON, or as Python writes them; none where the text holds none."""
    value = read_json(text) if is_json(text) else None
    if value is None or not _are_messages(value):
        return None
    return [_turn(message) for message in _messages(value, "messages")]


def read_json(text: str) -> Any:
    """The list or object that a text spells, in JSON or in Python; none where it spells neither."""
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return value if isinstance(value, (list, dict)) else None
    return None


def _are_messages(value: Any) -> bool:
    try:
        return all(_role(message) in ROLES.keys() | TOOL_ROLES for message in _messages(value, ""))
    except DataError:
        return False


# Messages


def _messages(value: Any, name: str) -> Sequence[Mapping[str, Any]]:
    if isinstance(value, Mapping):
        inside = next((value[key] for key in LISTS if isinstance(value.get(key), list)), None)
        value = [value] if inside is None else inside
    if not isinstance(value, list) or not value or not all(isinstance(message, Mapping) for message in value):
        raise DataError(f"the field {name!r} is neither text nor a list of messages")
    return value


def _key(message: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    return next((key for key in keys if message.get(key) is not None), None)


def _role(message: Mapping[str, Any]) -> str:
    key = _key(message, ROLE_KEYS)
    return message[key].strip().lower() if key and isinstance(message[key], str) else ""


def _turn(message: Mapping[str, Any]) -> Turn:
    role = _role(message)
    if role in TOOL_ROLES or any(message.get(key) for key in CALL_KEYS):
        raise DataError("a tool turn: only text between a user and an assistant can be trained on")
    if role not in ROLES:
        raise DataError("a message's role is none of system, user, assistant")
    content, thought = _key(message, CONTENT_KEYS), _key(message, THOUGHT_KEYS)
    return Turn(
        ROLES[role],
        spaced(_content(message[content] if content else None)),
        _thought(message[thought] if thought else None),
    )


def _content(content: Any) -> str:
    """Text, or a list of parts that all are text."""
    if isinstance(content, str):
        return content
    parts = [content] if isinstance(content, Mapping) else content
    if not isinstance(parts, list) or not parts:
        raise DataError("a message's content is not text")
    return "".join(_part(part) for part in parts)


def _part(part: Any) -> str:
    if isinstance(part, Mapping):
        if part.get("type") not in _TEXT_PARTS:
            raise DataError(f"a message holds {str(part['type'])[:20]!r}: only text can be trained on")
        part = part.get("text")
    if not isinstance(part, str):
        raise DataError("a message's content is not text")
    return part


def _thought(thought: Any) -> str | None:
    return thought if isinstance(thought, str) and thought.strip() else None


def unread_keys(value: Any) -> Iterator[str]:
    """The keys of messages that hold something which `read_turns` does not look at."""
    if isinstance(value, Mapping):
        value = next((value[key] for key in LISTS if isinstance(value.get(key), list)), [value])
    if isinstance(value, list) and all(isinstance(message, Mapping) for message in value):
        for message in value:
            yield from (key for key in message.keys() - READ_KEYS if message[key] not in (None, "", [], {}))
