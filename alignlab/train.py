"""`train_sft` and `train_dpo`: recipe → run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, PrinterCallback, set_seed
from transformers.trainer_callback import ProgressCallback
from trl import DPOConfig, SFTConfig

from alignlab import heldout, monitor, pretrain
from alignlab import model as models
from alignlab import run as runs
from alignlab.arguments import Circumstances, trl_arguments
from alignlab.data import Prepared, prepare, prepare_replies, sft_rows
from alignlab.errors import RunError
from alignlab.figures import figures_on_test, held_out_prompts
from alignlab.launch import check_world, refuse_different_recipes, refuse_sharded_4bit
from alignlab.plan import plan_line
from alignlab.recipe import ModelSection, Recipe, consumed, run_name, write_yaml
from alignlab.reference import Found, complete, identify_reference, look_up, pairs_scored_online, worth_storing
from alignlab.run import Parent, Run
from alignlab.samples import Samples
from alignlab.store import ReferenceIdentity
from alignlab.trainers import AlignDPOTrainer, AlignSFTTrainer

log = logging.getLogger(__name__)


def train_sft(recipe: Recipe, *, root: Path = Path("runs"), name: str | None = None, force: bool = False) -> Run:
    """Supervised fine-tuning on the chosen replies (loss over the reply only); a finished run is left as it is."""
    with _opened(recipe, "sft", root, name, force) as run:
        if run.is_finished:
            return run
        section = with_weights(recipe).model
        tokenizer, pairs = _prepared(recipe, run)
        replies = prepare_replies(recipe.data, tokenizer, pairs)
        rows, held_out = sft_rows(replies.train), sft_rows(replies.validation)
        doubles = len(replies.train) - len(rows)
        log.info("data: %d replies to learn from; %d more rows hold one of them again", len(rows), doubles)
        if replies is not pairs:
            run.note(sft_data=_facts_of(replies))
        checkpoint = _resume_point(run)
        args = sft_config(recipe, _here(run.checkpoints, len(rows), checkpoint))
        models.check_positions(models.load_config(section), args.max_length, "sft")
        set_seed(args.seed)
        weights = models.load_weights(section)
        policy = models.add_adapter(weights, section) if section.lora is not None else weights
        trainer = AlignSFTTrainer(policy, args, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer)
        if isinstance(policy, PeftModel):
            models.settle_adapters(policy, section)
        run.note(base=models.identify(section))
        _train(trainer, recipe, run, pairs, checkpoint)
        scores = heldout.score_pairs(trainer.model, pairs.test, tokenizer.pad_token_id)
        probe = heldout.probe(trainer.model, pairs.validation, tokenizer.pad_token_id)
        _finish(trainer, run, probe=probe, test={"perplexity": heldout.reply_perplexity(scores), "n": len(pairs.test)})
    return run


def train_dpo(recipe: Recipe, *, root: Path = Path("runs"), name: str | None = None, force: bool = False) -> Run:
    """DPO from the SFT run of the same recipe, or from `model.start`; a finished run is left as it is."""
    sft, section, start = _start(recipe, root)
    parent = _parent(sft, start)
    with _opened(recipe, "dpo", root, name, force) as run:
        _refuse_other_parent(run, parent)
        if run.is_finished:
            return run
        tokenizer, pairs = _prepared(recipe, run)
        checkpoint = _resume_point(run)
        here = _here(run.checkpoints, len(pairs.train), checkpoint)
        trainer = _dpo_trainer(recipe, section, start, here, tokenizer, pairs)
        base = models.identify(section)
        run.note(base=base, parent=parent, reference=start.reference)
        log.info("reference: %s", start.reference)
        trainer.identity = _identify_reference(trainer, section, start, base)
        pairs = _with_stored_reference(trainer, pairs, run)
        _check_start(trainer, recipe, pairs, sft)
        _train(trainer, recipe, run, pairs, checkpoint)
        began = time.monotonic()
        figures = figures_on_test(trainer, recipe, pairs, run)
        _note_times(run, figures=time.monotonic() - began)
        _finish(trainer, run, test=figures)
    return run


def prepare_dpo(recipe: Recipe, *, root: Path = Path("runs"), runs: int = 1) -> None:
    """What several DPO runs share, made once: the SFT run, the prepared rows, and the reference's log-probabilities.

    The last are stored where `runs` runs together would ask the reference for more pairs than there are to store.
    """
    _, section, start = _start(recipe, root)
    tokenizer, pairs = prepare_data(recipe)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _dpo_trainer(recipe, section, start, _here(Path(folder), len(pairs.train)), tokenizer, pairs)
        trainer.identity = _identify_reference(trainer, section, start, models.identify(section))
        if trainer.identity is None:
            return
        found, online = _look_up(trainer, pairs)
        if found.missing and worth_storing(found, runs * online):
            with trainer.scoring_reference() as score:
                log.info("%s", complete(found, score)[1])


def _start(recipe: Recipe, root: Path) -> tuple[Run | None, ModelSection, models.Start]:
    """What DPO starts from: the SFT run, where the recipe has one, and the model with its weights."""
    sft = None if recipe.model.start else _sft_run(recipe, root)
    section = with_weights(recipe).model
    return sft, section, models.find_start(section, sft.model if sft else None)


def _dpo_trainer(recipe: Recipe, section: ModelSection, start: models.Start, here: Circumstances, tokenizer, pairs):
    args = dpo_config(recipe, here)
    models.check_positions(models.load_config(section), args.max_length, "dpo")
    set_seed(args.seed)
    policy, reference = models.load_policy(section, start)
    rows = {"train_dataset": pairs.train, "eval_dataset": pairs.validation}
    trainer = AlignDPOTrainer(policy, reference, args, **rows, processing_class=tokenizer)
    if isinstance(policy, PeftModel):
        models.settle_adapters(policy, section)
    return trainer


def sft_config(recipe: Recipe, here: Circumstances) -> SFTConfig:
    return SFTConfig(**trl_arguments(recipe, "sft", here))


def dpo_config(recipe: Recipe, here: Circumstances) -> DPOConfig:
    return DPOConfig(**trl_arguments(recipe, "dpo", here))


def _processes() -> PartialState:
    """The processes of this launch; without a GPU accelerate counts them only when told to stay on the CPU."""
    return PartialState(cpu=not torch.cuda.is_available())


def _here(folder: Path, rows: int, checkpoint: Path | None = None) -> Circumstances:
    world = _processes().num_processes
    return Circumstances(folder, rows, not torch.cuda.is_available(), world, checkpoint is not None)


@contextlib.contextmanager
def _opened(recipe: Recipe, stage: str, root: Path, name: str | None, force: bool) -> Iterator[Run]:
    path = root / recipe.name / (name or run_name(recipe, stage))
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
        if run.is_finished:
            _say_finished(run.path, run.manifest.stop_reason)
        else:
            _say_what_it_needs(recipe, stage, run)
            monitor.start_peak_memory()
        yield run


@functools.cache  # once a process: each member of a sweep asks for the SFT run
def _say_finished(path: Path, why: str) -> None:
    log.info("%s is finished (%s); --force trains it again", path, why)


def _say_what_it_needs(recipe: Recipe, stage: str, run: Run) -> None:
    """One line before anything large is loaded, and in the manifest: the memory that is planned, and on what."""
    cuda = torch.cuda.is_available()
    line, planned = plan_line(recipe, stage, cuda=cuda)
    log.info("%s", line)
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


def prepare_data(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, Prepared]:
    """The recipe's tokenizer and its pairs as the model will see them, without a run."""
    tokenizer = models.load_tokenizer(with_weights(recipe).model)
    return tokenizer, prepare(recipe.data, tokenizer)


