"""A recipe file plus command-line overrides → a checked, frozen `Recipe`; imports no torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from alignlab.disk import cache_folder
from alignlab.errors import RecipeError
from alignlab.recipe.fields import Setting, library_settings, setting, suggest
from alignlab.recipe.objectives import OBJECTIVES, STAGES
from alignlab.recipe.rules import INSTEAD, LIMITS, OWNED, TOGETHER
from alignlab.recipe.written import SHIPPED, Key, Written, find_recipe, merge, read_overrides, read_recipe, shown


@dataclass(frozen=True, kw_only=True)
class ToySection:
    """The embedded default's dialogues (`data.source: toy`)."""

    pairs: int = 2000  # training pairs, before any is dropped
    flipped_share: float = 0.1  # share of training pairs whose label is flipped
    shuffled: bool = False  # labels are coin flips: the control in which nothing can be learned
    seed: int = 0  # of the dialogues, the tokenizer and the base model


# `alignlab.data.layouts.LAYOUTS`, and the toy
Pairs = Literal["hh-rlhf", "summarize-from-feedback", "shp", "ultrafeedback", "pairs", "two-responses", "ranked", "toy"]
Source = Literal[Pairs, "kto", "alpaca", "prompt-completion", "messages"]


@dataclass(frozen=True, kw_only=True)
class SFTDataSection:
    """Other data for SFT than the chosen replies; what is not said here is as in `data`."""

    path: str | list[str] | None = None  # as data.path; none: SFT learns the chosen replies
    source: Source | None = None
    subset: str | None = None
    config: str | None = None
    split: str = "train"
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DataSection:
    source: Source | None = None  # what a row means; none: recognised from the columns of each path, and said
    path: str | list[str] | None = None  # hub id, folder or file (alignlab.files.READERS); several are concatenated
    subset: str | None = None  # a folder inside `path`, such as helpful-base
    config: str | None = None  # of a hub dataset that has several
    columns: Mapping[str, str] = field(default_factory=dict)  # of other names than known: {prompt: question, …}
    split: str = "train"  # the hub split that is trained on, such as train_prefs
    test_split: str | None = "test"  # the split kept for the test rows, where the data has one of that name
    sft: SFTDataSection = field(default_factory=SFTDataSection)
    min_score_ratio: float = 2.0  # of shp: pairs whose scores are nearer are dropped, as its authors advise
    ranked_pairs: Literal["all", "adjacent", "best"] = "best"  # of ranked: every two, neighbours, or the best and each
    max_pairs_per_prompt: int | None = None  # none: 5 for shp, as its authors advise, and no limit for others
    # how a prompt reads: HH transcript, the tokenizer's chat template, Alpaca's sections, or the text as it stands
    format: Literal["hh", "chat", "alpaca", "plain"] = "hh"
    max_prompt_tokens: int = 512  # the oldest turns go first, whole
    max_reply_tokens: int = 512
    long_replies: Literal["drop", "cut"] = "drop"
    max_pairs: int | None = None  # read only so many rows: a quick look
    validation_share: float = 0.05  # of the dialogues
    test_share: float = 0.05  # of the dialogues; unused where the data brings its own test split
    seed: int = 0  # of the split
    toy: ToySection = field(default_factory=ToySection)


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    name: str  # hub id or path; `toy` is the embedded base model, `cache:NAME` one that `make NAME` puts into the cache
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    load_in_4bit: bool = False  # nf4 with double quantization (QLoRA, arXiv 2305.14314)
    lora: Mapping[str, Any] | None = None  # keyword arguments of peft.LoraConfig; none is full fine-tuning
    start: str | None = None  # hub id or path of an SFT model or adapter, instead of the recipe's own SFT run
    reference: Literal["sft", "base"] = "sft"
    reference_folder: str | None = None  # of the model or adapter that is the reference, where DPO starts from another
    chat_template: str | None = None  # Jinja text; a recipe may name a .jinja file beside it, whose text is taken in
    chat_template_kwargs: Mapping[str, Any] | None = None  # values for its variables, such as enable_thinking: false
    attn_implementation: str | None = None  # none: what transformers takes for this model
    use_kernels: bool | None = None  # the hub's kernels in place of the model's own layers (library: kernels)
    prefix_sharing: bool | Literal["auto"] = "auto"  # each pair's prompt computed once; auto: where known to win
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class KLSection:
    prompts: int = 64  # held-out prompts sampled at each evaluation
    max_new_tokens: int = 128
    batch_size: int = 8  # prompts sampled together; with the seed it fixes the replies


