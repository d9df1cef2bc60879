"""Trainer callbacks: the metrics file, guards, checkpoints that count, and early checks; and the peak of memory."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback, TrainerState
from transformers.integrations.integration_utils import rewrite_logs
from transformers.trainer_callback import ProgressCallback

from alignlab.disk import append_line, sync, write_json
from alignlab.errors import ModelError
from alignlab.recipe.arguments import wandb_is_off
from alignlab.recipe.load import MonitorSection
from alignlab.runs.run import Run, mark_complete, read_state
from alignlab.train.guards import Alarm, alarms

log = logging.getLogger(__name__)

SHOWN = {  # of an evaluation, on the terminal
    "eval_loss": "held-out loss",
    "eval_rewards/margins": "margin",
    "eval_rewards/accuracies": "accuracy",
    "eval_kl": "KL",
    "eval_perplexity": "perplexity",
    "eval_reply_tokens": "tokens per reply",
}
LOSS_TOLERANCE = 0.01
WANDB_SECONDS = 4  # within which a run of wandb's begins online, or else is offline
WANDB_FINISH_SECONDS = 60  # that a finished run waits for what is not uploaded yet
PEAK_RESET, PROCESS_STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class MetricsFile(TrainerCallback):
    """Writes each logged step as one line of `metrics.jsonl`, under the names that wandb shows."""

    def __init__(self, run: Run):
        self.run = run

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs and "train_runtime" not in logs:  # a summary: the manifest holds it
            row = _metrics_row({**logs, "step": state.global_step}, time=round(time.time(), 3))
            append_line(self.run.metrics_file, row)


def logged_rows(checkpoint: Path) -> list[dict[str, Any]]:
    """What had been logged when the checkpoint was written, as `metrics.jsonl` has it, but without times."""
    return [_metrics_row(entry) for entry in read_state(checkpoint)["log_history"]]


def _metrics_row(entry: Mapping[str, Any], **time: float) -> dict[str, Any]:
    logs = {key: value for key, value in entry.items() if key != "step"}
    return {"step": entry["step"], **time, **rewrite_logs(logs)}


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


def early_stopping(patience: int) -> EarlyStoppingCallback:
    """Ends a run after so many evaluations without a better one; of a run that goes on, whatever it had before."""

    class Patience(EarlyStoppingCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            super().on_train_begin(args, state, control, **kwargs)
            self.early_stopping_patience = patience
            state.stateful_callbacks.setdefault(
                type(self).__name__, self.state()
            )  # transformers 5.23 takes it for there

    Patience.__name__ = EarlyStoppingCallback.__name__  # under which checkpoints keep it
    return Patience(patience)


class TimeLeft(TrainerCallback):
    """Says after the first steps how long the rest will take, evaluations among it where one has been measured."""

    STEPS = 5  # measured, before which nothing is said

    def on_train_begin(self, args, state, control, **kwargs):
        self.since, self.evaluation = time.monotonic(), 0.0
        self.seconds: list[float] = []

    def on_evaluate(self, args, state, control, **kwargs):
        if not self.seconds:  # the one before the first step
            self.evaluation = time.monotonic() - self.since

    def on_step_begin(self, args, state, control, **kwargs):
        self.since = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.monotonic() - self.since)
        if len(self.seconds) != self.STEPS:
            return
        of_a_step, left = sum(self.seconds) / self.STEPS, state.max_steps - state.global_step
        evaluations = state.max_steps // state.eval_steps - state.global_step // state.eval_steps
        line = f"step {state.global_step}/{state.max_steps}: {of_a_step:.2g} s a step"
        line += f", {self.evaluation:.2g} s an evaluation" if self.evaluation else ", evaluations not counted"
        log.info("%s; %s to go", line, in_words(left * of_a_step + evaluations * self.evaluation))


def in_words(seconds: float) -> str:
    """
    >>> in_words(95), in_words(9000)
    ('about 2 minutes', 'about 2.5 hours')
    """
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"about {seconds / size:.{int(unit != 'minutes')}f} {unit}"
    return f"about {seconds:.0f} seconds"


class CarriedOver(TrainerCallback):
    """Keeps in each checkpoint what transformers leaves out of it (5.23), and takes it up where a run goes on.

    That is a half-filled logging window, TRL's averages and token count in it, and what the run has taken so far.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.began = time.monotonic()
        self.peak_memory = 0

    def on_train_begin(self, args, state, control, **kwargs):
        file = self._file(args, state)
        if not file.is_file():  # a new run, or one that goes on with more processes
            return
        found, trainer = json.loads(file.read_text(encoding="utf-8")), self.trainer
        trainer._tr_loss += found["loss"]
        trainer._globalstep_last_logged = found["last_logged"]
        trainer._metrics["train"].update(found["averages"])
        trainer._total_train_tokens = found["tokens"]
        trainer.samples.seconds += found["sampling_seconds"]
        self.began -= found["seconds"]
        self.peak_memory = found["peak_memory"]

    def on_save(self, args, state, control, **kwargs):
        trainer = self.trainer
        found = {
            "loss": trainer._tr_loss.item(),
            "last_logged": trainer._globalstep_last_logged,
            "averages": trainer._metrics["train"],
            "tokens": trainer._total_train_tokens,
            "sampling_seconds": trainer.samples.seconds,
            "seconds": self.seconds,
            "peak_memory": self.peak(),
        }
        write_json(self._file(args, state), found)

    @property
    def seconds(self) -> float:
        """Of training, in all starts of the run that led to where it is."""
        return time.monotonic() - self.began

    def peak(self) -> int:
        """The peak of memory in bytes, in all these starts."""
        return max(self.peak_memory, peak_memory())

    def _file(self, args, state) -> Path:
        return _checkpoint(args, state.global_step) / f"carried_over_{args.process_index}.json"


