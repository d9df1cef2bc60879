"""`train_sft`, `train_dpo`, `train_kto` and `train_orpo`: recipe → run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, PrinterCallback, set_seed
from transformers.trainer_callback import ProgressCallback

from alignlab.data.format import FIXED_DAY, Format, Stops
from alignlab.data.pairing import CUT
from alignlab.data.prepare import Prepared, is_labelled, kto_rows, prepare, prepare_replies, sft_rows
from alignlab.data.splits import SPLITS
from alignlab.disk import digest, filling, seal
from alignlab.errors import AlignlabError, DataError, RunError
from alignlab.measure import heldout
from alignlab.memory.page import plan_line
from alignlab.models import load as models
from alignlab.models import pretrain
from alignlab.recipe.arguments import TrainingContext, trl_arguments
from alignlab.recipe.fields import library_settings
from alignlab.recipe.load import ModelSection, Recipe, consumed, run_name, write_yaml
from alignlab.recipe.objectives import STAGES, config_class
from alignlab.recipe.show import far_from_usual
from alignlab.runs import run as runs
from alignlab.runs.run import Parent, Run
from alignlab.train import callbacks
from alignlab.train.figures import figures_on_test, held_out_prompts
from alignlab.train.launch import check_world, refuse_different_recipes, refuse_sharded_4bit, together
from alignlab.train.reference import (
    StoredPairs,
    complete,
    identify_reference,
    look_up,
    pairs_scored_online,
    worth_storing,
)
from alignlab.train.samples import Samples
from alignlab.train.store import ReferenceIdentity
from alignlab.train.trainers import AlignDPOTrainer, AlignKTOTrainer, AlignSFTTrainer

log = logging.getLogger(__name__)

TRAINERS = {"dpo": AlignDPOTrainer, "kto": AlignKTOTrainer}
BATCH = "per_device_train_batch_size"


@together()
def train_sft(recipe: Recipe, *, root: Path = Path("runs"), name: str | None = None, force: bool = False) -> Run:
    """Supervised fine-tuning on the chosen replies (loss over the reply only); a finished run is left as it is."""
    with _opened(recipe, "sft", root, name, force) as run:
        section = with_weights(recipe).model
        tokenizer, pairs = prepare_data(recipe, "sft")
        replies = prepare_replies(recipe.data, tokenizer, pairs)
        base = models.identify(section)
        made_from = _made_from(recipe, tokenizer, pairs, base)
        if replies is not pairs:
            made_from["data for SFT"] = replies.fingerprint
        if _is_made(run, made_from):
            return run
        _note_data(run, pairs)
        rows, held_out = sft_rows(replies.train), sft_rows(replies.validation)
        doubles = len(replies.train) - len(rows)
        log.info("data: %d replies to learn from; %d more rows hold one of them again", len(rows), doubles)
        if replies is not pairs:
            run.note(sft_data=_facts_of(replies))
        checkpoint = _resume_point(run)
        args = trl_config(recipe, "sft", _here(run.checkpoints, len(rows), checkpoint))
        config = models.load_config(section)
        models.check_positions(config, args.max_length, "sft")
        models.check_vocabulary(config, tokenizer, rows)
        set_seed(args.seed)
        weights = models.load_weights(section)
        policy = models.add_adapter(weights, section) if section.lora is not None else weights
        trainer = AlignSFTTrainer(policy, args, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer)
        if isinstance(policy, PeftModel):
            models.settle_adapters(policy, section)
        run.note(base=base, base_probe=trainer.probe(trainer.model, pairs.validation))
        _train(trainer, recipe, run, pairs, checkpoint)
        scores = heldout.score_pairs(trainer.model, pairs.test, tokenizer.pad_token_id)
        probe = trainer.probe(trainer.model, pairs.validation)
        _finish(trainer, run, probe=probe, test={"perplexity": heldout.reply_perplexity(scores), "n": len(pairs.test)})
    return run


@together()
def train_dpo(recipe: Recipe, *, root: Path = Path("runs"), name: str | None = None, force: bool = False) -> Run:
    """DPO from the SFT run of the same recipe, or from `model.start`; a finished run is left as it is."""
    return _train_preferences(recipe, "dpo", root, name, force)


@together()
def train_kto(recipe: Recipe, *, root: Path = Path("runs"), name: str | None = None, force: bool = False) -> Run:
    """KTO from where DPO starts, on single replies with a label or on pairs taken apart."""
    return _train_preferences(recipe, "kto", root, name, force)


@together()
def train_orpo(recipe: Recipe, *, root: Path = Path("runs"), name: str | None = None, force: bool = False) -> Run:
    """ORPO from the base model, in one stage; MachineError where the installed TRL has it no longer."""
    config_class("orpo")
    return _train_preferences(recipe, "orpo", root, name, force)


def _train_preferences(recipe: Recipe, stage: str, root: Path, name: str | None, force: bool) -> Run:
    sft, section, start = _start(recipe, stage, root)
    parent = _parent(sft, start) if STAGES[stage].from_sft else None
    with _opened(recipe, stage, root, name, force) as run:
        tokenizer, pairs = prepare_data(recipe, stage)
        base = models.identify(section)
        made_from = _made_from(recipe, tokenizer, pairs, base)
        if parent:
            made_from["start weights"] = parent.weights or parent.start
        if folder := section.reference_folder:
            made_from["reference weights"] = models.weights_hash(Path(folder))
        if _is_made(run, made_from):
            return run
        _note_data(run, pairs)
        checkpoint = _resume_point(run)
        trainer = _preference_trainer(recipe, stage, section, start, run.checkpoints, tokenizer, pairs, checkpoint)
        run.note(base=base, parent=parent, reference=start.reference)
        log.info("reference: %s", start.reference)
        trainer.identity = _identify_reference(trainer, section, start, base)
        if isinstance(trainer, AlignDPOTrainer):
            pairs = _with_stored_reference(trainer, pairs, run)
        _check_start(trainer, stage, section, pairs, sft)
        _train(trainer, recipe, run, pairs, checkpoint)
        began = time.monotonic()
        figures = figures_on_test(trainer, recipe, pairs, run)
        run.note(figures_seconds=round(time.monotonic() - began, 1))
        _finish(trainer, run, test=figures)
    return run


def prepare_dpo(recipe: Recipe, *, root: Path = Path("runs"), runs: int = 1) -> None:
    """What several DPO runs share, made once: the SFT run, the prepared rows, and the reference's log-probabilities.

    The last are stored where `runs` runs together would ask the reference for more pairs than there are to store.
    """
    _, section, start = _start(recipe, "dpo", root)
    tokenizer, pairs = prepare_data(recipe, "dpo")
    with tempfile.TemporaryDirectory() as folder:
        trainer = _preference_trainer(recipe, "dpo", section, start, Path(folder), tokenizer, pairs)
        trainer.identity = _identify_reference(trainer, section, start, models.identify(section))
        if trainer.identity is None:
            return
        found, online = _look_up(trainer, pairs)
        if found.missing and worth_storing(found, runs * online):
            with trainer.scoring_reference() as score:
                log.info("%s", complete(found, score)[1])


def _start(recipe: Recipe, stage: str, root: Path) -> tuple[Run | None, ModelSection, models.Start]:
    """What a stage starts from: the SFT run, where the recipe has one, and the model with its weights.

    ORPO starts from the base model and trains without a reference; what stands for it is what figures are told from.
    """
    models.refuse_unmade(recipe.model.name)  # before the line that says what comes first
    if not STAGES[stage].from_sft:
        section = dataclasses.replace(with_weights(recipe).model, start=None, reference="base")
        told = f"none in the loss; KL, rewards and win rate are told from the base model {recipe.model.name}"
        return None, section, models.Start(section.name, None, told)
    sft = None if recipe.model.start else _sft_run(recipe, root)
    section = with_weights(recipe).model
    return sft, section, models.find_start(section, sft.model if sft else None)


def _preference_trainer(
    recipe: Recipe,
    stage: str,
    section: ModelSection,
    start: models.Start,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Prepared,
    checkpoint: Path | None = None,
) -> Any:
    """The stage's trainer, with the policy and the model that it is compared with."""
    own = getattr(recipe, stage)
    rows = {"train_dataset": pairs.train, "eval_dataset": pairs.validation}
    if stage == "kto":
        batch, seed = (own.get(key, library_settings()[stage][key].default) for key in (BATCH, "seed"))
        rows = {name: kto_rows(of, batch, seed) for name, of in rows.items()}
    args = trl_config(recipe, stage, _here(folder, len(rows["train_dataset"]), checkpoint))
    config = models.load_config(section)
    models.check_positions(config, args.max_length, stage)
    models.check_vocabulary(config, tokenizer, pairs.train)
    set_seed(args.seed)
    policy, reference = models.load_policy(section, start)
    if stage == "orpo":
        from alignlab.train.orpo import AlignORPOTrainer

        trainer = AlignORPOTrainer(policy, args, **rows, processing_class=tokenizer)
        trainer.ref_model = reference and trainer.accelerator.prepare_model(reference, evaluation_mode=True)
    else:
        trainer = TRAINERS[stage](policy, reference, args, **rows, processing_class=tokenizer)
    if isinstance(policy, PeftModel):
        models.settle_adapters(policy, section, start.adapter)
    return trainer


