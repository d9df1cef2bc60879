"""The model card of an export: what a run's directory says of it, fit to be published; imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from alignlab.data import files
from alignlab.data.format import Stops
from alignlab.recipe.load import Recipe, sections_of, write_yaml
from alignlab.reports.rows import own_rows
from alignlab.reports.verdict import verdict
from alignlab.runs.facts import RunFacts, read_run
from alignlab.runs.run import Rows, Run, read_sweep
from alignlab.runs.sweep import label_of
from alignlab.text.estimate import Estimate
from alignlab.text.safe import harmless, paths_in, publishable
from alignlab.text.tables import as_markdown, figure, markdown_cell

SOURCE = ("source", "path", "subset", "format")  # of the data
QUESTION = "How do I keep a pot of basil alive?"
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
CAUSES = {
    "exact": "The two should be the same: what is left is float32 arithmetic in another order.",
    "rounding": "What is left is the rounding of weights and activations to 16 bits.",
    "base": "Training saw the base rounded to 4 bits; this is on the base in full precision.",
}


def is_local(name: str) -> bool:
    """Whether this names something on this machine rather than on the hub."""
    return Path(name).exists() or not HUB_ID.fullmatch(name) or name.endswith(tuple(files.READERS))


@dataclass(frozen=True)
class CardFacts:
    """What the card says of an export beyond its run."""

    place: str  # where it will be loaded from: a repository, or the folder's name
    form: str
    dtype: str
    base: str | None  # hub id or folder; none where the run trained all weights
    base_is: str  # a phrase on which base the weights stand on
    weights: str  # hash of the run's own
    difference: Mapping[str, Any]
    notes: Sequence[str]
    prompt: str  # QUESTION as the model sees it
    stops: Stops
    has_template: bool


def write_card(run: Run, recipe: Recipe, made: CardFacts) -> str:
    """The text of a README.md: front matter for the hub, use, figures, data, lineage, limits and the recipe."""
    facts = read_run(run.path)
    text = _template().render(
        metadata=yaml.safe_dump(_metadata(recipe, facts, made), sort_keys=False),
        name=made.place.rpartition("/")[2],
        about=recipe.about,
        run=facts,
        verdict=str(verdict(facts)),
        question=QUESTION,
        loader="AutoPeftModelForCausalLM" if made.form == "adapter" else "AutoModelForCausalLM",
        max_new_tokens=recipe.data.max_reply_tokens,
        prompt_literal=repr(made.prompt),
        ends=" or ".join(f"`{token}`" for token in made.stops.tokens),
        stop_literals=", ".join(f"`{text!r}`" for text in made.stops.texts),
        rank=_rank(recipe),
        whole_modules=(recipe.model.lora or {}).get("modules_to_save"),
        table=_table(facts),
        evaluation=facts.evaluation,
        targets=facts.targets,
        reference=facts.manifest.reference or facts.reference_name,
        chosen=chosen_from(run),
        data=list(_data(facts.manifest.data, facts.settings)),
        lineage=_lineage(run, recipe, facts, made),
        cause=CAUSES[made.difference["cause"]],
        differences=list(difference_rows(made.difference)),
        limits=_limits(facts, made),
        recipe=(settings := write_yaml(recipe).rstrip()),
        fence="`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`{3,}", settings))]),
        versions=", ".join(f"{name} {version}" for name, version in facts.manifest.versions.items()),
        made=made,
    )
    return publishable(harmless(text), sorted(paths_in([run.manifest, sections_of(recipe), str(run.path), made.base])))


@cache
def _template():
    loader = PackageLoader("alignlab.exports", ".")
    environment = Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["cell"] = markdown_cell
    return environment.get_template("card.md.jinja")


def _metadata(recipe: Recipe, facts: RunFacts, made: CardFacts) -> dict[str, Any]:
    base = made.base or recipe.model.name
    paths = recipe.data.path if isinstance(recipe.data.path, list) else [recipe.data.path]
    paths += recipe.data.sft.path if isinstance(recipe.data.sft.path, list) else [recipe.data.sft.path]
    datasets = [path for path in dict.fromkeys(paths) if path and not is_local(path)]
    is_adapter = made.form == "adapter"
    on_hub = recipe.model.name != "toy" and not is_local(base)
    lora = ["lora"] if recipe.model.lora is not None else []
    return {
        **({"base_model": base, "base_model_relation": "adapter" if is_adapter else "finetune"} if on_hub else {}),
        **({"datasets": datasets} if datasets else {}),
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["alignlab", "trl", facts.stage, *lora],
    }


def _rank(recipe: Recipe) -> int:
    """vLLM's --max-lora-rank, which takes some powers of two only."""
    needed = (recipe.model.lora or {}).get("r", 8)
    return next((rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= needed), needed)


