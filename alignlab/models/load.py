"""Tokenizer, 4-bit loading, LoRA, and what the reference is."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import pyarrow.compute as pc
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer_pt_utils import safe_globals

from alignlab.data.format import Format, Stops, own_template, training_template, with_settings
from alignlab.data.hub import stay_offline_without_hub
from alignlab.disk import find_damage, hash_file, is_sealed
from alignlab.errors import MachineError, ModelError
from alignlab.recipe.fields import suggest
from alignlab.recipe.load import ModelSection, model_folder
from alignlab.recipe.rules import LIMITS, whole_modules_conflict
from alignlab.runs.run import Run

log = logging.getLogger(__name__)

ADAPTER_FILE = "adapter_config.json"
PICKLED_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin")
PICKLED_STATE = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")  # of a training, in a checkpoint
TRUSTED = "where you trust it, save it as safetensors"


@dataclass(frozen=True)
class Start:
    """What DPO starts from: full weights, perhaps an adapter on them, and what the reference then is."""

    weights: str  # hub id or folder
    adapter: str | None
    reference: str  # one sentence, printed and kept in the manifest


def load_tokenizer(section: ModelSection, folder: str | None = None) -> PreTrainedTokenizerBase:
    """The model's fast tokenizer with a pad token, and the chat template that is trained with.

    Raises ModelError without an EOS token, or where only a `tokenizer.model` is at hand: transformers then orders
    the merges of Llama's vocabulary wrongly.
    """
    name = folder or section.name
    with loading("tokenizer", name, section):
        tokenizer = AutoTokenizer.from_pretrained(name, **_where(section, name))
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {name} has no EOS token, so no reply could end; set eos_token in its config"
        )
    if Path(name).is_dir() and not (Path(name) / "tokenizer.json").is_file():
        raise ModelError(f"{name} has no tokenizer.json; save one there with the original fast tokenizer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if template := _template(section, tokenizer):
        tokenizer.chat_template = template
    return tokenizer


def _template(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template to train with: the recipe's or the tokenizer's own, fit to be trained on, as it is set."""
    brought = section.chat_template or own_template(tokenizer)
    if brought is None:
        return None
    template = training_template(tokenizer, brought)
    if template != brought:
        say_once(f"{section.name}: its chat template cannot be trained on; TRL's training template takes its place")
    return with_settings(template, section.chat_template_kwargs or {})


@functools.cache  # once a process: a tokenizer is loaded again and again
def say_once(line: str) -> None:
    log.info("%s", line)


def find_stops(section: ModelSection, form: Format, weights: str | None = None) -> Stops:
    """Where replies of a recipe's models end: its format's end, the tokenizer's EOS, and what its models end with.

    `weights` are those of a model whose base is no longer where `model.name` says.
    """
    names = [weights or section.name, *([section.start] if section.start else [])]
    return form.stops(each for name in names for each in _eos_ids(section, name))


def generation_config(stops: Stops, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Ends a reply as training did; without the base's own sampling settings, as the runs are measured."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    return GenerationConfig(eos_token_id=list(stops.ids) if len(stops.ids) > 1 else stops.ids[0], **ids)


def _eos_ids(section: ModelSection, name: str) -> list[int]:
    """At which ids `generate` ends a reply of this model: those of its generation_config.json, or else config.json."""
    if name == "toy":  # ends with the EOS of its tokenizer
        return []
    try:
        revision = section.revision if name == section.name else None
        found = GenerationConfig.from_pretrained(name, revision=revision or "main").eos_token_id
    except (OSError, ValueError):
        try:
            found = load_config(section, name).get_text_config().eos_token_id
        except (ModelError, MachineError):  # an adapter has neither
            return []
    return found if isinstance(found, list) else [] if found is None else [found]


def load_weights(section: ModelSection, name: str | None = None) -> PreTrainedModel:
    """The full model, in 4-bit where the recipe says so.

    Under LoRA the frozen weights are kept in `dtype`. Where all weights are trained they are kept in float32 and
    computed with in `dtype`, since a step of 1e-6 on a bfloat16 weight changes nothing.
    """
    name = name or section.name
    dtype = compute_dtype(section) if section.lora is not None else torch.float32
    quantized = {"quantization_config": quantization(section)} if section.load_in_4bit else {}
    chosen = {"attn_implementation": section.attn_implementation, "use_kernels": section.use_kernels}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    with loading("model", name, section):
        weights = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, device_map=_placement(), **chosen, **quantized, **_where(section, name)
        )
    make_sampleable(weights)
    return weights


