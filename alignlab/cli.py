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
    args = _parsed(argv)
    try:
        return args.command(args) or 0
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


def _report(args: argparse.Namespace) -> None:
    from alignlab.report import find_runs, write_report

    for path in find_runs(args.recipe, args.run):
        print(write_report(path))


def _compare(args: argparse.Namespace) -> None:
    from alignlab.report import last_run, write_comparison

    print(write_comparison([last_run(run) for run in args.runs], Path(args.out) if args.out else None))


def _eval(args: argparse.Namespace) -> None:
    from alignlab.lineup import find_runs

    runs = find_runs(args.recipe, args.overrides, run=args.run, runs=args.runs, best=args.best)
    from alignlab.evaluate import Wishes, evaluate
    from alignlab.scoreboard import show

    paths = {"prompts": [Path(file) for file in args.prompts], "bias": args.bias and Path(args.bias)}
    folder = args.tasks_folder and Path(args.tasks_folder)
    same = ("judge", "url", "max_requests", "classifier", "lm_eval", "greedy", "max_new_tokens", "replies", "limit")
    given = {name: getattr(args, name) for name in (*same, "batch_size", "seed")}
    wishes = Wishes(**paths, **given, harmful_labels=args.harmful_label, tasks_folder=folder)
    file = evaluate(runs, wishes)
    print(show(json.loads(file.read_text(encoding="utf-8")), file))


def _plan(args: argparse.Namespace) -> None:
    recipe = _recipe(args)
    from alignlab.plan import GPUS, plan_facts, show_plan, show_probe, stages_of

    stages, gpus = stages_of(recipe, args.of), args.gpu or GPUS
    cuda = bool(args.gpu) or not (args.cpu or recipe.model.name == "toy")
    if not args.probe:
        page = plan_facts if args.json else show_plan
        found = page(recipe, stages, gpus, cuda=cuda)
        print(json.dumps(found, ensure_ascii=False) if args.json else found)
        return
    from alignlab.probe import probe

    for stage in stages:
        print(show_probe(stage, probe(recipe, stage)))


def _export(args: argparse.Namespace) -> None:
    if args.push:
        from alignlab.hub import check_push

        check_push(args.push, args.public)
    from alignlab.export import Wish, export, find_run, summarize

    run = find_run(args.recipe, args.run, best=args.best)
    wish = Wish(args.form, args.dtype, args.base, args.model, args.rows, args.force, args.push)
    made = export(run, Path(args.to), wish)
    print(summarize(made))
    if args.push:
        from alignlab.hub import push

        print(f"  push  {push(made.path, args.push, args.public, f'{run.path.parent.name}/{run.path.name}')}")


def _cache(args: argparse.Namespace) -> None:
    from alignlab.prepared import clear_prepared, list_prepared
    from alignlab.store import clear_store, list_store

    if args.clear:
        print(f"{(clear_store() + clear_prepared()) / 2**20:.1f} MiB freed")
        return
    entries = [(entry, f"reference: {entry.reference}") for entry in list_store()]
    entries += [(entry, f"data: {entry.about}") for entry in list_prepared()]
    for entry, about in entries:
        used = datetime.fromtimestamp(entry.last_used).strftime("%Y-%m-%d %H:%M")
        print(f"{entry.pairs:>9,} pairs  {entry.bytes / 2**20:7.1f} MiB  used {used}  {about}")


def _train(args: argparse.Namespace) -> int | None:
    recipe = _recipe(args)
    if args.launch:
        return _launch(args, recipe)
    from alignlab import train
    from alignlab.summary import summarize

    stage = train.train_sft if args.stage == "sft" else train.train_dpo
    run = stage(recipe, name=args.run, force=args.force)
    if _is_main_process():
        from alignlab.report import report_line

        print(summarize(run))
        print(report_line(run.path))
    return None


def _sweep(args: argparse.Namespace) -> int | None:
    from alignlab.choice import collect, render
    from alignlab.members import commands, find_members

    members = find_members(args.recipe, args.overrides, args.betas, args.grid)
    if args.print:
        print("\n".join(commands(members)))
        return None
    if args.collect:
        table = collect(members)
    else:
        from alignlab.sweep import run_members, share

        if args.shared:
            return share(members)
        table = run_members(members)
    print(render(table, members.folder))
    return 2 if any(member["status"] == "failed" for member in table["members"]) else None


def _launch(args: argparse.Namespace, recipe) -> int:
    from alignlab.launch import launch

    own = [args.stage, args.recipe, *args.overrides, *(["--run", args.run] if args.run else [])]
    own += ["--force"] * args.force + ["--debug"] * args.debug
    return launch(Path(args.launch), recipe.model, own, args.processes)