def trl_config(recipe: Recipe, stage: str, here: TrainingContext) -> Any:
    """TRL's own config of a stage."""
    return config_class(stage)(**trl_arguments(recipe, stage, here))


def _processes() -> PartialState:
    """The processes of this launch; without a GPU accelerate counts them only when told to stay on the CPU."""
    return PartialState(cpu=not torch.cuda.is_available())


def _here(folder: Path, rows: int, checkpoint: Path | None = None) -> TrainingContext:
    world = _processes().num_processes
    return TrainingContext(folder, rows, not torch.cuda.is_available(), world, checkpoint is not None)


@contextlib.contextmanager
def _opened(recipe: Recipe, stage: str, root: Path, name: str | None, force: bool) -> Iterator[Run]:
    models.refuse_unmade(recipe.model.name)
    path = root / recipe.name / (run_name(recipe, stage) if name is None else runs.check_name(name))
    state = _processes()
    check_world(state.num_processes)
    refuse_sharded_4bit(recipe.model)
    refuse_different_recipes(gather_object([write_yaml(recipe)]))
    if not state.is_main_process:
        state.wait_for_everyone()
        yield Run(path, is_writer=False)
        return
    with runs.opened(path, stage, consumed(recipe, stage), write_yaml(recipe), force=force) as run:
        state.wait_for_everyone()
        if not run.is_finished:
            _say_what_it_needs(recipe, stage, run)
            callbacks.start_peak_memory()
        with together():  # so that the manifest has this as its reason
            yield run


