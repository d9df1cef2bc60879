"""How a dialogue reads to a model: the prompt and reply strings, their token ids, and where a sampled reply ends.

One `Format` serves SFT, DPO, evaluation, generation and export alike. The ids are those that TRL makes of the same
strings: the tokenizer's BOS once, and behind a reply one EOS, or the token with which a chat template ends a turn.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from alignlab.data.transcript import ASSISTANT, HUMAN, Turn, join_turns, one_turn
from alignlab.data.words import Encoder, Ids, encode_whole
from alignlab.errors import DataError, ModelError
from alignlab.recipe.fields import suggest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "\x02{}\x03"  # characters that no template writes: what stands between marks is the template's own
FIXED_DAY = datetime(2024, 7, 26)  # written in place of today, so that runs agree: Llama 3.2's own default
_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_CHAT_ROLES = {"Human": "user", "Assistant": "assistant"}
_CUT_TRIES = 8  # a character is at most four bytes, each perhaps a token; doubled for odd tokenizers
_THINK, _THOUGHT = "<think>", "</think>"
_OTHER_TEMPLATE = "set model.chat_template to one that writes it"
_EMPTY_THOUGHT = re.compile(rf"{_THINK}\s*{_THOUGHT}\s*")
# Stanford Alpaca's two openings (its train.py, PROMPT_DICT)
_ALPACA = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."
_ALPACA_INPUT = ", paired with an input that provides further context"
ALPACA_HEADING = "a turn holds the heading of an Alpaca section"  # why a dialogue cannot be written so
_INSTRUCTION, _INPUT, _RESPONSE = "\n\n### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:\n"


@dataclass(frozen=True, slots=True)
class Dialogue:
    """The turns before a reply, as a transcript writes them: a turn's text begins with its space."""

    turns: Sequence[Turn]
    system: str | None = None
    input: str | None = None  # what the last Human turn is about, where a source tells it apart (Alpaca)
    tools: Sequence[Mapping[str, Any]] | None = None  # JSON schemas of functions; only chat templates can write them


@dataclass(frozen=True, slots=True)
class Writing:
    """A way of writing dialogues that needs no tokenizer."""

    prompt: Callable[[Dialogue], str]
    reply: Callable[[str], str]
    stops: tuple[str, ...]  # texts behind which a model would be speaking for the other side


def _hh_prompt(dialogue: Dialogue) -> str:
    return join_turns(_folded(dialogue).turns) + ASSISTANT


def _plain_prompt(dialogue: Dialogue) -> str:
    if len(dialogue.turns) > 1:
        raise DataError("a dialogue of several turns has no plain text; write data.format: hh or chat")
    return _folded(dialogue).turns[0].text.removeprefix(" ")


def _alpaca_prompt(dialogue: Dialogue) -> str:
    """Stanford Alpaca's sections; a system turn stands in place of its opening sentence."""
    opening = dialogue.system or _ALPACA.format(_ALPACA_INPUT if dialogue.input else "")
    headings = {"Human": _INSTRUCTION, "Assistant": _RESPONSE}
    said = "".join(headings[turn.role] + _one_section(turn.text) for turn in dialogue.turns)
    return opening + said + (_INPUT + dialogue.input if dialogue.input else "") + _RESPONSE


def _one_section(text: str) -> str:
    if any(heading.strip() in text for heading in (_INSTRUCTION, _INPUT, _RESPONSE)):
        raise DataError(ALPACA_HEADING)
    return text.removeprefix(" ")


WRITINGS = {
    "hh": Writing(_hh_prompt, one_turn, (HUMAN,)),
    "alpaca": Writing(_alpaca_prompt, _one_section, (_INSTRUCTION.rstrip(),)),
    "plain": Writing(_plain_prompt, str, ()),
}


@dataclass(frozen=True, slots=True)
class Stops:
    """Where a sampled reply ends: at the first of these tokens or texts. They are no part of what it says."""

    ids: tuple[int, ...]  # the tokenizer's EOS first
    tokens: tuple[str, ...]  # the same as the tokenizer spells them
    texts: tuple[str, ...] = ()
    opening: str = ""  # what a template writes before a reply, such as an empty thought: no part of it either

    @property
    def said(self) -> list[str]:
        """All of them as text."""
        return [*self.tokens, *self.texts]


@dataclass(frozen=True, slots=True)
class ReplyMarkers:
    """What a chat template writes around a reply; empty where a format has none."""

    opening: str = ""  # between prompt and reply
    ending: str = ""  # behind the last reply
    next_turn: str = ""  # between a reply and what the user says next


