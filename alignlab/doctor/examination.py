"""All that the doctor says of a recipe's data, as one JSON object: what is in it, what is wrong, what it will cost."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from alignlab.data.format import Format
from alignlab.data.prepare import Prepared, prepare_replies
from alignlab.data.prompts import as_transcript
from alignlab.data.splits import SPLITS
from alignlab.disk import write_record
from alignlab.doctor.costs import Rows, costs
from alignlab.doctor.damage import find_damage
from alignlab.doctor.description import describe
from alignlab.doctor.doubles import double_findings
from alignlab.doctor.finding import LEVELS, Finding, Shown, why_left_out
from alignlab.doctor.limits import limit_findings
from alignlab.doctor.near import near_findings
from alignlab.doctor.reading import reading_findings
from alignlab.doctor.shortcuts import find_shortcuts
from alignlab.recipe.load import Recipe
from alignlab.runs.run import EXAMINATION

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SHOWN_CHARACTERS = 300  # of a pair's texts beside a finding; the whole is at its file and line


def examine(
    prepared: Prepared,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    asked: Mapping[str, Sequence[str]] = MappingProxyType({}),
    root: Path = Path("runs"),
) -> dict[str, Any]:
    """The description, each finding with three pairs that show it (the worst come first), and what training takes.

    `asked` holds prompts to be evaluated on, by the name of their file (`alignlab.prompts.texts_of`).
    """
    began = time.perf_counter()
    form = Format(recipe.data.format, tokenizer)
    bare = before_template(prepared, form)
    shortcuts = find_shortcuts(bare)
    found = [*_findings(bare, form, asked), *shortcuts.findings]
    found.sort(key=lambda one: (LEVELS.index(one.level), not one.count))
    description = describe(prepared, recipe.data, tokenizer)
    if line := why_left_out():
        log.warning("data: %s", line)
    log.info("data: %d things looked for, in %.1f s", len(found), time.perf_counter() - began)
    return {
        **description,
        "findings": [_as_json(finding, bare) for finding in found],
        "features": [*shortcuts.features],
        "shortcuts": {"model": asdict(shortcuts.model), "longest": asdict(shortcuts.longest)},
        "costs": costs(_rows(prepared, recipe, tokenizer, description), recipe, root),
    }


def before_template(prepared: Prepared, form: Format) -> Prepared:
    """The pairs with their replies as they were before a chat template wrote its markers around them."""
    if form.name != "chat":
        return prepared

    def bare(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        replies = {name: [form.bare(text) for text in batch[name]] for name in ("chosen", "rejected") if name in batch}
        return {**batch, **replies}

    return replace(prepared, **{split: getattr(prepared, split).with_transform(bare) for split in SPLITS})


def write_examination(examination: Mapping[str, Any], folder: Path) -> Path:
    """Keeps it where the report of a run on the same data finds it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder / EXAMINATION, examination)
    return folder / EXAMINATION


def _findings(prepared: Prepared, form: Format, asked: Mapping[str, Sequence[str]]) -> Iterable[Finding]:
    transcript = partial(as_transcript, form)
    yield from limit_findings(prepared)
    yield from reading_findings(prepared, transcript)
    yield from double_findings(prepared, transcript)
    yield from near_findings(prepared, asked, transcript)
    yield from find_damage(prepared, form.name)


def _as_json(finding: Finding, prepared: Prepared) -> dict[str, Any]:
    shown = [_shown(one, prepared) for one in finding.shown]
    return {**asdict(finding), "rows": finding.count, "share": finding.share, "shown": shown}


def _shown(one: Shown, prepared: Prepared) -> dict[str, Any]:
    if not one.split:
        return {"what": one.what}
    pair = getattr(prepared, one.split)[one.number]
    texts = {name: abridged(pair[name], SHOWN_CHARACTERS) for name in ("prompt", "chosen", "rejected")}
    return {**one._asdict(), "file": prepared.files[pair["file"]], "line": pair["line"], **texts}


def abridged(text: str, most: int) -> str:
    """At most about so many characters: the beginning and the end."""
    return text if len(text) <= most else f"{text[: most // 2]} […] {text[-(most // 2) :]}"


def _rows(
    prepared: Prepared, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, description: Mapping[str, Any]
) -> dict[str, Rows]:
    """What each stage trains on; the mean lengths are those of all splits."""
    mean = {name: of["mean"] for name, of in description["tokens"].items()}
    pairs = Rows(prepared.kept["train"], mean["prompt"], mean["chosen"], mean["rejected"])
    if not recipe.data.sft.path:
        return {"sft": Rows(pairs.count, pairs.prompt, pairs.chosen), "dpo": pairs}
    replies = prepare_replies(recipe.data, tokenizer, prepared)
    prompt, chosen = (float(replies.token_counts("train", text).mean()) for text in ("prompt", "chosen"))
    return {"sft": Rows(len(replies.train), prompt, chosen), "dpo": pairs}