@dataclass(frozen=True, kw_only=True)
class MonitorSection:
    kl: KLSection = field(default_factory=KLSection)
    max_kl: float | None = 20.0  # nats per reply; acts on kl − 2·stderr, never on noise
    max_accuracy: float | None = 0.95  # of the implicit reward on held-out pairs; as above
    action: Literal["warn", "stop"] = "warn"  # stop: end the run, and keep the best checkpoint inside the limits
    patience: int | None = 3  # evaluations without a better one; none never stops early


@dataclass(frozen=True, kw_only=True)
class SweepSection:
    betas: list[float] = field(default_factory=lambda: [0.5, 0.3, 0.1, 0.05])  # one member each
    max_kl: float = 10.0  # nats per reply; the member with the largest margin below it is chosen


@dataclass(frozen=True, kw_only=True)
class RoundsSection:
    """Iterative DPO (`alignlab rounds`); as in arXiv 2401.10020, three rounds of four replies to a prompt."""

    count: int = 3  # rounds
    samples: int = 4  # replies to each prompt, of which the best and the worst become a pair
    judge: str = "rule"  # rule (the toy's), reward:NAME or llm:MODEL: of the replies, and of each round
    reference: Literal["previous", "sft"] = "previous"  # what DPO is held to: the round before, or the SFT run
    prompts: int = 500  # drawn anew for each round from those that the recipe trains on
    mix_original: float = 0.0  # share of a round's pairs that are the recipe's own training pairs
    seed: int = 0  # of the draws of prompts and replies


@dataclass(frozen=True, kw_only=True)
class TargetsSection:
    """What a run is to reach on the test split: met, missed, or not decidable. None asks nothing."""

    win_rate: float | None = 0.6  # above: over the reference, a tie counting half
    margin: float | None = 0.5  # above: of the implicit reward
    accuracy: float | None = 0.6  # above: of the implicit reward
    kl: float | None = 10.0  # below: nats per reply, from the reference
    perplexity: float | None = 0.05  # within: change of the chosen replies' perplexity from the reference's, a share


@dataclass(frozen=True, kw_only=True)
class EvaluateSection:
    targets: TargetsSection = field(default_factory=TargetsSection)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    path: Path
    about: str
    data: DataSection
    model: ModelSection
    sft: Mapping[str, Any]  # keyword arguments of trl.SFTConfig, as written
    dpo: Mapping[str, Any]  # keyword arguments of trl.DPOConfig, as written
    monitor: MonitorSection
    sweep: SweepSection
    evaluate: EvaluateSection
    rounds: RoundsSection
    sources: Mapping[str, str]  # "dpo.beta" -> "recipes/mistral.yaml:9" or "command line: 'dpo.beta=0.3'"
    kto: Mapping[str, Any] = field(default_factory=dict)  # of trl.KTOConfig
    orpo: Mapping[str, Any] = field(default_factory=dict)  # of trl.experimental.orpo.ORPOConfig
    overrides: tuple[str, ...] = ()  # those of the command line that change a value, as key=JSON, sorted


