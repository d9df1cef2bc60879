"""What a run stands on: versions of the libraries, a GPU or the CPU, and whether its memory holds what is planned."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from alignlab.errors import AlignlabError, MachineError, ModelError, RecipeError
from alignlab.recipe.load import Recipe, run_name
from alignlab.recipe.objectives import STAGES, config_class
from alignlab.runs.run import RUNS, Run

log = logging.getLogger(__name__)

PINNED = ("trl", "transformers", "peft")  # whose seams are tested for the range that pyproject.toml gives
GIB = 2**30
LIBRARIES = 1.0  # GiB that a process on a CPU takes besides its tensors
CGROUP = Path("/sys/fs/cgroup")  # a container's own limit, where there is one


def refuse_other_versions() -> None:
    """Raises MachineError where a library is not there, or of a version for which alignlab is not made."""
    from packaging.requirements import Requirement

    try:
        needed = [Requirement(each) for each in importlib.metadata.requires("alignlab") or ()]
    except importlib.metadata.PackageNotFoundError:  # a checkout that nobody has installed
        return
    for each in needed:
        if each.name not in PINNED or each.marker:
            continue
        remedy = f"pip install '{each.name}{each.specifier}'"
        try:
            found = importlib.metadata.version(each.name)
        except importlib.metadata.PackageNotFoundError:
            raise MachineError(f"{each.name} is not installed; {remedy}") from None
        if not each.specifier.contains(found, prereleases=True):
            raise MachineError(f"{each.name} is {found}, and alignlab is made for {each.specifier}; {remedy}")


def check_machine(
    recipe: Recipe, stage: str, *, name: str | None = None, force: bool = False, settings: bool = True
) -> None:
    """Says what a run will be trained on, before anything is loaded; MachineError where it cannot fit.

    `force` goes on all the same. Nothing is said of a run that is finished. `settings`: whether those of TRL are tried.
    """
    stages = [stage]
    if STAGES[stage].from_sft and not recipe.model.start:
        stages = ["sft", stage]
    given = {stage: name} if name else {}
    runs = {each: Run(RUNS / recipe.name / (given.get(each) or run_name(recipe, each))) for each in stages}
    pending = [each for each, run in runs.items() if not run.is_finished or (force and each == stage)]
    if not pending:
        return
    _say(describe_machine())
    for each in pending:
        if settings:
            _refuse_settings(recipe, each)
        if too_much := what_does_not_fit(recipe, each):
            if not force:
                raise MachineError(f"{too_much}; --force goes on as it is")
            log.warning("%s; going on, by --force", too_much)


@cache  # once a process: a sweep asks for each of its members
def _say(line: str) -> None:
    log.info("%s", line)


def describe_machine() -> str:
    """The GPU, or that there is none, with the memory that is free."""
    import psutil
    import torch

    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info(_own_gpu())
        several = f", one of {torch.cuda.device_count()}" if torch.cuda.device_count() > 1 else ""
        return (
            f"runs on {torch.cuda.get_device_name(_own_gpu())}{several}: {free / GIB:.1f} of {whole / GIB:.1f} GiB free"
        )
    why = "no GPU found"
    if torch.backends.mps.is_available():
        why = "Apple's GPU is not used"
    elif torch.version.cuda is None and shutil.which("nvidia-smi"):
        why = "the GPU is not used, since this torch is built without CUDA"
    memory = f"{free_memory() / GIB:.1f} of {psutil.virtual_memory().total / GIB:.1f} GiB of memory free"
    return f"{why}: training on the CPU, {os.cpu_count()} cores, {memory}"


def _own_gpu() -> int:
    """That of this process: asking after another's would take memory on it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def free_memory() -> float:
    """Bytes of RAM that may be taken, by the limit of a container where that is lower."""
    import psutil

    free = float(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int((CGROUP / f"memory.{name}").read_text(encoding="utf-8")) for name in ("max", "current"))
        held = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="utf-8").splitlines())
        free = min(free, limit - used + int(held.get("inactive_file", 0)))
    return free


def what_does_not_fit(recipe: Recipe, stage: str) -> str | None:
    """What is planned and what is free, where the first is more, with the overrides that would fit."""
    import torch

    from alignlab.memory.page import change
    from alignlab.memory.plan import plan
    from alignlab.train.launch import is_sharded

    cuda = torch.cuda.is_available()
    processes = 1 if cuda else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    room = (torch.cuda.mem_get_info(_own_gpu())[0] if cuda else free_memory()) / GIB / processes - (
        not cuda
    ) * LIBRARIES
    if is_sharded():  # each process then holds a part of what is planned
        return None
    try:
        found = plan(recipe, stage, cuda=cuda)
    except ModelError:  # the run itself says that no plan can be made
        return None
    if found.fits(room):
        return None
    changes = change(found, room)
    remedy = f"it fits with {' '.join(changes)}" if changes else "take a smaller model, or a larger machine"
    each = f" in each of {processes} processes" if processes > 1 else ""
    what = f"{stage} of {recipe.name} needs {found.needed / GIB:.1f} GiB{each}, most of it in {found.peak}"
    return f"{what}, and {max(room, 0):.1f} GiB are free for it; {remedy}"


def _refuse_settings(recipe: Recipe, stage: str) -> None:
    """Raises where TRL's config, the optimizer or the schedule cannot be made of the recipe's settings."""
    import torch
    from transformers import Trainer, get_scheduler

    from alignlab.recipe.arguments import TrainingContext, trl_arguments

    arguments = trl_arguments(recipe, stage, TrainingContext(Path(), rows=1, on_cpu=not torch.cuda.is_available()))
    asked = ""
    try:
        args: Any = config_class(stage)(**arguments)
        if not args.optim_target_modules:  # else it needs the model
            asked = f"{stage}.optim={args.optim.value}: "
            Trainer.get_optimizer_cls_and_kwargs(args)
        name, given = args.lr_scheduler_type.value, args.lr_scheduler_kwargs
        asked = f"{stage}.lr_scheduler_type={name} with {stage}.lr_scheduler_kwargs={given or {}}: "
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
        get_scheduler(name, optimizer, 0, 1, scheduler_specific_kwargs=dict(given or {}))
    except ImportError as e:
        raise MachineError(f"{asked}{_one_line(e)}") from e
    except (ValueError, TypeError) as e:
        raise RecipeError(f"{asked}{_one_line(e)}") from e


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def explain_import(error: ImportError) -> str | None:
    """One line for an optional library that is missing; none where alignlab itself cannot be imported."""
    if (error.name or "").startswith("alignlab") or isinstance(error, AlignlabError):
        return None
    install = f"; pip install {error.name.partition('.')[0]}" if error.name else ""
    return f"a library that this needs is not there: {_one_line(error)}{install}"
