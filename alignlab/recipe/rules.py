"""What alignlab asks of a recipe beyond the types of its settings, as tables: key → rule, with the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from alignlab.recipe.objectives import STAGES

_HUB = "nothing is uploaded; push the run's model/ yourself"
_LAUNCHER = "describe the machines in `accelerate launch --config_file`"
_PREPARED = "rows are prepared, shortened and tokenized as the data section says"
_MIXED = "write model.dtype"
_TIED = "saving is tied to evaluation; write eval_steps"
_BEST = "the best checkpoint of a run is always kept"
_RESUME = "the same command resumes a run exactly as it would have gone on"
_METRICS = "there is no compute_metrics to use it; measures of a run come from its run directory"
_TRACKER = "leave it out: metrics.jsonl and wandb are written; WANDB_MODE, WANDB_PROJECT and WANDB_ENTITY are obeyed"
_TOKENIZER = "the tokenizer's own token is used"
_FIXED_REFERENCE = "the reference stays fixed; model.reference says which it is"
_ADAPTER = "PEFT's own bookkeeping"

# Keys of stages that alignlab sets itself → what to write instead, or why. A dotted key holds only there.
OWNED: dict[str, str] = {
    "output_dir": "a run stands in runs/; name it with --run",
    "run_name": "a run is named after its recipe; name it with --run",
    **dict.fromkeys(("report_to", "project"), _TRACKER),
    **dict.fromkeys(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), _TRACKER),
    "logging_strategy": "always steps; write logging_steps",
    **dict.fromkeys(("eval_strategy", "eval_delay"), "always steps; write eval_steps"),
    "eval_on_start": "a run is always evaluated before its first step",
    **dict.fromkeys(("save_strategy", "save_steps"), _TIED),
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _BEST),
    **dict.fromkeys(("resume_from_checkpoint", "restore_callback_states_from_checkpoint"), _RESUME),
    **dict.fromkeys(("save_only_model", "ignore_data_skip", "enable_jit_checkpoint"), _RESUME),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "the command says what is done"),
    "use_cpu": "the GPU is used where there is one; CUDA_VISIBLE_DEVICES='' hides it",
    "dataloader_pin_memory": "memory is pinned where there is a GPU",
    **dict.fromkeys(("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"), _MIXED),
    "activation_checkpointing": "write gradient_checkpointing, the name under which TRL has its default",
    "activation_checkpointing_kwargs": "write gradient_checkpointing_kwargs",
    "auto_find_batch_size": "a run must be repeatable; write per_device_train_batch_size",
    **dict.fromkeys(("include_for_metrics", "batch_eval_metrics"), _METRICS),
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"), _HUB),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _HUB),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "local_rank"), _LAUNCHER),
    **dict.fromkeys(("remove_unused_columns", "label_names"), _PREPARED),
    **dict.fromkeys(("dataset_num_proc", "dataset_text_field", "dataset_kwargs"), _PREPARED),
    "truncation_mode": "nothing is cut after preparation; write data.max_prompt_tokens and data.max_reply_tokens",
    **dict.fromkeys(("packing", "packing_strategy", "eval_packing", "padding_free"), "one dialogue is one row"),
    **dict.fromkeys(("completion_only_loss", "assistant_only_loss"), "the loss is always that of the reply alone"),
    "model_init_kwargs": "write its keys in the model section",
    "trust_remote_code": "write model.trust_remote_code",
    "chat_template_path": "write model.chat_template",
    **dict.fromkeys(("eos_token", "pad_token"), _TOKENIZER),
    **dict.fromkeys(("precompute_ref_log_probs", "precompute_ref_batch_size"), "alignlab runs the reference itself"),
    **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), _FIXED_REFERENCE),
    **dict.fromkeys(("dpo.neftune_noise_alpha", "kto.neftune_noise_alpha"), "the noise would reach the reference too"),
    "kto.train_sampling_strategy": "rows are shuffled once, by kto.seed; TRL's KL estimate needs their neighbours",
    **dict.fromkeys(("orpo.max_completion_length", "orpo.is_encoder_decoder"), _PREPARED),
    "orpo.padding_value": _TOKENIZER,
    "orpo.generate_during_eval": "samples.jsonl holds replies at each evaluation",
    "model.lora.task_type": "always CAUSAL_LM",
    "model.lora.base_model_name_or_path": "write model.name",
    "model.lora.revision": "write model.revision",
    **{f"model.lora.{k}": _ADAPTER for k in ("peft_type", "peft_version", "auto_mapping", "inference_mode")},
    "model.lora.runtime_config": _ADAPTER,
}

_STARTING = "the policy starts from the SFT run, or write model.start"
_GONE = "it was removed upstream, and nothing replaces it"

# Keys that are no setting → what to write: removed or renamed upstream, or called otherwise elsewhere.
INSTEAD: dict[str, str] = {
    "max_prompt_length": "TRL removed it; write data.max_prompt_tokens",
    **dict.fromkeys(("max_completion_length", "max_target_length"), "TRL removed it; write data.max_reply_tokens"),
    "max_seq_length": "TRL renamed it; write max_length",
    "warmup_ratio": "transformers removed it; write warmup_steps: below 1 it is a share of all steps",
    **dict.fromkeys(("torch_dtype", "dtype"), "write model.dtype"),
    "evaluation_strategy": "evaluation goes by steps; write eval_steps",
    "rpo_alpha": "TRL removed it; write loss_type: [sigmoid, sft] and loss_weights: [1.0, <alpha>]",
    "use_liger_loss": "TRL removed it: its loss needs no logits in memory; for kernels write model.use_kernels: true",
    **dict.fromkeys(("model_adapter_name", "force_use_ref_model"), _STARTING),
    **dict.fromkeys(("ref_adapter_name", "ref_model_init_kwargs"), "write model.reference"),
    "reference_free": "TRL removed it; every DPO run has a reference, see model.reference",
    "generate_during_eval": "TRL removed it; samples.jsonl holds replies at each evaluation",
    **dict.fromkeys(
        ("label_pad_token_id", "padding_value", "is_encoder_decoder", "use_logits_to_keep", "tools"), _GONE
    ),
    **dict.fromkeys(("base_model_attribute_name", "logging_dir", "save_safetensors", "past_index", "ray_scope"), _GONE),
    **dict.fromkeys(("fp16_opt_level", "half_precision_backend", "jit_mode_eval", "use_ipex", "tpu_num_cores"), _GONE),
    "dataset_batch_size": _GONE,
    "overwrite_output_dir": "a finished run is never overwritten in silence; see `alignlab dpo --help`",
    **dict.fromkeys(("no_cuda", "use_mps_device"), "the machine decides; CUDA_VISIBLE_DEVICES='' hides a GPU"),
    "group_by_length": "transformers renamed it; write train_sampling_strategy: group_by_length",
    "adafactor": "transformers removed it; write optim: adafactor",
    **dict.fromkeys(("model_name_or_path", "name_or_path"), "write model.name"),
    "model_revision": "write model.revision",
    **dict.fromkeys(("use_4bit", "quantization", "quantization_config"), "write model.load_in_4bit: true"),
    "load_in_8bit": "only 4-bit is supported; write model.load_in_4bit: true",
    **dict.fromkeys(("use_peft", "peft_config", "lora_config"), "write model.lora: {r: 16}"),
    **dict.fromkeys(("lora_r", "rank"), "write model.lora.r"),
    "lora_target_modules": "write model.lora.target_modules",
    **dict.fromkeys(("dataset_name", "dataset"), "write data.path"),
    "lr": "write learning_rate",
    "epochs": "write num_train_epochs",
    "batch_size": "write per_device_train_batch_size",
    "limit": "write data.max_pairs",
    "extends": "write it in the recipe file",
}

_POSITIVE = (lambda v: v > 0, "a value above 0")
_NOT_NEGATIVE = (lambda v: v >= 0, "0 or more")
_COUNT = (lambda v: v >= 1, "1 or more")
_SHARE = (lambda v: 0 <= v < 1, "a share: at least 0 and below 1")

# Of PEFT 0.21: other layers under the adapter, or weights moved out of the base into it.
_REBUILDING = ("layer_replication", "use_bdlora", "arrow_config", "kasa_config")

# Limits beyond the type, each saving a run that could only fail or mislead; the bare ones hold in every stage.
LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("data.max_prompt_tokens", "data.max_reply_tokens", "data.max_pairs", "data.toy.pairs"), _COUNT),
    "data.max_pairs_per_prompt": _COUNT,
    "data.min_score_ratio": (lambda v: v >= 1, "1 or more"),
    **dict.fromkeys(("data.validation_share", "data.test_share", "data.toy.flipped_share"), _SHARE),
    **dict.fromkeys(("data.seed", "data.toy.seed", "seed", "data_seed"), _NOT_NEGATIVE),
    **dict.fromkeys(("model.lora.r", "model.lora.lora_alpha"), _COUNT),
    "model.lora.lora_dropout": _SHARE,
    "model.lora.bias": (lambda v: v == "none", "none: policy and reference would share the base's biases"),
    "model.lora.init_lora_weights": (
        lambda v: v in (True, "gaussian", "orthogonal"),
        "true, gaussian or orthogonal: the reference needs a base that the adapter leaves as it is",
    ),
    **dict.fromkeys([f"model.lora.{key}" for key in _REBUILDING], (lambda v: not v, "nothing: it changes the base")),
    "model.lora.monteclora_config": (lambda v: not v, "nothing: its noise would reach the reference too"),
    **dict.fromkeys(
        ("monitor.kl.prompts", "monitor.kl.max_new_tokens", "monitor.kl.batch_size", "monitor.patience"), _COUNT
    ),
    **dict.fromkeys(("monitor.max_kl", "sweep.max_kl"), _POSITIVE),
    **dict.fromkeys(("evaluate.targets.kl", "evaluate.targets.perplexity"), _POSITIVE),
    **dict.fromkeys(("evaluate.targets.win_rate", "evaluate.targets.accuracy"), _SHARE),
    **dict.fromkeys(("rounds.count", "rounds.prompts"), _COUNT),
    "rounds.samples": (lambda v: v >= 2, "2 or more: a pair is of two replies"),
    "rounds.mix_original": _SHARE,
    "rounds.seed": _NOT_NEGATIVE,
    "monitor.max_accuracy": (lambda v: 0 < v <= 1, "a share: above 0, at most 1"),
    **dict.fromkeys(("beta", "num_train_epochs", "eval_steps", "logging_steps"), _POSITIVE),
    "learning_rate": (lambda v: 0 < v <= 1, "a value above 0 and at most 1, such as 5e-6"),
    **dict.fromkeys(("adam_epsilon", "discopop_tau"), _POSITIVE),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "max_length"), _COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "pad_to_multiple_of"), _COUNT),
    **dict.fromkeys(("warmup_steps", "weight_decay", "max_grad_norm", "dataloader_num_workers"), _NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), _SHARE),
    "kto.per_device_train_batch_size": (lambda v: v >= 2, "2 or more: KTO's KL estimate needs another row's reply"),
    **dict.fromkeys(("desirable_weight", "undesirable_weight"), _NOT_NEGATIVE),
    "ld_alpha": (lambda v: 0 <= v <= 1, "a value from 0 to 1"),
    "label_smoothing": (lambda v: 0 <= v < 0.5, "at least 0 and below 0.5"),  # a share of flipped labels
    "max_steps": (lambda v: v == -1 or v >= 1, "1 or more, or -1 for num_train_epochs"),
    "save_total_limit": (
        lambda v: v >= 2,
        "2 or more: where the last checkpoint is damaged, the one before it is used",
    ),
}


def _source_conflict(source: str | None, path: Any) -> str | None:
    if source == "toy" and path:
        return f"data.path is {path!r}, but data.source: toy makes its own dialogues"
    if source != "toy" and not path:
        needed = "a hub id, a folder or a file"
        return f"data.source: {source} needs data.path: {needed}" if source else f"data.path is missing: {needed}"
    if source == "alpaca":
        return "data.source is alpaca, which holds replies and no pairs; write data.sft: {source: alpaca, path: …}"
    return None


def _sft_source_conflict(source: str | None, path: Any) -> str | None:
    if source and not path:
        return f"data.sft.source: {source} needs data.sft.path: a hub id, a folder or a file"
    if source == "toy":
        return "data.sft.source is toy, whose dialogues are those of data.source: toy"
    return None


def _share_conflict(validation: float, test: float) -> str | None:
    if validation + test >= 1:
        return f"data.validation_share {validation} and data.test_share {test} leave nothing to train on"
    return None


def _weights_conflict(load_in_4bit: bool, dtype: str, lora: Any) -> str | None:
    if lora or lora == {}:
        return None
    if load_in_4bit:
        return "model.load_in_4bit is true, but 4-bit weights cannot be trained; write model.lora: {r: 16}"
    if dtype == "float16":
        return "model.dtype is float16, in which whole models do not train; write float32, bfloat16 or a model.lora"
    return None


def _reference_conflict(reference: str, folder: str | None) -> str | None:
    if reference == "base" and folder:
        return f"model.reference is base, and model.reference_folder is {folder}; leave one of them out"
    return None


def _head_conflict(targets: Any) -> str | None:
    names = [name for name in targets if name.rpartition(".")[2] == "lm_head"] if isinstance(targets, list) else []
    why = "where TRL does not train it; leave it out, or write all-linear, which is without it"
    return f"model.lora.target_modules holds {names[0]}, {why}" if names else None


def whole_modules_conflict(modules: list[str] | None, dtype: str) -> str | None:
    if not modules or dtype == "float32":
        return None
    why = f"which are trained whole, in float32, where the model computes in {dtype}"
    return f"model.lora.modules_to_save is {modules}, {why}; set model.dtype=float32, or leave it out"


def _length_conflict(stage: str) -> Callable[..., str | None]:
    def conflict(length: int | None, prompt: int, reply: int) -> str | None:
        if length is None or length >= prompt + reply:
            return None
        needed = f"data.max_prompt_tokens {prompt} + data.max_reply_tokens {reply} = {prompt + reply}"
        return f"{stage}.max_length is {length}, but rows may have {needed} tokens; leave it out or lower those"

    return conflict


def _steps_conflict(stage: str) -> Callable[..., str | None]:
    def conflict(evaluation: float | None, logging: float) -> str | None:
        if not (isinstance(evaluation, int) and isinstance(logging, int)) or evaluation % logging == 0:
            return None
        why = "a checkpoint is saved at each evaluation and must fall on a logged step"
        return f"{stage}.eval_steps is {evaluation}, no multiple of {stage}.logging_steps {logging}: {why}"

    return conflict


def _loss_conflict(losses: list[str], weights: list[float] | None, smoothing: float) -> str | None:
    if weights is not None and len(weights) != len(losses):
        return f"dpo.loss_weights has {len(weights)} values for the {len(losses)} of dpo.loss_type"
    if "exo_pair" in losses and smoothing == 0:
        return "dpo.loss_type holds exo_pair, which needs dpo.label_smoothing above 0, such as 0.001"
    return None


def _betas_conflict(betas: list[float]) -> str | None:
    if not betas:
        return "sweep.betas is empty; write some, such as [0.5, 0.3, 0.1, 0.05]"
    if wrong := [beta for beta in betas if not 0 < beta < math.inf]:
        return f"sweep.betas holds {wrong[0]}, but a beta is a number above 0"
    if twice := [beta for n, beta in enumerate(betas) if beta in betas[:n]]:
        return f"sweep.betas holds {twice[0]} twice, which would be two equal members; keep one"
    return None


# Settings that are sound each, but not together: their keys, and what is wrong with their values, if anything.
TOGETHER: tuple[tuple[tuple[str, ...], Callable[..., str | None]], ...] = (
    (("data.source", "data.path"), _source_conflict),
    (("data.sft.source", "data.sft.path"), _sft_source_conflict),
    (("data.validation_share", "data.test_share"), _share_conflict),
    (("model.load_in_4bit", "model.dtype", "model.lora"), _weights_conflict),
    (("model.reference", "model.reference_folder"), _reference_conflict),
    (("model.lora.target_modules",), _head_conflict),
    (("model.lora.modules_to_save", "model.dtype"), whole_modules_conflict),
    *((((f"{s}.max_length", "data.max_prompt_tokens", "data.max_reply_tokens")), _length_conflict(s)) for s in STAGES),
    *(((f"{s}.eval_steps", f"{s}.logging_steps"), _steps_conflict(s)) for s in STAGES),
    (("dpo.loss_type", "dpo.loss_weights", "dpo.label_smoothing"), _loss_conflict),
    (("sweep.betas",), _betas_conflict),
)