def _made_from(recipe: Recipe, tokenizer, pairs: Prepared, base: Mapping[str, Any]) -> dict[str, Any]:
    """By content, what decides the result of a run besides its settings."""
    template = tokenizer.chat_template if recipe.data.format == "chat" else None
    return {
        "data": pairs.fingerprint,
        "base weights": base.get("weights") or base["revision"],
        "chat template": template and digest(template),
        "stops": _stops(recipe, tokenizer).said,
    }


def _stops(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Stops:
    return models.find_stops(recipe.model, Format(recipe.data.format, tokenizer))


def _is_made(run: Run, made_from: Mapping[str, Any]) -> bool:
    """Whether the run is finished; RunError where it was made from something else than it would be now."""
    runs.refuse_other_origin(run, made_from)
    if run.is_finished:
        _say_finished(run.path, run.manifest.stop_reason)
        return True
    run.note(made_from=made_from)
    return False


@functools.cache  # once a process: each member of a sweep asks for the SFT run
def _say_finished(path: Path, why: str) -> None:
    log.info("%s is finished (%s); --force trains it again", path, why)


def _say_what_it_needs(recipe: Recipe, stage: str, run: Run) -> None:
    """One line before anything large is loaded, and in the manifest: the memory that is planned, and on what."""
    cuda = torch.cuda.is_available()
    line, planned = plan_line(recipe, stage, cuda=cuda)
    log.info("%s", line)
    for key, why in far_from_usual(recipe).items():
        if key.startswith(stage):
            log.warning("%s: %s", key, why)
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if cuda else []
    run.note(planned_gib=planned, machine={**dataclasses.asdict(run.manifest.machine), "gpus": gpus})


def _sft_run(recipe: Recipe, root: Path) -> Run:
    path = root / recipe.name / run_name(recipe, "sft")
    if _processes().num_processes > 1 and not Run(path).is_finished:
        raise RunError(f"{path} is not finished; run `alignlab sft {recipe.name}` under the launcher first")
    if not Run(path).is_finished:
        log.info("%s is not there yet: SFT comes first", path)
    return train_sft(recipe, root=root)


def with_weights(recipe: Recipe) -> Recipe:
    """The recipe with the folder of the embedded base model in place of its name."""
    if recipe.model.name != "toy":
        return recipe
    with _processes().main_process_first():
        folder = pretrain.base_model(recipe.data.toy)
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, name=str(folder)))


