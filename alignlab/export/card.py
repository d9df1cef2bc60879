"""The model card of an export: what a run's directory says of it, fit to be published; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from alignlab import files
from alignlab.estimate import is_number
from alignlab.format import Stops
from alignlab.recipe import Recipe, sections_of, write_yaml
from alignlab.report.reading import read_run, sweep_facts
from alignlab.report.verdict import number, percent, verdict
from alignlab.run import Run, read_sweep
from alignlab.text import harmless

QUESTION = "How do I keep a pot of basil alive?"
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
PATH = re.compile(r"""(?:file://|(?<![\w.:/<\[]))~?(?:/[^\s/'"`,;:()<>|]+){2,}/?""")
RESULTS = (
    ("accuracy", "accuracy of the implicit reward", True),
    ("margin", "reward margin", False),
    ("perplexity", "perplexity of chosen replies", False),
    ("reference_perplexity", "perplexity of chosen replies, reference", False),
    ("kl", "KL from the reference, nats per reply", False),
    ("reply_tokens", "tokens per reply", False),
    ("eos_rate", "replies that end by themselves", True),
)
CAUSES = {
    "exact": "The two should be the same: what is left is float32 arithmetic in another order.",
    "rounding": "What is left is the rounding of weights and activations to 16 bits.",
    "base": "Training saw the base rounded to 4 bits; this is on the base in full precision.",
}


def is_local(name: str) -> bool:
    """Whether this names something on this machine rather than on the hub."""
    return Path(name).exists() or not HUB_ID.fullmatch(name) or name.endswith(tuple(files.READERS))


def publishable(text: str, secrets: Sequence[str] = ()) -> str:
    """The text with each absolute path cut down to its last part; `secrets` are paths that stand in it for certain."""
    for path in sorted(secrets, key=len, reverse=True):
        text = text.replace(path, Path(path).name)
    return PATH.sub(lambda found: Path(found[0]).name, text)


def paths_in(tree: Any) -> set[str]:
    """The absolute paths among the values of nested mappings and lists, those with spaces in them included."""
    if is_dataclass(tree) and not isinstance(tree, type):
        return paths_in(asdict(tree))
    if isinstance(tree, Mapping):
        return set().union(*map(paths_in, tree.values()))
    if isinstance(tree, list | tuple):
        return set().union(*map(paths_in, tree))
    is_path = isinstance(tree, str) and tree.startswith(("/", "~/")) and "\n" not in tree and len(tree) > 1
    return {tree.rstrip("/")} if is_path else set()


@dataclass(frozen=True)
class Made:
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


def write_card(run: Run, recipe: Recipe, made: Made) -> str:
    """The text of a README.md: front matter for the hub, use, figures, data, lineage, limits and the recipe."""
    facts = read_run(run.path)
    text = _template().render(
        metadata=yaml.safe_dump(_metadata(recipe, facts, made), sort_keys=False),
        name=made.place.rpartition("/")[2],
        about=recipe.about,
        run=facts,
        verdict=verdict(facts),
        question=QUESTION,
        loader="AutoPeftModelForCausalLM" if made.form == "adapter" else "AutoModelForCausalLM",
        max_new_tokens=recipe.data.max_reply_tokens,
        prompt_literal=repr(made.prompt),
        ends=" or ".join(f"`{token}`" for token in made.stops.tokens),
        stop_literals=", ".join(f"`{text!r}`" for text in made.stops.texts),
        rank=_rank(recipe),
        results=list(_results(facts)),
        reference=facts["reference"] or facts["reference_name"],
        evaluation=_evaluation(facts["evaluation"]),
        chosen=_chosen(run),
        data=list(_data(facts["data"], facts["data_from"])),
        lineage=_lineage(run, recipe, facts, made),
        cause=CAUSES[made.difference["cause"]],
        differences=list(difference_rows(made.difference)),
        limits=_limits(facts, made),
        recipe=(settings := write_yaml(recipe).rstrip()),
        fence="`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`{3,}", settings))]),
        versions=", ".join(f"{name} {version}" for name, version in facts["where"]["versions"].items()),
        made=made,
    )
    return publishable(harmless(text), sorted(paths_in([run.manifest, sections_of(recipe), str(run.path), made.base])))


@cache
def _template():
    loader = PackageLoader("alignlab.export", ".")
    environment = Environment(
        loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["cell"] = lambda text: " ".join(str(text).replace("|", "\\|").split())
    return environment.get_template("card.md.jinja")


def _metadata(recipe: Recipe, facts: Mapping[str, Any], made: Made) -> dict[str, Any]:
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
        "tags": ["alignlab", "trl", facts["stage"], *lora],
    }


