"""Runs the members of a sweep one after another in this process: what they share once, then each as `alignlab dpo`."""

from __future__ import annotations

import gc
import json
import logging
import os
import traceback
from collections.abc import Sequence

import torch

from alignlab.errors import AlignlabError, RunError
from alignlab.recipe.load import consumed, run_name
from alignlab.runs.run import Run, Sweep
from alignlab.sweeps.choice import collect
from alignlab.sweeps.members import Member, Members
from alignlab.train.stages import prepare_dpo, train_dpo

log = logging.getLogger(__name__)


def run_members(members: Members) -> Sweep:
    """Trains the members that are not finished, and returns the table, which is written after each of them.

    A member that fails is named in the table, with the traceback in its `error.log`, and the others go on; started
    again, the sweep goes on where it was. KeyboardInterrupt ends it.
    """
    _refuse_several_processes()
    pending = _pending(members)
    done, names = len(members.asked) - len(pending), ", ".join(member.name for member in members.asked)
    log.info("%d members, %d of them finished: %s", len(members.asked), done, names)
    if len(pending) > 1:
        _share_what_can_be(members)
    failures: dict[str, str] = {}
    table = collect(members)
    for number, member in enumerate(pending, 1):
        log.info("member %d of %d: %s", number, len(pending), members.folder / member.name)
        try:
            failure = _run(member, members)
        except KeyboardInterrupt as e:
            raise KeyboardInterrupt(f"{member.name}: {e or 'interrupted; the same command goes on'}") from None
        if failure:
            failures[member.name] = failure
            log.error("%s failed: %s", member.name, failure)
        _free_memory()
        table = collect(members, failures)
    return table


def share(members: Members) -> None:
    """What members share, made once: the SFT run, the prepared rows, and the reference's log-probabilities."""
    for alike in _alike(_pending(members)):
        _share(alike, members)


def _share(alike: Sequence[Member], members: Members) -> None:
    prepare_dpo(alike[0].recipe, root=members.folder.parent, runs=len(alike))
    _free_memory()


def _share_what_can_be(members: Members) -> None:
    """The same; what cannot be made ends the sweep only where no member could do without."""
    groups = _alike(_pending(members))
    for alike in groups:
        try:
            _share(alike, members)
        except Exception as e:
            recipe = alike[0].recipe
            can_start = recipe.model.start or _is_finished(Run(members.folder / run_name(recipe, "sft")))
            if len(groups) == 1 and not can_start:
                raise
            log.error("%s: %s", alike[0].name, e)  # it will fail by its name, and perhaps no other


def _refuse_several_processes() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("a sweep runs its members in one process; alignlab sweep … --print writes a command for each")


def _pending(members: Members) -> list[Member]:
    return [member for member in members.asked if not _is_finished(Run(members.folder / member.name))]


def _is_finished(run: Run) -> bool:
    try:
        return run.is_finished
    except RunError:  # a damaged manifest: training says so, of this member alone
        return False


def _alike(members: Sequence[Member]) -> list[list[Member]]:
    """The members by what they start from: those of one SFT run, data and model share a reference."""
    groups: dict[str, list[Member]] = {}
    for member in members:
        inputs = consumed(member.recipe, "dpo")
        start = [run_name(member.recipe, "sft"), inputs["data"], inputs["model"], inputs["dpo"].get("ld_alpha")]
        groups.setdefault(json.dumps(start, default=str), []).append(member)
    return list(groups.values())


def _run(member: Member, members: Members) -> str | None:
    """Trains one member; what went wrong, if anything, in one line."""
    run = Run(members.folder / member.name)
    trace = run.path / "error.log"
    try:
        train_dpo(member.recipe, root=members.folder.parent)
    except Exception as e:
        run.path.mkdir(parents=True, exist_ok=True)
        trace.write_text(traceback.format_exc(), encoding="utf-8")
        said = str(e) if isinstance(e, AlignlabError) else f"{type(e).__name__}: {e}"
        return (said.splitlines() or [type(e).__name__])[0] + f" ({trace})" * (not isinstance(e, AlignlabError))
    trace.unlink(missing_ok=True)
    return None


def _free_memory() -> None:
    """Lets go of the last member's model, whose callbacks and trainer refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