def prepare_data(recipe: Recipe, stage: str = "dpo") -> tuple[PreTrainedTokenizerBase, Prepared]:
    """The recipe's tokenizer and its pairs as the model will see them, without a run; for KTO and SFT labels too."""
    section = with_weights(recipe).model
    tokenizer = models.load_tokenizer(section)
    pairs = prepare(recipe.data, tokenizer, labels=STAGES[stage].takes_labels)
    if is_labelled(pairs.train):
        _refuse_one_sided(pairs)
    _say_how_it_is_written(section.name, Format(recipe.data.format, tokenizer), pairs.repaired.get(CUT, 0))
    return tokenizer, pairs


def _refuse_one_sided(rows: Prepared) -> None:
    """KTO learns from what good replies have and bad ones have not, and each split must tell whether it has."""
    for split in SPLITS:
        labels = list(getattr(rows, split)["label"])
        if all(labels) or not any(labels):
            called, missing = ("good", "bad") if labels[0] else ("bad", "good")
            remedy = f"bring {missing} ones too" + ("" if split == "train" else f", or a larger data.{split}_share")
            raise DataError(f"all {len(labels)} replies of the {split} split are labelled {called}; {remedy}")


def stops_of(recipe: Recipe) -> list[str] | None:
    """What ends a reply under this recipe; none, and a line that says why, where its tokenizer cannot be loaded."""
    try:
        section = recipe.model
        tokenizer = pretrain.tokenizer(recipe.data.toy) if section.name == "toy" else models.load_tokenizer(section)
        return models.find_stops(section, Format(recipe.data.format, tokenizer)).said
    except AlignlabError as error:
        log.warning("stops are not known: %s", error)
        return None


def _say_how_it_is_written(model: str, form: Format, cut: int) -> None:
    """What the way of writing dialogues does to a run, a line each, where a reader would not expect it."""
    if form.name != "chat" and form.chat_template:
        models.say_once(
            f"{model} brings a chat template, and data.format={form.name} writes dialogues in another way; "
            f"an instruct model keeps its own with data.format=chat"
        )
    if form.writes_date:
        day = f"{FIXED_DAY:%d %b %Y}"
        models.say_once(f"the chat template writes the day's date: here it is always {day}, so that runs agree")
    if not form.learns_end:
        models.say_once(f"the chat template writes nothing behind a reply: what is learned as its end is {form.eos}")
    if cut:
        models.say_once(f"{cut} replies are cut at data.max_reply_tokens, so that their end is not learned")


def _note_data(run: Run, pairs: Prepared) -> None:
    if run.is_writer:
        shutil.copyfile(pairs.dropped_rows, run.dropped_file)
        run.note(data=_facts_of(pairs))


def _facts_of(prepared: Prepared) -> dict[str, Any]:
    return {name: getattr(prepared, name) for name in ("rows", "kept", "dropped", "repaired", "parts", "fingerprint")}


def _resume_point(run: Run) -> Path | None:
    """The newest whole checkpoint; what was logged after it and what is damaged goes."""
    checkpoint, damaged = runs.last_whole_checkpoint(run)
    for broken in damaged:
        log.warning("%s is not whole and is removed; going on from %s", broken, checkpoint or "the start")
    _processes().wait_for_everyone()
    if _processes().is_main_process:
        runs.remove_checkpoints(damaged)
        step, logged = (runs.step_of(checkpoint), callbacks.logged_rows(checkpoint)) if checkpoint else (-1, [])
        runs.cut_back(run, step, logged)
    _processes().wait_for_everyone()
    if checkpoint:
        log.info("resuming from %s", checkpoint)
    return checkpoint