class Format:
    """One way of writing dialogues for one tokenizer; `name` is a recipe's `data.format`."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None):
        """`chat_template` is the template's text, where the tokenizer brings none or another is wanted."""
        _check_tokenizer(tokenizer)
        self.name = name
        self.tokenizer = tokenizer
        self.eos = tokenizer.eos_token
        self.chat_template = chat_template or own_template(tokenizer)
        if name == "chat" and self.chat_template is None:
            raise ModelError(
                "data.format=chat needs a chat template, and this tokenizer has none; set model.chat_template"
                " to a .jinja file, or data.format=hh"
            )
        self._fixed_template = _CLOCK.sub(lambda call: repr(FIXED_DAY.strftime(call[2])), self.chat_template or "")

    @property
    def folds_system(self) -> bool:
        """Whether a system turn goes into the first Human turn, having no place of its own."""
        return self.name in ("hh", "plain")

    def stops(self, more: Iterable[int] = ()) -> Stops:
        """Where a sampled reply ends: its format's end, the tokenizer's EOS, and `more` ids that a model ends with."""
        ends = self._ends
        tokens = self.tokenizer.convert_tokens_to_ids([end for end in ends if end in self._added_tokens])
        known = {token for token in (*more, *tokens) if token < len(self.tokenizer)}
        eos = self.tokenizer.eos_token_id
        ids = (eos, *sorted(known - {eos}))
        spelled = tuple(self.tokenizer.decode([token]) for token in ids)
        texts = tuple(end for end in ends if end not in self._added_tokens)
        return Stops(ids, spelled, texts, self.frame.opening)

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        if self.name != "chat":
            return WRITINGS[self.name].stops
        end = self._end_in(self.frame.ending) or self._end_in(self.frame.next_turn)
        return (end,) if end else ()

    def _end_in(self, written: str) -> str:
        """What ends a reply in what is written behind it: a token of its own, or the text before the first one."""
        found = [(written.index(token), -len(token), token) for token in self._added_tokens if token in written]
        start, _, token = min(found, default=(len(written), 0, ""))
        text = written[:start].rstrip()
        return text or token

    @cached_property
    def end(self) -> str:
        """The token behind a reply in training: that with which the chat template ends a turn, or else the EOS."""
        ending = self.frame.ending.rstrip()
        last = max((token for token in self._added_tokens if ending.endswith(token)), key=len, default=self.eos)
        return self.eos if self.eos in ending else last

    @property
    def learns_end(self) -> bool:
        """Whether training shows the end of a turn as the template writes it, not an EOS in its place."""
        return self.name != "chat" or bool(self._end_in(self.frame.ending))

    @cached_property
    def frame(self) -> ReplyMarkers:
        """What the chat template writes around a reply, read off a dialogue of marks."""
        reply, more = MARK.format("reply"), MARK.format("more")
        if self._marks is None:
            return ReplyMarkers()
        try:
            opening, ending = self._behind(self._marks, self.prompt(self._marks), Turn("Assistant", reply)).split(reply)
            turns = [*self._marks.turns, Turn("Assistant", reply), Turn("Human", more)]
            whole = self._render(replace(self._marks, turns=turns), add_generation_prompt=False)
        except (DataError, ValueError):  # or the reply stands there twice, or not at all
            return ReplyMarkers()
        return ReplyMarkers(opening, ending, whole.partition(reply)[2].partition(more)[0])

    @cached_property
    def _marks(self) -> Dialogue | None:
        """A dialogue of marks that the chat template takes; it may demand a system turn."""
        if self.name != "chat":
            return None
        for system in (None, MARK.format("system")):
            dialogue = Dialogue([Turn("Human", MARK.format("asked"))], system)
            with contextlib.suppress(DataError):
                self.prompt(dialogue)
                return dialogue
        return None

    @cached_property
    def can_be_trained(self) -> bool:
        """Whether the chat template itself writes a prompt in the same way before a reply, and an end behind it."""
        if self._marks is None or not self.learns_end:
            return False
        answered = replace(self._marks, turns=[*self._marks.turns, Turn("Assistant", MARK.format("reply"))])
        with contextlib.suppress(DataError):
            return self._render(answered, add_generation_prompt=False).startswith(self.prompt(self._marks))
        return False

    @cached_property
    def writes_bos(self) -> bool:
        """Whether the chat template writes the tokenizer's BOS, which is then not added again."""
        bos = self.tokenizer.bos_token
        return bool(bos and self._marks and self.prompt(self._marks).startswith(bos))

    @cached_property
    def writes_date(self) -> bool:
        """Whether a prompt holds the day's date; `FIXED_DAY` is written instead."""
        mark = MARK.format("day")
        template = _CLOCK.sub(lambda _: repr(mark), self.chat_template or "")
        return self._marks is not None and mark in self._render(
            self._marks, add_generation_prompt=True, template=template
        )

    @cached_property
    def writes_reasoning(self) -> bool:
        """Whether the reasoning of a reply reaches the model; `reply` leaves it out where it does not."""
        if self._marks is None:
            return False
        thought = MARK.format("thought")
        reply = Turn("Assistant", MARK.format("reply"), thought)
        with contextlib.suppress(DataError):
            return thought in self._behind(self._marks, self.prompt(self._marks), reply)
        return False

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer, bos=not self.writes_bos, end=self.end)

    def prompt(self, dialogue: Dialogue) -> str:
        """What the model sees before it replies."""
        if self.name != "chat":
            return WRITINGS[self.name].prompt(dialogue)
        dialogue = _with_input(dialogue)
        prompt = self._render(dialogue, add_generation_prompt=True)
        if dialogue.system and dialogue.system.strip() not in prompt:
            raise DataError(f"the chat template drops the system turn; {_OTHER_TEMPLATE}")
        if dialogue.turns[-1].text.strip() not in prompt:
            raise DataError(f"the chat template drops what the user says; {_OTHER_TEMPLATE}")
        return prompt

    def reply(self, dialogue: Dialogue, prompt: str, text: str, reasoning: str | None = None) -> str:
        """What follows the prompt when `text` is the reply, up to its `end` and without it."""
        if self.name != "chat":
            return WRITINGS[self.name].reply(text)
        turn = Turn("Assistant", text, reasoning if self.writes_reasoning else None)
        written = self._behind(_with_input(dialogue), prompt, turn)
        if any(part.strip() not in written for part in re.split(f"{_THINK}|{_THOUGHT}", text)):
            raise DataError(f"the chat template drops a part of the reply; {_OTHER_TEMPLATE}")
        return written.partition(self.end)[0]

    def _behind(self, dialogue: Dialogue, prompt: str, reply: Turn) -> str:
        """All that the chat template writes behind the prompt where this is the reply."""
        whole = self._render(replace(dialogue, turns=[*dialogue.turns, reply]), add_generation_prompt=False)
        return whole[len(prompt) :] if whole.startswith(prompt) else self._behind_thought(dialogue, prompt, reply)

    def _behind_thought(self, dialogue: Dialogue, prompt: str, reply: Turn) -> str:
        """The same where the prompt opens a thought that the template does not write before a reply.

        The reply closes it, with nothing in it where the row holds no reasoning.
        """
        thought, closed, answer = reply.text.rpartition(_THOUGHT)
        thought = thought.partition(_THINK)[2] if _THINK in thought else thought
        plain = Turn("Assistant", answer.lstrip() if closed else reply.text)
        whole = self._render(replace(dialogue, turns=[*dialogue.turns, plain]), add_generation_prompt=False)
        before, opened, blank = prompt.rpartition(_THINK)
        if not opened or blank.strip() or not whole.startswith(before):
            raise DataError("the chat template writes the prompt differently before a reply")
        rest = whole[len(before) :]
        empty = _EMPTY_THOUGHT.match(rest)
        return f"{(reply.reasoning or thought).strip()}\n{_THOUGHT}\n\n{rest[empty.end() if empty else 0 :]}"

    def bare(self, reply: str) -> str:
        """A reply without what the chat template wrote around it."""
        return reply.removeprefix(self.frame.opening).removesuffix(self.frame.ending.partition(self.end)[0])

    def prompt_ids(self, dialogue: Dialogue) -> list[int]:
        """The token ids of a prompt, BOS included: what training saw, and what generation starts from."""
        return self.encode([self.prompt(dialogue)])[0]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, with the tokenizer's BOS exactly once where it has one."""
        return encode_whole(self.tokenizer, texts, bos=not self.writes_bos)

    def cut(self, prompt: str, prompt_ids: Ids, reply: str, limit: int) -> tuple[str, list[int]]:
        """The beginning of a reply, of at most `limit` tokens and whole characters, without an EOS."""
        begins = [int(token) for token in prompt_ids]
        ids = self.encode([prompt + reply])[0][len(begins) :]
        start = 0 if self.writes_bos else begins[:1].count(self.tokenizer.bos_token_id)
        for kept in range(limit, max(limit - _CUT_TRIES, 0), -1):
            text = self.tokenizer.decode(begins[start:] + ids[:kept], clean_up_tokenization_spaces=False)
            if len(text) > len(prompt) and (prompt + reply).startswith(text):
                return text[len(prompt) :], ids[:kept]
        raise DataError("a long reply cannot be cut: its tokens do not spell the text")

    def special_token_in(self, text: str) -> str | None:
        """A token that the text spells out and that would come out as itself, or a template's end of turn."""
        if not any(start in text for start in self._special_starts):
            return None
        return next((token for token in self._special_tokens if token in text), None)

    @cached_property
    def _special_tokens(self) -> list[str]:
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        own = self._ends if self.name == "chat" else ()  # other formats refuse theirs with reasons of their own
        return sorted({*self.tokenizer.all_special_tokens, *special, *own})

    @cached_property
    def _special_starts(self) -> set[str]:
        return {token[0] for token in self._special_tokens}

    @cached_property
    def _added_tokens(self) -> set[str]:
        """Texts that are one token wherever they stand; those of white space, which some tokenizers have, are not."""
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        return {token for token in {*added, self.eos} if token.strip()}

    def _render(self, dialogue: Dialogue, add_generation_prompt: bool, template: str | None = None) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                _messages(dialogue),
                tools=list(dialogue.tools) if dialogue.tools else None,
                chat_template=template or self._fixed_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the chat template refuses the dialogue: {error}") from error


