"""Folders to torture: a tiny random model, recipes of seconds, and a child process that runs one command and may die.

Children are forked from a process that has imported everything, so that a kill costs seconds and not the ten that
importing torch and TRL takes. A child is a process of its own all the same: SIGKILL ends it wherever it is.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

RECIPE = """
about: a run of seconds
data: {{source: toy, max_prompt_tokens: 80, max_reply_tokens: 48, toy: {{pairs: 96}}}}
model: {{name: {model}, dtype: float32, lora: {{r: 4, target_modules: all-linear}}}}
sft: {{max_steps: 4, learning_rate: 1.0e-2, logging_steps: 2, eval_steps: 2, lr_scheduler_type: {schedule}}}
dpo: {{{dpo}, logging_steps: 2, eval_steps: 2, lr_scheduler_type: {schedule}}}
monitor: {{kl: {{prompts: 4, max_new_tokens: 8}}, {monitor}}}
sweep: {{betas: [0.5, 0.1]}}
"""
# a recipe for each way in which a run ends
RECIPES = {
    "steps": {"schedule": "cosine", "dpo": "max_steps: 8, learning_rate: 1.0e-3", "monitor": "patience: 9"},
    "constant": {"schedule": "constant", "dpo": "max_steps: 8, learning_rate: 1.0e-3", "monitor": "patience: 9"},
    "epochs": {"schedule": "cosine", "dpo": "num_train_epochs: 0.5, learning_rate: 1.0e-3", "monitor": "patience: 9"},
    "patience": {"schedule": "constant", "dpo": "max_steps: 40, learning_rate: 0.2", "monitor": "patience: 1"},
    "guard": {
        "schedule": "constant",
        "dpo": "max_steps: 40, learning_rate: 3.0e-2",
        "monitor": "max_kl: 1.0, action: stop, patience: 9",
    },
}
# a model that learns to end its replies, so that there is something to judge
ROUNDS = """
about: rounds of seconds
data: {{source: toy, max_prompt_tokens: 80, max_reply_tokens: 48, toy: {{pairs: 96}}}}
model: {{name: {model}, dtype: float32}}
sft: {{max_steps: 12, learning_rate: 1.0e-2, logging_steps: 6, eval_steps: 6, lr_scheduler_type: constant}}
dpo: {{max_steps: 4, learning_rate: 1.0e-3, logging_steps: 2, eval_steps: 2, lr_scheduler_type: constant}}
monitor: {{kl: {{prompts: 4, max_new_tokens: 8}}, max_kl: null, patience: 9}}
rounds: {{count: 2, samples: 3, prompts: 24, judge: "llm:longer"}}
"""
ENVIRONMENT = {
    "WANDB_MODE": "disabled",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "os.chmod", "os.utime"}


@dataclass(frozen=True)
class Death:
    """When a child is to die: before the `event`-th change of a file, or after some seconds; neither: never.

    With `window` the changes are counted from the last checkpoint on: of what follows training.
    """

    event: int | None = None
    seconds: float | None = None
    window: bool = False

    def __str__(self) -> str:
        if self.seconds is not None:
            return f"after {self.seconds:.2f} s"
        where = " behind the last checkpoint" if self.window else ""
        return f"at change {self.event}{where}" if self.event else "never"


@dataclass(frozen=True)
class Ending:
    code: int  # the exit code, or 128 + the signal
    said: str  # stdout and stderr together
    changes: Sequence[str]  # of files, in order, each as `os.rename runs/…`
    seconds: float

    @property
    def killed(self) -> bool:
        return self.code == 128 + signal.SIGKILL

    @property
    def traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.said


def prepare_environment() -> None:
    """Before anything is imported: some libraries read their environment only once."""
    os.environ.update(ENVIRONMENT)


def import_everything() -> None:
    import alignlab.data.prepare  # noqa: F401
    import alignlab.doctor.examination  # noqa: F401
    import alignlab.evaluation.evaluator  # noqa: F401
    import alignlab.exports.export  # noqa: F401
    import alignlab.reports.page  # noqa: F401
    import alignlab.rounds.rounds  # noqa: F401
    import alignlab.sweeps.runner  # noqa: F401
    import alignlab.train.stages  # noqa: F401


def make_template(folder: Path) -> Path:
    """A folder with a model, its cache and the recipes of `RECIPES`."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from alignlab.models import pretrain
    from alignlab.recipe.load import ToySection

    (folder / "recipes").mkdir(parents=True)
    tokenizer = pretrain.tokenizer(ToySection(pairs=96))
    set_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**shape, **words, max_position_embeddings=128))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, settings in RECIPES.items():
        text = RECIPE.format(model=folder / "model", **settings)
        (folder / "recipes" / f"{name}.yaml").write_text(text)
    (folder / "recipes" / "rounds.yaml").write_text(ROUNDS.format(model=folder / "model"))
    return folder


def copied(template: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(template, to)
    return to


def run_command(
    folder: Path, arguments: Sequence[str], death: Death = Death(), last: str | None = None, log: str = ".said"
) -> Ending:
    """Runs `alignlab ARGUMENTS` in `folder` in a child that dies as `death` says; `last` is the last checkpoint."""
    events, log = folder / f"{log}-changes", folder / log
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(folder, arguments, death, last, log, events)
    code = _wait(pid, death)
    said = log.read_text(errors="replace") if log.is_file() else ""
    changes = events.read_text(errors="replace").splitlines() if events.is_file() else []
    return Ending(code, said, changes, time.monotonic() - began)


def _wait(pid: int, death: Death) -> int:
    deadline = time.monotonic() + (death.seconds if death.seconds is not None else 600)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            if death.seconds is None:
                raise TimeoutError("a command took more than ten minutes")
            return 128 + signal.SIGKILL
        time.sleep(0.005)


def _child(folder: Path, arguments, death: Death, last: str | None, log: Path, events: Path) -> None:
    """Never returns."""
    os.setsid()
    os.chdir(folder)
    os.environ["ALIGNLAB_CACHE"] = str(folder / "cache")
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.addaudithook(_Killer(folder, death, last, os.open(events, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)))
    code = 70
    try:
        from alignlab.cli.commands import main

        code = main(list(arguments))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)