def _train(trainer, recipe: Recipe, run: Run, pairs: Prepared, checkpoint: Path | None) -> None:
    interrupt = _add_callbacks(trainer, recipe, run)
    stops = _stops(recipe, trainer.processing_class)
    run.note(stops=stops.said)
    log.info("a reply ends at %s", " or ".join(map(repr, stops.said)))
    prompts = held_out_prompts(recipe, pairs.validation, "validation", stops, trainer.args.seed)
    trainer.samples = Samples(run, trainer.processing_class, prompts, _share(trainer), trainer.identity)
    _say_what_is_repeated(trainer, len(pairs.validation))
    if run.is_writer:
        trainer.samples.say_what_is_lost()
    with callbacks.wandb_run(run, recipe.name):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    training, sampling = trainer.carried_over.seconds, trainer.samples.seconds
    run.note(training_seconds=round(training, 1), sampling_seconds=round(sampling, 1))
    if interrupt.stopping:
        step = trainer.state.global_step
        run.note(status="stopped", stop_reason=f"interrupted at step {step}")
        raise KeyboardInterrupt(f"stopped at step {step} with a checkpoint; the same command goes on from there")
    if trainer.guard and trainer.guard.stopped and not trainer.state.best_model_checkpoint:
        trainer.return_to_reference()
        trainer.state.best_global_step = 0
    run.note(stop_reason=callbacks.stop_reason(trainer.state, trainer.guard and trainer.guard.stopped))


def _add_callbacks(trainer, recipe: Recipe, run: Run) -> callbacks.StopOnInterrupt:
    for callback in (ProgressCallback, PrinterCallback):  # `callbacks.Progress` takes their place
        trainer.remove_callback(callback)
    stage, interrupt = run.manifest.stage, callbacks.StopOnInterrupt()
    trainer.carried_over = callbacks.CarriedOver(trainer)
    own = [callbacks.Progress(), callbacks.TimeLeft(), callbacks.EvaluateAtEnd(), interrupt]
    own += [callbacks.WeightsMove(), callbacks.MetricsFile(run), trainer.carried_over, callbacks.WholeCheckpoints(run)]
    if stage != "sft":
        limits = recipe.monitor if STAGES[stage].from_sft else dataclasses.replace(recipe.monitor, max_kl=None)
        run.note(limits={"max_kl": limits.max_kl, "max_accuracy": limits.max_accuracy, "action": limits.action})
        trainer.guard = callbacks.Guard(run, limits, stage, trainer.is_anchored)
        own.append(trainer.guard)
    if recipe.monitor.patience:
        own.append(callbacks.early_stopping(recipe.monitor.patience))
    for callback in own:
        trainer.add_callback(callback)
    return interrupt


def _share(trainer) -> tuple[int, int]:
    """Which of how many shares of the sampling is this process's; where weights are sharded all do all, in lockstep."""
    state = trainer.accelerator
    return (
        (0, 1)
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
        else (state.process_index, state.num_processes)
    )


def _say_what_is_repeated(trainer, held_out: int) -> None:
    """Accelerate fills the last held-out batch up with rows from the first, so that processes have equally many."""
    world = _processes().num_processes
    short = -held_out % (world * trainer.args.per_device_eval_batch_size) if world > 1 else 0
    if short:
        log.info(
            "held-out figures count %d of %d rows twice, to give %d processes as many each", short, held_out, world
        )


def _parent(sft: Run | None, start: models.Start) -> Parent:
    if sft is None:
        name = start.adapter or start.weights
        return Parent(start=name, weights=models.weights_hash(Path(name)) if Path(name).is_dir() else None)
    return Parent(run=str(sft.path), weights=models.weights_hash(sft.model))


def _identify_reference(
    trainer: Any, section: ModelSection, start: models.Start, base: dict[str, Any]
) -> ReferenceIdentity | None:
    """Under which the store knows the reference; none where weights are sharded, so that it is in place only later."""
    is_dpo = isinstance(trainer, AlignDPOTrainer)
    shared = is_dpo and trainer.share_prefixes(section.prefix_sharing)
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return None
    return identify_reference(
        section, start, ld_alpha=trainer.args.ld_alpha if is_dpo else None, prefix_sharing=shared, known=base
    )