# Templates


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template that a tokenizer brings; of several with names, the one for plain dialogues."""
    found = getattr(tokenizer, "chat_template", None)
    return found.get("default", next(iter(found.values()))) if isinstance(found, dict) else found


def training_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """The template itself, or TRL's training template for it where it cannot be trained on and TRL has one."""
    if Format("chat", tokenizer, template).can_be_trained:
        return template
    from jinja2 import TemplateError
    from trl.chat_template_utils import get_training_chat_template

    brought, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        return get_training_chat_template(tokenizer) or template
    except (TemplateError, TypeError, ValueError):  # it knows no other
        return template
    finally:
        tokenizer.chat_template = brought


def with_settings(template: str, settings: Mapping[str, Any]) -> str:
    """The template with values for its variables, which hold where whoever renders it gives none."""
    for name in settings:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            near = suggest(name, set(re.findall(r"[A-Za-z_]\w+", template)))
            raise ModelError(f"model.chat_template_kwargs.{name} is nothing that the chat template reads{near}")
    given = [f"{{% if {k} is not defined %}}{{% set {k} = {v!r} %}}{{% endif %}}" for k, v in settings.items()]
    head = "".join([*given, "{{ '' }}"]) if given else ""  # a block would take a line break behind it away
    return template if template.startswith(head) else head + template


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token is None:
        raise ModelError(
            f"{tokenizer.name_or_path}: the tokenizer has no EOS token, and a reply could never end;"
            " name one as eos_token in its tokenizer_config.json"
        )
    if tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]:
        raise ModelError(
            f"{tokenizer.name_or_path}: the tokenizer ends every text with an EOS, prompts too;"
            " set add_eos_token to false in its tokenizer_config.json"
        )