def _prepared(recipe: Recipe, run: Run) -> tuple[PreTrainedTokenizerBase, Prepared]:
    tokenizer, pairs = prepare_data(recipe)
    if _processes().is_main_process:
        shutil.copyfile(pairs.dropped_rows, run.dropped_file)
        run.note(data=_facts_of(pairs))
    return tokenizer, pairs


def _facts_of(prepared: Prepared) -> dict[str, Any]:
    return {name: getattr(prepared, name) for name in ("rows", "kept", "dropped", "repaired", "parts", "fingerprint")}


def _resume_point(run: Run) -> Path | None:
    """The newest whole checkpoint; what was logged after it and what is damaged goes."""
    checkpoint, damaged = runs.last_whole_checkpoint(run)
    for broken in damaged:
        log.warning("%s is not whole and is removed; going on from %s", broken, checkpoint or "the start")
    if _processes().is_main_process:
        runs.remove_checkpoints(damaged)
        runs.cut_back(run, runs.step_of(checkpoint) if checkpoint else -1)
    _processes().wait_for_everyone()
    if checkpoint:
        log.info("resuming from %s", checkpoint)
    return checkpoint


def _train(trainer, recipe: Recipe, run: Run, pairs: Prepared, checkpoint: Path | None) -> None:
    interrupt = _add_callbacks(trainer, recipe, run)
    prompts = held_out_prompts(recipe, pairs.validation, "validation", trainer.args.seed)
    trainer.samples = Samples(run, trainer.processing_class, prompts, _share(trainer), trainer.identity)
    _say_what_is_repeated(trainer, len(pairs.validation))
    began = time.monotonic()
    with monitor.wandb_run(run, recipe.name):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    _note_times(run, training=time.monotonic() - began, sampling=trainer.samples.seconds)
    if interrupt.asked:
        step = trainer.state.global_step
        run.note(status="stopped", stop_reason=f"interrupted at step {step}")
        raise KeyboardInterrupt(f"stopped at step {step} with a checkpoint; the same command goes on from there")
    if trainer.guard and trainer.guard.stopped and not trainer.state.best_model_checkpoint:
        trainer.return_to_reference()
        trainer.state.best_global_step = 0
    run.note(stop_reason=monitor.stop_reason(trainer.state, trainer.guard and trainer.guard.stopped))


