"""Trainer callbacks: the metrics file, guards, checkpoints that count, and early checks; and the peak of memory."""

from __future__ import annotations

import contextlib
import logging
import math
import netrc
import os
import resource
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers.integrations.integration_utils import rewrite_logs
from transformers.trainer_callback import ProgressCallback

from alignlab.disk import append_line
from alignlab.errors import ModelError
from alignlab.guards import Alarm, alarms
from alignlab.recipe import MonitorSection
from alignlab.run import Run, mark_complete

log = logging.getLogger(__name__)

SHOWN = {  # of an evaluation, on the terminal
    "eval_loss": "held-out loss",
    "eval_rewards/margins": "margin",
    "eval_rewards/accuracies": "accuracy",
    "eval_kl": "KL",
    "eval_perplexity": "perplexity",
    "eval_reply_tokens": "tokens per reply",
}
START_TOLERANCE = 0.01
PEAK_RESET, PROCESS_STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class MetricsFile(TrainerCallback):
    """Writes each logged step as one line of `metrics.jsonl`, under the names that wandb shows."""

    def __init__(self, run: Run):
        self.run = run

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs and "train_runtime" not in logs:  # a summary: the manifest holds it
            row = {"step": state.global_step, "time": round(time.time(), 3), **rewrite_logs(logs)}
            append_line(self.run.metrics_file, row)


class Progress(ProgressCallback):
    """Trainer's bar, and one line for each evaluation instead of a printed dictionary for each logged step."""

    def on_train_begin(self, args, state, control, **kwargs):
        if not args.disable_tqdm:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, **kwargs):
        if not args.disable_tqdm:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3g}")
        if "eval_loss" in logs and state.is_world_process_zero:
            figures = [f"{shown} {logs[key]:.3g}" for key, shown in SHOWN.items() if key in logs]
            line = f"step {state.global_step}/{state.max_steps}: {', '.join(figures)}"
            self.training_bar.write(line, file=sys.stderr) if self.training_bar else log.info(line)


class WholeCheckpoints(TrainerCallback):
    """Marks a checkpoint as whole once everything in it is written; one without the mark is never resumed from."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class EvaluateAtEnd(TrainerCallback):
    """Evaluates and saves at the last step too, so that it competes for the best checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = control.should_evaluate = control.should_save = True


