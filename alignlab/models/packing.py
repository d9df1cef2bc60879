"""The fast DPO forward: each pair's common prefix is computed once, padding is packed away, and the loss is the same.

A batch is laid out in rows of [common prefix, rest of chosen, rest of rejected] (`alignlab.layout`). Outputs go back
into the shape of TRL's fused LM head (`trl.trainer.utils.add_fused_lm_head`), so its losses, metrics and reference pass
work unchanged.

Shapes: B pairs, S = 2B sequences ([chosen; rejected]) of T tokens as TRL pads them, R packed rows of W positions.
"""

from __future__ import annotations

import functools
import inspect
import logging
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from trl.trainer import utils as trl_utils
from trl.trainer.utils import FusedCausalLMOutput

from alignlab.errors import ModelError
from alignlab.models.layout import attention_masks, attention_reach, lay_out, sliding_window

log = logging.getLogger(__name__)

PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
MASK_KINDS = {"full_attention", "sliding_attention"}
KNOWN_ARGUMENTS = {"input_ids", "attention_mask", "labels", "use_cache", "return_dict"}
CPU_TILE = 4096  # vocabulary entries
IGNORED = -100  # the label of a token that is not scored
MAX_DIFFERENCE = 1e-3
"""Nats by which any token's log-probability may differ on the first batch where all arithmetic is in float32."""
MEAN_DIFFERENCE = 0.03
"""Nats by which log-probabilities may differ on average in lower precision, where single tokens differ by rounding."""


def decide(
    setting: Literal["auto"] | bool,
    model: nn.Module,
    device: torch.device | str,
    router_loss: bool | None = None,
) -> tuple[bool, str]:
    """Whether to share prefixes, and a line that says so and why; `setting` is the recipe's `model.prefix_sharing`.

    `router_loss` is the DPO trainer's `aux_loss_enabled`; None takes it from the model, as TRL does where the recipe
    leaves `dpo.router_aux_loss_coef` alone.
    """
    reason = unsupported(model) or _router_reason(model, router_loss)
    if setting is True and reason:
        raise ModelError(f"model.prefix_sharing is true, but {reason}; set it to auto or false")
    if setting is True:
        return True, "prefix sharing: on, as the recipe asks"
    if setting is False:
        return False, "prefix sharing: off, as the recipe asks"
    if reason:
        return False, f"prefix sharing: off, {reason}"
    kind = torch.device(device).type
    if kind != "cpu":
        return False, f"prefix sharing: off, no win is recorded on {kind} (model.prefix_sharing: true turns it on)"
    return True, "prefix sharing: on, each pair's prompt is computed once"


def unsupported(model: nn.Module) -> str | None:
    """Why prefixes cannot be shared in this model, as a clause that names it; None where they can."""
    bare = bare_model(model)
    name, config = type(bare).__name__, bare.config.get_text_config()
    if reason := _unsupported_adapter(model):
        return reason
    if config.is_encoder_decoder:
        return f"{name} has an encoder"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attn_implementation={config._attn_implementation!r} takes no 4-D mask (sdpa and eager do)"
    if _has_alibi(config):
        return f"{name} uses ALiBi, which reads distances from a token's place in the row"
    if "position_ids" not in inspect.signature(type(bare.base_model).forward).parameters:
        return f"the positions of {name} cannot be set"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return f"{name} cuts its attention window by a token's place in the row"
    if unknown := sorted(set(getattr(config, "layer_types", None) or ()) - MASK_KINDS):
        return f"{name} has {' and '.join(unknown)} layers, whose masks alignlab does not build"
    if any(isinstance(module, nn.Conv1d) for module in bare.base_model.modules()):
        return f"{name} has convolutions, which mix tokens outside attention"
    if getattr(config, "output_router_logits", False):
        return f"{name} has an auxiliary router loss, which reads the padding mask (output_router_logits: false)"
    return None


