"""A run's model as it was trained, and the same model as one set of plain weights."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alignlab.errors import MachineError, ModelError
from alignlab.models import load as models
from alignlab.models import pretrain
from alignlab.recipe.load import ModelSection, Recipe
from alignlab.runs.run import Base, Manifest, Run


@dataclass(frozen=True)
class Trained:
    """Where the weights of a finished run are: its own alone, or its adapter on those of a base."""

    run: Run
    section: ModelSection  # `name` is where the base lies here
    adapter: Path | None = None  # none: the run trained all weights
    base: str | None = None  # what others know the base by: its hub id, or where there is none its folder
    revision: str | None = None  # of that id
    is_embedded: bool = False  # the base is alignlab's own, which nobody else has

    @property
    def weights(self) -> str:
        """A hub id or folder of full weights: the base's, or the run's own."""
        return self.section.name if self.adapter else str(self.run.model)

    @property
    def is_4bit(self) -> bool:
        """Whether training saw the base in 4-bit."""
        return self.adapter is not None and self.section.load_in_4bit


def find_trained(run: Run, recipe: Recipe, base: str | None = None) -> Trained:
    """What a run's model stands on; `base` is where its base model lies if not where training found it.

    Raises ModelError where that is gone, or is another model than the one that was trained on.
    """
    if not (run.model / models.ADAPTER_FILE).is_file():
        return Trained(run, recipe.model)
    trained_on = json.loads((run.model / models.ADAPTER_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"]
    manifest = run.manifest
    recorded = _recorded(manifest, trained_on)
    is_embedded = recipe.model.name == "toy" and recorded is not None and recorded is manifest.base
    name = base or (str(pretrain.base_model(recipe.data.toy)) if is_embedded else trained_on)
    revision = recorded.revision if recorded else None
    section = replace(recipe.model, name=name, revision=revision if name == trained_on else None)
    _check_base(run, section, recorded)
    return Trained(run, section, run.model, trained_on if revision else name, revision, is_embedded)


def _recorded(manifest: Manifest, trained_on: str) -> Base | None:
    """What the manifest says of the model that the adapter was trained on."""
    base, parent = manifest.base, manifest.parent
    if base and base.name == trained_on:
        return base
    if parent and parent.weights and parent.start == trained_on:
        return Base(name=parent.start, weights=parent.weights)
    return None


def _check_base(run: Run, section: ModelSection, recorded: Base | None) -> None:
    name, remedy = section.name, "put it back, or say with --model where it lies"
    weights = recorded.weights if recorded else None
    if (weights or Path(name).is_absolute()) and not Path(name).is_dir():
        raise ModelError(f"the base model of {run.path} is gone: there is no folder {name}; {remedy}")
    if weights and models.weights_hash(Path(name)) != weights:
        raise ModelError(f"{name} is not the base model that {run.path} was trained on: its weights differ; {remedy}")
    try:
        models.load_config(section)
    except MachineError:
        raise ModelError(
            f"the base model of {run.path} is gone: {name} is neither a folder nor on this machine, and the hub cannot "
            f"be reached; {remedy}"
        ) from None


def load_trained(trained: Trained) -> PreTrainedModel | PeftModel:
    """The model as the run trained it: the base in 4-bit where it was, and the adapter on it."""
    weights = _as_trained(trained)
    if trained.adapter is None:
        return weights
    with models.loading("adapter", str(trained.adapter), trained.section):
        return PeftModel.from_pretrained(weights, str(trained.adapter))


def _as_trained(trained: Trained) -> PreTrainedModel:
    """The weights below the adapter; of a float16 run in float32 where there is no GPU to compute float16 on."""
    section = trained.section
    if section.dtype == "float16" and not torch.cuda.is_available():
        section = replace(section, dtype="float32")
    return models.load_weights(section, trained.weights)


def merge(trained: Trained, dtype: str, *, dequantized: bool = False) -> PreTrainedModel:
    """The run's model as plain weights of this dtype, on the CPU; one copy of them is in memory.

    `dequantized` takes for each 4-bit weight the values that training saw instead of those it was rounded from.
    """
    model = load_plain(trained.weights, dtype, trained.section)
    if trained.adapter is None:
        return model
    if dequantized:
        _take_rounded_weights(model, _as_trained(trained))
    with warnings.catch_warnings():
        # PEFT on an adapter of 4-bit GPT-2, whose layers were Linear and are Conv1D here
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        return PeftModel.from_pretrained(model, str(trained.adapter)).merge_and_unload()


def load_plain(name: str, dtype: str, section: ModelSection, device_map: str | None = None) -> PreTrainedModel:
    """Full weights in this dtype, whatever the recipe says about 4-bit; on the CPU unless told otherwise."""
    revision = {"revision": section.revision} if section.revision and name == section.name else {}
    how = {"trust_remote_code": section.trust_remote_code, "device_map": device_map, **revision}
    with models.loading("model", name, section):
        return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), **how)


def load_exported(folder: Path, dtype: str, trained: Trained) -> PreTrainedModel | PeftModel:
    """An exported folder as others load it; what the GPUs have no room for stays on the CPU."""
    place = "auto" if torch.cuda.is_available() else None
    if not (folder / models.ADAPTER_FILE).is_file():
        return load_plain(str(folder), dtype, trained.section, place)
    return PeftModel.from_pretrained(load_plain(trained.weights, dtype, trained.section, place), str(folder))


@torch.no_grad()
def _take_rounded_weights(model: PreTrainedModel, quantized: PreTrainedModel) -> None:
    """Puts what each 4-bit weight of `quantized` stands for in place of the same weight of `model`.

    Not `quantized.dequantize()`: that turns GPT-2's Conv1D into Linear, whose weights are the other way round.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    rounded: dict[str, Any] = {
        name: layer.weight for name, layer in quantized.named_modules() if isinstance(layer, Linear4bit)
    }
    assert rounded, "a 4-bit model has 4-bit layers"
    for name, weight in rounded.items():
        layer = model.get_submodule(name)
        values = dequantize_4bit(weight.data, weight.quant_state)
        layer.weight.copy_(values.T if isinstance(layer, Conv1D) else values)
