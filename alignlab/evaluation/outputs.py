"""Replies of models that are not here: files in AlpacaEval's form, an instruction and an output to a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from alignlab.data.files import read_file
from alignlab.data.layouts import find_asked, read_asked
from alignlab.data.prompts import PromptSet
from alignlab.errors import AlignlabError, DataError
from alignlab.evaluation.judge import Contest
from alignlab.measure.generate import Reply

OUTPUT = "output"


def read_outputs(file: Path) -> dict[str, str]:
    """The reply to each prompt of a file; DataError with the line of a row that has none."""
    if not file.is_file():
        raise DataError(f"{file}: no such file of outputs")
    found = {}
    for row in read_file(file):
        columns = find_asked({name: [value] for name, value in row.fields.items() if value is not None})
        if columns is None or not isinstance(row.fields.get(OUTPUT), str):
            raise DataError(
                f"{row.file}:{row.line}: a row has an instruction and an output, as AlpacaEval writes them; "
                f"this one has {', '.join(row.fields)}"
            )
        try:
            asked = read_asked(row.fields, columns)
        except AlignlabError as e:
            raise DataError(f"{row.file}:{row.line}: {e}") from e
        found["\n\n".join(filter(None, (asked.turns[-1].text.strip(), asked.input)))] = row.fields[OUTPUT]
    return found


def find_replies(
    files: Mapping[str, Path], sets: Sequence[PromptSet], tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, list[Reply]]]:
    """Set of prompts → model → its replies, where a file has one to each prompt of the set; it must be so of one."""
    found: dict[str, dict[str, list[Reply]]] = {each.name: {} for each in sets}
    for name, file in files.items():
        outputs, told = read_outputs(file), []
        for each in sets:
            asked = [_asked(prompt.transcript) for prompt in each.prompts]
            if not (missing := [text for text in asked if text not in outputs]):
                found[each.name][name] = [_reply(outputs[text], tokenizer) for text in asked]
            told.append(f"{len(missing)} of {len(asked)} prompts of {each.name}")
        if not any(name in its for its in found.values()):
            raise DataError(
                f"{file} has no output for {', and none for '.join(told)}; give the file of its prompts with --prompts"
            )
    return found


def _asked(transcript: str) -> str:
    """The user's words where a prompt holds nothing else, and the dialogue as it stands otherwise."""
    messages = Contest(transcript, "", "").messages()
    return messages[0]["content"] if len(messages) == 1 else transcript.strip()


def _reply(text: str, tokenizer: PreTrainedTokenizerBase) -> Reply:
    return Reply(tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]), text, True)