def _rank(recipe: Recipe) -> int:
    """vLLM's --max-lora-rank, which takes some powers of two only."""
    needed = (recipe.model.lora or {}).get("r", 8)
    return next((rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= needed), needed)


def _results(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if win_rate := facts["win_rate"]:
        judged = f", {win_rate['judge']}" if win_rate.get("judge") else ""
        yield f"win rate over {facts['versus']}{judged}", figure(win_rate, True)
    for name, label, is_share in RESULTS:
        if name in facts["test"]:
            yield label, figure(facts["test"][name], is_share)


def figure(estimate: Mapping[str, Any], is_share: bool = False) -> str:
    """`0.62 ± 0.03 (n=256)`, as far as error and n are known."""
    shown = percent if is_share else number
    error = estimate.get("stderr")
    spread = f" ± {percent(error) if is_share else f'{error:.2g}'}" if is_number(error) else ""
    return f"{shown(estimate['mean'])}{spread}" + (f" (n={estimate['n']})" if estimate.get("n") else "")


def _evaluation(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The table of eval.json, one column a model."""
    if not found or not found.get("table"):
        return None
    columns = list(dict.fromkeys(name for row in found["table"] for name in row["values"]))
    rows = []
    for row in found["table"]:
        label = f"{row['measure']}, {row['unit']}" if row.get("unit") not in ("", None, "share") else row["measure"]
        values = [row["values"].get(name) for name in columns]
        rows.append((label, [figure(value, row.get("unit") == "share") if value else "–" for value in values]))
    return {"split": found.get("split"), "judge": found.get("judge"), "columns": columns, "rows": rows}


def _chosen(run: Run) -> str | None:
    """That the run was chosen among others, which its figures must be read with."""
    sweep = read_sweep(run.path.parent)
    if sweep is None or sweep.choice != run.path.name:
        return None
    others = ", ".join(member["label"] for member in sweep_facts(sweep)["members"])
    return f"Chosen from a sweep of {len(sweep.members)} ({others}) as the {sweep.rule}."


def _data(data: Mapping[str, Any], source: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "source", ", ".join(f"{name} {value}" for name, value in source.items())
    if data:
        kept = ", ".join(f"{count:,} {split}" for split, count in data["kept"].items())
        yield "rows read", "not recorded" if data["rows"] is None else f"{data['rows']:,}"
        yield "pairs kept", f"{sum(data['kept'].values()):,} ({kept})"
        for what in ("dropped", "repaired"):
            yield what, ", ".join(f"{count:,} {reason}" for reason, count in data[what].items()) or "none"
        yield "fingerprint of the prepared rows", data["fingerprint"]


def _lineage(run: Run, recipe: Recipe, facts: Mapping[str, Any], made: Made) -> list[str]:
    manifest = run.manifest
    base, parent, steps = manifest.base, manifest.parent, []
    if base:
        mark = f"revision `{base.revision}`" if base.revision else f"weights `{base.weights}`"
        embedded = " (alignlab's embedded toy model)" if recipe.model.name == "toy" else ""
        steps.append(f"base: `{base.name}`{embedded}, {mark}")
    if parent and parent.run:
        steps.append(f"SFT: `{parent.run}`, weights `{parent.weights}`")
    elif parent:
        steps.append(f"start: `{parent.start}`")
    kept = "the last step" if manifest.best_step is None else f"step {manifest.best_step}"
    steps.append(f"{facts['stage'].upper()}: `{run.path}`, {kept} of {facts['steps']}, weights `{made.weights}`")
    return [*steps, f"this export: {made.base_is}"]


def difference_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What was measured, and its value in nats."""
    yield "per reply, mean absolute difference", figure(found["reply"])
    yield "per reply, largest", f"{found['reply_most']:.2g}"
    yield "per reply, mean with its sign", figure(found["shift"])
    yield "per token, mean absolute difference", f"{figure(found['token'])} over {found['tokens']:,} tokens"
    yield "per token, largest", f"{found['token_most']:.2g}"


def _limits(facts: Mapping[str, Any], made: Made) -> list[str]:
    """What a user must know, and above all what nobody measured."""
    limits = [f"step {w['step']}: {w['message']}" for w in facts["warnings"]] + list(made.notes)
    if not facts["win_rate"] and not facts["evaluation"]:
        limits.append("Whether its replies are better than the reference's was not judged.")
    ended = facts["stop_reason"]
    return [*limits, f"Training: {ended}."] if ended else limits
