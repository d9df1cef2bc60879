"""The chat template of an exported model: chat messages read to it as prompts did in training, token for token."""

from __future__ import annotations

import contextlib
from pathlib import Path

from alignlab.data.format import Dialogue, Format
from alignlab.data.transcript import Turn
from alignlab.data.words import encode_whole
from alignlab.errors import DataError

# Of the ways of writing that are no chat template themselves; plain text has no turns, so it has none
TEMPLATES = {name: Path(__file__).with_name(f"{name}.jinja") for name in ("hh", "alpaca")}
# A chat front end adds no BOS to what a template renders. Behind a BOS that is text, the tokenizers of Llama 2 and
# Mistral leave out the space that they put before a text, so that the template has to write it.
HEADS = ("", "{{ bos_token }}", "{{ bos_token + ' ' }}")
PROBE = "How are you?"


def chat_template(form: Format) -> str | None:
    """The template under which `apply_chat_template` gives the token ids that `form` gave in training.

    An Assistant turn may begin with a space, as a sampled HH reply does, or not: it reads the same. Where no BOS and
    no space before it makes the ids those of training, the template is as it stands; `reads_as_in_training` says so.
    """
    if form.name == "chat":
        body = form.chat_template or ""
    elif form.name in TEMPLATES:
        body = TEMPLATES[form.name].read_text(encoding="utf-8").rstrip("\n")
    else:
        return None
    return next((head + body for head in HEADS if reads_as_in_training(form, head + body)), body)


def reads_as_in_training(form: Format, template: str) -> bool:
    """Whether a chat front end with this template gives the model the token ids that training gave it."""
    for system in (None, "Be brief."):  # a template may demand a system turn
        with contextlib.suppress(DataError):
            asked = Dialogue([Turn("Human", f" {PROBE}")], system)
            rendered = Format("chat", form.tokenizer, template).prompt(asked)
            return encode_whole(form.tokenizer, [rendered], bos=False)[0] == form.prompt_ids(asked)
    return False