class WholeCheckpoints(TrainerCallback):
    """Marks a checkpoint as whole once everything in it is written; one without the mark is never resumed from."""

    def __init__(self, run: Run):
        self.run = run

    def on_train_begin(self, args, state, control, **kwargs):
        """Finds the best checkpoint of a run that was moved since it was written."""
        if state.best_global_step:
            state.best_model_checkpoint = str(_checkpoint(args, state.best_global_step))

    def on_save(self, args, state, control, **kwargs):
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process writes a part
        if state.is_world_process_zero:
            sync(self.run.metrics_file)
            sync(self.run.samples_file)
            mark_complete(_checkpoint(args, state.global_step))


def _checkpoint(args, step: int) -> Path:
    return Path(args.output_dir) / f"checkpoint-{step}"


class EvaluateAtEnd(TrainerCallback):
    """Evaluates and saves at the last step too, so that it competes for the best checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = control.should_evaluate = control.should_save = True


class StopOnInterrupt(TrainerCallback):
    """On SIGINT or SIGTERM finishes the step, writes a checkpoint and stops; a second one stops at once.

    Training is told to stop only behind the checkpoint: one that holds the order to stop is the end of its run.
    """

    def __init__(self):
        self.asked = self.stopping = False
        self.before: dict[signal.Signals, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread: signals are somebody else's business
                self.before[number] = signal.signal(number, self._ask)

    def on_step_end(self, args, state, control, **kwargs):
        self.stopping = _any_process(self.asked)  # or one would wait in vain for another that has stopped
        if self.stopping:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self.stopping:
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.stopping = _any_process(self.asked)
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
        self.steps_allowed = 1

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

    def __init__(self, run: Run, section: MonitorSection, stage: str, anchored: bool):
        self.run, self.section, self.stage, self.anchored = run, section, stage, anchored
        self.said = {warning.guard for warning in run.manifest.warnings}
        self.outside = False
        self.stopped: Alarm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.log_history:  # resumed, perhaps from the very evaluation that stopped it
            self.on_evaluate(args, state, control)

    def on_evaluate(self, args, state, control, **kwargs):
        evaluations = [row for row in state.log_history if "eval_loss" in row]
        found = alarms(evaluations, self.section, self.anchored, self.stage)
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


def check_probe(
    who: str, found: list[float], whose: str, expected: Sequence[float], other: Sequence[float] | None, exact: bool
) -> None:
    """Refuses a model that does not give the log-probabilities (nats) of the one that it should be to the same replies.

    `other` are those of the model that it could be taken for: base and SFT model differ by what SFT has changed. Of
    that distance a hundredth is allowed in float32, a tenth in 4-bit or half precision; and rounding.
    """
    share, rounding = (0.01, 1e-4) if exact else (0.1, 2e-3)
    allowed = rounding * sum(map(abs, expected)) + 0.01
    if other:
        allowed += share * _distance(expected, other)
    if not _distance(found, expected) <= allowed:  # nan fails too
        nats = ["/".join(f"{each:.2f}" for each in some) for some in (found, expected)]
        remedy = (
            "train SFT again with --force" if whose == "SFT run" else "a fault of alignlab or TRL, please report it"
        )
        raise ModelError(
            f"before the first step the {who} gives replies {nats[0]} nats, where the {whose} gave {nats[1]}: "
            f"it is not that model; {remedy}"
        )


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def check_loss(loss: float, expected: float) -> None:
    """Refuses another loss than that of two equal models, where policy and reference are the same model."""
    if not abs(loss - expected) <= LOSS_TOLERANCE:
        raise ModelError(
            f"before the first step the loss is {loss:.4f}, not {expected:.4f}, though policy and reference agree; "
            f"a fault of alignlab or TRL, please report it"
        )


def start_peak_memory() -> None:
    """Forgets the peak so far: several runs may follow each other in a process, and each notes its own."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux alone has it, and not every container lets it be written
        PEAK_RESET.write_text("5", encoding="utf-8")


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of this process, what it still holds of earlier runs included."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        lines = PROCESS_STATUS.read_text(encoding="utf-8").splitlines()
        if peak := next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None):
            return int(peak) * 1024
    with contextlib.suppress(ImportError):  # Windows has none
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return psutil.Process().memory_info().peak_wset  # type: ignore[attr-defined]  # of Windows alone


