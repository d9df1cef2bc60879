"""A memory plan as text: its parts, whether a GPU holds them, what to change where it does not, and the disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignlab.errors import ModelError
from alignlab.memory.plan import FLOAT32, GIB, OPTIMIZERS, STEP, Plan, plan
from alignlab.recipe.fields import library_settings
from alignlab.recipe.load import Recipe, load_recipe

GPUS = (16.0, 24.0)  # GiB
LEAST_PROMPT = 128  # tokens; a shorter prompt loses what was asked


def plan_line(recipe: Recipe, stage: str, *, cuda: bool) -> tuple[str, float | None]:
    """One line for the start of a run, and the GiB of tensors that it plans; None where no plan can be made."""
    try:
        found = plan(recipe, stage, cuda=cuda)
    except ModelError as e:
        return f"memory: {e}", None
    peak = f"peak {found.allocated / GIB:.2f} GiB of tensors planned, in {found.peak}"
    rows = f"micro-batches of {len(found.job.rows)} × {found.job.longest.length} tokens"
    whole = f"; {found.needed / GIB:.1f} GiB of GPU memory with CUDA's own" if cuda else ""
    return f"memory: {peak}{whole} ({rows})", round(found.allocated / GIB, 2)


def show_plan(found: Plan, gpus: Sequence[float]) -> str:
    """One stage's part of the page of `alignlab plan`."""
    lines = [_headline(found), *_parts(found)]
    if found.job.cuda:
        lines += [verdict(found, gpu) for gpu in gpus]
    else:
        lines.append("  a process on a CPU: no CUDA context; the libraries themselves take about 1 GiB more")
    return "\n".join(lines)


def plan_facts(plans: Sequence[Plan], gpus: Sequence[float]) -> dict[str, Any]:
    """The same as one JSON object; all sizes in GiB."""
    stages = {found.job.stage: _facts(found, gpus) for found in plans}
    return {"recipe": plans[0].job.recipe.name, "unit": "GiB", "stages": stages}


def _facts(found: Plan, gpus: Sequence[float]) -> dict[str, Any]:
    sized = lambda parts: {name: round(size / GIB, 4) for name, size in parts.items() if size}
    fits = {f"{gpu:g}": {"fits": found.fits(gpu), "change": change(found, gpu)} for gpu in gpus}
    return {
        "batch": len(found.job.rows),
        "length": found.job.longest.length,
        "device": "cuda" if found.job.cuda else "cpu",
        "resident": sized(found.resident),
        "moments": sized(found.moments),
        "peak": found.peak,
        **sized({"allocated": found.allocated, "training_step": found.step, "needed": found.needed}),
        "overhead": sized(found.overhead),
        "disk": sized(disk(found)),
        "gpus": fits if found.job.cuda else {},
    }


def verdict(found: Plan, gpu: float) -> str:
    """Whether the plan fits a GPU of `gpu` GiB, and the overrides with which it would, or a larger micro-batch."""
    left = gpu - found.needed / GIB
    if found.fits(gpu):
        more = larger_batch(found, gpu)
        return f"  --gpu {gpu:g}: fits, {left:.1f} GiB left" + (f"; so does {' '.join(more)}" if more else "")
    changes = change(found, gpu)
    remedy = f"fits with {' '.join(changes)}" if changes else "no change of batch, length or bits makes it fit"
    return f"  --gpu {gpu:g}: does not fit, {-left:.1f} GiB too much at {found.peak}; {remedy}"


