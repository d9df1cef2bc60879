"""What a recipe will need, part by part, before it starts; imports no torch.

Weights, adapters and their optimizer states are resident; on top of them comes what the greediest moment of a run
holds: a training step's forward and backward, an evaluation, sampling, the KL, or scoring the test pairs. Bytes are
those that tensors take; a CUDA context and what the allocator loses are added where a GPU's size is the question.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from alignlab.arguments import Circumstances, trl_arguments
from alignlab.errors import ModelError
from alignlab.fields import library_settings
from alignlab.plan import layers
from alignlab.plan.layers import FLOAT32, Batch, Way
from alignlab.plan.shapes import Shape, quantized_bytes, read_shape, targeted
from alignlab.plan.tape import Walk, walk
from alignlab.recipe import ModelSection, Recipe

GIB = 2**30
SCORED_AT_ONCE = 8  # replies, where test pairs are scored (alignlab.generate.reply_logps)
CONTEXT = 0.5 * GIB  # CUDA's own, with the kernels of torch and bitsandbytes; an estimate: GPUs and drivers differ
SLACK = 0.04  # of what is not weights: an allowance for the allocator's unused blocks, not a measurement
WORKSPACE = 32 * 2**20  # cuBLAS's, which torch's allocator counts
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}

STEP = ("forward", "reference forward", "LM head backward", "layer backward", "optimizer step")

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
UNPLANNED_LORA = (
    "modules_to_save",
    "use_dora",
    "layers_to_transform",
    "rank_pattern",
    "target_parameters",
    "exclude_modules",
)


@dataclass(frozen=True)
class Part:
    name: str
    bytes: float


@dataclass(frozen=True)
class Moment:
    """One moment of a run, and what is held in it besides the resident parts."""

    name: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> float:
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True)
class Plan:
    """What one stage of a recipe needs on each device."""

    stage: str
    cuda: bool
    batch: int  # pairs or replies in a micro-batch
    length: int  # tokens of the longest row
    shape: Shape
    way: Way
    checkpointing: bool
    resident: tuple[Part, ...]
    moments: tuple[Moment, ...]

    @property
    def weights(self) -> float:
        return self.resident[0].bytes

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.bytes)

    @property
    def allocated(self) -> float:
        """Bytes of tensors at the peak: what `torch.cuda.max_memory_allocated` should say."""
        return sum(part.bytes for part in self.resident) + self.peak.bytes

    @property
    def step(self) -> float:
        """Bytes of tensors at the greediest moment of a training step, evaluations and sampling aside."""
        return sum(part.bytes for part in self.resident) + max(m.bytes for m in self.moments if m.name in STEP)

    @property
    def overhead(self) -> tuple[Part, ...]:
        if not self.cuda:
            return ()
        slack = SLACK * (self.allocated - self.weights)
        return Part("CUDA context (estimate)", CONTEXT), Part("allocator slack (allowance)", slack)

    @property
    def needed(self) -> float:
        """Bytes that the device must have."""
        return self.allocated + sum(part.bytes for part in self.overhead)


@dataclass(frozen=True)
class _Job:
    """What of a stage decides its memory."""

    stage: str
    shape: Shape
    way: Way
    checkpointing: bool
    batch: int
    eval_batch: int
    prompt: int
    reply: int
    new_tokens: int
    prompts: int  # sampled at once
    trained: float  # numbers that are trained
    state: float  # bytes of optimizer state a trained number

    def rows(self, batch: int) -> Batch:
        sequences = batch * (2 if self.stage == "dpo" else 1)
        return Batch(sequences, self.prompt + self.reply, sequences * self.reply)


def plan(
    recipe: Recipe,
    stage: str,
    *,
    cuda: bool = True,
    batch: int | None = None,
    length: int | None = None,
    shape: Shape | None = None,
) -> Plan:
    """What `stage` of the recipe needs on one GPU, or in tensors on a CPU, with the recipe's own batch and length.

    Raises ModelError where a part of the model, the adapter or the optimizer is not known. Prefix sharing and a stored
    reference are left out: a step that uses them needs less.
    """
    shape = shape or read_shape(recipe.model)
    job = _job(recipe, stage, shape, cuda)
    if batch or length:
        job = _resized(job, batch or job.batch, length or job.prompt + job.reply)
    return Plan(
        stage=stage,
        cuda=cuda,
        batch=job.batch,
        length=job.prompt + job.reply,
        shape=shape,
        way=job.way,
        checkpointing=job.checkpointing,
        resident=tuple(part for part in _resident(job, recipe.model) if part.bytes),
        moments=tuple(_moments(job)),
    )


def _resized(job: _Job, batch: int, length: int) -> _Job:
    """The same job at another batch and length; the reply keeps its share of the length."""
    reply = max(1, round(length * job.reply / (job.prompt + job.reply)))
    return dataclasses.replace(job, batch=batch, prompt=length - reply, reply=reply)


def _job(recipe: Recipe, stage: str, shape: Shape, cuda: bool) -> _Job:
    defaults = {name: of.default for name, of in library_settings()[stage].items()}
    given = {**defaults, **trl_arguments(recipe, stage, Circumstances(Path(), on_cpu=not cuda))}
    lora, model = recipe.model.lora, recipe.model
    adapted = () if lora is None else targeted(shape, lora)
    _refuse_unknown(lora, adapted, given, stage)
    rank = 0 if lora is None else lora.get("r", library_settings()["lora"]["r"].default)
    dropping = stage == "sft" or not given["disable_dropout"]
    trained = shape.layers * sum(rank * (of.inputs + of.outputs) for of in adapted) if rank else shape.parameters
    way = Way(
        cuda=cuda,
        compute=WIDTH[model.dtype],
        stored=FLOAT32 if lora is None else WIDTH[model.dtype],
        in_4bit=model.load_in_4bit,
        rank=rank,
        adapted=frozenset(of.name for of in adapted),
        lora_dropout=(lora or {}).get("lora_dropout", 0.0) if dropping else 0.0,
        dropout=shape.dropout if dropping else 0.0,
    )
    return _Job(
        stage=stage,
        shape=shape,
        way=way,
        checkpointing=bool(given["gradient_checkpointing"]),
        batch=given["per_device_train_batch_size"],
        eval_batch=given["per_device_eval_batch_size"],
        prompt=recipe.data.max_prompt_tokens,
        reply=recipe.data.max_reply_tokens,
        new_tokens=recipe.monitor.kl.max_new_tokens,
        prompts=min(recipe.monitor.kl.batch_size, recipe.monitor.kl.prompts),
        trained=trained,
        state=OPTIMIZERS[given["optim"]],
    )


def _refuse_unknown(lora: Mapping[str, Any] | None, adapted: tuple, given: Mapping[str, Any], stage: str) -> None:
    if given["optim"] not in OPTIMIZERS:
        raise ModelError(f"no memory plan: the states of {stage}.optim={given['optim']} are not known")
    if lora is None:
        return
    if unknown := [key for key in UNPLANNED_LORA if lora.get(key)]:
        raise ModelError(f"no memory plan: what model.lora.{unknown[0]}={lora[unknown[0]]!r} adds is not known")
    if not adapted:
        raise ModelError(f"model.lora.target_modules={lora.get('target_modules')!r} names no layer of this model")


# --- resident ---


def _resident(job: _Job, model: ModelSection) -> list[Part]:
    shape, way = job.shape, job.way
    whole = shape.embeddings + shape.norms + shape.biases
    if way.in_4bit:
        quantized = shape.layers * sum(quantized_bytes(of.weights) for of in shape.linears)
        parts = [
            Part("weights, 4-bit", quantized),
            Part(f"embedding, LM head and norms, {model.dtype}", whole * way.stored),
        ]
    else:
        parts = [Part(f"weights, {'float32' if way.full else model.dtype}", shape.parameters * way.stored)]
    if job.stage == "dpo" and way.full:
        parts.append(Part("reference, a second model in float32", shape.parameters * FLOAT32))
    if way.rank:
        parts.append(Part("adapter, float32", job.trained * FLOAT32))
        if job.stage == "dpo" and model.reference == "sft":
            parts.append(Part("reference, a frozen copy of the adapter", job.trained * FLOAT32))
    parts.append(Part("optimizer states", job.trained * job.state))
    return [*parts, Part("cuBLAS workspace", WORKSPACE if way.cuda else 0)]


# --- moments ---


def _moments(job: _Job) -> list[Moment]:
    gradients = Part("gradients, float32", job.trained * FLOAT32)
    found = [Moment(name, (gradients, *parts)) for name, parts in _step(job)]
    found.append(Moment("optimizer step", (gradients,)))
    found.append(_without_gradient(job, "evaluation", job.rows(job.eval_batch)))
    found.append(_sampling(job))
    if job.stage == "dpo":
        found.append(_kl(job))
    return [*found, _scoring(job)]


def _step(job: _Job) -> list[tuple[str, tuple[Part, ...]]]:
    """The moments of one micro-batch: forward, the reference's forward, backward of the LM head, of a layer."""
    shape, way, batch = job.shape, job.way, job.rows(job.batch)
    kept, layer, top = _kept(job, batch), _walk_layer(job, batch, True), _walk_head(shape, way, batch, True)
    plain = _walk_layer(job, batch, False)
    narrow = Part("autocast's copies of trained weights", _narrow_copies(job))
    between = Part("hidden states between layers" if job.checkpointing else "saved by the layers", kept)
    under = between if job.checkpointing else Part(between.name, kept - layer.saved)
    at_work = plain.forward if job.checkpointing else layer.forward
    forward = max(at_work, top.forward + (0 if job.checkpointing else layer.saved))
    named = Part("the embedding's output", 0 if job.checkpointing or way.full else _hidden(shape, way, batch))
    moments = [("forward", (under, narrow, named, Part("a layer at work", forward)))]
    if job.stage == "dpo":
        name = "the reference's own copies of weights" if way.full else "adapter's copies"
        copies = Part(name, shape.parameters * way.compute if way.full and way.mixed else 0)
        reference = _without_gradient(job, "", batch).bytes - _narrow_copies(job)
        saved = Part("saved by the LM head", top.saved)
        moments.append(("reference forward", (between, saved, copies, Part("the reference at work", reference))))
    moments.append(("LM head backward", (between, Part("LM head", top.backward))))
    at_work = layer.recompute if job.checkpointing else layer.backward
    moments.append(("layer backward", (under, Part("a layer, forward and backward", at_work))))
    return [(name, tuple(part for part in parts if part.bytes)) for name, parts in moments]