SECTIONS = {
    "data": DataSection,
    "model": ModelSection,
    "monitor": MonitorSection,
    "sweep": SweepSection,
    "evaluate": EvaluateSection,
    "rounds": RoundsSection,
}
_LORA = ("model", "lora")
_TEMPLATE = ("model", "chat_template")
_PATHS = (("data", "path"), ("data", "sft", "path"))
_MODEL = ("model", "name")
IN_CACHE = "cache:"  # opens the name of a model that a `make` of its name puts into alignlab's cache
_ABSENT = object()
LONGEST_NAME = 100  # characters of a run's
LONGEST_OWN = 40  # of a run's on data of the command line
_OWN_DATA = "data.path"


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe with what it extends and the overrides merged in; RecipeError names every fault of it at once.

    A name is looked up in ./recipes, then among the shipped recipes; with a slash or .yaml it is a path.
    """
    path = find_recipe(str(name_or_path))
    faults: list[str] = []
    in_file = read_recipe(path, faults)
    given = read_overrides(overrides, faults)
    values, sources = _check(merge(in_file, given), faults)
    if faults:
        raise RecipeError("\n".join(dict.fromkeys(faults)))
    before, _ = _check(in_file, [])
    return Recipe(
        name=_name(path),
        path=path,
        about=values.get(("about",), ""),
        data=_build(DataSection, ("data",), values),
        model=_build(ModelSection, ("model",), values),
        monitor=_build(MonitorSection, ("monitor",), values),
        sweep=_build(SweepSection, ("sweep",), values),
        evaluate=_build(EvaluateSection, ("evaluate",), values),
        rounds=_build(RoundsSection, ("rounds",), values),
        **{stage: _under((stage,), values) for stage in STAGES},
        sources={".".join(key): where for key, where in sources.items()},
        overrides=tuple(
            f"{'.'.join(key)}={json.dumps(value, ensure_ascii=False)}"
            for key, value in sorted(values.items())
            if sources[key].startswith("command line") and before.get(key, _own_default(key)) != value
        ),
    )


def _name(path: Path) -> str:
    """The file's name; of a run's own `recipe.yaml` that of the recipe it was made from (runs/NAME/dpo/recipe.yaml)."""
    return path.absolute().parts[-3] if (path.parent / "manifest.json").is_file() else path.stem


def _build(section: type, prefix: Key, values: Mapping[Key, Any]) -> Any:
    """The section whose keys stand below `prefix`, defaults where nothing was written."""
    hints, given = get_type_hints(section), {}
    for each in fields(section):
        key = (*prefix, each.name)
        if is_dataclass(hints[each.name]):
            given[each.name] = _build(hints[each.name], key, values)
        elif key == _LORA:
            given[each.name] = _under(key, values) or values.get(key)
        elif key in values:
            given[each.name] = values[key]
    return section(**given)


def _under(prefix: Key, values: Mapping[Key, Any]) -> dict[str, Any]:
    return {key[-1]: value for key, value in values.items() if key[:-1] == prefix}


@cache
def _settings() -> Mapping[Key, Setting]:
    """Every key that a recipe may hold."""
    known: dict[Key, Setting] = {("about",): Setting(("str",), default="")}
    known |= {key: of for name, section in SECTIONS.items() for key, of in _settings_of(section, (name,))}
    for library, settings in library_settings().items():
        prefix = (library,) if library in STAGES else _LORA
        known.update({(*prefix, name): of for name, of in settings.items()})
    for stage in STAGES:  # unset, it is the sum of data's two limits, not TRL's 1024
        known[stage, "max_length"] = replace(known[stage, "max_length"], default=None)
    return known


def _settings_of(section: type, prefix: Key) -> Iterator[tuple[Key, Setting]]:
    hints = get_type_hints(section)
    for each in fields(section):
        key = (*prefix, each.name)
        if is_dataclass(hints[each.name]):
            yield from _settings_of(hints[each.name], key)
        elif key != _LORA:
            default = each.default if each.default_factory is MISSING else each.default_factory()
            yield key, setting(hints[each.name], default)


def _own_default(key: Key) -> Any:
    """What an unwritten key of alignlab's own sections holds; TRL's and PEFT's are left to them."""
    ours = key in _settings() and key[0] not in STAGES and key[:2] != _LORA
    return _settings()[key].default if ours else _ABSENT


# --- checking ---


def _check(written: Mapping[Key, Written], faults: list[str]) -> tuple[dict[Key, Any], dict[Key, str]]:
    """The sound values by key, and where each was written; every other becomes a fault."""
    gathered = _gather(written, faults)
    values: dict[Key, Any] = {}
    for key, item in gathered.items():
        try:
            values[key] = _read(key, item)
        except ValueError as error:
            faults.append(f"{'.'.join(key)} is {_brief(item.value)} ({item.where}); {error}")
    for key, of in _settings().items():
        if of.required and key[:2] != _LORA and key not in gathered:
            faults.append(
                f"{'.'.join(key)} is missing; write it in the recipe or as {'.'.join(key)}=… on the command line"
            )
    broken = gathered.keys() - values.keys()
    faults.extend(_conflicts(values, broken, {key: item.where for key, item in gathered.items()}))
    return values, {key: gathered[key].where for key in values}


def _gather(written: Mapping[Key, Written], faults: list[str]) -> dict[Key, Written]:
    """What was written, by the setting it belongs to: a mapping's keys come together; strangers become faults."""
    sections = {key[:depth] for key in _settings() for depth in range(1, len(key))}
    gathered: dict[Key, Written] = {}
    for key, item in written.items():
        head = next((key[:depth] for depth in range(1, len(key) + 1) if key[:depth] not in sections), key)
        if head in sections:
            if head == _LORA and item.value in (None, {}):
                gathered[head] = item
            elif item.value != {}:
                faults.append(f"{'.'.join(key)} is {_brief(item.value)} ({item.where}); expected keys below it")
        elif reason := _refusal(head):
            faults.append(f"{'.'.join(head)} {reason[0]} ({item.where}){reason[1]}")
        else:
            whole = gathered[head].value if head in gathered and len(key) > len(head) else {}
            value = _nested(whole, key[len(head) :], item.value)
            gathered[head] = replace(gathered.get(head, item), value=value)
    return gathered