def make_sampleable(model: PreTrainedModel) -> None:
    """Leaves a mixture's router logits out, but where TRL's loss asks for them: `generate` fails with them.

    That loss asks for `num_experts`, which some configs have under another name alone (transformers 5.23, TRL 1.16).
    Raises ModelError where `generate` would fail all the same.
    """
    config = model.config.get_text_config()
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False
    layers = {*(getattr(config, "layer_types", None) or ["attention"])}
    keeps = "past_key_values" in inspect.signature(model.forward).parameters  # whose length only attention knows
    if keeps and layers <= {"mamba", "linear_attention", "conv"}:
        raise ModelError(
            f"{config.model_type} with no layer of attention cannot be sampled from by transformers 5.23; "
            "choose a model.name with attention layers"
        )
    if hasattr(config, "num_local_experts") and not hasattr(config, "num_experts"):
        type(config).attribute_map = {**type(config).attribute_map, "num_experts": "num_local_experts"}


def load_config(section: ModelSection, name: str | None = None) -> PreTrainedConfig:
    name = name or section.name
    with loading("config", name, section):
        return AutoConfig.from_pretrained(name, **_where(section, name))


def compute_dtype(section: ModelSection) -> torch.dtype:
    """The recipe's dtype; raises MachineError where this GPU has no bfloat16, or float16 has no GPU."""
    if section.dtype == "float16" and not torch.cuda.is_available():
        raise MachineError("float16 is trained on a GPU only, and there is none here; set model.dtype=bfloat16")
    if section.dtype == "bfloat16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        raise MachineError(f"{torch.cuda.get_device_name()} has no bfloat16; set model.dtype=float16")
    return getattr(torch, section.dtype)


def quantization(section: ModelSection) -> BitsAndBytesConfig:
    """NF4 with double quantization, computed in the recipe's dtype (QLoRA, arXiv 2305.14314)."""
    try:
        import bitsandbytes
    except Exception as e:
        raise MachineError(f"bitsandbytes cannot be used here ({e}); set model.load_in_4bit=false") from None
    # With AVX512_BF16, bitsandbytes packs 4-bit weights on the first forward in eval mode, and the packed kernel has
    # no autograd: gradients after an evaluation are silently wrong. Seen in bitsandbytes 0.50.
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(section),
    )


def lora_config(section: ModelSection) -> LoraConfig:
    assert section.lora is not None, "full fine-tuning has no adapter"
    return LoraConfig(task_type="CAUSAL_LM", **section.lora)


def add_adapter(weights: PreTrainedModel, section: ModelSection) -> PeftModel:
    """A fresh trainable adapter, whose first output is that of the weights alone."""
    _refuse_unknown_targets(weights, section)
    try:
        adapted = get_peft_model(weights, lora_config(section))
    except ValueError as e:
        raise ModelError(f"model.lora does not fit {section.name}: {_first_line(e)}") from e
    _refuse_adapted_head(adapted)
    return adapted