def _kept(job: _Job, batch: Batch) -> float:
    """What all layers leave for the backward: each one's input under checkpointing, else all that they saved."""
    shape, way = job.shape, job.way
    boundary = _hidden(shape, way, batch)
    if job.checkpointing:
        # PEFT has the embedding's output require a gradient, which keeps it; GPT-2 adds its positions to it
        more = boundary + batch.length * shape.hidden * way.stored if way.rank and shape.learned_positions else 0
        return _shared(shape, way, batch) + shape.layers * boundary + more
    first = _walk_layer(job, batch, True, wants_gradient=way.full).saved
    return _shared(shape, way, batch) + first + (shape.layers - 1) * _walk_layer(job, batch, True).saved


def _hidden(shape: Shape, way: Way, batch: Batch) -> float:
    return batch.positions * shape.hidden * way.stored


def _shared(shape: Shape, way: Way, batch: Batch) -> float:
    """Of all layers: the batch (ids, mask, labels), the mask of what each token sees, cosines and sines."""
    rotary = 0 if shape.learned_positions else 2 * batch.length * shape.head_size * way.stored
    return 3 * 8 * batch.positions + batch.sequences * batch.length**2 + rotary


def _narrow_copies(job: _Job) -> float:
    """Autocast keeps each trained weight's copy in the compute dtype until the forward ends."""
    weights = job.shape.linear_weights if job.way.full else job.trained
    return weights * job.way.compute if job.way.mixed else 0


