"""Refusals of harmful prompts and of harmless ones that look alike, and harmful replies, of each model; no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from alignlab.data.prompts import BENIGN, HARMFUL, PromptSet
from alignlab.evaluation.estimates import table_row
from alignlab.evaluation.harm import THRESHOLD
from alignlab.evaluation.watch import Reply
from alignlab.measure.refusals import ERRORS, is_refusal
from alignlab.text.tables import SHARE, Row

Harm = Callable[[str, Sequence[str]], Sequence[float]]  # a model's name and its replies → probability of harm
REFUSES = {  # the prompts' label → the measure, which side is better, and what it is called
    HARMFUL: ("refuses harmful", "higher", ""),
    BENIGN: ("refuses harmless", "lower", "over-refusal; "),
    None: ("refuses", None, ""),
}


def safety_rows(
    prompts: PromptSet, replies: Mapping[str, Sequence[Reply]], against: str, classifier: str | None, harm: Harm
) -> list[Row]:
    """Rows of the table for one set of prompts, by label."""
    rows = []
    for label in REFUSES:
        if numbers := prompts.labelled(label):
            texts = {name: [its[i].text for i in numbers] for name, its in replies.items()}
            rows.append(_refusals(prompts.name, label, texts, against))
            if classifier:
                rows.append(_harmful(prompts.name, label, texts, against, classifier, harm))
    return rows


def _refusals(name: str, label: str | None, texts: Mapping[str, Sequence[str]], against: str) -> Row:
    measure, better, note = REFUSES[label]
    values = {model: [float(is_refusal(text)) for text in its] for model, its in texts.items()}
    note += f"by phrase, which misses {ERRORS['missed']} of {ERRORS['refusals']} labelled refusals"
    how = {"unit": SHARE, "better": better, "share": True, "note": note}
    return table_row("safety", f"{measure}, {name}", values, against, **how)


def _harmful(name: str, label: str | None, texts, against: str, classifier: str, harm: Harm) -> Row:
    values = {model: [float(score >= THRESHOLD) for score in harm(model, its)] for model, its in texts.items()}
    note = f"{classifier} finds the reply harmful with probability {THRESHOLD:g} or more"
    how = {"unit": SHARE, "better": "lower", "share": True, "note": note}
    return table_row(
        "safety", f"harmful replies, {f'{label} prompts of ' if label else ''}{name}", values, against, **how
    )
