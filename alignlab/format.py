"""How a dialogue reads to a model: the prompt and reply strings, and their token ids.

One `Format` serves SFT, DPO, evaluation, generation and export alike. The ids are those that TRL makes of the same
strings: the tokenizer's BOS once, and one EOS behind a reply.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from alignlab.errors import DataError, ModelError
from alignlab.transcript import ASSISTANT, HUMAN, Turn, join_turns, one_turn
from alignlab.words import Encoder, Ids, encode_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHAT_ROLES = {"Human": "user", "Assistant": "assistant"}
_CUT_TRIES = 8  # a character is at most four bytes, each perhaps a token; doubled for odd tokenizers
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


def stops_of(format_name: str) -> tuple[str, ...]:
    return WRITINGS[format_name].stops if format_name in WRITINGS else ()


class Format:
    """One way of writing dialogues for one tokenizer; `name` is a recipe's `data.format`."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None):
        """`chat_template` is the template's text, where the tokenizer brings none or another is wanted."""
        _check_tokenizer(tokenizer)
        self.name = name
        self.tokenizer = tokenizer
        self.eos = tokenizer.eos_token
        self.chat_template = chat_template or getattr(tokenizer, "chat_template", None)
        if name == "chat" and self.chat_template is None:
            raise ModelError(
                "data.format=chat needs a chat template, and this tokenizer has none; set model.chat_template"
                " to a .jinja file, or data.format=hh"
            )
        self._special_tokens = _special_tokens(tokenizer)
        self._special_starts = {token[0] for token in self._special_tokens}

    @property
    def folds_system(self) -> bool:
        """Whether a system turn goes into the first Human turn, having no place of its own."""
        return self.name in ("hh", "plain")

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts at which a sampled reply ends, besides its EOS."""
        return stops_of(self.name)

    @cached_property
    def writes_bos(self) -> bool:
        """Whether the chat template writes the tokenizer's BOS, which is then not added again."""
        if self.name != "chat" or not self.tokenizer.bos_token:
            return False
        for system in (None, "a"):  # a template may demand a system turn
            with contextlib.suppress(DataError):
                rendered = self._render(Dialogue([Turn("Human", " a")], system), add_generation_prompt=True)
                return rendered.startswith(self.tokenizer.bos_token)
        return False

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer, bos=not self.writes_bos)

    def prompt(self, dialogue: Dialogue) -> str:
        """What the model sees before it replies."""
        if self.name != "chat":
            return WRITINGS[self.name].prompt(dialogue)
        prompt = self._render(dialogue, add_generation_prompt=True)
        if dialogue.system and dialogue.system.strip() not in prompt:
            raise DataError("the chat template drops the system turn; set model.chat_template to one that writes it")
        return prompt

    def reply(self, dialogue: Dialogue, prompt: str, text: str, reasoning: str | None = None) -> str:
        """What follows the prompt when `text` is the reply, up to the EOS and without it.

        A template that writes no EOS gets one behind all that it writes.
        """
        if self.name != "chat":
            return WRITINGS[self.name].reply(text)
        dialogue = _with_input(dialogue)
        answered = replace(dialogue, turns=[*dialogue.turns, Turn("Assistant", text, reasoning)])
        whole = self._render(answered, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise DataError("the chat template writes the prompt differently before a reply")
        return whole[len(prompt) :].partition(self.eos)[0]

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
        """A special token that the text spells out, and that would come out as that token rather than as text."""
        if not any(start in text for start in self._special_starts):
            return None
        return next((token for token in self._special_tokens if token in text), None)

    def _render(self, dialogue: Dialogue, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                _messages(_with_input(dialogue)),
                tools=list(dialogue.tools) if dialogue.tools else None,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateError as error:
            raise DataError(f"the chat template refuses the dialogue: {error}") from error


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


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*tokenizer.all_special_tokens, *added})


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