def _nested(whole: Mapping[str, Any], below: Key, value: Any) -> Any:
    return {**whole, below[0]: _nested(whole.get(below[0], {}), below[1:], value)} if below else value


def _refusal(key: Key) -> tuple[str, str] | None:
    """Why `key` may not be written, and the remedy."""
    name, bare = ".".join(key), key[-1]
    if why := OWNED.get(name) or (OWNED.get(bare) if key[0] in STAGES else None):
        return "is set by alignlab", f"; {why}"
    if key in _settings():
        return None
    elsewhere = [other for other in _settings() if other[-1] == bare and _refusal(other) is None]
    elsewhere = [other for other in elsewhere if other[0] not in ("kto", "orpo")] or elsewhere
    if "." in bare:
        remedy = "; keys are nested: write dpo: {beta: 0.3}, not dpo.beta: 0.3"
    elif bare in INSTEAD:
        remedy = f"; {INSTEAD[bare]}"
    elif elsewhere:
        remedy = f"; write {' or '.join(map('.'.join, elsewhere))}"
    else:
        depth = len(key) - 1
        remedy = suggest(bare, dict.fromkeys(other[depth] for other in _settings() if other[:depth] == key[:-1]))
    return "is not a setting", remedy


def remedy_for(word: str) -> str:
    """What to write instead of an option of this name that no command has; nothing where no setting is near."""
    refusal = _refusal((word,))
    return refusal[1] if refusal else ""


def _read(key: Key, item: Written) -> Any:
    if key == _LORA:
        return item.value
    asked = item.value if isinstance(item.value, list) else [item.value]
    if key == ("dpo", "loss_type") and (
        other := next((name for name in asked if str(name).lower() in OBJECTIVES), None)
    ):
        raise ValueError(OBJECTIVES[str(other).lower()])
    value = _settings()[key].read(item.value)
    limit = LIMITS.get(".".join(key)) or (LIMITS.get(key[-1]) if key[0] in STAGES else None)
    if limit and value is not None and not limit[0](value):
        raise ValueError(f"expected {limit[1]}")
    if key == _MODEL and value.startswith(IN_CACHE):
        return str(model_folder(value.removeprefix(IN_CACHE)))
    if key in _PATHS and value:
        return [_beside(one, item.folder) for one in value] if isinstance(value, list) else _beside(value, item.folder)
    return _template_text(value, item.folder) if key == _TEMPLATE and value else value


def model_folder(name: str) -> Path:
    """Where `make NAME` puts the model that a recipe names `cache:NAME`."""
    return cache_folder() / "models" / name


def _beside(value: str, folder: Path) -> str:
    """The path of what lies beside the recipe under this name; else the name, for the working folder or the hub."""
    return shown(folder / value) if value and (folder / value).exists() else value


def _template_text(value: str, folder: Path) -> str:
    if "{" in value:  # Jinja itself, as in the recipe.yaml of a run
        return value
    for path in (folder / value, SHIPPED / value):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise ValueError(f"no such file in {shown(folder)}")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _conflicts(values: Mapping[Key, Any], broken: Set[Key], where: Mapping[Key, str]) -> Iterator[str]:
    """The faults of settings that are sound each, but not together."""
    has_lora = any(key[:2] == _LORA for key in (*values, *broken)) and values.get(_LORA, {}) is not None
    for keys, conflict in TOGETHER:
        paths = [tuple(key.split(".")) for key in keys]
        if broken.isdisjoint(paths) and (found := conflict(*(values.get(p, _default(p, has_lora)) for p in paths))):
            places = dict.fromkeys(where[p] for p in paths if p in where)
            yield f"{found} ({', '.join(places) or 'by default'})"


def _default(key: Key, has_lora: bool) -> Any:
    return has_lora if key == _LORA else _settings()[key].default


# --- a recipe's identity ---


def consumed(recipe: Recipe, stage: str) -> dict[str, Any]:
    """What a stage's result depends on: data, model and the stage's own section, without its logging.

    What starts from the base model leaves out the keys of `model` that say what else to start from; all but SFT leave
    out those of `data` that only SFT reads.
    """
    data, model = asdict(recipe.data), asdict(recipe.model)
    if stage != "sft":
        del data["sft"]
    if not STAGES[stage].from_sft:
        del model["start"], model["reference"], model["reference_folder"]
    if stage != "dpo":
        del model["prefix_sharing"]
    logging = ("disable_tqdm", "log_level", "log_level_replica", "log_on_each_node")
    own = {k: v for k, v in getattr(recipe, stage).items() if not k.startswith("logging_") and k not in logging}
    return {"data": data, "model": model, stage: own}


