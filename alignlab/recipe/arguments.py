"""What TRL gets: a stage's section of the recipe, and beside it the keys that alignlab owns; imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab.recipe.fields import library_settings
from alignlab.recipe.load import Recipe

EVALUATIONS = 10  # to a run, where the recipe does not say how often


@dataclass(frozen=True)
class TrainingContext:
    """What the arguments depend on besides the recipe."""

    folder: Path  # for checkpoints
    rows: int | None = None  # training rows, where they are known
    on_cpu: bool = False
    world_size: int = 1
    resuming: bool = False


def trl_arguments(recipe: Recipe, stage: str, here: TrainingContext) -> dict[str, Any]:
    """Keyword arguments of the stage's config of TRL; the second part is `rules.OWNED`, which a recipe cannot set."""
    section = getattr(recipe, stage)
    eval_steps = section.get("eval_steps") or _eval_steps(recipe, stage, here)
    prepared = {"sft": {"dataset_kwargs": {"skip_prepare_dataset": True}}, "orpo": {"remove_unused_columns": False}}
    return {
        "max_length": recipe.data.max_prompt_tokens + recipe.data.max_reply_tokens,
        "gradient_checkpointing": not here.on_cpu,
        "ddp_find_unused_parameters": False,
        "save_total_limit": 2,
        "disable_tqdm": not sys.stderr.isatty(),
        **section,
        "output_dir": str(here.folder),
        "report_to": [] if wandb_is_off() else ["wandb"],
        "use_cpu": here.on_cpu,
        "bf16": recipe.model.dtype == "bfloat16",
        "fp16": recipe.model.dtype == "float16",
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "eval_steps": eval_steps,
        "save_steps": eval_steps,
        "eval_on_start": not here.resuming,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "restore_callback_states_from_checkpoint": True,
        "dataloader_pin_memory": not here.on_cpu,
        **prepared.get(stage, {}),
    }


def wandb_is_off() -> bool:
    """Whether nothing is to be logged to wandb, by its own variable or by transformers' older one."""
    disabled = os.environ.get("WANDB_DISABLED", "").upper() in ("1", "ON", "YES", "TRUE")
    return disabled or os.environ.get("WANDB_MODE") == "disabled"


def _eval_steps(recipe: Recipe, stage: str, here: TrainingContext) -> int | None:
    """A tenth of the run, rounded to whole logging windows: a checkpoint is saved at each evaluation."""
    defaults = library_settings()[stage]
    own = {name: getattr(recipe, stage).get(name, defaults[name].default) for name in _COUNTED}
    steps = _steps(own, here)
    if steps is None or own["logging_steps"] < 1:
        return None
    return max(1, round(steps / EVALUATIONS / own["logging_steps"])) * own["logging_steps"]


_COUNTED = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
)


def _steps(own: Mapping[str, Any], here: TrainingContext) -> float | None:
    if own["max_steps"] > 0:
        return own["max_steps"]
    if here.rows is None:
        return None
    per_step = own["per_device_train_batch_size"] * own["gradient_accumulation_steps"] * here.world_size
    return here.rows * own["num_train_epochs"] / per_step