def _walk_layer(job: _Job, batch: Batch, saving: bool, wants_gradient: bool = True) -> Walk:
    return _walked(job.shape, job.way, batch, saving, job.checkpointing and saving, wants_gradient)


@lru_cache(maxsize=256)
def _walked(shape: Shape, way: Way, batch: Batch, saving: bool, pinned: bool, wants_gradient: bool) -> Walk:
    if not saving:
        way = dataclasses.replace(way, cached=True, lora_dropout=0.0, dropout=0.0)
    tape, hidden, result = layers.layer(shape, way, batch)
    return walk(tape, hidden, result, saving=saving, pinned=pinned, wants_gradient=wants_gradient)


@lru_cache(maxsize=256)
def _walk_head(shape: Shape, way: Way, batch: Batch, saving: bool) -> Walk:
    tape, hidden, result = layers.head(shape, way, batch)
    return walk(tape, hidden, result, saving=saving, pinned=False)


def _without_gradient(job: _Job, name: str, batch: Batch, results: float = 0) -> Moment:
    """A forward that keeps nothing, up to its log-probabilities or to logits of `results` bytes."""
    shape, way = job.shape, job.way
    top = results or _walk_head(shape, way, batch, False).forward
    parts = (
        Part("the batch and its mask", _shared(shape, way, batch)),
        Part("the embedding's output", _hidden(shape, way, batch)),
        Part("autocast's copies of trained weights", _narrow_copies(job)),
        Part("a layer, or the LM head, at work", max(_walk_layer(job, batch, False).forward, top)),
    )
    return Moment(name, tuple(part for part in parts if part.bytes))