def run_name(recipe: Recipe, stage: str) -> str:
    """The stage and the overrides that it consumes: `dpo`, `dpo-beta0.3`, `sft-max_pairs100`.

    Data of the command line is named by its file's stem: two of one stem are one name, whose second run is refused. An
    override that repeats the recipe's own value changes nothing and names nothing. Where the readable name
    could stand for other overrides as well (a path, a long list), a digest of them follows it.
    """
    inputs = consumed(recipe, stage)
    chosen = {key: _at(inputs, key) for key in (o.partition("=")[0] for o in recipe.overrides)}
    chosen = {key: value for key, value in chosen.items() if value is not _ABSENT}
    path = chosen.pop(_OWN_DATA, None)
    parts = [_part(_short(key, stage), value, _takes_text(key)) for key, value in chosen.items()]
    stem = [(_stem(path), True)] if path else []
    name = "-".join([stage, *(text for text, _ in [*stem, *parts])])
    longest = LONGEST_OWN if path else LONGEST_NAME
    if all(exact for _, exact in parts) and len(name) <= longest:
        return name
    digest = sha256(json.dumps([path, chosen] if path else chosen).encode()).hexdigest()[:8]
    return f"{name[: longest - 9]}-{digest}"


def _stem(path: str | list[str]) -> str:
    """`good_pairs` of `data/good pairs.jsonl.gz`; of several paths that of the first, and how many more."""
    first, *more = [path] if isinstance(path, str) else path
    stem = re.sub(r"\.[a-z]+(\.gz)?$", "", Path(first).name.lower())
    return re.sub("[^A-Za-z0-9_.]+", "_", stem).strip("_.") + f"_{len(more)}_more" * bool(more) or "data"


def _at(inputs: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, or _ABSENT."""
    value: Any = inputs
    for name in key.split("."):
        value = value.get(name, _ABSENT) if isinstance(value, Mapping) else _ABSENT
    return value


def _short(key: str, stage: str) -> str:
    """The key's last component where it is the stage's own or nothing else that is consumed ends in it."""
    last = key.rpartition(".")[2]
    alike = [".".join(k) for k in _settings() if k[-1] == last and k[0] in ("data", "model", stage)]
    return last if key == f"{stage}.{last}" or (key in alike and len(alike) == 1) else key


def _takes_text(key: str) -> bool:
    found = _settings().get(tuple(key.split(".")))
    return found is None or "str" in found.types


def _part(key: str, value: Any, takes_text: bool) -> tuple[str, bool]:
    """`beta0.3` or `loss_type=sigmoid+sft`, and whether key and value can be read back from it."""
    if value is None or isinstance(value, bool):
        return f"{key}={json.dumps(value)}", True
    if isinstance(value, (int, float)) and abs(value) < math.inf:
        number = repr(value).removesuffix(".0")
        return (key + number if key[-1].isalpha() else f"{key}={number}"), True
    words = value if isinstance(value, list) else [value]
    text = "+".join(str(word) for word in words)
    plain = words and all(isinstance(word, str) and re.fullmatch("[a-z][a-z0-9_]*", word) for word in words)
    if plain and text not in ("null", "true", "false") and (len(words) > 1 or takes_text is isinstance(value, str)):
        return f"{key}={text}", True
    return f"{key}={re.sub('[^A-Za-z0-9_.]+', '_', text).strip('_')[:40]}", False


# --- written back ---


class _Dumper(yaml.SafeDumper):
    """YAML with texts of several lines, such as chat templates, written as they read."""


_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else "")
)


def write_yaml(recipe: Recipe) -> str:
    """The resolved recipe, which `load_recipe` reads back as an equal one; no other file is needed."""
    return yaml.dump(sections_of(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def sections_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe's settings as plain dicts, in the order in which a recipe is written."""
    plain = asdict(recipe)
    names = ("about", "data", "model", *stages_of(recipe), "monitor", "sweep", "evaluate", "rounds")
    return {name: plain[name] for name in names}


def stages_of(recipe: Recipe) -> list[str]:
    """The stages that a recipe has settings for; SFT and DPO always."""
    return [stage for stage in STAGES if stage in ("sft", "dpo") or getattr(recipe, stage)]