class StopOnInterrupt(TrainerCallback):
    """On SIGINT or SIGTERM finishes the step, writes a checkpoint and stops; a second one stops at once."""

    def __init__(self):
        self.asked = False
        self.before: dict[signal.Signals, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread: signals are somebody else's business
                self.before[number] = signal.signal(number, self._ask)

    def on_step_end(self, args, state, control, **kwargs):
        self.asked = _any_process(self.asked)  # or one would wait in vain for another that has stopped
        if self.asked:
            control.should_log = control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step, with a checkpoint; once more stops at once", file=sys.stderr)


def _any_process(flag: bool) -> bool:
    if not torch.distributed.is_initialized():
        return flag
    device = torch.device("cuda") if torch.distributed.get_backend() == "nccl" else torch.device("cpu")
    flags = torch.tensor([float(flag)], device=device)
    torch.distributed.all_reduce(flags)
    return flags.item() > 0


class WeightsMove(TrainerCallback):
    """Refuses to go on when the first step with a learning rate above zero has moved no trainable weight.

    It compares the start of each trainable tensor. Under float16 the loss scaler may skip the first steps, so that
    ten are allowed.
    """

    def __init__(self):
        self.before: list[torch.Tensor] = []
        self.learning_rate = 0.0
        self.steps_allowed: int | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.steps_allowed = 10 if args.fp16 else 1
        if not any(p.requires_grad for p in model.parameters()):
            raise ModelError("the model has no trainable parameters; check model.lora's target_modules")

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.learning_rate = max(group["lr"] for group in optimizer.param_groups)
        if self.steps_allowed and self.learning_rate > 0 and not self.before:
            self.before = _starts(model)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.before:
            return
        self.steps_allowed -= 1
        moved = any((new != old).any() for new, old in zip(_starts(model), self.before, strict=True))
        if not moved and not self.steps_allowed:
            raise ModelError(
                f"a step at learning rate {self.learning_rate:.2g} moved no weight in {len(self.before)} trainable "
                f"tensors; raise the learning rate, or keep trainable weights in float32"
            )
        if moved:
            self.before, self.steps_allowed = [], 0


def _starts(model: PreTrainedModel) -> list[torch.Tensor]:
    return [p.detach().flatten()[:4096].clone() for p in model.parameters() if p.requires_grad]


class Guard(TrainerCallback):
    """Says, once each, what an evaluation gives cause to warn of; under `action: stop` it ends the run.

    `outside` tells whether the last evaluation was outside the limits, and so may not be the best checkpoint.
    """

    def __init__(self, run: Run, section: MonitorSection, anchored: bool):
        self.run, self.section, self.anchored = run, section, anchored
        self.said = {warning.guard for warning in run.manifest.warnings}
        self.outside = False
        self.stopped: Alarm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.log_history:  # resumed, perhaps from the very evaluation that stopped it
            self.on_evaluate(args, state, control)

    def on_evaluate(self, args, state, control, **kwargs):
        found = alarms([row for row in state.log_history if "eval_loss" in row], self.section, self.anchored)
        for alarm in found:
            if alarm.guard not in self.said:
                self._say(alarm, state.is_world_process_zero)
        stopping = [alarm for alarm in found if alarm.stops and self.section.action == "stop"]
        self.outside = bool(stopping)
        if stopping:
            self.stopped, control.should_training_stop = stopping[0], True

    def _say(self, alarm: Alarm, is_main: bool) -> None:
        self.said.add(alarm.guard)
        if not is_main:
            return
        log.warning("step %d: %s", alarm.step, alarm.message)
        self.run.note(warnings=[*self.run.manifest.warnings, alarm.as_json()])
        if (wandb := sys.modules.get("wandb")) and wandb.run is not None:
            wandb.run.alert(title=f"{alarm.guard} at step {alarm.step}", text=alarm.message)
            wandb.run.summary[f"warnings/{alarm.guard}"] = alarm.message


def stop_reason(state: TrainerState, stopped: Alarm | None) -> str:
    """Why a run ended, and which checkpoint is kept, in a sentence; `stopped` is what a guard ended it for."""
    if stopped and not state.best_model_checkpoint:
        kept = "no checkpoint was inside the limits, so the reference itself is kept"
        return f"stopped at step {stopped.step}: {stopped.sign}; {kept}"
    if stopped:
        kept = f"kept the best checkpoint inside the limits, step {state.best_global_step}"
        return f"stopped at step {stopped.step}: {stopped.sign}; {kept}"
    if state.global_step >= state.max_steps:
        return f"all {state.max_steps} steps done; best checkpoint at step {state.best_global_step}"
    return (
        f"no better held-out loss since step {state.best_global_step}, whose checkpoint is kept; "
        f"stopped at step {state.global_step} of {state.max_steps}"
    )


def check_start(loss: float, chosen_reward: float, rejected_reward: float, plain_sigmoid: bool) -> None:
    """Refuses a DPO run whose policy and reference differ before the first step (law: one blessed reference).

    Both are then the same weights, so both rewards are 0 and the sigmoid loss is ln 2; the tolerance of 0.01 is for
    half precision, where two forwards may round differently.
    """
    if not (abs(chosen_reward) <= START_TOLERANCE and abs(rejected_reward) <= START_TOLERANCE):  # nan fails too
        raise ModelError(
            f"before the first step the rewards are {chosen_reward:.4f} and {rejected_reward:.4f}, not 0: policy and "
            f"reference are not the same model; if that is meant, set model.reference=base"
        )
    if plain_sigmoid and not abs(loss - math.log(2)) <= START_TOLERANCE:
        raise ModelError(f"before the first step the loss is {loss:.4f}, not ln 2 = 0.6931: the reference is wrong")


def check_reference(found: list[float], expected: list[float], exact: bool) -> None:
    """Refuses a reference that does not give the SFT run's own log-probabilities (nats) to the same replies.

    Within 0.1 % in float32, 2 % in 4-bit or half precision; a bare base model is off by about 10 %.
    """
    tolerance = 0.001 if exact else 0.02
    for ours, theirs in zip(found, expected, strict=True):
        if not abs(ours - theirs) <= tolerance * abs(theirs) + 0.05:  # nan fails too
            raise ModelError(
                f"the reference gives a held-out reply {ours:.2f} nats where the SFT run gave {theirs:.2f}: "
                f"it is not the SFT model; train SFT again with --force"
            )


def start_peak_memory() -> None:
    """Forgets the peak so far: several runs may follow each other in a process, and each notes its own."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux alone has it, and not every container lets it be written
        PEAK_RESET.write_text("5")


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of this process, what it still holds of earlier runs included."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        lines = PROCESS_STATUS.read_text().splitlines()
        if peak := next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None):
            return int(peak) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def wandb_run(run: Run, group: str) -> Iterator[None]:
    """Names this run for wandb and ends it with the context; offline by itself where nobody is logged in.

    `WANDB_MODE`, `WANDB_PROJECT` and the other variables of wandb's own win. A resumed run goes on in its wandb run,
    whose id is in the manifest; the runs of a recipe share a group.
    """
    wandb_id = run.manifest.wandb_id or secrets.token_hex(4)  # `random` is seeded by now
    own = {"WANDB_RUN_ID": wandb_id, "WANDB_RESUME": "allow", "WANDB_DIR": str(run.path)}
    named = {"WANDB_PROJECT": "alignlab", "WANDB_NAME": f"{group}/{run.path.name}", "WANDB_RUN_GROUP": group}
    mode = {} if _wandb_login() else {"WANDB_MODE": "offline"}
    before = dict(os.environ)
    os.environ.update({**named, **mode, **before, **own})
    if os.environ.get("WANDB_MODE") != "disabled":
        run.note(wandb_id=wandb_id)
    try:
        yield
    finally:
        if (wandb := sys.modules.get("wandb")) and wandb.run is not None:
            wandb.finish()
            wandb.teardown()  # or the next run of this process would be written into the folder of this one
        os.environ.clear()
        os.environ.update(before)


def _wandb_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].strip("/")
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
