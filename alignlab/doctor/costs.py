"""What training on this data will take: tokens, steps, floating-point operations, and hours; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab.errors import AlignlabError
from alignlab.recipe.arguments import TrainingContext, trl_arguments
from alignlab.recipe.fields import library_settings
from alignlab.recipe.load import Recipe, run_name
from alignlab.runs.run import Run

# Peaks of dense bfloat16 from NVIDIA's data sheets; the share that training reaches is an assumption, not a measurement
PEAK_TFLOPS = {"RTX 4090": 165, "A100": 312, "H100": 989}
UTILIZATION = 0.3


@dataclass(frozen=True)
class Rows:
    """What one pass over the training rows takes: their number, and the mean tokens of their texts."""

    count: int
    prompt: float
    chosen: float
    rejected: float = 0.0


def costs(rows: Mapping[str, Rows], recipe: Recipe, root: Path) -> dict[str, dict[str, Any]]:
    """Of each stage the steps of one process, the positions computed, the operations, and the hours they may take.

    Hours stand beside the assumption they rest on, and beside those that an earlier run of the stage under `root`
    took a step, where there is one. Raises nothing where the model's shape is not known: there are no operations then.
    """
    return {stage: _stage(stage, of, recipe, root) for stage, of in rows.items()}


def _stage(stage: str, rows: Rows, recipe: Recipe, root: Path) -> dict[str, Any]:
    defaults = {name: setting.default for name, setting in library_settings()[stage].items()}
    own = {**defaults, **trl_arguments(recipe, stage, TrainingContext(Path(), rows=rows.count))}
    per_step = own["per_device_train_batch_size"] * own["gradient_accumulation_steps"]
    # As transformers counts them: the last step of an epoch may be a short one
    steps = (
        own["max_steps"]
        if own["max_steps"] > 0
        else math.ceil(math.ceil(rows.count / per_step) * own["num_train_epochs"])
    )
    trained = steps * per_step if own["max_steps"] > 0 else rows.count * own["num_train_epochs"]
    texts = 2 * rows.prompt + rows.chosen + rows.rejected if stage == "dpo" else rows.prompt + rows.chosen
    positions = trained * texts
    return {
        "rows": rows.count,
        "rows_a_step": per_step,
        "steps": steps,
        "epochs": round(trained / max(rows.count, 1), 2),
        "tokens": round(positions),
        "tokens_with_shared_prompts": round(trained * (texts - rows.prompt)) if stage == "dpo" else round(positions),
        **_hours(stage, positions, bool(own["gradient_checkpointing"]), recipe),
        "measured": _measured(recipe, stage, steps, root),
    }


def _hours(stage: str, positions: float, checkpointing: bool, recipe: Recipe) -> dict[str, Any]:
    """Two operations a weight and position forward, twice that backward; frozen weights need no gradient of theirs.

    The rule of Kaplan et al. (arXiv 2001.08361, sec. 2.1), which leaves attention scores out. The reference's
    forward is counted as often as the policy's.
    """
    from alignlab.memory.outline import config_of, matrix_weights

    try:
        weights = matrix_weights(config_of(recipe.model), recipe.model)
    except AlignlabError as e:
        return {"operations": None, "hours": None, "why": str(e)}
    passes = 1 + (1 if recipe.model.lora else 2) + checkpointing + (stage == "dpo")
    operations = 2.0 * weights * positions * passes
    hours = {gpu: operations / (peak * 1e12 * UTILIZATION) / 3600 for gpu, peak in PEAK_TFLOPS.items()}
    return {
        "operations": operations,
        "hours": {gpu: float(f"{value:.2g}") for gpu, value in hours.items()},
        "why": f"at {UTILIZATION:.0%} of the peak of one GPU, an assumption",
    }


def _measured(recipe: Recipe, stage: str, steps: int, root: Path) -> dict[str, Any] | None:
    """Hours by the pace of the stage's own run, on the machine that it ran on."""
    run = Run(root / recipe.name / run_name(recipe, stage))
    try:
        manifest = run.manifest
    except AlignlabError:
        return None
    if not (manifest.training_seconds and manifest.steps):
        return None
    pace = manifest.training_seconds / manifest.steps
    return {"run": str(run.path), "seconds_a_step": round(pace, 2), "hours": float(f"{pace * steps / 3600:.2g}")}