class _Killer:
    """An audit hook that counts changes of files below a folder, and kills its own process before one of them."""

    def __init__(self, folder: Path, death: Death, last: str | None, log: int):
        self.folder, self.death, self.last, self.log = str(folder), death, last, log
        self.pid = os.getpid()
        self.seen = 0
        self.counting = not death.window or bool(last and (folder / last).exists())

    def __call__(self, event: str, arguments: tuple) -> None:
        if os.getpid() != self.pid:  # a helper process of the child
            return
        is_change = event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES)
        path = str(arguments[-2] if event == "os.rename" and len(arguments) > 3 else arguments[0])
        if not is_change or (path.startswith("/") and not path.startswith(self.folder)) or path.startswith("/dev"):
            return
        target = str(arguments[1]) if event == "os.rename" else path
        if self.counting:
            self.seen += 1
            if self.seen == self.death.event:
                os.kill(self.pid, signal.SIGKILL)
        os.write(self.log, f"{event} {target}\n".encode(errors="replace"))
        if self.last and target.endswith(self.last):
            self.counting = True


def outcome(folder: Path) -> dict[str, str]:
    """A short hash of everything that must not depend on kills, by name."""
    from alignlab.runs.run import Run

    found = {}
    for manifest in sorted(folder.glob("runs/*/*/manifest.json")):
        run = Run(manifest.parent)
        name = f"{manifest.parent.parent.name}/{manifest.parent.name}"
        for file in sorted(run.model.glob("*")):
            if file.suffix in (".safetensors", ".json") and file.name != "adapter_config.json":
                found[f"{name}/{file.name}"] = _hash(file.read_bytes())
        found[f"{name}/metrics"] = _hash(_without_times(_rows(run.metrics_file)))
        found[f"{name}/samples"] = _hash(_rows(run.samples_file))
        found[f"{name}/dropped"] = _hash(run.dropped_file.read_bytes() if run.dropped_file.is_file() else b"")
        facts = json.loads(manifest.read_text())
        for fact in ("status", "stop_reason", "best_step", "steps", "test", "probe", "warnings", "data", "parent"):
            found[f"{name}/{fact}"] = _hash(facts.get(fact))
    for file in sorted(
        [*folder.glob("runs/**/eval.json"), *folder.glob("runs/*/sweep.json"), *folder.glob("runs/*/rounds.json")]
    ):
        told = json.loads(file.read_text().replace(str(folder), ""))
        figures: dict[str, str] = {}
        found[str(file.relative_to(folder / "runs"))] = _hash(_timeless(told, figures))
        found |= {f"{file.relative_to(folder / 'runs')}{name}": value for name, value in figures.items()}
    for file in sorted([*folder.glob("pairs.jsonl"), *folder.glob("runs/*/pairs/*.jsonl")]):
        found[str(file.relative_to(folder))] = _hash(file.read_bytes())
    for file in sorted(folder.glob("out/*.safetensors")):
        found[f"out/{file.name}"] = _hash(file.read_bytes())
    return found


TIMES = {"time", "seconds", "versions", "started", "finished", "made", "wall", "hours", "checksum"}  # and their hash


def _timeless(value, figures: dict[str, str], name: str = ""):
    """Without times; floats go to `figures` by their place, which `differences` compares to three digits.

    The last bits of a float32 product depend on where its operands lie in memory. So an evaluation that reads its
    replies scores them by other last bits than one that sampled them.
    """
    if isinstance(value, float):
        figures[name] = repr(value)
        return None
    if isinstance(value, dict):
        if value.get("measure") == "hours":
            return None
        kept = [k for k in value if k not in TIMES and "seconds" not in k and "memory" not in k]
        return {k: _timeless(value[k], figures, f"{name}.{k}") for k in kept}
    return [_timeless(v, figures, f"{name}.{i}") for i, v in enumerate(value)] if isinstance(value, list) else value


def _without_times(rows: list[dict]) -> list[dict]:
    times = {"time", "eval/runtime", "eval/samples_per_second", "eval/steps_per_second"}
    return [{k: v for k, v in row.items() if k not in times} for row in rows]


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _hash(value) -> str:
    import xxhash

    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True, default=str).encode()
    return xxhash.xxh3_64_hexdigest(data)


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if not _alike(one.get(name), other.get(name)))


def _alike(one: str | None, other: str | None) -> bool:
    """Equal, or figures that are equal to three digits: a difference of two of them has no more that are certain."""
    if one == other or one is None or other is None:
        return one == other
    try:
        return math.isclose(float(one), float(other), rel_tol=1e-3, abs_tol=1e-3)
    except ValueError:
        return False


def random_death(draw: random.Random, changes: int, window: int, seconds: float) -> Death:
    """One kill in three behind the last checkpoint, one in four by the clock, the others anywhere."""
    which = draw.random()
    if window and which < 0.4:
        return Death(event=draw.randint(1, window), window=True)
    if which < 0.6:
        return Death(seconds=draw.uniform(0.05, seconds))
    return Death(event=draw.randint(1, max(changes, 1)))


def parts(results: Path, done: Callable[[dict], object]) -> set:
    """What earlier parts of a campaign have done."""
    if not results.is_file():
        return set()
    return {done(json.loads(line)) for line in results.read_text().splitlines() if line.strip()}


def append(results: Path, row: dict) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")