def _add_callbacks(trainer, recipe: Recipe, run: Run) -> monitor.StopOnInterrupt:
    for callback in (ProgressCallback, PrinterCallback):  # `monitor.Progress` takes their place
        trainer.remove_callback(callback)
    interrupt = monitor.StopOnInterrupt()
    own = [monitor.Progress(), monitor.EvaluateAtEnd(), interrupt, monitor.WeightsMove()]
    own += [monitor.MetricsFile(run), monitor.WholeCheckpoints()]
    if isinstance(trainer, AlignDPOTrainer):
        limits = recipe.monitor
        run.note(limits={"max_kl": limits.max_kl, "max_accuracy": limits.max_accuracy, "action": limits.action})
        trainer.guard = monitor.Guard(run, limits, anchored="sft" in trainer.loss_types)
        own.append(trainer.guard)
    if recipe.monitor.patience:
        own.append(EarlyStoppingCallback(recipe.monitor.patience))
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


def _note_times(run: Run, **seconds: float) -> None:
    """Adds to what earlier starts of the same run have taken."""
    names = {f"{name}_seconds": value for name, value in seconds.items()}
    run.note(**{name: round((getattr(run.manifest, name) or 0) + value, 1) for name, value in names.items()})


def _parent(sft: Run | None, start: models.Start) -> Parent:
    if sft is None:
        name = start.adapter or start.weights
        return Parent(start=name, weights=models.weights_hash(Path(name)) if Path(name).is_dir() else None)
    return Parent(run=str(sft.path), weights=models.weights_hash(sft.model))


def _identify_reference(
    trainer: AlignDPOTrainer, section: ModelSection, start: models.Start, base: dict[str, Any]
) -> ReferenceIdentity | None:
    """Under which the store knows the reference; none where weights are sharded, so that it is in place only later."""
    shared = trainer.share_prefixes(section.prefix_sharing)
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return None
    return identify_reference(section, start, ld_alpha=trainer.args.ld_alpha, prefix_sharing=shared, known=base)


def _look_up(trainer: AlignDPOTrainer, pairs: Prepared) -> tuple[Found, int]:
    """What the store knows of these pairs, and for how many a run without it would ask the reference."""
    args, splits = trainer.args, {"train": pairs.train, "validation": pairs.validation}
    if args.ld_alpha is None:  # the test figures are of the replies as they are
        splits["test"] = pairs.test
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
            filled, receipt = complete(found, score)
        log.info("%s", receipt)
        trainer.use_stored_reference(filled["train"], filled["validation"])
    else:
        log.info("reference: scored during training, %d pairs; the store would need %d", online, len(found.missing))
    run.note(stored_reference=stored)
    return dataclasses.replace(pairs, **filled)


def _refuse_other_parent(run: Run, parent: Parent) -> None:
    before = run.manifest.parent
    if before and before != parent:
        raise RunError(
            f"{run.path} was trained from {before}, and would start from {parent}; "
            f"name a new run with --run, or train it again with --force"
        )


def _check_start(trainer: AlignDPOTrainer, recipe: Recipe, pairs: Prepared, sft: Run | None) -> None:
    """The step-0 checks: the reference is the SFT model, and the policy starts where the reference is."""
    pad = trainer.processing_class.pad_token_id
    section = recipe.model
    if section.reference == "sft":
        if sft:
            with trainer.as_reference() as reference:
                found = heldout.probe(reference, pairs.validation, pad)
            exact = section.dtype == "float32" and not section.load_in_4bit
            monitor.check_reference(found, sft.manifest.probe, exact)
        for pair in pairs.train.select(range(min(4, len(pairs.train)))):
            first = trainer.score_one(pair)
            rewards = first["rewards/chosen"], first["rewards/rejected"]
            monitor.check_start(first["loss"], *rewards, plain_sigmoid=trainer.loss_types == ["sigmoid"])


def _finish(trainer, run: Run, **facts: Any) -> None:
    """Writes the final model whole, then the manifest that calls the run finished."""
    if not _processes().is_main_process:
        return
    beside = run.path / ".model"
    shutil.rmtree(beside, ignore_errors=True)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    policy.save_pretrained(beside, **({"selected_adapters": ["default"]} if isinstance(policy, PeftModel) else {}))
    trainer.processing_class.save_pretrained(beside)
    shutil.rmtree(run.model, ignore_errors=True)
    beside.rename(run.model)
    run.note(
        status="finished",
        best_step=trainer.state.best_global_step,
        steps=trainer.state.global_step,
        world_size=_processes().num_processes,
        peak_memory_gib=round(monitor.peak_memory() / 2**30, 2),
        finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **facts,
    )