def _router_reason(model: nn.Module, router_loss: bool | None) -> str | None:
    """Why the router loss of a mixture of experts forbids sharing; its batches would all go the standard way."""
    bare = bare_model(model)
    config = bare.config.get_text_config()
    if router_loss is None:
        router_loss = hasattr(config, "output_router_logits") and bool(getattr(config, "router_aux_loss_coef", 0.0))
    loss = f"the auxiliary router loss of {type(bare).__name__}"
    return f"{loss} reads the padding mask (dpo.router_aux_loss_coef: 0 ends it)" if router_loss else None


def _unsupported_adapter(model: nn.Module) -> str | None:
    for name, adapter in (getattr(model, "peft_config", None) or {}).items():
        if adapter.is_prompt_learning or getattr(adapter, "is_adaption_prompt", False):
            return f"adapter {name!r} ({adapter.peft_type.value}) puts tokens of its own before the prompt"
        if getattr(adapter, "alora_invocation_tokens", None):
            return f"adapter {name!r} switches on at a token's place in the row"
    return None


def _has_alibi(config: Any) -> bool:
    return config.model_type == "bloom" or bool(getattr(config, "alibi", False))


def bare_model(model: nn.Module) -> PreTrainedModel:
    """The model under PEFT's wrapper, which is the one whose forward TRL patches."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if get_base_model else model


def share_prefixes(model: nn.Module, on_difference: Literal["raise", "stop"] = "raise") -> PrefixSharing:
    """Make `model(..., fused_lm_head=True)` compute each pair's common prefix once, until the handle's `undo`.

    Call it after TRL's `add_fused_lm_head` and after dropout is off; a model that shares already keeps its handle.
    The first batch is computed both ways, and so is the first that is longer than a sliding window. Where they
    differ, "raise" is a ModelError and "stop" a warning, after which the standard forward goes on. All other calls,
    `generate` among them, go the standard way untouched.
    """
    bare = bare_model(model)
    if handle := vars(bare).get("prefix_sharing"):
        return handle
    if reason := unsupported(model) or _dropout(bare):
        raise ModelError(f"prefixes cannot be shared: {reason}; set model.prefix_sharing=false")
    return PrefixSharing(bare, on_difference)


def _dropout(model: nn.Module) -> str | None:
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    rates += [rate for module in model.modules() if isinstance(rate := getattr(module, "attention_dropout", 0), float)]
    return f"a dropout of {max(rates)} would strike both branches of a prefix alike" if any(rates) else None


@dataclass(frozen=True)
class Plan:
    """What the packed forward of one batch takes, and what brings its outputs back."""

    model_inputs: dict[str, Any]
    scored_places_N: Tensor  # where the N scored tokens are predicted: row × W + column
    scored_ST: Tensor  # bool, over T − 1 predictions
    exceeds_window: bool


class PrefixSharing:
    """One model's forward with shared prefixes: what it did so far, and how to pause or undo it."""

    def __init__(self, model: PreTrainedModel, on_difference: Literal["raise", "stop"]):
        self.model, self.on_difference = model, on_difference
        self.enabled = True
        self.standard_positions = self.computed_positions = 0
        self.fallbacks: Counter[str] = Counter()  # batches that went the standard way, by reason
        self.differences: dict[str, float] = {}  # nats, of each batch that was computed both ways
        self._planned: tuple[tuple, Plan] | None = None
        self._exact = False  # whether the forward that has just run was in float32 throughout
        self._standard = model.forward
        self._shared = self._forward_function()
        model.forward = types.MethodType(self._shared, model)
        model.prefix_sharing = self

    def undo(self) -> None:
        """Give the model its own forward back."""
        self.enabled = False
        del self.model.prefix_sharing
        if getattr(self.model.forward, "__func__", None) is self._shared:  # else wrapped again, and now a pass-through
            self.model.forward = self._standard

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The standard forward, inside the block."""
        enabled, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = enabled

    def _forward_function(self) -> Callable[..., ModelOutput]:
        @functools.wraps(type(self.model).forward)  # `generate` reads the signature
        def forward(_model: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> ModelOutput:
            if not (fused_lm_head and self.enabled):
                return self._standard(*args, fused_lm_head=fused_lm_head, **kwargs)
            return self._forward(*args, **kwargs)

        return forward

    def _forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        if reason := "its arguments have no names" if args else obstacle(**kwargs):
            if reason not in self.fallbacks:
                log.warning("prefix sharing: a batch goes the standard way, %s", reason)
            self.fallbacks[reason] += 1
            return self._standard(*args, fused_lm_head=True, **kwargs)
        plan = self._plan_for(kwargs["input_ids"], kwargs["attention_mask"], kwargs["labels"])
        check = self._due_check(plan)
        expected_ST = self._standard_log_probs(kwargs) if check else None
        output = self._packed_forward(plan)
        assert output.log_probs is not None, "labels were given"
        if check and expected_ST is not None and not self._agrees(check, output.log_probs, expected_ST, plan):
            return self._standard(fused_lm_head=True, **kwargs)
        self.standard_positions += kwargs["input_ids"].numel()
        self.computed_positions += plan.model_inputs["input_ids"].numel()
        return output

    def _plan_for(self, *batch: Tensor) -> Plan:
        """The batch's plan; the reference pass that follows the policy's on the same tokens finds it made."""
        batch = tuple(value.cpu() for value in batch)
        if self._planned is None or not all(map(torch.equal, batch, self._planned[0])):
            self._planned = tuple(map(torch.clone, batch)), plan_batch(self.model, *batch)
        return self._planned[1]

    def _packed_forward(self, plan: Plan) -> FusedCausalLMOutput:
        def keep_scored(_module: nn.Module, _args: tuple, output: ModelOutput) -> ModelOutput:
            hidden_PH = output.last_hidden_state.flatten(0, 1)
            places_N = plan.scored_places_N.to(hidden_PH.device)
            self._exact = is_exact(self.model)  # asked in here: accelerate's autocast may begin with the forward
            output.last_hidden_state = hidden_PH.index_select(0, places_N).unsqueeze(0)
            return output

        hook = self.model.base_model.register_forward_hook(keep_scored)  # the LM head sees scored positions only
        try:
            with lm_head_tiles(self.model.device):
                output = self._standard(fused_lm_head=True, use_cache=False, **plan.model_inputs)
        finally:
            hook.remove()
        scored_ST = plan.scored_ST.to(output.log_probs.device)
        computed = {name: value_1N[0] for name in PER_TOKEN if (value_1N := getattr(output, name)) is not None}
        spread = {name: x_N.new_zeros(scored_ST.shape).masked_scatter(scored_ST, x_N) for name, x_N in computed.items()}
        return FusedCausalLMOutput(loss=output.loss, label_mask=scored_ST, **spread)

    def _due_check(self, plan: Plan) -> str | None:
        """The name of the check that this batch is the first to allow, if any."""
        name = "the first batch beyond the window" if plan.exceeds_window else "the first batch"
        return name if name not in self.differences and len(plan.scored_places_N) else None

    def _standard_log_probs(self, arguments: dict[str, Any]) -> Tensor:
        with torch.no_grad(), warnings.catch_warnings():
            # Reentrant checkpointing warns where nothing needs a gradient, as here.
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
            return self._standard(fused_lm_head=True, **arguments).log_probs

    def _agrees(self, check: str, log_probs_ST: Tensor, expected_ST: Tensor, plan: Plan) -> bool:
        """Whether both ways gave the same; if not, this raises or, where told to, switches itself off."""
        distance_N = (log_probs_ST.detach() - expected_ST).abs().float()[plan.scored_ST.to(expected_ST.device)]
        exact = self._exact
        most, limit = (distance_N.max(), MAX_DIFFERENCE) if exact else (distance_N.mean(), MEAN_DIFFERENCE)
        difference = self.differences[check] = most.item()
        if difference <= limit:  # a NaN is not
            return True
        message = (
            f"prefix sharing changes the log-probabilities of {type(self.model).__name__} on {check} by "
            f"{'up to' if exact else 'a mean of'} {difference:.2g} nats (limit {limit:g})"
        )
        if self.on_difference == "raise":
            raise ModelError(f"{message}; set model.prefix_sharing=false")
        log.warning("%s: off from here", message)
        self.enabled = False
        return False


def obstacle(**arguments: Any) -> str | None:
    """Why a batch cannot be packed, or None; TRL's own text batches always can."""
    ids, mask, labels = (arguments.get(name) for name in ("input_ids", "attention_mask", "labels"))
    if ids is None or mask is None or labels is None:
        return "it lacks input_ids, attention_mask or labels"
    unknown = [name for name, value in arguments.items() if value is not None and value is not False]
    if unknown := sorted(set(unknown) - KNOWN_ARGUMENTS):
        return f"it comes with {', '.join(unknown)}"
    if len(ids) % 2 or mask.shape != ids.shape:
        return f"its {len(ids)} rows are not pairs"
    mask = mask.bool()
    if not (mask[:, 0].all() and (mask[:, 1:] <= mask[:, :-1]).all()):
        return "its padding is not on the right"
    if (labels[:, 1:] != IGNORED)[~mask[:, 1:]].any():
        return "it scores padding"
    return None