def _table(facts: RunFacts) -> str:
    """As `alignlab eval` measured it, else the run's own figures."""
    found = facts.evaluation
    names, rows = (found.names, found.table) if found else own_rows(facts)
    return as_markdown([row for row in rows if row.group != "accuracy by slice"], names) if rows else ""


def chosen_from(run: Run) -> str | None:
    """That the run was chosen among others, which its figures must be read with; only those that were trained count."""
    sweep = read_sweep(run.path.parent)
    if sweep is None or sweep.choice != run.path.name:
        return None
    trained = [member for member in sweep.members if member.status == "finished"]
    others = ", ".join(map(label_of, trained))
    said = f"Chosen from a sweep of {len(trained)} ({others}) as the {sweep.rule}."
    if not_trained := [label_of(member) for member in sweep.members if member not in trained]:
        said += f" Asked for, and not finished when it was chosen: {', '.join(not_trained)}."
    return said


def _data(data: Rows | None, settings: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    written = {name: json.loads(settings.get(f"data.{name}", "null")) for name in SOURCE}
    yield "source", ", ".join(f"{name} {value}" for name, value in written.items() if value)
    if data:
        kept = ", ".join(f"{count:,} {split}" for split, count in data.kept.items())
        yield "rows read", "not recorded" if data.rows is None else f"{data.rows:,}"
        yield "pairs kept", f"{sum(data.kept.values()):,} ({kept})"
        for what, reasons in (("dropped", data.dropped), ("repaired", data.repaired)):
            yield what, ", ".join(f"{count:,} {reason}" for reason, count in reasons.items()) or "none"
        yield "fingerprint of the prepared rows", str(data.fingerprint)


def _lineage(run: Run, recipe: Recipe, facts: RunFacts, made: CardFacts) -> list[str]:
    base, parent, steps = facts.manifest.base, facts.manifest.parent, []
    if base:
        mark = f"revision `{base.revision}`" if base.revision else f"weights `{base.weights}`"
        embedded = " (alignlab's embedded toy model)" if recipe.model.name == "toy" else ""
        steps.append(f"base: `{base.name}`{embedded}, {mark}")
    if parent and parent.run:
        steps.append(f"SFT: `{parent.run}`, weights `{parent.weights}`")
    elif parent:
        steps.append(f"start: `{parent.start}`")
    kept = "the last step" if facts.best_step is None else f"step {facts.best_step}"
    steps.append(f"{facts.stage.upper()}: `{run.path}`, {kept} of {facts.steps}, weights `{made.weights}`")
    return [*steps, f"this export: {made.base_is}"]


def difference_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What was measured, and its value in nats."""
    reply, shift, token = (Estimate(**found[name]) for name in ("reply", "shift", "token"))
    yield "per reply, mean absolute difference", figure(reply)
    yield "per reply, largest", f"{found['reply_most']:.2g}"
    yield "per reply, mean with its sign", figure(shift)
    yield "per token, mean absolute difference", f"{figure(token)} over {found['tokens']:,} tokens"
    yield "per token, largest", f"{found['token_most']:.2g}"


def _limits(facts: RunFacts, made: CardFacts) -> list[str]:
    """What a user must know, and above all what nobody measured."""
    limits = [f"step {warning.step}: {warning.message}" for warning in facts.warnings]
    limits += [f"alignlab eval: {warning}" for warning in (facts.evaluation.warnings if facts.evaluation else ())]
    limits += made.notes
    if facts.stage != "sft" and not facts.win_rate:
        limits.append("Whether its replies are better than the reference's was not judged.")
    return [*limits, f"Training: {facts.stop_reason}."] if facts.stop_reason else limits