def _refuse_unknown_targets(weights: PreTrainedModel, section: ModelSection) -> None:
    """PEFT 0.21 passes over a name that no module has, as long as another of the list is found."""
    targets = (section.lora or {}).get("target_modules")
    names = [f".{name}" for name, _ in weights.named_modules()]
    for target in targets if isinstance(targets, list) else []:
        if not any(name.endswith(f".{target}") for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            near = suggest(target, known)
            raise ModelError(f"model.lora.target_modules holds {target}, and {section.name} has no such module{near}")


def _refuse_adapted_head(model: PeftModel) -> None:
    """TRL 1.16 computes log-probabilities from the output layer's own weight, so that an adapter on it never counts."""
    head = model.get_output_embeddings()
    if isinstance(head, (BaseTunerLayer, TrainableTokensWrapper)):
        name = next(name for name, module in model.get_base_model().named_modules() if module is head)
        remedy = f"leave {name} out of model.lora.target_modules, or write all-linear, which is without it"
        if isinstance(head, TrainableTokensWrapper):
            remedy = "it shares the embeddings' weights, so leave model.lora.trainable_token_indices out"
        raise ModelError(f"LoRA is on the output layer {name}, where TRL does not train it; {remedy}")


def check_positions(config: PreTrainedConfig, max_length: int | None, stage: str) -> None:
    """Raises ModelError where `max_length` exceeds the positions the model was made with."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and max_length and max_length > positions:
        raise ModelError(
            f"{stage}.max_length is {max_length}, but the model has {positions} positions; "
            f"lower data.max_prompt_tokens and data.max_reply_tokens, and {stage}.max_length where it is written"
        )


def check_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> None:
    """Raises ModelError where rows hold a token, or are padded with one, that the model has no embedding for."""
    known = config.get_text_config().vocab_size
    columns = (rows.data.column(name) for name in rows.column_names if name.endswith("_ids"))
    largest = max(tokenizer.pad_token_id, *(pc.max(pc.list_flatten(column)).as_py() for column in columns))
    if largest >= known:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ModelError(
            f"the tokenizer writes {token!r} as {largest}, and the model has embeddings for {known} tokens only; "
            f"use the tokenizer that the model was trained with, or enlarge its embeddings"
        )


def find_start(section: ModelSection, sft_model: Path | None) -> Start:
    """What a DPO run of this recipe starts from, by the one rule: the SFT run, unless the recipe says otherwise."""
    if section.start is None:
        assert sft_model is not None, "without model.start there is an SFT run"
        is_adapter = (sft_model / ADAPTER_FILE).is_file()
        name, what = str(sft_model), "this recipe's SFT run"
    else:
        name, what = section.start, "model.start"
        is_adapter = _is_adapter(name, section)
    if is_adapter and section.lora is None:
        raise ModelError(f"{name} is an adapter, but the recipe trains all weights; set model.lora, or merge it first")
    weights, adapter = (section.name, name) if is_adapter else (name, None)
    if adapter:
        _refuse_other_base(section, adapter)
    if (other := section.reference_folder) and adapter:
        _refuse_other_base(section, other)
    if other and _is_adapter(other, section) != is_adapter:
        raise ModelError(
            f"model.reference_folder {other} and {name}: one is an adapter and one a model; give two alike"
        )
    return Start(weights, adapter, _reference_sentence(section, adapter, name, what))


def load_policy(section: ModelSection, start: Start) -> tuple[PreTrainedModel | PeftModel, PreTrainedModel | None]:
    """The trainable policy, and a second model as the reference only where LoRA does not make one needless.

    DPOTrainer turns a policy that comes with an adapter into policy and reference: it copies the adapter, frozen,
    under the name `ref`. The copy of a fresh adapter answers as the model without one.
    """
    policy = load_weights(section, start.weights)
    if start.adapter:
        with loading("adapter", start.adapter, section):
            own = PeftConfig.from_pretrained(start.adapter)
            _refuse_unfaithful(own, section, start.adapter)
            policy = PeftModel.from_pretrained(policy, start.adapter, is_trainable=True)
        _refuse_adapted_head(policy)
        _say_what_the_adapter_decides(own, section, start.adapter)
        return policy, None
    if section.lora is not None:
        return add_adapter(policy, section), None
    other = section.name if section.reference == "base" else section.reference_folder or start.weights
    return policy, load_weights(section, other)


def _refuse_unfaithful(own: PeftConfig, section: ModelSection, adapter: str) -> None:
    """What a recipe may not ask of an adapter, one that comes from elsewhere may not have."""
    for key, value in own.to_dict().items():
        fits, expected = LIMITS.get(f"model.lora.{key}", (None, ""))
        if fits and value is not None and not fits(value):
            raise ModelError(
                f"{key} of the adapter {adapter} is {value!r}; expected {expected}; merge it and start there"
            )
    if own.modules_to_save and (fault := whole_modules_conflict(own.modules_to_save, section.dtype)):
        raise ModelError(f"the adapter {adapter}: {fault}")


def _say_what_the_adapter_decides(own: PeftConfig, section: ModelSection, adapter: str) -> None:
    wanted = section.lora or {}
    for key in ("r", "lora_alpha"):
        if key in wanted and getattr(own, key, None) != wanted[key]:
            log.warning("model.lora.%s=%s has no effect: %s has %s", key, wanted[key], adapter, getattr(own, key))


def settle_adapters(model: PeftModel, section: ModelSection, adapter: str | None = None) -> None:
    """Gives policy and reference the weights of `adapter` bit for bit, in float32; no copy where the base is wanted.

    The reference has those of `model.reference_folder` where a recipe names it. The
    settings of both are put in order, so that equal runs write equal files.

    A bfloat16 adapter, to which DPOTrainer casts those on 4-bit weights, is not moved by DPO's small learning rates.
    Its copy for the reference leaves out adapters of embeddings and trained tokens (TRL 1.16).
    """
    if section.reference == "base" and "ref" in model.peft_config:
        model.delete_adapter("ref")
    for config in model.peft_config.values():  # PEFT 0.21 writes a set in another order each time
        for name, value in vars(config).items():
            if isinstance(value, set):
                setattr(config, name, sorted(value))
    for name, weight in model.named_parameters():
        if not {"default", "ref"}.isdisjoint(name.split(".")):
            weight.data = weight.data.float()
    for name in model.peft_config if adapter else ():
        source = section.reference_folder if name == "ref" and section.reference_folder else adapter
        model.load_adapter(str(source), name, is_trainable=name == "default")


def load_adapters(model: PeftModel, checkpoint: Path) -> None:
    """Puts a checkpoint's adapters back bit for bit, in the dtype they train in.

    Trainer's own loading leaves out the policy's adapter (transformers 5.17) or casts it (5.23, 4-bit).
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    for name in model.peft_config:
        folder = checkpoint if name == "default" else checkpoint / name
        state = load_file(folder / "adapter_model.safetensors")
        set_peft_model_state_dict(model, state, adapter_name=name)


def weights_hash(folder: Path) -> str:
    """A hash of the weights in a folder, by file name and content."""
    import xxhash

    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    if not files:
        raise ModelError(f"{folder} holds no weights (*.safetensors)")
    return xxhash.xxh3_128("".join(f"{f.name} {hash_file(f)}\n" for f in files).encode()).hexdigest()


def identify(section: ModelSection, name: str | None = None) -> dict[str, Any]:
    """Which weights these are: the hash of a local folder, or the hub's commit."""
    name = name or section.name
    if Path(name).is_dir():
        return {"name": name, "weights": weights_hash(Path(name))}
    config = load_config(section, name)
    return {"name": name, "revision": getattr(config, "_commit_hash", None) or section.revision}


def _reference_sentence(section: ModelSection, adapter: str | None, name: str, what: str) -> str:
    if section.reference == "base":
        if section.start and not adapter and section.lora is not None:
            raise ModelError(
                f"model.reference: base needs {section.name} in memory beside {name}; "
                f"point model.start at an adapter, or leave model.reference out"
            )
        return f"the base model {section.name}, without {what}"
    if section.reference_folder:
        return f"the {'adapter' if adapter else 'model'} in {section.reference_folder}; DPO starts from {name}"
    if adapter:
        return f"a frozen copy of the adapter of {what} ({name})"
    return f"{what} ({name}), " + (
        "with the new adapter switched off" if section.lora is not None else "as a second, frozen copy"
    )


def _is_adapter(start: str, section: ModelSection) -> bool:
    if Path(start).is_dir():
        return (Path(start) / ADAPTER_FILE).is_file()
    from transformers.utils import cached_file

    with loading("model", start, section):
        return cached_file(start, ADAPTER_FILE, _raise_exceptions_for_missing_entries=False) is not None


def _refuse_other_base(section: ModelSection, adapter: str) -> None:
    with loading("adapter", adapter, section):
        trained_on = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    run = Run(Path(adapter).parent)
    base = run.manifest.base if run.has_started else None
    if base and base.weights and Path(section.name).is_dir():  # by content: a folder may have moved, or have changed
        if base.weights == weights_hash(Path(section.name)):
            return
        raise ModelError(
            f"the adapter {adapter} was trained on other weights than those in {section.name}; "
            f"bring the base model back that it belongs to, or set model.name to where it is"
        )
    if not trained_on or not _same_place(trained_on, section.name):
        raise ModelError(
            f"the adapter {adapter} was trained on {trained_on}, and model.name is {section.name}; "
            f"set model.name to the base it belongs to"
        )


def _same_place(one: str, other: str) -> bool:
    return one == other or (Path(one).exists() and Path(other).exists() and Path(one).samefile(other))


def _where(section: ModelSection, name: str) -> Mapping[str, Any]:
    revision = {"revision": section.revision} if section.revision and name == section.name else {}
    return {"trust_remote_code": section.trust_remote_code, **revision}


def _placement() -> Any:
    if not torch.cuda.is_available():
        return None
    from accelerate import PartialState

    return {"": PartialState().device}


def refuse_changed(folder: Path) -> None:
    """Raises ModelError where a folder that training has sealed is not as it was sealed."""
    if is_sealed(folder) and (name := find_damage(folder)):
        raise ModelError(
            f"{folder / name} has changed since it was written; bring it back from a copy, "
            f"or train it again with --force"
        )


def refuse_pickles(folder: Path, names: Sequence[str], remedy: str) -> None:
    """Raises ModelError where a pickle is damaged or holds what torch refuses; reads no tensor of it."""
    for file in [file for name in names for file in sorted(folder.glob(name))]:
        try:
            with safe_globals():
                torch.load(file, map_location="meta", weights_only=True, mmap=is_zipfile(file))
        except Exception as e:  # a damaged pickle raises anything
            raise ModelError(f"{file} cannot be loaded: {_why_refused(e)}; {remedy}") from e


def _why_refused(error: Exception) -> str:
    cause = error.__context__
    if isinstance(error, UnpicklingError) and isinstance(cause, Exception):
        return f"torch refuses it ({_first_line(cause)})"
    return f"damaged ({_first_line(error)})"


def refuse_unmade(name: str) -> None:
    """Raises ModelError where a model is one that `make` puts into the cache, and is not there yet."""
    folder = Path(name)
    if folder == model_folder(folder.name) and not folder.exists():
        raise ModelError(f"the model {folder.name} is not on this machine; run make {folder.name} first")


@contextlib.contextmanager
def loading(what: str, name: str, section: ModelSection) -> Iterator[None]:
    """Turns the many ways in which loading fails into one line that says what to do."""
    refuse_unmade(name)
    if Path(name).is_absolute() and not Path(name).exists():
        raise ModelError(f"there is no {what} at {name}")
    if Path(name).is_dir():
        refuse_changed(Path(name))
        if not any(Path(name).glob("*.safetensors")):
            refuse_pickles(Path(name), PICKLED_WEIGHTS, TRUSTED)
    elif not Path(name).exists():
        stay_offline_without_hub()
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError, UnpicklingError) as e:
        raise _explained(what, name, "model.start" if name == section.start else "model.name", e) from e


def _explained(what: str, name: str, key: str, error: Exception) -> Exception:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    causes: list[BaseException] = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return ModelError(
            f"{name} is gated: accept its terms on its hub page and log in with `hf auth login`, "
            f"or point {key} at a local folder"
        )
    if isinstance(error, OSError) and error.errno == 28:  # ENOSPC: the disk's fault, told apart from the model's
        return error
    if any("trust_remote_code" in str(cause) for cause in causes):
        return ModelError(
            f"{name} brings Python code of its own, which is not run unasked; read it, and where you trust it set "
            f"model.trust_remote_code=true"
        )
    if isinstance(error, UnpicklingError):
        return ModelError(f"pytorch_model.bin of {name} cannot be loaded: {_why_refused(error)}; {TRUSTED}")
    if Path(name).is_dir() or not isinstance(error, OSError):  # the hub and the network fail as OSError
        return ModelError(f"the {what} in {name} cannot be loaded: {_first_line(error)}")
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return ModelError(f"the hub has no model {name}, or hides it; check the name, or log in with `hf auth login`")
    return MachineError(
        f"the {what} of {name} is neither on this machine nor can the hub be reached; "
        f"download it where there is a network and point {key} at the folder"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
