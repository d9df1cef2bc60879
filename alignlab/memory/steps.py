"""A stage's real steps on fake tensors, with some of the model's layers, and the bytes that each moment holds."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model, use_adapter

from alignlab.errors import ModelError
from alignlab.measure.formulas import kl_per_reply
from alignlab.measure.generate import reply_logits, reply_logps
from alignlab.memory.fakes import Fakes, as_on_cuda, held_tensors
from alignlab.memory.outline import fill, keep_layers, outline, own_tables, quantize
from alignlab.models import load as models
from alignlab.models.packing import bare_model, decide, scored_positions_only, share_prefixes
from alignlab.recipe.load import Recipe
from alignlab.recipe.objectives import STAGES

AT_ONCE = 8  # replies are scored, where test pairs are (alignlab.generate.reply_logps)


class Row(NamedTuple):
    """The tokens of one pair; SFT reads the prompt and the chosen reply."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def length(self) -> int:
        return self.prompt + max(self.chosen, self.rejected)


# Settings of TRL that take no memory, so that the members of a sweep share a plan
WITHOUT_SIZE = (
    *("output_dir", "disable_tqdm", "report_to", "beta", "seed", "learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("logging_steps", "eval_steps", "save_steps", "eval_on_start"),
)


@dataclass(frozen=True)
class Job:
    """A stage of a recipe, on what device, and the rows of a micro-batch."""

    recipe: Recipe
    stage: str
    cuda: bool
    given: Mapping[str, Any]  # all that TRL gets, its own defaults included
    rows: Sequence[Row]

    @property
    def facts(self) -> list[Any]:
        """All that decides what is measured."""
        given = {name: value for name, value in self.given.items() if name not in WITHOUT_SIZE}
        model = {**asdict(self.recipe.model), "name": None}
        return [self.stage, self.cuda, given, self.rows, model, asdict(self.recipe.monitor.kl)]

    @property
    def longest(self) -> Row:
        return max(self.rows, key=lambda row: row.length)

    @property
    def accumulates(self) -> bool:
        """Whether the gradients of earlier micro-batches are there."""
        return self.given["gradient_accumulation_steps"] > 1

    @property
    def has_reference_copy(self) -> bool:
        """Whether the reference is a frozen copy of the adapter."""
        model = self.recipe.model
        return STAGES[self.stage].from_sft and model.lora is not None and model.reference == "sft"

    @property
    def scores_online(self) -> bool:
        """Whether the reference may score pairs while the policy trains on them.

        A DPO run over all of its pairs has its log-probabilities stored before (`alignlab.reference.worth_storing`).
        """
        is_short = self.given["max_steps"] > 0 or self.given["num_train_epochs"] < 1
        return self.stage == "kto" or (self.stage == "dpo" and is_short)


def measure(job: Job, config: PreTrainedConfig, layers: Sequence[int]) -> Counter[str]:
    """Bytes with these layers only: of each part, and `at MOMENT` beside the parts; and the `trained` numbers."""
    policy, second = _policy(job, config, layers), _second_model(job, config, layers)
    tables = own_tables() if job.recipe.model.load_in_4bit else contextlib.nullcontext()
    with tables, _as_trained(job), Fakes() as meter:
        for model in filter(None, (policy, second)):
            fill(model)
        found = _parts_of(policy, job)
        if second is not None:
            found["reference, a second model in float32"] = meter.now - found.total()
        parts = found.total()
        _Steps(job, policy, second, meter).run()
        found.update({f"at {moment}": size - parts for moment, size in meter.peaks.items() if moment})
        found["trained"] = sum(weight.numel() for weight in policy.parameters() if weight.requires_grad)
    return found


def _as_trained(job: Job) -> contextlib.AbstractContextManager:
    """What TRL's LM head does on this device, as the trainer has it."""
    if job.cuda:
        return as_on_cuda()
    return scored_positions_only(torch.device("cpu")) if job.stage == "sft" else contextlib.nullcontext()


def _policy(job: Job, config: PreTrainedConfig, layers: Sequence[int]) -> nn.Module:
    """The model that is trained, as `model.load_policy` and TRL's trainers make it."""
    section = job.recipe.model
    model = outline(config, section)
    keep_layers(model, layers)
    if section.load_in_4bit:
        quantize(model, section)
    if job.given["gradient_checkpointing"]:
        _checkpoint(model, job.stage)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    if section.lora is None:
        return model
    with torch.device("meta"):
        policy = models.add_adapter(model, section)
        if job.has_reference_copy:
            policy.add_adapter("ref", policy.peft_config["default"])
    if job.given["gradient_checkpointing"]:
        policy.enable_input_require_grads()
    return policy


def _checkpoint(model: PreTrainedModel, stage: str) -> None:
    try:
        model.activation_checkpointing_enable()
    except ValueError as e:
        key = f"{stage}.gradient_checkpointing"
        raise ModelError(f"{type(model).__name__} has no gradient checkpointing; set {key}=false") from e


def _second_model(job: Job, config: PreTrainedConfig, layers: Sequence[int]) -> nn.Module | None:
    """The reference, or what ORPO is measured from, where no adapter makes it needless."""
    if job.stage == "sft" or job.recipe.model.lora is not None:
        return None
    model = outline(config, job.recipe.model).eval().requires_grad_(False)
    keep_layers(model, layers)
    add_fused_lm_head(model)
    return model


def _parts_of(policy: nn.Module, job: Job) -> Counter[str]:
    """Bytes of the policy's parameters and buffers, by part."""
    section = job.recipe.model
    rest = "embedding, LM head and norms, " if section.load_in_4bit else "weights, "
    rest += "float32" if section.lora is None else section.dtype
    sizes = Counter({rest: sum(buffer.nbytes for buffer in policy.buffers())})
    for name, weight in policy.named_parameters():
        part = rest
        if hasattr(weight, "quant_state"):
            part = "weights, 4-bit"
        elif ".ref." in name:
            part = "reference, a frozen copy of the adapter"
        elif weight.requires_grad and section.lora is not None:
            part = "adapter, float32"
        sizes[part] += sum(tensor.nbytes for tensor in held_tensors(weight))
    return sizes


class _Steps:
    """What a run does with its models, one moment after the other."""

    def __init__(self, job: Job, policy: nn.Module, second: nn.Module | None, meter: Fakes):
        self.job, self.policy, self.second, self.meter = job, policy, second, meter
        section, bare = job.recipe.model, bare_model(policy)
        for model in filter(None, (policy, second) if job.given.get("disable_dropout") else ()):
            disable_dropout_in_model(model)
        self.router = _asks_router(bare, job.given.get("router_aux_loss_coef"))
        shares, _ = decide(section.prefix_sharing, policy, "cuda" if job.cuda else "cpu", bool(self.router))
        self.shares = shares and job.stage == "dpo"
        for model in filter(None, (bare, second) if self.shares else ()):
            share_prefixes(model)
        for model in filter(None, (policy, second)):  # as accelerate does
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=section.dtype != "float32")
            model.forward = convert_outputs_to_fp32(autocast(model.forward))

    def run(self) -> None:
        self.policy.eval()
        with torch.no_grad():
            if self.shares:
                self._score(self.job.rows[-1:])  # the first batch is computed both ways
            self.meter.enter("evaluation")
            self._score([self.job.longest] * self.job.given["per_device_eval_batch_size"])
            if not self.shares:
                self.meter.enter("scoring test pairs")
                reply_logps(self.policy, *self._texts(AT_ONCE, self.job.longest.chosen), pad=0, batch_size=AT_ONCE)
            self._sample()
        self.meter.enter("")
        self._train()

    def _score(self, rows: Sequence[Row]) -> None:
        batch = _batch(rows, self.job.stage)
        output = self.policy(**batch, **self.router)
        if self.job.scores_online:
            with self._reference() as reference:
                reference(**batch)
        del output

    def _sample(self) -> None:
        """Replies to held-out prompts, at the first token and at the last, when the cache is longest; and their KL."""
        kl, prompt = self.job.recipe.monitor.kl, self.job.longest.prompt
        rows = min(kl.batch_size, kl.prompts)
        self._generate(rows, prompt)
        self._generate(rows, prompt + kl.max_new_tokens - 2)
        if self.job.stage != "sft":
            self.meter.enter("KL")
            texts = self._texts(rows, kl.max_new_tokens)
            ours, _, mask = reply_logits(self.policy, *texts, pad=0)
            with self._reference() as reference:
                theirs, _, _ = reply_logits(reference, *texts, pad=0)
            kl_per_reply(ours, theirs, mask)

    def _generate(self, rows: int, tokens: int) -> None:
        """Two tokens more; that `tokens` pass all layers at once counts only where they are the prompt."""

        def name_moment(_module: nn.Module, _args: tuple, given: dict[str, Any]) -> None:
            counts = given["input_ids"].shape[1] in (1, self.job.longest.prompt)
            self.meter.enter("sampling" if counts else "")

        ids = torch.zeros(rows, tokens, dtype=torch.long)
        how = GenerationConfig(max_new_tokens=2, do_sample=True, top_k=0, pad_token_id=0, eos_token_id=None)
        hook = bare_model(self.policy).register_forward_pre_hook(name_moment, with_kwargs=True)
        self.policy.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)
        hook.remove()

    def _texts(self, count: int, tokens: int) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts, and replies of so many tokens."""
        return [[0] * self.job.longest.prompt] * count, [[0] * tokens] * count

    def _train(self) -> None:
        """One micro-batch, on top of the gradients of earlier ones where there are any."""
        self.policy.train()
        for weight in self.policy.parameters():
            if weight.requires_grad and self.job.accumulates:
                weight.grad = torch.empty_like(weight)
        loss = self._loss(_batch(self.job.rows, self.job.stage))
        self.meter.enter("backward")
        loss.backward()
        del loss
        self.meter.enter("optimizer step")

    def _loss(self, batch: dict[str, Any]) -> Tensor:
        self.meter.enter("forward")
        output = self.policy(**batch, **self.router)
        logps = output.log_probs if batch["fused_lm_head"] else _logps(output.logits, batch["labels"])
        loss = logps.sum() + (output.aux_loss if self.router else 0)
        if self.job.scores_online:
            self.meter.enter("reference forward")
            with torch.no_grad(), self._reference() as reference:
                theirs = reference(**batch).log_probs.sum()
            loss = loss - theirs
        return loss

    @contextlib.contextmanager
    def _reference(self) -> Iterator[nn.Module]:
        if self.second is not None:
            yield self.second
            return
        with use_adapter(self.policy, "ref" if self.job.has_reference_copy else None):
            yield self.policy


def _asks_router(model: PreTrainedModel, weight: float | None) -> dict[str, bool]:
    """TRL's argument that asks a mixture of experts for its router's loss."""
    config = model.config.get_text_config()
    weight = getattr(config, "router_aux_loss_coef", 0.0) if weight is None else weight
    return {"output_router_logits": True} if weight and hasattr(config, "output_router_logits") else {}


def _batch(rows: Sequence[Row], stage: str) -> dict[str, Any]:
    """A batch as TRL's collators pad it, of rows whose replies differ from their first token on."""
    texts = [(row.prompt, row.chosen, 1) for row in rows]
    if stage in ("dpo", "orpo"):
        texts += [(row.prompt, row.rejected, 2) for row in rows]
    width = max(prompt + reply for prompt, reply, _ in texts)
    ids, mask = torch.zeros(2, len(texts), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for number, (prompt, reply, token) in enumerate(texts):
        mask[number, : prompt + reply] = 1
        ids[number, prompt : prompt + reply] = labels[number, prompt : prompt + reply] = token
    fused = stage != "orpo"
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False, "fused_lm_head": fused}


def _logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Each token's log-probability from whole logits, and the chosen half's once more, as ORPO's loss has them."""
    every, own = logits[:, :-1].log_softmax(-1), labels[:, 1:].clamp(min=0)[..., None]
    chosen = logits[: len(logits) // 2, :-1].contiguous().log_softmax(-1)
    return torch.cat([every.gather(-1, own), chosen.gather(-1, own[: len(chosen)])])