def larger_batch(found: Plan, gpu: float) -> list[str]:
    """The overrides for the largest micro-batch that fits, with as many rows a step as before; [] where there is none.

    Each row adds as much as any other, so that two plans tell how many there is room for.
    """
    batch, steps = len(found.job.rows), found.job.given["gradient_accumulation_steps"]
    if steps % 2:
        return []
    twice = plan(found.job.recipe, found.job.stage, cuda=found.job.cuda, batch=2 * batch)
    times = 1
    while steps % (2 * times) == 0 and found.needed + (2 * times - 1) * (twice.needed - found.needed) <= gpu * GIB:
        times *= 2
    return _written(_micro_batch(found, batch * times, steps // times)) if times > 1 else []


def change(found: Plan, gpu: float) -> list[str] | None:
    """The overrides that make a plan fit, the cheapest first; [] where it does as it is, None where none do."""
    recipe, overrides = found.job.recipe, {}
    while not found.fits(gpu):
        remedy = next(_remedies(found), None)
        if remedy is None:
            return None
        overrides |= remedy
        kept = [each for each in recipe.overrides if each.partition("=")[0] not in overrides]
        found = plan(load_recipe(recipe.path, [*kept, *_written(overrides)]), found.job.stage, cuda=found.job.cuda)
    return _written(overrides)


def _remedies(found: Plan) -> Iterator[dict[str, Any]]:
    """What would shrink the greediest moment, that which changes no result first."""
    job, data, model = found.job, found.job.recipe.data, found.job.recipe.model
    batch, evaluated = len(job.rows), job.given["per_device_eval_batch_size"]
    if found.peak in ("sampling", "KL") and job.recipe.monitor.kl.batch_size > 1:
        yield {"monitor.kl.batch_size": job.recipe.monitor.kl.batch_size // 2}
    if found.peak == "evaluation" and evaluated > 1:
        yield {f"{job.stage}.per_device_eval_batch_size": evaluated // 2}
    if found.peak in STEP and not job.given["gradient_checkpointing"]:
        yield {f"{job.stage}.gradient_checkpointing": True}
    if found.peak in STEP and batch > 1:
        yield _micro_batch(found, batch // 2, job.given["gradient_accumulation_steps"] * 2)
    if model.lora is not None and not model.load_in_4bit:
        yield {"model.load_in_4bit": True}
    if OPTIMIZERS[job.given["optim"]] > 4 and model.lora is None:
        yield {f"{job.stage}.optim": "adamw_8bit"}
    if found.peak != "KL" and data.max_prompt_tokens // 2 >= LEAST_PROMPT:
        yield {"data.max_prompt_tokens": data.max_prompt_tokens // 2}
    if data.max_reply_tokens // 2 >= LEAST_PROMPT:
        yield {"data.max_reply_tokens": data.max_reply_tokens // 2}


def _micro_batch(found: Plan, rows: int, steps: int) -> dict[str, int]:
    stage = found.job.stage
    return {f"{stage}.per_device_train_batch_size": rows, f"{stage}.gradient_accumulation_steps": steps}


def _written(overrides: Mapping[str, Any]) -> list[str]:
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in overrides.items()]


def disk(found: Plan) -> dict[str, float]:
    """Bytes on disk; two checkpoints are kept where the recipe does not say otherwise."""
    model = found.trained * FLOAT32
    copies = 2 if found.job.has_reference_copy else 1  # PEFT saves the frozen copy beside the adapter
    width = 4 if found.job.recipe.model.dtype == "float32" else 2
    return {
        "each checkpoint": model * copies + found.resident["optimizer states"],
        "the trained model": model,
        "an export of merged weights": found.parameters * width,
    }


def _headline(found: Plan) -> str:
    job, model = found.job, found.job.recipe.model
    kind = "all weights"
    if model.lora is not None:
        rank = model.lora.get("r", library_settings()["lora"]["r"].default)
        kind = f"LoRA (r {rank}){', 4-bit' if model.load_in_4bit else ''}"
    rows = f"{len(job.rows)} {'replies' if job.stage in ('sft', 'kto') else 'pairs'} × {job.longest.length} tokens"
    steps = "with" if job.given["gradient_checkpointing"] else "without"
    return f"{job.stage} of {model.name}: {kind}, {model.dtype}, {rows}, {steps} gradient checkpointing"


def _parts(found: Plan) -> list[str]:
    rows: list[tuple[str, float]] = [("always there", sum(found.resident.values())), *_indented(found.resident)]
    for moment, size in sorted(found.moments.items(), key=lambda each: -each[1]):
        is_peak = moment == found.peak
        rows.append((f"at {moment}{'  ← peak' if is_peak else ''}", size))
        if is_peak and moment in STEP and found.job.accumulates:
            rows += _indented({"gradients among it": found.gradients})
    rows += [("tensors at the peak", found.allocated), *_indented(found.overhead)]
    if found.overhead:
        rows.append(("needed, each GPU", found.needed))
    rows.append(("of that, were no evaluation greedier, a training step", found.step))
    rows += [(f"on disk: {name}", size) for name, size in disk(found).items()]
    width = max(len(name) for name, _ in rows)
    return [f"  {name:{width}}  {size / GIB:8.3f} GiB" for name, size in rows]


def _indented(parts: Mapping[str, float]) -> list[tuple[str, float]]:
    return [(f"  {name}", size) for name, size in parts.items() if size]


def stages_of(recipe: Recipe, stage: str | None) -> tuple[str, ...]:
    """The stages that are planned: the one asked for, or both, SFT only where the recipe has one of its own."""
    return (stage,) if stage else ("dpo",) if recipe.model.start else ("sft", "dpo")
