"""A recipe as text: the page of `alignlab show`, the lines of `alignlab list`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import yaml

from alignlab.errors import RecipeError
from alignlab.recipe.load import Recipe, sections_of
from alignlab.recipe.objectives import STAGES
from alignlab.recipe.rules import OWNED
from alignlab.recipe.written import SHIPPED, read_recipe, shown


def list_recipes() -> list[tuple[str, str, Path]]:
    """Name, description and file of each recipe that can be run; one in ./recipes hides a shipped one.

    Left out is what names no model, such as qlora-7b: others extend it. The settings themselves are not checked.
    """
    found: dict[str, tuple[str, str, Path] | None] = {}
    for path in (*sorted(Path("recipes").glob("*.yaml")), *sorted(SHIPPED.glob("*.yaml"))):
        if path.stem not in found:
            found[path.stem] = _list_recipe(path)
    return sorted(line for line in found.values() if line)


def _list_recipe(path: Path) -> tuple[str, str, Path] | None:
    try:
        written = read_recipe(path, [])
    except RecipeError as error:
        return path.stem, f"cannot be read: {error}", path
    about = written.get(("about",))
    return (path.stem, str(about.value) if about else "", path) if ("model", "name") in written else None


class ShownRecipe(Recipe):
    """A recipe that prints as `alignlab show` does."""

    def __repr__(self) -> str:
        return show_recipe(self)

    def _repr_html_(self) -> str:
        return f'<pre style="font-family: monospace; white-space: pre; overflow-x: auto">{escape(repr(self))}</pre>'


def show_recipe(recipe: Recipe) -> str:
    """Every value of the resolved recipe with the place it was written, and the values without effect."""
    lines = [f"{recipe.name}: {recipe.about}", f"from {shown(recipe.path)}"]
    for name, section in sections_of(recipe).items():
        if isinstance(section, Mapping):
            lines += ["", name, *_columns(_rows(section, name, recipe.sources))]
    if unused := without_effect(recipe):
        lines += ["", "without effect", *_columns((key, why) for key, why in unused.items())]
    if unusual := far_from_usual(recipe):
        lines += ["", "far from what is usual", *_columns((key, why) for key, why in unusual.items())]
    return "\n".join(lines)


def _rows(section: Mapping[str, Any], prefix: str, sources: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    for name, value in section.items():
        key = f"{prefix}.{name}"
        if isinstance(value, dict) and key not in sources:
            yield from _rows(value, key, sources)
        else:
            yield key, _brief(value), sources.get(key, "default")


def _brief(value: Any) -> str:
    text = " ".join(yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").split())
    return text if len(text) <= 48 else f"{text[:47]}…"


def _columns(rows: Iterator[tuple[str, ...]]) -> list[str]:
    """The rows with their columns aligned, each two spaces in."""
    table = list(rows)
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]


def show_arguments(stage: str, arguments: Mapping[str, Any], recipe: Recipe) -> str:
    """What TRL gets: each keyword argument of the stage's config, and who sets it.

    `arguments` are the final ones. A key that is neither the recipe's nor on the list of what alignlab always sets
    is one that alignlab derives, such as `max_length`.
    """

    def origin(key: str) -> str:
        why = OWNED.get(f"{stage}.{key}") or OWNED.get(key)
        return recipe.sources.get(f"{stage}.{key}") or (f"set by alignlab: {why}" if why else "set by alignlab")

    rows = ((key, _brief(_plain(value)), origin(key)) for key, value in sorted(arguments.items()))
    return "\n".join([f"{STAGES[stage].module}.{STAGES[stage].config}", *_columns(rows)])


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, list, dict, type(None))) else str(value)


def recipe_facts(recipe: Recipe, arguments: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All of both pages, as JSON can hold it; `arguments` are those that TRL gets in each stage."""
    given = {stage: {key: _plain(value) for key, value in its.items()} for stage, its in arguments.items()}
    return {
        "name": recipe.name,
        "file": shown(recipe.path),
        **sections_of(recipe),
        "sources": dict(recipe.sources),
        "without_effect": without_effect(recipe),
        "trl": given,
    }


# Learning rates that are usual for a whole model and for an adapter: alignment-handbook's Zephyr, full and QLoRA; for
# DPO of whole models the range that the course on DPO advises, and ten times it for adapters.
USUAL_RATES = {"sft": ((1e-5, 5e-5), (1e-4, 5e-4)), "dpo": ((5e-7, 5e-6), (5e-6, 5e-5))}
USUAL_BETAS = (0.01, 0.5)  # of the sigmoid loss: alignment-handbook's Zephyr, and DPO, arXiv 2305.18290, sec. 6
FAR_OFF = 10  # times above or below what is usual


def far_from_usual(recipe: Recipe) -> dict[str, str]:
    """The written values that are far from what is usual, and what that is; the toy learns at rates of its own."""
    found: dict[str, str] = {}
    for stage, usual in USUAL_RATES.items():
        adapter = recipe.model.lora is not None
        low, high = usual[adapter]
        rate = getattr(recipe, stage).get("learning_rate", low)
        if recipe.model.name != "toy" and not low / FAR_OFF <= rate <= high * FAR_OFF:
            what = "an adapter" if adapter else "a whole model"
            found[f"{stage}.learning_rate"] = f"{rate:g} is far from the usual {low:g} to {high:g} for {what}"
    low, high = USUAL_BETAS
    beta = recipe.dpo.get("beta", low)
    if recipe.dpo.get("loss_type", ["sigmoid"]) == ["sigmoid"] and not low / FAR_OFF <= beta <= high * FAR_OFF:
        found["dpo.beta"] = f"{beta:g} is far from the usual {low:g} to {high:g}; 0.2 to 0.3 is a start"
    return found


def without_effect(recipe: Recipe) -> dict[str, str]:
    """The written keys that change nothing, and why."""
    return {key: why for key, why in _idle(recipe) if key in recipe.sources}


def _idle(recipe: Recipe) -> Iterator[tuple[str, str]]:
    losses = recipe.dpo.get("loss_type", ["sigmoid"])
    if recipe.dpo.get("disable_dropout", True) and (recipe.model.lora or {}).get("lora_dropout"):
        yield "model.lora.lora_dropout", "in dpo: TRL disables dropout there, unless dpo.disable_dropout is false"
    if not {"robust", "exo_pair"} & set(losses):
        yield "dpo.label_smoothing", "only the losses robust and exo_pair use it"
    if "discopop" not in losses:
        yield "dpo.discopop_tau", "only the loss discopop uses it"
    if recipe.dpo.get("f_divergence_type") != "alpha_divergence":
        yield "dpo.f_alpha_divergence_coef", "only dpo.f_divergence_type: alpha_divergence uses it"
    yield "dpo.label_smoothing_factor", "DPO's own is label_smoothing"
    if recipe.data.source != "toy":
        yield from ((f"data.toy.{name}", "only data.source: toy uses it") for name in asdict(recipe.data.toy))
    if recipe.data.format != "chat":
        yield from (
            (f"model.{key}", "only data.format: chat uses it") for key in ("chat_template", "chat_template_kwargs")
        )
    for stage in STAGES:
        if "max_steps" in getattr(recipe, stage) and getattr(recipe, stage)["max_steps"] > 0:
            yield f"{stage}.num_train_epochs", f"{stage}.max_steps decides"
    if recipe.model.start:
        yield from ((f"sft.{name}", "model.start takes the place of the SFT run") for name in recipe.sft)