def _recipe(args: argparse.Namespace):
    from alignlab.recipe import load_recipe

    return load_recipe(args.recipe, args.overrides)


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; overrides may stand after options too, where argparse by itself refuses them."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    strangers = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(args, "overrides")]
    if strangers:
        parser.error(f"unrecognized arguments: {' '.join(strangers)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


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
    report = _command(
        commands,
        "report",
        _report,
        "one HTML page, and the same facts as report.json, from the runs of a recipe",
        ["tiny", "mistral --run dpo dpo-beta0.3", "runs/mistral/dpo-beta0.3"],
        recipe=False,
    )
    report.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a recipe's name, whose runs are under runs/, or a folder. Without --run: the sweep where there is one, "
        "else the DPO run that was started last, else the SFT run",
    )
    report.add_argument("--run", metavar="NAME", nargs="+", default=[], help="these runs under runs/RECIPE/ instead")
    compare = _command(
        commands,
        "compare",
        _compare,
        "runs side by side on one HTML page, the settings in which they differ first",
        ["runs/mistral/dpo runs/mistral/dpo-beta0.3", "mistral zephyr --out mistral-zephyr.html"],
        recipe=False,
    )
    compare.add_argument("runs", metavar="RUN", nargs="+", help="a run's directory, or a recipe for its last DPO run")
    compare.add_argument(
        "--out", metavar="FILE", help="the page; by default compare.html in the nearest folder that holds all the runs"
    )
    _add_eval(commands)
    plan = _command(
        commands,
        "plan",
        _plan,
        "the memory a recipe will need, part by part, and whether it fits",
        ["mistral", "mistral --gpu 16 --stage dpo", "zephyr dpo.per_device_train_batch_size=2 --json", "tiny --probe"],
    )
    plan.add_argument("--gpu", type=_gib, action="append", metavar="GIB", help="memory of one GPU; default 16 and 24")
    plan.add_argument("--stage", dest="of", choices=("sft", "dpo"), help="only this stage")
    plan.add_argument("--cpu", action="store_true", help="plan for a process on a CPU")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.add_argument("--probe", action="store_true", help="run two steps on the longest rows and compare")
    _add_export(commands)
    cache = _command(
        commands,
        "cache",
        _cache,
        "what is stored: prepared data, and reference log-probabilities",
        ["", "--clear"],
        recipe=False,
    )
    cache.add_argument("--clear", action="store_true", help="remove them all")
    for stage, about in (("sft", "supervised fine-tuning"), ("dpo", "DPO from the SFT run, trained first if missing")):
        examples = ["tiny", f"mistral {stage}.learning_rate=1e-5", f"gpt2 data.path=my.jsonl --run {stage}-mine"]
        examples.append("mistral --launch accelerate_configs/ddp.yaml --processes 8")
        command = _command(commands, stage, _train, about, examples)
        command.add_argument("--run", metavar="NAME", help="the run's name under runs/RECIPE/")
        command.add_argument("--force", action="store_true", help="train again; the older run is kept aside")
        command.add_argument("--launch", metavar="FILE", help="in several processes: a file of accelerate_configs/")
        command.add_argument("--processes", type=int, metavar="N", help="of all hosts together, instead of the file's")
    sweep = _command(
        commands,
        "sweep",
        _sweep,
        "DPO at each of several betas, the table, and the beta to choose",
        [
            "tiny",
            "mistral --betas 0.5,0.3,0.1,0.05",
            "mistral --grid dpo.learning_rate=5e-6,1e-6 seed=0,1",
            "mistral --print > jobs",
            "mistral --collect",
        ],
    )
    sweep.add_argument("--betas", metavar="B,B", help="instead of the recipe's sweep.betas")
    sweep.add_argument(
        "--grid",
        metavar="KEY=V,V",
        nargs="+",
        action="extend",
        default=[],
        help="other settings to combine with the betas; a key without a section is one of dpo",
    )
    instead = sweep.add_mutually_exclusive_group()
    instead.add_argument(
        "--print", action="store_true", help="one command a line: what all share first, then each member"
    )
    instead.add_argument(
        "--shared", action="store_true", help="only what all share: SFT, data, the reference's numbers"
    )
    instead.add_argument(
        "--collect", action="store_true", help="train nothing: the table of the members that are there"
    )
    return parser


