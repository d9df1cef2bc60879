"""How a dialogue reads to a model: the prompt and reply strings, and their token ids.

`hh` is the transcript as it stands; `chat` is the tokenizer's chat template. The ids are those that TRL makes of the
same strings: the tokenizer's BOS once, and one EOS behind a reply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignlab.errors import DataError, ModelError
from alignlab.transcript import ASSISTANT, Turn, join_turns, one_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHAT_ROLES = {"Human": "user", "Assistant": "assistant"}
_CUT_TRIES = 8  # a character is at most four bytes, each perhaps a token; doubled for odd tokenizers


@dataclass(frozen=True, slots=True)
class Dialogue:
    """The turns before a reply, as a transcript writes them: a turn's text begins with its space."""

    turns: Sequence[Turn]
    system: str | None = None


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

    def prompt(self, dialogue: Dialogue) -> str:
        """What the model sees before it replies.

        A transcript has no place for a system turn: its text opens the first Human turn that is left.
        """
        if self.name == "chat":
            return self._render(dialogue, add_generation_prompt=True)
        return join_turns(_fold_system(dialogue)) + ASSISTANT

    def reply(self, dialogue: Dialogue, prompt: str, text: str) -> str:
        """What follows the prompt when `text` is the reply, up to the EOS and without it.

        A template that writes no EOS gets one behind all that it writes.
        """
        if self.name == "hh":
            return one_turn(text)
        answered = Dialogue([*dialogue.turns, Turn("Assistant", text)], dialogue.system)
        whole = self._render(answered, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise DataError("the chat template writes the prompt differently before a reply")
        return whole[len(prompt) :].partition(self.eos)[0]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, with the tokenizer's BOS exactly once where it has one."""
        if not texts:
            return []
        return self.tokenizer(
            list(texts),
            add_special_tokens=not self._writes_bos(texts[0]),
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    def cut(self, prompt: str, prompt_ids: list[int], reply: str, limit: int) -> tuple[str, list[int]]:
        """The beginning of a reply, of at most `limit` tokens and whole characters, without an EOS."""
        ids = self.encode([prompt + reply])[0][len(prompt_ids) :]
        start = 0 if self._writes_bos(prompt) else prompt_ids[:1].count(self.tokenizer.bos_token_id)
        for kept in range(limit, max(limit - _CUT_TRIES, 0), -1):
            text = self.tokenizer.decode(prompt_ids[start:] + ids[:kept], clean_up_tokenization_spaces=False)
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
                _messages(dialogue),
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateError as error:
            raise DataError(f"the chat template refuses the dialogue: {error}") from error

    def _writes_bos(self, prompt: str) -> bool:
        return bool(self.tokenizer.bos_token) and prompt.startswith(self.tokenizer.bos_token)


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


def _fold_system(dialogue: Dialogue) -> Sequence[Turn]:
    if dialogue.system is None:
        return dialogue.turns
    first = next(number for number, turn in enumerate(dialogue.turns) if turn.role == "Human")
    text = f" {dialogue.system}\n\n{dialogue.turns[first].text.removeprefix(' ')}"
    return [*dialogue.turns[:first], Turn("Human", text), *dialogue.turns[first + 1 :]]


def _messages(dialogue: Dialogue) -> list[dict[str, str]]:
    system = [] if dialogue.system is None else [{"role": "system", "content": dialogue.system}]
    turns = [{"role": _CHAT_ROLES[turn.role], "content": turn.text.removeprefix(" ")} for turn in dialogue.turns]
    return system + turns
