"""Several processes: `accelerate launch` with its file checked first, and the world that came of it checked after."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from alignlab.errors import MachineError, RunError
from alignlab.recipe.load import ModelSection

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]  # beside which a checkout has accelerate_configs/; a wheel has it inside
WAIT_MINUTES = 15  # for the host whose machine_rank is 0
ASKED = "ALIGNLAB_WORLD_SIZE"  # how many processes a launch was asked for, handed down to each of them
SHARDED = {"FSDP": "ACCELERATE_USE_FSDP", "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED"}  # and what accelerate sets for it


# How gloo and NCCL say that another process is gone (torch 2.13); gloo does so in a plain RuntimeError
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


class Killed(RunError):
    """A process of a launch has died by a signal, and the launch with it."""

    def __init__(self, rank: int, number: int):
        self.number = number
        super().__init__(f"rank {rank} was killed by {signal.Signals(number).name}")


def launch(file: Path, section: ModelSection, arguments: Sequence[str], processes: int | None = None) -> int:
    """Runs `alignlab ARGUMENTS` as `accelerate launch --config_file FILE` would; the exit code of its processes.

    Raises `Killed` where one of them died by a signal, and KeyboardInterrupt where the launch itself was told to stop.
    """
    config = read_config(file)
    refuse_sharded_4bit(section, str(config["distributed_type"]))
    asked = processes or config.get("num_processes", 1)
    if asked > 1 and not config.get("use_cpu"):
        _refuse_without_gpu(asked, str(file))
    if config.get("num_machines", 1) > 1:
        log.info("%s", waits_for(config))
    import torch.distributed
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    words = ["--config_file", str(find_config(file)), "--num_processes", str(asked)]
    words += ["--rdzv_conf", f"timeout={60 * WAIT_MINUTES}", "-m", "alignlab", *arguments]
    os.environ[ASKED] = str(asked)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes have said what is wrong
    try:
        launch_command(launch_command_parser().parse_args(words))
    except ChildFailedError as e:
        codes = {rank: failure.exitcode for rank, failure in e.failures.items()}
        if dead := [rank for rank, code in codes.items() if code < 0]:
            raise Killed(dead[0], -codes[dead[0]]) from e
        return min(codes.values())  # a fault of ours, 1, before one that the user can mend
    except SignalException as e:
        raise KeyboardInterrupt from e
    except subprocess.CalledProcessError as e:
        return e.returncode
    except torch.distributed.DistError as e:
        raise MachineError(f"the other hosts have not come together ({' '.join(str(e).split())[:200]})") from e
    except (ValueError, ConnectionError, ImportError) as e:  # accelerate's way of refusing a combination
        raise MachineError(f"accelerate cannot launch with {file}: {' '.join(str(e).split())}") from e
    return 0


def waits_for(config: Mapping[str, Any]) -> str:
    """Of a launch over several hosts: for whom this one waits, and how long."""
    hosts, rank = config["num_machines"], config.get("machine_rank", 0)
    where = f"{config.get('main_process_ip')}:{config.get('main_process_port')}"
    if rank:
        return f"host {rank} of 0 to {hosts - 1}: waits up to {WAIT_MINUTES} minutes for host 0 at {where}"
    others = "host 1" if hosts == 2 else f"hosts 1 to {hosts - 1}"
    how_long = "up to 10 minutes on GPUs, 30 on CPUs"  # torch's own, for the first collective of NCCL and gloo
    return f"host 0 of 0 to {hosts - 1}: waits at {where} for {others}, {how_long}"


def _refuse_without_gpu(processes: int, file: str) -> None:
    import torch

    if not torch.cuda.is_available():
        raise MachineError(
            f"{file} asks for {processes} processes, and there is no GPU here; leave --launch out, or write "
            f"use_cpu: true as in accelerate_configs/two-cpu.yaml"
        )


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Turns what a collective says when another process has gone into one line."""
    try:
        yield
    except RuntimeError as e:
        import torch.distributed

        if isinstance(e, torch.distributed.DistError) or any(words in str(e) for words in GONE):
            raise RunError(
                "another process of this launch has died; the same command goes on from the last checkpoint"
            ) from e
        raise