def _sampling(job: _Job) -> Moment:
    """`generate` on the held-out prompts: at its start the prompts pass all layers, at its end the cache is longest.

    The cache is extended layer by layer, so that one layer's keys are there twice for the moment.
    """
    shape, way = job.shape, job.way
    width = FLOAT32 if way.full else way.compute
    keys = lambda tokens: job.prompts * tokens * shape.kv_heads * shape.head_size * width
    work = _without_gradient(
        job, "", Batch(job.prompts, job.prompt, job.prompts), results=layers.logits(shape, way, job.prompts)
    )
    start = Part("cache of the prompts' keys and values", 2 * shape.layers * keys(job.prompt))
    longest = job.prompt + job.new_tokens
    end = Part("cache of keys and values", (2 * shape.layers + 1) * keys(longest))
    words = Part("logits and probabilities", 6 * job.prompts * shape.vocabulary * FLOAT32)
    moments = Moment("sampling", (start, *work.parts)), Moment("sampling", (end, words))
    return max(moments, key=lambda moment: moment.bytes)


def _kl(job: _Job) -> Moment:
    """Policy and reference logits of sampled replies in float32, their log-probabilities, and three more for the KL."""
    logits = job.prompts * (job.new_tokens + 1) * job.shape.vocabulary * FLOAT32
    return Moment(
        "KL", (Part("logits of policy and reference", 2 * logits), Part("log-probabilities and KL", 5 * logits))
    )


def _scoring(job: _Job) -> Moment:
    """The test pairs' replies, by whole logits and their log-probabilities in float32."""
    batch = Batch(SCORED_AT_ONCE, job.prompt + job.reply, SCORED_AT_ONCE * job.reply)
    rows = SCORED_AT_ONCE * (job.reply + 1)
    results = max(2 * FLOAT32 * rows * job.shape.vocabulary, layers.logits(job.shape, job.way, rows))
    return _without_gradient(job, "scoring test pairs", batch, results)
