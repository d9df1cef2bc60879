"""What can be trained: each stage with the config of TRL that its section holds; imports no torch."""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass
from typing import Any

from alignlab.errors import MachineError

TRL = "1.16"  # the version that this package is made for, and that has all of these


@dataclass(frozen=True)
class Stage:
    about: str  # in `--help`
    module: str  # of TRL
    config: str
    from_sft: bool = False  # or from the base model
    takes_labels: bool = False  # single replies that are called good or bad, as well as pairs


STAGES = {
    "sft": Stage("supervised fine-tuning", "trl", "SFTConfig", takes_labels=True),
    "dpo": Stage("DPO from the SFT run, trained first if missing", "trl", "DPOConfig", from_sft=True),
    "kto": Stage(
        "KTO from the SFT run: learns from thumbs, or from pairs taken apart",
        "trl",
        "KTOConfig",
        from_sft=True,
        takes_labels=True,
    ),
    "orpo": Stage("ORPO from the base model: SFT and preferences in one stage", "trl.experimental.orpo", "ORPOConfig"),
}
# What `dpo.loss_type` is asked for and is no loss of DPO's → what it is
OBJECTIVES = {
    "kto": "KTO is a trainer of its own: alignlab kto, with its settings under kto:",
    "orpo": "ORPO is a trainer of its own: alignlab orpo, with its settings under orpo:",
    "simpo": "SimPO is a loss of TRL's CPOTrainer (trl.experimental.cpo, loss_type simpo), which alignlab does not run",
    "cpo": "CPO is a trainer of its own in TRL (trl.experimental.cpo), which alignlab does not run",
}


def config_class(stage: str) -> Any:
    """TRL's config of a stage; MachineError where the installed TRL has it no longer."""
    of = STAGES[stage]
    try:
        return getattr(importlib.import_module(of.module), of.config)
    except (ImportError, AttributeError) as e:
        installed = importlib.metadata.version("trl")
        raise MachineError(
            f"{stage}: TRL {installed} has no {of.module}.{of.config}; TRL {TRL} has it: pip install 'trl=={TRL}.*'"
        ) from e
