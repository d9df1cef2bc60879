"""What a run's models are made of, and the models themselves: adapters of one base share it in memory."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from alignlab.disk import digest
from alignlab.errors import ModelError, RunError
from alignlab.models import load as models
from alignlab.recipe.load import Recipe, load_recipe
from alignlab.recipe.objectives import STAGES
from alignlab.runs.evaluation import ModelFacts
from alignlab.runs.run import Run, parent_of
from alignlab.runs.selection import names_of
from alignlab.train.stages import with_weights


@dataclass(frozen=True)
class Candidate:
    """One model to evaluate, by what it is made of."""

    name: str
    recipe: Recipe  # of the run it belongs to, with the embedded base's folder in place of its name
    weights: str  # hub id or folder
    adapter: str | None
    run: Run | None  # none for a base model
    reference: Candidate | None = None  # what its implicit reward and its KL are against
    key: str = field(default="", compare=False)  # a digest of the content: weights, adapter, dtype, quantization

    @property
    def home(self) -> Path:
        """Where its replies and scores are kept, beside the runs of its recipe."""
        assert self.run is not None
        return self.run.path.parent / "replies" / f"{self.key[:16]}.jsonl"

    @property
    def base(self) -> tuple[str, str, bool]:
        section = self.recipe.model
        return self.weights, section.dtype, section.load_in_4bit


@dataclass(frozen=True)
class ModelSet:
    """The models of an evaluation; the others are compared with `against`, and cases are of `ours`."""

    candidates: Sequence[Candidate]
    against: Candidate

    @property
    def ours(self) -> Candidate:
        return self.candidates[-1]

    @property
    def names(self) -> list[str]:
        return [candidate.name for candidate in self.candidates]


def choose_models(runs: Sequence[Run], others: Mapping[str, str] | None = None) -> ModelSet:
    """Of one run its base, what it started from, and itself, compared with its start; of several, with the first.

    `others` are models that are no runs: a name → a folder. They stand in front.
    """
    hashes: dict[str, Any] = {}
    if len(runs) > 1:
        found = [_of_run(run, name, hashes) for run, name in zip(runs, names_of(runs), strict=True)]
        against = found[0]
    else:
        found = _with_its_start(runs[0], hashes)
        against = found[-2]
    return ModelSet([*(_of_folder(*each, found[-1], hashes) for each in (others or {}).items()), *found], against)


def _of_folder(name: str, folder: str, like: Candidate, hashes: dict[str, Any]) -> Candidate:
    """A model that is no run, written to as the runs are; RunError where it has other tokens."""
    if not Path(folder).is_dir():
        raise ModelError(f"--models {name}={folder}: no such folder; its replies may come with --outputs {name}=FILE")
    section = replace(like.recipe.model, start=folder)
    if not (Path(folder) / models.ADAPTER_FILE).is_file():
        ours, theirs = models.load_tokenizer(like.recipe.model), models.load_tokenizer(section, folder)
        if ours.get_vocab() != theirs.get_vocab():
            raise RunError(
                f"--models {name}={folder}: its tokenizer is not the runs', so that a perplexity means something else "
                f"for each; give its replies instead, with --outputs {name}=FILE"
            )
    start = models.find_start(section, None)
    return _candidate(name, replace(like.recipe, model=section), start.weights, start.adapter, like.run, hashes)


def _with_its_start(run: Run, hashes: dict[str, Any]) -> list[Candidate]:
    last = _of_run(run, run.manifest.stage, hashes)
    base = _candidate("base", last.recipe, last.recipe.model.name, None, run, hashes)
    if not STAGES[run.manifest.stage].from_sft:
        return [base, last]
    start = _start(run, last.recipe)
    started = _candidate("sft", last.recipe, start.weights, start.adapter, run, hashes)
    return [base, last] if started.key == base.key else [base, started, last]


def _of_run(run: Run, name: str, hashes: dict[str, Any]) -> Candidate:
    recipe = with_weights(load_recipe(run.recipe_file))
    _refuse_other_base(run, recipe, hashes)
    own = str(run.model)
    lora = recipe.model.lora is not None
    if not STAGES[run.manifest.stage].from_sft:
        is_measured = run.manifest.stage == "orpo"
        base = _candidate("base", recipe, recipe.model.name, None, run, hashes) if is_measured else None
        return _candidate(name, recipe, *((recipe.model.name, own) if lora else (own, None)), run, hashes, base)
    start = _start(run, recipe)
    against = _reference(run, recipe, start, hashes)
    return _candidate(name, recipe, *((start.weights, own) if lora else (own, None)), run, hashes, against)


def _start(run: Run, recipe: Recipe) -> models.Start:
    return models.find_start(recipe.model, _parent(run))


def _parent(run: Run) -> Path | None:
    """The model folder of the SFT run that a DPO run started from; none where it started from `model.start`."""
    recorded = run.manifest.parent
    if not recorded or not recorded.run:
        return None
    parent = parent_of(run)
    if parent is None or not parent.model.is_dir():
        raise RunError(f"{run.path} was trained from {recorded.run}, which is not there; bring it back beside the run")
    if models.weights_hash(parent.model) != recorded.weights:
        raise RunError(
            f"{parent.path} is not what {run.path} was trained from: its weights have changed since; "
            f"train the DPO run again with --force, or bring the older SFT run back"
        )
    return parent.model


def _reference(run: Run, recipe: Recipe, start: models.Start, hashes: dict[str, Any]) -> Candidate:
    if recipe.model.reference == "base":
        return _candidate("base", recipe, recipe.model.name, None, run, hashes)
    if folder := recipe.model.reference_folder:
        weights, adapter = (start.weights, folder) if start.adapter else (folder, None)
        return _candidate("reference", recipe, weights, adapter, run, hashes)
    return _candidate("sft", recipe, start.weights, start.adapter, run, hashes)


def _candidate(name, recipe: Recipe, weights: str, adapter, run: Run, hashes, reference=None) -> Candidate:
    section = recipe.model
    facts = {"weights": _content(recipe, weights, hashes), "adapter": adapter and _content(recipe, adapter, hashes)}
    key = digest({**facts, "dtype": section.dtype, "4bit": section.load_in_4bit, "lora": section.lora is not None})
    return Candidate(name, recipe, weights, adapter, run, reference, key)


def _content(recipe: Recipe, name: str, hashes: dict[str, Any]) -> Any:
    """What tells these weights from any others: the hash of a folder's, or the hub's name and revision."""
    if name not in hashes:
        local = Path(name).is_dir()
        hashes[name] = models.weights_hash(Path(name)) if local else [name, recipe.model.revision]
    return hashes[name]


def _refuse_other_base(run: Run, recipe: Recipe, hashes: dict[str, Any]) -> None:
    trained_on = run.manifest.base and run.manifest.base.weights
    if trained_on and Path(recipe.model.name).is_dir() and _content(recipe, recipe.model.name, hashes) != trained_on:
        raise RunError(
            f"the base model at {recipe.model.name} is not the one that {run.path} was trained on; "
            f"bring that one back, or train the run again with --force"
        )


def model_facts(candidate: Candidate) -> ModelFacts:
    """What stands in eval.json of one model."""
    own, reference = (c and (c.adapter or c.weights) for c in (candidate, candidate.reference))
    facts = ModelFacts(name=candidate.name, path=own, content=candidate.key, reference=reference)
    run = trained_by(candidate)
    if run is None:
        return facts
    cost = {name: getattr(run.manifest, name) for name in ("training_seconds", "peak_memory_gib")}
    return replace(facts, path=str(run.path), **cost)


def trained_by(candidate: Candidate) -> Run | None:
    """The run whose model this is; none of a base model, or one from elsewhere."""
    own = Path(candidate.adapter or candidate.weights)
    run = Run(own.parent)
    return run if own.name == "model" and run.has_started else None


def refuse_what_cannot_be_compared(candidates: Sequence[Candidate]) -> list[str]:
    """RunError where prompts or perplexities would not mean the same; warnings where test pairs may have leaked."""
    first, said = candidates[0], []
    seen = {id(first.run): _way_of_writing(first)}
    for other in candidates[1:]:
        if id(other.run) not in seen:
            seen[id(other.run)] = _way_of_writing(other)
        for what, ours, theirs in zip(
            ("tokenizers", "prompt formats", "chat templates"), seen[id(first.run)], seen[id(other.run)], strict=True
        ):
            if ours != theirs:
                raise RunError(
                    f"{first.name} and {other.name} cannot be compared, since their {what} differ ({ours[:40]} and "
                    f"{theirs[:40]}): a perplexity per token means something else for each; evaluate each by itself"
                )
        ours, theirs = (c.run.manifest.data and c.run.manifest.data.fingerprint for c in (first, other))
        if ours != theirs:
            said.append(
                f"{other.name} was made from other data than {first.name}: what is held out from one may have trained "
                f"the other"
            )
    return said


def _way_of_writing(candidate: Candidate) -> tuple[str, str, str]:
    section = candidate.recipe.model
    tokenizer = models.load_tokenizer(section)
    words = digest(sorted(tokenizer.get_vocab().items()))[:8]
    return f"{len(tokenizer)} words, {words}", candidate.recipe.data.format, str(tokenizer.chat_template)


class LoadedModels:
    """The models that are in memory: one base with any number of adapters, or full models one after another.

    4-bit and dtype are as in training. What is not held any longer is given back before more is loaded.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, str, bool], PreTrainedModel | PeftModel] = {}

    def hold(self, *candidates: Candidate) -> None:
        """Loads what these need, and lets everything else go."""
        needed = {candidate.base for candidate in candidates}
        for base in self._held.keys() - needed:
            del self._held[base]
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for candidate in candidates:
            if candidate.base not in self._held:
                self._held[candidate.base] = models.load_weights(candidate.recipe.model, candidate.weights).eval()
            if candidate.adapter:
                self._add_adapter(candidate)

    def _add_adapter(self, candidate: Candidate) -> None:
        model = self._held[candidate.base]
        name = candidate.key
        if name in getattr(model, "peft_config", {}):
            return
        with models.loading("adapter", candidate.adapter, candidate.recipe.model):
            if isinstance(model, PeftModel):
                model.load_adapter(candidate.adapter, adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, candidate.adapter, adapter_name=name)
        self._held[candidate.base] = model.eval()

    @contextlib.contextmanager
    def on(self, candidate: Candidate) -> Iterator[PreTrainedModel | PeftModel]:
        """The model that answers as the candidate does, while the context lasts."""
        model = self._held.get(candidate.base)
        missing = candidate.adapter and candidate.key not in getattr(model, "peft_config", {})
        if model is None or missing:
            self.hold(candidate)
            model = self._held[candidate.base]
        if not isinstance(model, PeftModel):
            yield model
        elif candidate.adapter:
            model.set_adapter(candidate.key)
            yield model
        else:
            with model.disable_adapter():
                yield model