@contextlib.contextmanager
def wandb_run(run: Run, group: str) -> Iterator[None]:
    """A run of wandb's that ends with the context: online where wandb's own login holds, else offline, and said.

    `WANDB_MODE`, `WANDB_PROJECT` and the other variables of wandb's own win. A resumed run goes on in its wandb run,
    whose id is in the manifest; the runs of a recipe share a group.
    """
    if not run.is_writer or wandb_is_off():
        yield
        return
    wandb_id = run.manifest.wandb_id or secrets.token_hex(4)  # `random` is seeded by now
    own = {"WANDB_RUN_ID": wandb_id, "WANDB_RESUME": "allow", "WANDB_DIR": str(run.path)}
    own["WANDB_MODE"] = os.environ.get("WANDB_MODE") or "online"
    named = {"WANDB_PROJECT": "alignlab", "WANDB_NAME": f"{group}/{run.path.name}", "WANDB_RUN_GROUP": group}
    named["WANDB_SILENT"] = "true"  # its greeting asks its server three times who this is, and waits
    before = dict(os.environ)
    os.environ.update({**named, **before, **own})
    run.note(wandb_id=wandb_id)
    import wandb  # a second, which runs without it are spared

    try:
        if not _start_wandb():
            before["WANDB_MODE"] = "offline"  # for later runs of this process, which need not wait again
        yield
    finally:
        try:
            wandb.finish()
            wandb.teardown()  # or the next run of this process would be written into the folder of this one
        except Exception as e:  # its service has died; what was logged is in metrics.jsonl
            log.warning("wandb: not ended (%s); `wandb sync` uploads %s later", type(e).__name__, run.path / "wandb")
        os.environ.clear()
        os.environ.update(before)


def _start_wandb() -> bool:
    """Starts the run that Trainer's callback will find; whether it is online, which one line says, and why not."""
    import wandb

    why = "as WANDB_MODE says"
    if os.environ.get("WANDB_MODE") not in ("offline", "dryrun"):
        settings = wandb.Settings(init_timeout=WANDB_SECONDS, finish_timeout=WANDB_FINISH_SECONDS)
        try:
            if wandb.login(prompt=False, verify=False):
                begun = wandb.init(settings=settings)
                log.info("wandb: online as %s, %s", begun.entity, begun.url)
                return True
            why = "nobody is logged in; `wandb login` does it"
        except (wandb.Error, ValueError) as e:  # refused, out of reach, or a variable that holds nonsense
            reason = " ".join(str(e).splitlines()[:3])
            why = f"no run could begin ({reason}); `wandb sync` uploads it later"
    log.info("wandb: offline, %s", why)
    wandb.teardown()
    os.environ["WANDB_MODE"] = "offline"
    wandb.init()
    return False