def _folded(dialogue: Dialogue) -> Dialogue:
    """The dialogue with its system turn at the head of the first Human turn, and its input at the end of the last."""
    dialogue = _with_input(dialogue)
    if dialogue.system is None:
        return dialogue
    first = next(number for number, turn in enumerate(dialogue.turns) if turn.role == "Human")
    text = f" {dialogue.system}\n\n{dialogue.turns[first].text.removeprefix(' ')}"
    return Dialogue([*dialogue.turns[:first], Turn("Human", text), *dialogue.turns[first + 1 :]])


def _with_input(dialogue: Dialogue) -> Dialogue:
    if not dialogue.input:
        return dialogue
    *before, last = dialogue.turns
    return replace(dialogue, turns=[*before, Turn("Human", f"{last.text}\n\n{dialogue.input}")], input=None)


def _messages(dialogue: Dialogue) -> list[dict[str, str]]:
    system = [] if dialogue.system is None else [{"role": "system", "content": dialogue.system}]
    return system + [_message(turn) for turn in dialogue.turns]


def _message(turn: Turn) -> dict[str, str]:
    thought = {"reasoning_content": turn.reasoning} if turn.reasoning else {}
    return {"role": _CHAT_ROLES[turn.role], "content": turn.text.removeprefix(" "), **thought}
