"""A memory plan as text: its parts, a table over batch and length, and what to change where it does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignlab.errors import ModelError, RecipeError
from alignlab.fields import library_settings
from alignlab.plan.memory import GIB, OPTIMIZERS, STEP, Part, Plan, plan
from alignlab.recipe import Recipe
from alignlab.rules import STAGES

GPUS = (16.0, 24.0)  # GiB
BATCHES = (1, 2, 4, 8)
LENGTHS = (512, 1024, 2048)
LEAST_PROMPT = 128  # tokens; a shorter prompt loses what was asked


def plan_line(recipe: Recipe, stage: str, *, cuda: bool) -> tuple[str, float | None]:
    """One line for the start of a run, and the GiB of tensors that it plans; None where no plan can be made."""
    try:
        found = plan(recipe, stage, cuda=cuda)
    except ModelError as e:
        return f"memory: {e}", None
    peak = f"peak {found.allocated / GIB:.2f} GiB of tensors planned, in {found.peak.name}"
    rows = f"micro-batches of {found.batch} × {found.length} tokens"
    whole = f"; {found.needed / GIB:.1f} GiB of GPU memory with CUDA's own" if cuda else ""
    return f"memory: {peak}{whole} ({rows})", round(found.allocated / GIB, 2)


def show_plan(recipe: Recipe, stages: Sequence[str], gpus: Sequence[float], *, cuda: bool) -> str:
    """The page of `alignlab plan`."""
    pages = []
    for stage in stages:
        found = plan(recipe, stage, cuda=cuda)
        lines = [_headline(recipe, found), *_parts(found)]
        if cuda:
            lines += ["", *_table(recipe, stage), ""]
            lines += [verdict(recipe, found, gpu) for gpu in gpus]
        else:
            lines.append("  a process on a CPU: no CUDA context; the libraries themselves take about 1 GiB more")
        pages.append("\n".join(lines))
    return "\n\n".join(pages)


def plan_facts(recipe: Recipe, stages: Sequence[str], gpus: Sequence[float], *, cuda: bool) -> dict[str, Any]:
    """The same as one JSON object; all sizes in GiB."""
    return {"recipe": recipe.name, "unit": "GiB", "stages": {s: _facts(recipe, s, gpus, cuda) for s in stages}}


def _facts(recipe: Recipe, stage: str, gpus: Sequence[float], cuda: bool) -> dict[str, Any]:
    found = plan(recipe, stage, cuda=cuda)
    sized = lambda parts: {part.name: round(part.bytes / GIB, 4) for part in parts}
    fits = {f"{gpu:g}": {"fits": found.needed <= gpu * GIB, "change": change(recipe, stage, gpu)} for gpu in gpus}
    return {
        "batch": found.batch,
        "length": found.length,
        "device": "cuda" if cuda else "cpu",
        "resident": sized(found.resident),
        "moments": {moment.name: sized(moment.parts) for moment in found.moments},
        "peak": found.peak.name,
        "allocated": round(found.allocated / GIB, 4),
        "training_step": round(found.step / GIB, 4),
        "overhead": sized(found.overhead),
        "needed": round(found.needed / GIB, 4),
        "gpus": fits if cuda else {},
    }


def show_probe(stage: str, probe: Any) -> str:
    """What two real steps took, beside what was planned for them."""
    measured, planned = probe.measured / GIB, probe.planned / GIB
    rows = f"micro-batches of {probe.plan.batch}, the longest row {probe.plan.length} tokens"
    lines = [f"{stage}: two steps, {rows}", f"  planned   {planned:8.3f} GiB of tensors, in a training step"]
    lines.append(f"  measured  {measured:8.3f} GiB ({probe.difference:+.1%})")
    if probe.reserved is None:
        lines.append("  counted after each operation on the CPU; what depends on CUDA is not compared")
    else:
        lines.append(f"  reserved  {probe.reserved / GIB:8.3f} GiB, which the allocator held")
    return "\n".join(lines)


def verdict(recipe: Recipe, found: Plan, gpu: float) -> str:
    """Whether the plan fits a GPU of `gpu` GiB, and the overrides with which it would.

    Raises RecipeError where the weights alone are larger.
    """
    if found.weights > gpu * GIB:
        raise RecipeError(
            f"--gpu {gpu:g} is smaller than the weights of {recipe.model.name} alone, {found.weights / GIB:.1f} GiB; "
            + ("take a smaller model" if found.way.in_4bit else "write model.load_in_4bit=true with a model.lora")
        )
    left = gpu - found.needed / GIB
    if left >= 0:
        return f"  --gpu {gpu:g}: fits, {left:.1f} GiB left"
    changes = change(recipe, found.stage, gpu)
    remedy = f"fits with {' '.join(changes)}" if changes else "no change of batch, length or bits makes it fit"
    return f"  --gpu {gpu:g}: does not fit, {-left:.1f} GiB too much at {found.peak.name}; {remedy}"


def change(recipe: Recipe, stage: str, gpu: float) -> list[str] | None:
    """The overrides that make a stage fit, the cheapest first; [] where it does as it is, None where none do."""
    overrides: dict[str, Any] = {}
    while True:
        found = plan(_with(recipe, overrides), stage)
        if found.needed <= gpu * GIB:
            return [f"{key}={_written(value)}" for key, value in overrides.items()]
        more = next(_remedies(_with(recipe, overrides), found), None)
        if more is None:
            return None
        overrides |= more


def _remedies(recipe: Recipe, found: Plan) -> Iterator[dict[str, Any]]:
    """What would shrink the greediest moment, that which changes no result first."""
    stage, data, kl = found.stage, recipe.data, recipe.monitor.kl
    value = lambda name: getattr(recipe, stage).get(name, library_settings()[stage][name].default)
    batch, evaluated = value("per_device_train_batch_size"), value("per_device_eval_batch_size")
    if found.peak.name in ("sampling", "KL") and kl.batch_size > 1:
        yield {"monitor.kl.batch_size": kl.batch_size // 2}
    if found.peak.name == "evaluation" and evaluated > 1:
        yield {f"{stage}.per_device_eval_batch_size": evaluated // 2}
    if found.peak.name in STEP and not found.checkpointing:
        yield {f"{stage}.gradient_checkpointing": True}
    if found.peak.name in STEP and batch > 1:
        steps = value("gradient_accumulation_steps") * 2
        yield {f"{stage}.per_device_train_batch_size": batch // 2, f"{stage}.gradient_accumulation_steps": steps}
    if recipe.model.lora is not None and not recipe.model.load_in_4bit:
        yield {"model.load_in_4bit": True}
    if OPTIMIZERS[value("optim")] > 4 and found.way.full:
        yield {f"{stage}.optim": "adamw_8bit"}
    if found.peak.name != "KL" and data.max_prompt_tokens // 2 >= LEAST_PROMPT:
        yield {"data.max_prompt_tokens": data.max_prompt_tokens // 2}
    if data.max_reply_tokens // 2 >= LEAST_PROMPT:
        yield {"data.max_reply_tokens": data.max_reply_tokens // 2}


def _with(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    for key, value in overrides.items():
        recipe = _replaced(recipe, key.split("."), value)
    return recipe


def _replaced(whole: Any, path: Sequence[str], value: Any) -> Any:
    name, *rest = path
    if isinstance(whole, Mapping):
        return {**whole, name: value}
    return dataclasses.replace(whole, **{name: _replaced(getattr(whole, name), rest, value) if rest else value})


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _rows(stage: str) -> str:
    return "replies" if stage == "sft" else "pairs"


def _headline(recipe: Recipe, found: Plan) -> str:
    way = found.way
    kind = "all weights" if way.full else f"LoRA (r {way.rank}){', 4-bit' if way.in_4bit else ''}"
    steps = "with" if found.checkpointing else "without"
    rows = f"{found.batch} {_rows(found.stage)} × {found.length} tokens"
    return f"{found.stage} of {recipe.model.name}: {kind}, {recipe.model.dtype}, {rows}, {steps} gradient checkpointing"


def _parts(found: Plan) -> list[str]:
    rows: list[tuple[str, float | None]] = [("always there", None), *_lines(found.resident)]
    for moment in sorted(found.moments, key=lambda moment: -moment.bytes):
        mark = "  ← peak" if moment is found.peak else ""
        rows.append((f"at {moment.name}{mark}", moment.bytes))
        if moment is found.peak:
            rows += _lines(moment.parts)
    rows.append(("tensors at the peak", found.allocated))
    rows += _lines(found.overhead)
    if found.overhead:
        rows.append(("needed, each GPU", found.needed))
    rows.append(("of that, were no evaluation greedier, a training step", found.step))
    width = max(len(name) for name, _ in rows)
    return [f"  {name}" if size is None else f"  {name:{width}}  {size / GIB:8.3f} GiB" for name, size in rows]


def _lines(parts: Sequence[Part]) -> list[tuple[str, float | None]]:
    return [(f"  {part.name}", part.bytes) for part in parts]


def _table(recipe: Recipe, stage: str) -> list[str]:
    """GiB needed on each GPU, over the rows in a micro-batch and the tokens of the longest."""
    head = "".join(f"{batch:>8}" for batch in BATCHES)
    lines = [f"  GiB needed, {_rows(stage)} in a micro-batch →", f"  {'tokens':>8}{head}"]
    limit = plan(recipe, stage).shape.learned_positions
    for length in LENGTHS:
        if limit and length > limit:
            continue
        sizes = [plan(recipe, stage, batch=batch, length=length).needed / GIB for batch in BATCHES]
        lines.append(f"  {length:>8}" + "".join(f"{size:8.1f}" for size in sizes))
    return lines


def stages_of(recipe: Recipe, stage: str | None) -> tuple[str, ...]:
    """The stages that are planned: the one asked for, or both, SFT only where the recipe has one of its own."""
    return (stage,) if stage else STAGES[1:] if recipe.model.start else STAGES