def plan_batch(model: PreTrainedModel, ids_ST: Tensor, mask_ST: Tensor, labels_ST: Tensor) -> Plan:
    """The packed inputs for a batch whose tensors are on the CPU; the plan is on the model's device."""
    lengths_S = mask_ST.sum(1)
    layout = lay_out(ids_ST, lengths_S, attention_reach(model))
    targets_ST = labels_ST[:, 1:]
    scored_ST = targets_ST != IGNORED
    window, device = sliding_window(model), model.device
    return Plan(
        model_inputs={
            "input_ids": layout.ids_RW.to(device),
            "position_ids": layout.position_RW.to(device),
            "attention_mask": attention_masks(layout, model),
            "shift_labels": targets_ST[scored_ST].unsqueeze(0).to(device),
        },
        scored_places_N=layout.place_ST[:, :-1][scored_ST].to(device),
        scored_ST=scored_ST.to(device),
        exceeds_window=window is not None and int(lengths_S.max()) > window,
    )


@contextmanager
def lm_head_tiles(device: torch.device) -> Iterator[None]:
    """On a CPU, TRL's fused LM head in narrower tiles of the vocabulary: the same sums, an eighth of the memory.

    TRL's tiles of 32,768 are buffers that a C library maps and faults in anew each time; 1,000 scored tokens took
    1.4 to 1.6 times as long with them, and as long where memory is kept.
    """
    standard = trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE  # of vocabulary; no argument of `add_fused_lm_head` reaches it
    trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = CPU_TILE if device.type == "cpu" else standard
    try:
        yield
    finally:
        trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = standard


@contextmanager
def scored_positions_only(device: torch.device) -> Iterator[None]:
    """On a CPU, TRL's fused LM head on the positions that are scored, in the narrower tiles.

    TRL does so on GPUs, and scores every position elsewhere, for devices that compile each shape anew; a CPU does not.
    """
    standard = trl_utils._use_triton  # in this module it asks for nothing else than that

    def scores_only_what_counts(device: torch.device) -> bool:
        return device.type == "cpu" or standard(device)

    trl_utils._use_triton = scores_only_what_counts
    try:
        with lm_head_tiles(device):
            yield
    finally:
        trl_utils._use_triton = standard


def is_exact(model: PreTrainedModel) -> bool:
    """Whether the model computes in float32 throughout, so that two ways to compute differ by its rounding only."""
    kind = model.device.type
    plain = not torch.is_autocast_enabled(kind) and not getattr(model, "is_quantized", False)
    return plain and model.dtype == torch.float32 and not (kind == "cuda" and torch.backends.cuda.matmul.allow_tf32)