def leave() -> None:
    """Ends the process group of this launch.

    A thread of gloo that is left running may ask for the interpreter's lock while it ends, which aborts the process.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def find_config(file: Path) -> Path:
    """The file of this path; where there is none, the one that comes with alignlab: `accelerate_configs/ddp.yaml`."""
    return next((path for path in (file, PACKAGE / file, PACKAGE.parent / file) if path.is_file()), file)


def read_config(file: Path) -> dict[str, Any]:
    """A file of `accelerate config`; MachineError where it is not one."""
    file = find_config(file)
    if not file.is_file():
        raise MachineError(
            f"there is no launch file {file}; accelerate_configs/ holds some, `accelerate config` writes one"
        )
    from accelerate.commands.config.config_args import ClusterConfig

    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise MachineError(f"{file} is not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(config, dict) or "distributed_type" not in config:
        raise MachineError(
            f"{file} is no accelerate config: it has no distributed_type; use one of accelerate_configs/"
        )
    if strangers := sorted(config.keys() - ClusterConfig.__dataclass_fields__.keys()):
        raise MachineError(f"{file} is no accelerate config: {', '.join(map(str, strangers))} are no keys of it")
    return config


def refuse_sharded_4bit(section: ModelSection, distributed_type: str | None = None) -> None:
    """Refuses to shard 4-bit weights: what is left to shard is an adapter, and DDP is the way that is tested."""
    if section.load_in_4bit and (distributed_type in SHARDED or is_sharded()):
        raise MachineError(
            "model.load_in_4bit does not go with FSDP or DeepSpeed; use accelerate_configs/ddp.yaml, "
            "or set model.load_in_4bit=false"
        )


def is_sharded() -> bool:
    """Whether this process holds a part of the weights, by FSDP or DeepSpeed."""
    return any(os.environ.get(name) == "true" for name in SHARDED.values())


def check_world(world_size: int) -> None:
    """Refuses another number of processes than was asked for, where the launcher has started fewer in silence."""
    asked = asked_processes()
    if asked and asked != world_size:
        raise MachineError(
            f"accelerate was asked for {asked} processes and started {world_size}: without GPUs write "
            f"distributed_type: MULTI_GPU and use_cpu: true as in accelerate_configs/two-cpu.yaml"
        )
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and world_size == 1:
        raise MachineError(
            f"srun started {tasks} tasks, each of which would be a run of its own; start one task a host "
            f"(srun --ntasks-per-node=1) and let accelerate start its processes"
        )


def asked_processes() -> int | None:
    """How many processes, on all hosts, the launcher of this one was told to start; None where there is no launcher."""
    if ASKED in os.environ:
        return int(os.environ[ASKED])
    import psutil

    parent = psutil.Process().parent()
    try:
        return asked_by(parent.cmdline()) if parent else None
    except psutil.Error:  # gone, or another user's
        return None


def asked_by(command: Sequence[str]) -> int | None:
    """The number of processes that a command line asks of accelerate; None where it asks for none.

    >>> asked_by(["/usr/bin/accelerate", "launch", "--num_processes", "2", "-m", "alignlab", "dpo", "tiny"])
    2
    """
    names = [Path(word).name for word in command[:4]]
    if "accelerate-launch" in names:
        words = command[names.index("accelerate-launch") + 1 :]
    elif "accelerate" in names and "launch" in names:
        words = command[names.index("launch") + 1 :]
    else:
        return None
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    args, _ = launch_command_parser().parse_known_args(words)
    if args.num_processes:
        return args.num_processes
    file = args.config_file or (default_config_file if Path(default_config_file).is_file() else None)
    told = load_config_from_file(file).num_processes if file else None
    return told if told and told > 0 else None


def refuse_different_recipes(texts: Sequence[str]) -> None:
    """Refuses a launch whose processes, on their hosts, have read different recipes; `texts` has one for each rank."""
    different = [rank for rank, text in enumerate(texts) if text != texts[0]]
    if not different:
        return
    lines = zip(texts[0].splitlines(), texts[different[0]].splitlines(), strict=False)
    first = next(
        (f"{ours.strip()!r} against {theirs.strip()!r}" for ours, theirs in lines if ours != theirs), "its length"
    )
    raise RunError(
        f"rank {different[0]} has another recipe than rank 0 ({first}); bring the same recipe file to every host"
    )
