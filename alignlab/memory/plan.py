"""What a recipe will need, part by part, before it starts.

Weights, adapters and their optimizer states are always there; on top of them comes what the greediest moment of a run
holds: a training step, an evaluation, sampling, the KL, or scoring the test pairs. Bytes are those of tensors; a CUDA
context and what the allocator loses are added where a GPU's size is the question.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from transformers import PreTrainedConfig

from alignlab.disk import cache_folder, digest, read_record, write_record
from alignlab.errors import AlignlabError, ModelError
from alignlab.memory.outline import config_of, outline, samples
from alignlab.memory.steps import Job, Row, measure
from alignlab.recipe.arguments import TrainingContext, trl_arguments
from alignlab.recipe.fields import library_settings
from alignlab.recipe.load import Recipe
from alignlab.text.estimate import is_number

GIB = 2**30
FLOAT32 = 4  # bytes
CONTEXT = 0.5 * GIB  # CUDA's own, with the kernels of torch and bitsandbytes; an estimate: GPUs and drivers differ
SLACK = 0.04  # of what is not weights: an allowance for the allocator's unused blocks, not a measurement
WORKSPACE = 32 * 2**20  # cuBLAS's, which torch's allocator counts
STEP = ("forward", "reference forward", "backward", "optimizer step")

# Bytes of state a trained number, by `optim` (transformers' OptimizerNames); 8-bit states keep a float32 maximum of
# each block of 256 (bitsandbytes.optim). Paged states are counted too, though they may move to the host.
_ADAM, _ADAM_8BIT, _ONE, _ONE_8BIT = 8, 2 + 2 * 4 / 256, 4, 1 + 4 / 256
OPTIMIZERS: Mapping[str, float] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "paged_adamw"), _ADAM),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), _ADAM_8BIT),
    **dict.fromkeys(("lion", "lion_32bit", "paged_lion_32bit", "paged_lion", "adagrad", "rmsprop"), _ONE),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), _ONE_8BIT),
    "sgd": 0,
}


@dataclass(frozen=True)
class Plan:
    """What one stage of a recipe needs on each device, in bytes."""

    job: Job
    resident: Mapping[str, float]  # what is always there, by part
    moments: Mapping[str, float]  # what is there besides at each moment
    parameters: int  # of the model without adapters
    trained: float  # numbers

    @property
    def gradients(self) -> float:
        """Bytes of gradients, which are part of a training step's moments where there are any."""
        return self.trained * FLOAT32

    @property
    def peak(self) -> str:
        return max(self.moments, key=self.moments.__getitem__)

    @property
    def allocated(self) -> float:
        """Bytes of tensors at the peak: what `torch.cuda.max_memory_allocated` should say."""
        return sum(self.resident.values()) + self.moments[self.peak]

    @property
    def step(self) -> float:
        """Bytes of tensors at the greediest moment of a training step, evaluations and sampling aside."""
        return sum(self.resident.values()) + max(size for name, size in self.moments.items() if name in STEP)

    @property
    def overhead(self) -> dict[str, float]:
        if not self.job.cuda:
            return {}
        weights = sum(size for part, size in self.resident.items() if part.startswith(("weights", "embedding")))
        return {"CUDA context (estimate)": CONTEXT, "allocator slack (allowance)": SLACK * (self.allocated - weights)}

    @property
    def needed(self) -> float:
        """Bytes that the device must have."""
        return self.allocated + sum(self.overhead.values())

    def fits(self, gpu: float) -> bool:
        """Whether a GPU of `gpu` GiB holds it."""
        return self.needed <= gpu * GIB


def plan(
    recipe: Recipe,
    stage: str,
    *,
    cuda: bool = True,
    batch: int | None = None,
    length: int | None = None,
    rows: Sequence[Row] | None = None,
    config: PreTrainedConfig | None = None,
) -> Plan:
    """What `stage` of the recipe needs on one GPU, or in tensors on a CPU, with the recipe's own batch and length.

    `rows` are those of a micro-batch, in place of `batch` rows of `length` tokens. Raises ModelError where no model can
    be made of its config, or where the states of the optimizer are not known.
    """
    defaults = {name: of.default for name, of in library_settings()[stage].items()}
    given = {**defaults, **trl_arguments(recipe, stage, TrainingContext(Path(), on_cpu=not cuda))}
    if given["optim"] not in OPTIMIZERS:
        raise ModelError(f"no memory plan: the states of {stage}.optim={given['optim']} are not known")
    rows = rows or _longest_rows(recipe, batch or given["per_device_train_batch_size"], length)
    job, config = Job(recipe, stage, cuda, given, rows), config or config_of(recipe.model)
    model, found = outline(config, recipe.model), Counter()
    for layers, times in samples(model):
        found.update({name: times * size for name, size in _measured(job, config, layers).items()})
    trained = found.pop("trained")
    moments = {name.removeprefix("at "): found.pop(name) for name in [*found] if name.startswith("at ")}
    moments["optimizer step"] = trained * FLOAT32
    resident = {**found, "optimizer states": trained * OPTIMIZERS[given["optim"]]}
    resident["cuBLAS workspace"] = WORKSPACE if cuda else 0
    return Plan(job, resident, moments, sum(weight.numel() for weight in model.parameters()), trained)


def _measured(job: Job, config: PreTrainedConfig, layers: Sequence[int]) -> Mapping[str, float]:
    """What `measure` finds, which is kept in the cache for the next start of the same run."""
    shape = {**config.to_dict(), "_name_or_path": None}
    facts = [job.facts, shape, list(layers), _code_and_versions()]
    file = cache_folder() / "plans" / f"{digest(json.loads(json.dumps(facts, default=str)))}.json"
    with contextlib.suppress(OSError, ValueError):
        if (kept := read_record(file)) and all(is_number(size) for size in kept.values()):
            return kept
    try:
        found = measure(job, config, layers)
    except AlignlabError:
        raise
    except Exception as e:  # of modelling code, which need not bear tensors without content
        name, why = job.recipe.model.name, " ".join(str(e).split())[:200]
        raise ModelError(f"no memory plan for {name}: its steps fail where no numbers are there ({why})") from e
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_record(file, found)
    return found


@cache
def _code_and_versions() -> list[str]:
    """What decides a measurement besides the recipe."""
    code = [file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py"))]
    return [digest(code), *(version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate"))]


def _longest_rows(recipe: Recipe, batch: int, length: int | None) -> list[Row]:
    """Rows as long as they may be, one but for a token: a batch of equal lengths would need no mask.

    At another length the reply keeps its share of it.
    """
    prompt, reply = recipe.data.max_prompt_tokens, recipe.data.max_reply_tokens
    if length:
        reply = max(2, round(length * reply / (prompt + reply)))
        prompt = length - reply
    return [Row(prompt, reply, reply)] * (batch - 1) + [Row(prompt, reply - (batch > 1), reply - 1)]
