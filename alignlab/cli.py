"""Arguments → calls; the only place that catches, and where logging is configured."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from alignlab import __version__
from alignlab.errors import AlignlabError

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_ERROR_REPORTING": "false",
    "TRANSFORMERS_VERBOSITY": "error",  # its warnings speak to who writes training code
    "WANDB_SILENT": "true",  # the run directory says where things are; wandb's banner says it again
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 a fault the user can mend (one line on stderr), 130 interrupted."""
    quiet = QUIET if sys.stderr.isatty() else {**QUIET, "TQDM_DISABLE": "1"}  # no bars in log files
    os.environ.update({name: value for name, value in quiet.items() if name not in os.environ})
    _configure_logging()
    args = _parser().parse_args(argv)
    try:
        args.command(args)
        return 0
    except KeyboardInterrupt as e:
        return _say(str(e) or "interrupted; the same command goes on from the last checkpoint", 130)
    except AlignlabError as e:
        return _fail(str(e), args)
    except Exception as e:
        if not _is_full_disk(e):
            raise
        return _fail("no space left on the disk; make room, and the same command goes on from where it was", args)


def _list(args: argparse.Namespace) -> None:
    from alignlab.listing import list_recipes

    found = list_recipes()
    width = max(len(name) for name, _, _ in found)
    for name, about, _ in found:
        print(f"{name:{width}}  {about}")


def _show(args: argparse.Namespace) -> None:
    recipe = _recipe(args)
    from alignlab.arguments import Circumstances, trl_arguments
    from alignlab.listing import show_arguments, show_recipe
    from alignlab.recipe import run_name

    print(show_recipe(recipe))
    for stage in ("sft", "dpo"):
        here = Circumstances(Path("runs") / recipe.name / run_name(recipe, stage) / "checkpoints")
        print("\n" + show_arguments(stage, trl_arguments(recipe, stage, here), recipe))


def _data(args: argparse.Namespace) -> None:
    recipe = _recipe(args)
    from alignlab.data import write_pairs
    from alignlab.describe import describe, render
    from alignlab.train import prepare_data

    tokenizer, pairs = prepare_data(recipe)
    if args.out:
        write_pairs(pairs, Path(args.out))
    description = describe(pairs, recipe.data, tokenizer)
    print(json.dumps(description, ensure_ascii=False) if args.json else render(description))


def _cache(args: argparse.Namespace) -> None:
    from alignlab.store import clear_store, list_store

    if args.clear:
        print(f"{clear_store() / 2**20:.1f} MiB freed")
        return
    for entry in list_store():
        used = datetime.fromtimestamp(entry.last_used).strftime("%Y-%m-%d %H:%M")
        print(f"{entry.pairs:>9,} pairs  {entry.bytes / 2**20:7.1f} MiB  used {used}  {entry.reference}")


def _train(args: argparse.Namespace) -> None:
    recipe = _recipe(args)
    from alignlab import train
    from alignlab.summary import summarize

    stage = train.train_sft if args.stage == "sft" else train.train_dpo
    run = stage(recipe, name=args.run, force=args.force)
    if _is_main_process():
        print(summarize(run))


def _recipe(args: argparse.Namespace):
    from alignlab.recipe import load_recipe

    return load_recipe(args.recipe, args.overrides)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="alignlab",
        description="Aligns a language model to preferences: a recipe describes the run, TRL trains it.",
        epilog="alignlab COMMAND --help has examples.",
    )
    parser.add_argument("--version", action="version", version=f"alignlab {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="stage")
    _command(commands, "list", _list, "the recipes, one line each", [], recipe=False)
    _command(commands, "show", _show, "the resolved recipe, and where each value came from", ["mistral dpo.beta=0.3"])
    data = _command(
        commands,
        "data",
        _data,
        "what is in the dataset: counts, drops by reason, lengths, a few pairs",
        ["tiny", "mistral data.path=helpful.jsonl.gz", "tiny --json", "tiny --out pairs.jsonl"],
    )
    data.add_argument("--json", action="store_true", help="print one JSON object")
    data.add_argument("--out", metavar="FILE", help="write the prepared rows: split, prompt, chosen, rejected")
    cache = _command(commands, "cache", _cache, "stored reference log-probabilities", ["", "--clear"], recipe=False)
    cache.add_argument("--clear", action="store_true", help="remove them all")
    for stage, about in (("sft", "supervised fine-tuning"), ("dpo", "DPO from the SFT run, trained first if missing")):
        examples = ["tiny", f"mistral {stage}.learning_rate=1e-5", f"gpt2 data.path=my.jsonl --run {stage}-mine"]
        command = _command(commands, stage, _train, about, examples)
        command.add_argument("--run", metavar="NAME", help="the run's name under runs/RECIPE/")
        command.add_argument("--force", action="store_true", help="train again; the older run is kept aside")
    return parser


def _command(commands, name, call, about, examples, recipe=True) -> argparse.ArgumentParser:
    epilog = "examples:\n" + "\n".join(f"  alignlab {name} {example}" for example in examples or [""])
    command = commands.add_parser(
        name, help=about, description=about, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.set_defaults(command=call)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if recipe:
        command.add_argument("recipe", metavar="RECIPE", help="a name from `alignlab list`, or a path")
        command.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings for this run only")
    return command


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _fail(message: str, args: argparse.Namespace) -> int:
    if args.debug:
        logging.getLogger("alignlab").exception("traceback, as asked for by --debug")
    return _say(message, 2)


def _say(message: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    print(message if rank == "0" else f"[rank {rank}] {message}", file=sys.stderr)
    return code


# How safetensors and torch.save (torch 2.13) say that the disk is full, in place of ENOSPC
FULL_DISK = ("No space left on device", "iostream error", "PytorchStreamWriter failed", "inline_container")


def _is_full_disk(error: BaseException | None) -> bool:
    while error:
        if getattr(error, "errno", None) == errno.ENOSPC or any(words in str(error) for words in FULL_DISK):
            return True
        error = error.__cause__ or error.__context__
    return False


def _configure_logging() -> None:
    """Our lines on stderr as they are; other libraries' warnings, but for those nobody using alignlab can act on."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("alignlab").setLevel(logging.INFO if _is_main_process() else logging.ERROR)
    # bitsandbytes asks for an optional CPU kernel from the hub and goes on without it
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # TRL 1.16 itself still passes gradient_checkpointing, which transformers 5.23 has renamed
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)


if __name__ == "__main__":
    sys.exit(main())