def _look_up(trainer: AlignDPOTrainer, pairs: Prepared) -> tuple[StoredPairs, int]:
    """What the store knows of these pairs, and for how many a run without it would ask the reference."""
    args, splits = trainer.args, {"train": pairs.train, "validation": pairs.validation}
    if args.ld_alpha is None:  # the test figures are of the replies as they are
        splits["test"] = pairs.test
    assert trainer.identity is not None
    found = look_up(trainer.identity, splits, max_length=args.max_length, truncation_mode=args.truncation_mode)
    online = pairs_scored_online(args, len(pairs.train), len(pairs.validation), _processes().num_processes)
    return found, online + len(splits.get("test", ()))


def _with_stored_reference(trainer: AlignDPOTrainer, pairs: Prepared, run: Run) -> Prepared:
    """The pairs with the reference's log-probabilities from the store, where that costs less than asking it again."""
    if trainer.identity is None:
        return pairs
    found, online = _look_up(trainer, pairs)
    stored = run.manifest.stored_reference  # a resumed run goes on as it began
    if stored is None:
        stored = worth_storing(found, online)
    filled: dict[str, Dataset] = {}
    if stored:
        with trainer.scoring_reference() as score:
            filled, use = complete(found, score)
        log.info("%s", use)
        trainer.use_stored_reference(filled["train"], filled["validation"])
    else:
        log.info("reference: scored during training, %d pairs; the store would need %d", online, len(found.missing))
    run.note(stored_reference=stored)
    return dataclasses.replace(pairs, **filled)


def _check_start(trainer: Any, stage: str, section: ModelSection, pairs: Prepared, sft: Run | None) -> None:
    """The step-0 checks: policy and reference are the models that the recipe means, for TRL's loss too."""
    exact = section.dtype == "float32" and not section.load_in_4bit
    policy = trainer.probe(trainer.model, pairs.validation)
    with trainer.as_reference() as model:
        reference = trainer.probe(model, pairs.validation)
    if sft:
        tuned, base = sft.manifest.probe, sft.manifest.base_probe
        if not tuned:
            raise RunError(f"{sft.manifest_file} has no probe to know the model by; train SFT again with --force")
        callbacks.check_probe("policy", policy, "SFT run", tuned, base, exact)
        if section.reference == "sft":
            callbacks.check_probe("reference", reference, "SFT run", tuned, base, exact)
        elif base:
            callbacks.check_probe("reference", reference, "base model", base, tuned, exact)
    if STAGES[stage].from_sft and (section.reference == "base" or section.reference_folder):
        return
    callbacks.check_probe("reference", reference, "policy", policy, None, exact)
    few = trainer.train_dataset.select(range(min(4, len(trainer.train_dataset))))
    for row in few if section.reference == "sft" else ():
        first = trainer.score_one(row)
        sides = [side for side in ("chosen", "rejected") if f"logps/{side}" in first]  # one, of a reply with a label
        logps = [first[f"logps/{side}"] for side in sides]
        apart = [first[f"logps/{side}"] - first[f"rewards/{side}"] / trainer.beta for side in sides]
        callbacks.check_probe("reference in TRL's loss", apart, "policy", logps, None, exact)
        if trainer.first_loss is not None:
            callbacks.check_loss(first["loss"], trainer.first_loss)


def _finish(trainer, run: Run, **facts: Any) -> None:
    """Writes the final model whole, then the manifest that calls the run finished."""
    if not _processes().is_main_process:
        return
    policy = trainer.accelerator.unwrap_model(trainer.model)
    with filling(run.model) as folder:
        policy.save_pretrained(folder, **({"selected_adapters": ["default"]} if isinstance(policy, PeftModel) else {}))
        trainer.processing_class.save_pretrained(folder)
        models.generation_config(trainer.samples.prompts.stops, trainer.processing_class).save_pretrained(folder)
        seal(folder)
    runs.seal_files(run)
    run.note(
        status="finished",
        best_step=trainer.state.best_global_step,
        steps=trainer.state.global_step,
        tokens=int(trainer._total_train_tokens),
        world_size=_processes().num_processes,
        peak_memory_gib=round(trainer.carried_over.peak() / 2**30, 2),
        finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **facts,
    )