def _add_export(commands) -> None:
    command = _command(
        commands,
        "export",
        _export,
        "a finished run's model as a folder that loads anywhere, checked against the run",
        ["mistral --to out", "mistral --best --to out --base dequantized", "mistral --to out --push me/mistral-hh"],
        recipe=False,
    )
    command.add_argument(
        "recipe", metavar="RECIPE", help="a recipe's name, whose runs are under runs/, or a run's directory"
    )
    command.add_argument("--to", metavar="FOLDER", required=True, help="a folder that is new or empty")
    which = command.add_mutually_exclusive_group()
    which.add_argument("--run", metavar="NAME", help="the run under runs/RECIPE/; default dpo")
    which.add_argument("--best", action="store_true", help="the run that the recipe's sweep chose")
    command.add_argument(
        "--as", dest="form", choices=("merged", "adapter"), default="merged", help="default merged: one plain model"
    )
    command.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="of merged weights; default the recipe's"
    )
    command.add_argument(
        "--base",
        choices=("full", "dequantized"),
        default="full",
        help="of a 4-bit run: merge into the full-precision base, or into the rounded one that training saw",
    )
    command.add_argument("--model", metavar="PLACE", help="the base model, where it is not where training found it")
    command.add_argument(
        "--rows", metavar="N", type=_count, default=32, help="held-out replies to check the export with; default 32"
    )
    command.add_argument("--force", action="store_true", help="replace an earlier export in FOLDER")
    command.add_argument("--push", metavar="USER/NAME", help="upload the folder to the hub, private")
    command.add_argument("--public", action="store_true", help="upload it for everybody to see")


def _add_eval(commands) -> None:
    command = _command(
        commands,
        "eval",
        _eval,
        "is it better, at what, how sure, and at what cost: base, SFT and DPO on the same held-out prompts",
        [
            "tiny",
            "mistral --judge llm:gpt-4o-mini --max-requests 2000",
            "mistral --prompts xstest.csv mt_bench.jsonl --bias crows_pairs.csv --judge reward:my/reward-model",
            "mistral --best --limit 32",
            "mistral --runs dpo dpo-beta0.3 dpo-beta0.05",
        ],
        recipe=False,
    )
    command.add_argument("recipe", metavar="RECIPE", nargs="?", help="a recipe, or the directory of a finished run")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="those that the run was made with")
    which = command.add_argument_group("which models")
    which.add_argument("--run", metavar="NAME", help="this run under runs/RECIPE/, its base and what it started from")
    which.add_argument("--best", action="store_true", help="the run that the sweep chose")
    which.add_argument("--runs", metavar="RUN", nargs="+", default=[], help="these runs side by side")
    on = command.add_argument_group("on what")
    on.add_argument(
        "--prompts",
        metavar="FILE",
        nargs="+",
        default=[],
        help="prompts too: MT-Bench, XSTest, AdvBench, "
        "StrongREJECT, or any .jsonl or .csv with prompt, and label where there is one",
    )
    on.add_argument("--bias", metavar="FILE", help="stereotypes by likelihood: sentence pairs as CrowS-Pairs has them")
    on.add_argument("--replies", type=_count, default=256, metavar="N", help="held-out prompts answered; default 256")
    on.add_argument("--limit", type=_count, metavar="N", help="of pairs, prompts and rows of each file: a quick look")
    how = command.add_argument_group("how")
    how.add_argument("--judge", metavar="JUDGE", help="rule (the toy's), reward:NAME, votes:FILE, llm:MODEL or none")
    how.add_argument("--url", metavar="URL", help="of an llm judge: an OpenAI-compatible endpoint, up to its /v1")
    how.add_argument("--max-requests", type=_count, metavar="N", help="to an llm judge, in this call")
    how.add_argument("--classifier", metavar="NAME", help="a text-classification model that finds harmful replies")
    how.add_argument("--harmful-label", metavar="LABEL", nargs="+", default=[], help="its labels that mean harm")
    how.add_argument("--greedy", action="store_true", help="greedy replies; default: sampled at temperature 1")
    how.add_argument("--max-new-tokens", type=_count, metavar="N", help="default: data.max_reply_tokens")
    how.add_argument("--batch-size", type=_count, default=16, metavar="N", help="prompts sampled together; default 16")
    how.add_argument("--seed", type=int, default=0, help="of the draw of prompts and of the replies; default 0")
    how.add_argument("--lm-eval", metavar="TASK", nargs="+", default=[], help="benchmarks too, run by lm-eval")
    how.add_argument("--tasks-folder", metavar="DIR", help="where lm-eval finds task files of your own")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of things; write 1 or more")
    return int(text)


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


def _gib(text: str) -> float:
    try:
        gib = float(text)
    except ValueError:
        gib = 0.0
    if not 0 < gib < 10_000:
        raise argparse.ArgumentTypeError(f"{text} is no amount of memory; write GiB, such as 16")
    return gib


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no count; write 1 or more")
    return int(text)


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
