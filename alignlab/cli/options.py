"""What each command takes: the argument parser; imports nothing that a command would have to wait for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import NoReturn

from alignlab import __version__
from alignlab.recipe.fields import suggest
from alignlab.recipe.objectives import STAGES
from alignlab.text.safe import harmless


class _Parser(argparse.ArgumentParser):
    commands: Mapping[str, argparse.ArgumentParser]

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        super().exit(status, message and harmless(message))

    def error(self, message: str) -> NoReturn:
        """One line, as any other fault has."""
        if message.startswith(MISSING) and "RECIPE" in message:
            message = f"which recipe? name one, as in `{self.prog} tiny`; `alignlab list` has them"
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


MISSING = "the following arguments are required"  # argparse's words
TRAINING = "; the commands that train are sft, dpo, kto and orpo"


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; overrides may stand after options too, where argparse by itself refuses them."""
    parser = _parser()
    words = sys.argv[1:] if argv is None else list(argv)
    if not words:
        parser.print_help()
        parser.exit()
    if not words[0].startswith("-") and words[0] not in parser.commands:
        listed = ", ".join(parser.commands)
        near = TRAINING if words[0] in ("train", "trian") else suggest(words[0], parser.commands)
        parser.error(f"there is no command {words[0]!r}{near or f'; there are {listed}'}")
    args, rest = parser.parse_known_args(words)
    command = parser.commands[args.command]
    strangers = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(args, "overrides")]
    if strangers:
        command.error(_stranger(strangers[0], args, command))
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _stranger(word: str, args: argparse.Namespace, command: argparse.ArgumentParser) -> str:
    """What is said to a word that the command does not take: an option's name or, of a recipe, a setting."""
    name, is_option = word.partition("=")[0], word.startswith("-")
    if not is_option and args.command == "sweep" and args.betas:
        return f"{word} stands alone; the betas are one list: --betas {args.betas},{word}"
    if not is_option:
        return f"{word} is one word too many"
    options = [option for action in command._actions for option in action.option_strings]
    if near := get_close_matches(name, options, 1):
        return f"{name} is no option of this command; did you mean {near[0]!r}?"
    remedy = ""
    if hasattr(args, "overrides"):
        from alignlab.recipe.load import remedy_for

        remedy = remedy_for(name.strip("-").replace("-", "_")) or "; settings are written section.key=value"
    return f"{name} is no option of this command{remedy}"


def _parser() -> _Parser:
    parser = _Parser(
        prog="alignlab",
        description="Aligns a language model to preferences: a recipe describes the run, TRL trains it.",
        epilog="alignlab COMMAND --help has examples.",
    )
    parser.add_argument("--version", action="version", version=f"alignlab {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    parser.commands = commands.choices
    _command(commands, "list", "the recipes, one line each", [], recipe=False)
    examples = ["mistral dpo.beta=0.3", "tiny --json"]
    show = _command(commands, "show", "the resolved recipe, and where each value came from", examples)
    show.add_argument("--json", action="store_true", help="print one JSON object")
    added = (
        _data,
        _plan,
        _train,
        _sweep,
        _eval,
        _report,
        _compare,
        _export,
        _pairs,
        _rounds,
        _chat,
        _serve,
        _vote,
        _cache,
    )
    for add in added:
        add(commands)
    return parser


def _data(commands) -> None:
    data = _command(
        commands,
        "data",
        "what is in the dataset and what is wrong with it: counts, lengths, duplicates, leaks, shortcuts, hours",
        [
            "tiny",
            "mistral data.path=helpful.jsonl.gz --prompts mt_bench.jsonl",
            "tiny --fail-on wrong near-duplicates=0.01",
            "tiny --out pairs.jsonl --json",
        ],
    )
    data.add_argument("--json", action="store_true", help="print one JSON object")
    data.add_argument("--out", metavar="FILE", help="write the prepared rows: split, prompt, chosen, rejected")
    about = "files of prompts to be evaluated on: are they in the training data?"
    data.add_argument("--prompts", nargs="+", default=[], metavar="FILE", help=about)
    data.add_argument("--prompt-column", metavar="NAME", help="the column of their prompts, where it is not found")
    about = "exit with 1 where a finding (or any of a level: wrong, doubtful, note) is there, on more than this share"
    data.add_argument("--fail-on", nargs="+", default=[], metavar="NAME[=SHARE]", help=about)


def _plan(commands) -> None:
    plan = _command(
        commands,
        "plan",
        "the memory a recipe will need, part by part, and whether it fits",
        ["mistral", "mistral --gpu 16 --stage dpo", "zephyr dpo.per_device_train_batch_size=2 --json", "tiny --probe"],
    )
    plan.add_argument("--gpu", type=_gib, action="append", metavar="GIB", help="memory of one GPU; default 16 and 24")
    plan.add_argument("--stage", dest="of", choices=tuple(STAGES), help="only this stage")
    plan.add_argument("--cpu", action="store_true", help="plan for a process on a CPU")
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.add_argument("--probe", action="store_true", help="run two steps on the longest rows and compare")


def _train(commands) -> None:
    for stage, of in STAGES.items():
        examples = ["tiny", f"mistral {stage}.learning_rate=1e-5", f"gpt2 data.path=my.jsonl --run {stage}-mine"]
        examples.append("mistral --launch accelerate_configs/ddp.yaml --processes 8")
        command = _command(commands, stage, of.about, examples)
        command.add_argument("--run", metavar="NAME", help="the run's name under runs/RECIPE/")
        command.add_argument(
            "--force", action="store_true", help="train again, the older run is kept aside; and where it cannot fit"
        )
        command.add_argument("--launch", metavar="FILE", help="in several processes: a file of accelerate_configs/")
        command.add_argument("--processes", type=int, metavar="N", help="of all hosts together, instead of the file's")


def _sweep(commands) -> None:
    sweep = _command(
        commands,
        "sweep",
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
    _table_option(sweep)
    sweep.add_argument("--force", action="store_true", help="go on where the memory plan says that it cannot fit")
    instead = sweep.add_mutually_exclusive_group()
    instead.add_argument("--print", action="store_true", help="a command a line: what all share, then each member")
    instead.add_argument("--shared", action="store_true", help="only what all share: SFT, data, reference")
    instead.add_argument("--collect", action="store_true", help="train nothing: the table of the members there are")


def _eval(commands) -> None:
    command = _command(
        commands,
        "eval",
        "is it better, at what, how sure, and at what cost: base, SFT and DPO on the same held-out prompts",
        [
            "tiny",
            "mistral --judge llm:gpt-4o-mini --max-requests 2000",
            "mistral --prompts xstest.csv mt_bench.jsonl --bias crows_pairs.csv --judge reward:my/reward-model",
            "mistral --best --limit 32",
            "mistral --runs dpo dpo-beta0.3 dpo-beta0.05",
            "tiny --runs sft dpo kto orpo",
            "mistral --models zephyr=models/zephyr --outputs gpt4=gpt4.json --prompts alpaca_eval.json",
        ],
        recipe=False,
    )
    command.add_argument("recipe", metavar="RECIPE", nargs="?", help="a recipe, or the directory of a finished run")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="those that the run was made with")
    which = command.add_argument_group("which models")
    which.add_argument("--run", metavar="NAME", help="this run under runs/RECIPE/, its base and what it started from")
    which.add_argument("--best", action="store_true", help="the run that the sweep chose")
    which.add_argument("--runs", metavar="RUN", nargs="+", default=[], help="these runs side by side")
    about = "a model that is no run, with the runs' tokenizer"
    which.add_argument("--models", type=_named, metavar="NAME=FOLDER", nargs="+", default=[], help=about)
    about = "replies of any other model, as AlpacaEval writes them: instruction and output"
    which.add_argument("--outputs", type=_named, metavar="NAME=FILE", nargs="+", default=[], help=about)
    _table_option(command)
    on = command.add_argument_group("on what")
    on.add_argument(
        "--prompts",
        metavar="FILE",
        nargs="+",
        default=[],
        help="prompts too: MT-Bench, XSTest, AdvBench, "
        "StrongREJECT, or any file with prompt, question or instruction, and label where there is one",
    )
    on.add_argument("--prompt-column", metavar="NAME", help="the column of the prompts in these files")
    on.add_argument("--bias", metavar="FILE", help="stereotypes by likelihood: sentence pairs as CrowS-Pairs has them")
    on.add_argument("--replies", type=_count, default=256, metavar="N", help="held-out prompts answered; default 256")
    on.add_argument("--limit", type=_count, metavar="N", help="of pairs, prompts and rows of each file: a quick look")
    how = command.add_argument_group("how")
    how.add_argument("--judge", metavar="JUDGE", help="rule (the toy's), reward:NAME, votes:FILE, llm:MODEL or none")
    how.add_argument("--url", metavar="URL", help="of an llm judge: an OpenAI-compatible endpoint, up to its /v1")
    how.add_argument("--max-requests", type=_count, metavar="N", help="to an llm judge, in this call")
    about = "of an llm judge's answer, its thoughts among them; default 1024"
    how.add_argument("--judge-tokens", type=_count, default=1024, metavar="N", help=about)
    how.add_argument("--classifier", metavar="NAME", help="a text-classification model that finds harmful replies")
    how.add_argument("--harmful-label", metavar="LABEL", nargs="+", default=[], help="its labels that mean harm")
    how.add_argument("--greedy", action="store_true", help="greedy replies; default: sampled at temperature 1")
    how.add_argument("--max-new-tokens", type=_count, metavar="N", help="default: data.max_reply_tokens")
    how.add_argument("--batch-size", type=_count, default=16, metavar="N", help="prompts sampled together; default 16")
    how.add_argument("--seed", type=int, default=0, help="of the draw of prompts and of the replies; default 0")
    how.add_argument("--lm-eval", metavar="TASK", nargs="+", default=[], help="benchmarks too, run by lm-eval")
    how.add_argument("--tasks-folder", metavar="DIR", help="where lm-eval finds task files of your own")


def _report(commands) -> None:
    report = _command(
        commands,
        "report",
        "one HTML page, and the same facts as report.json, from the runs of a recipe",
        ["tiny", "mistral --run dpo dpo-beta0.3", "mistral --best", "runs/mistral/dpo-beta0.3"],
        recipe=False,
    )
    _figures_option(report)
    report.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a recipe's name, whose runs are under runs/, or a folder. Without an option: the sweep where there is "
        "one, else the run that was started last, SFT behind others",
    )
    which = report.add_mutually_exclusive_group()
    which.add_argument("--run", metavar="NAME", nargs="+", default=[], help="these runs under runs/RECIPE/ instead")
    which.add_argument("--best", action="store_true", help="the run that the sweep chose instead")


def _compare(commands) -> None:
    compare = _command(
        commands,
        "compare",
        "runs side by side on one HTML page, the settings in which they differ first",
        [
            "runs/mistral/dpo runs/mistral/dpo-beta0.3",
            "mistral --table mistral.md",
            "mistral zephyr --out mistral-zephyr.html",
        ],
        recipe=False,
    )
    about = "a run's directory, or a recipe for its last run; one recipe alone: all of its runs, SFT among them"
    compare.add_argument("runs", metavar="RUN", nargs="+", help=about)
    _table_option(compare)
    _figures_option(compare)
    compare.add_argument(
        "--out", metavar="FILE", help="the page; by default compare.html in the nearest folder that holds all the runs"
    )


def _export(commands) -> None:
    command = _command(
        commands,
        "export",
        "a finished run's model as a folder that loads anywhere, checked against the run",
        ["mistral --to out", "mistral --best --to out --base dequantized", "mistral --to out --push me/mistral-hh"],
        recipe=False,
    )
    command.add_argument(
        "recipe", metavar="RECIPE", help="a recipe's name, whose runs are under runs/, or a run's directory"
    )
    command.add_argument("--to", metavar="FOLDER", help="a folder that is new or empty; default exports/RECIPE/RUN")
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


def _pairs(commands) -> None:
    command = _command(
        commands,
        "pairs",
        "preference pairs from a run's own replies, by a judge or a constitution",
        [
            "tiny",
            "mistral --run dpo --judge llm:gpt-4o-mini --max-requests 2000 --limit 100",
            "mistral --prompts questions.jsonl --judge reward:my/reward-model --keep margin=1",
            "mistral --judge llm:gpt-4o-mini --constitution ten",
        ],
    )
    command.add_argument("--run", metavar="NAME", help="whose replies; default: the recipe's SFT run")
    about = "a file of prompts, or train: those that the recipe trains on (default)"
    command.add_argument("--prompts", metavar="FILE", default="train", help=about)
    command.add_argument("--prompt-column", metavar="NAME", help="the column of the prompts in that file")
    command.add_argument("--limit", type=_count, metavar="N", help="of prompts: a seeded draw")
    command.add_argument("--out", metavar="FILE", default="pairs.jsonl", help="default pairs.jsonl")
    command.add_argument("--samples", type=_count, metavar="N", help="replies to each prompt; default 4")
    command.add_argument("--keep", metavar="RULE", help="best-worst (default), all, or margin=X: of scores")
    command.add_argument("--constitution", metavar="FILE", help="ten (shipped) or a file: revise, in place of judging")
    _judge_options(command)
    about = "replies sampled together; default: monitor.kl.batch_size"
    command.add_argument("--batch-size", type=_count, metavar="N", help=about)
    command.add_argument("--seed", type=int, default=0, help="of the draw of prompts and of the replies; default 0")


def _rounds(commands) -> None:
    examples = ["tiny", "tiny rounds.count=2 rounds.reference=sft", "mistral rounds.judge=llm:gpt-4o-mini"]
    about = "iterative DPO: sample, judge, train, evaluate, again; recipe section rounds"
    command = _command(commands, "rounds", about, examples)
    command.add_argument("--run", metavar="NAME", help="in place of `rounds` in the runs' names, rounds-1 and so on")
    command.add_argument("--force", action="store_true", help="train again; the older runs are kept aside")
    command.add_argument("--url", metavar="URL", help="of an llm judge: an OpenAI-compatible endpoint, up to its /v1")
    command.add_argument("--max-requests", type=_count, metavar="N", help="to an llm judge, in this call")


def _judge_options(command) -> None:
    command.add_argument("--judge", metavar="JUDGE", help="rule (the toy's), reward:NAME, votes:FILE or llm:MODEL")
    command.add_argument("--url", metavar="URL", help="of an llm judge: an OpenAI-compatible endpoint, up to its /v1")
    command.add_argument("--max-requests", type=_count, metavar="N", help="to an llm judge, in this call")


def _chat(commands) -> None:
    chat = _command(
        commands,
        "chat",
        "talk to a finished run, in the format that it was trained in",
        ["tiny", "mistral --best --greedy", "mistral --run dpo --against sft"],
        recipe=False,
    )
    _one_run(chat)
    chat.add_argument("--against", metavar="RUN", help="another run answers too, side by side")
    chat.add_argument("--greedy", action="store_true", help="greedy replies; default: sampled at temperature 1")
    chat.add_argument("--max-new-tokens", type=_count, metavar="N", help="default: data.max_reply_tokens")
    chat.add_argument("--seed", type=int, default=0, help="of sampled replies; default 0")


def _serve(commands) -> None:
    serve = _command(
        commands,
        "serve",
        "an OpenAI-compatible endpoint, by vllm on a GPU or else by transformers",
        ["tiny", "mistral --best --port 8001"],
        recipe=False,
    )
    _one_run(serve)
    _address(serve, 8000)


def _vote(commands) -> None:
    vote = _command(
        commands,
        "vote",
        "a page for blind votes on the replies of runs; the votes become results and data",
        [
            "tiny",
            "mistral --runs sft dpo dpo-beta0.3 --prompts mt_bench.jsonl --replies 80",
            "mistral --export votes.jsonl",
        ],
        recipe=False,
    )
    vote.add_argument("recipe", metavar="RECIPE", help="a recipe's name, whose runs are under runs/, or a folder")
    about = "these runs, each against each; default: the last DPO run against what it started from"
    vote.add_argument("--runs", metavar="RUN", nargs="+", default=[], help=about)
    vote.add_argument(
        "--prompts", metavar="FILE", nargs="+", default=[], help="files of prompts; default: held-out ones"
    )
    vote.add_argument("--replies", type=_count, default=100, metavar="N", help="prompts that are answered; default 100")
    vote.add_argument("--db", metavar="FILE", help="where the votes are kept; default votes.db beside the runs")
    vote.add_argument("--export", metavar="FILE", help="write the votes as JSON lines, and serve nothing")
    _address(vote, 8100)
    about = "another name under which browsers ask for this page"
    vote.add_argument("--allow-host", metavar="NAME", action="append", default=[], help=about)


def _one_run(command) -> None:
    command.add_argument(
        "recipe", metavar="RECIPE", help="a recipe's name, whose runs are under runs/, or a run's directory"
    )
    which = command.add_mutually_exclusive_group()
    which.add_argument("--run", metavar="NAME", help="the run under runs/RECIPE/; default: the last DPO run")
    which.add_argument("--best", action="store_true", help="the run that the recipe's sweep chose")


def _address(command, port: int) -> None:
    command.add_argument("--port", type=_port, default=port, metavar="N", help=f"default {port}")
    about = "default 127.0.0.1, which only this machine reaches"
    command.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help=about)


def _cache(commands) -> None:
    cache = _command(
        commands,
        "cache",
        "what is stored: prepared data, and reference log-probabilities",
        ["", "--clear"],
        recipe=False,
    )
    cache.add_argument("--clear", action="store_true", help="remove them all")


def _command(commands, name, about, examples, recipe=True) -> argparse.ArgumentParser:
    epilog = "examples:\n" + "\n".join(f"  alignlab {name} {example}" for example in examples or [""])
    command = commands.add_parser(
        name, help=about, description=about, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if recipe:
        command.add_argument("recipe", metavar="RECIPE", help="a name from `alignlab list`, or a path")
        command.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings for this run only")
    return command


def _table_option(command) -> None:
    command.add_argument("--table", metavar="FILE", help="write the figures as a table too: FILE.csv or FILE.md")


def _figures_option(command) -> None:
    command.add_argument("--figures", metavar="DIR", help="write each chart as an SVG file too")


def _gib(text: str) -> float:
    try:
        gib = float(text)
    except ValueError:
        gib = 0.0
    if not 0 < gib < 10_000:
        raise argparse.ArgumentTypeError(f"{text} is no amount of memory; write GiB, such as 16")
    return gib


def _named(text: str) -> tuple[str, str]:
    name, equals, place = text.partition("=")
    if not (name and equals and place):
        raise argparse.ArgumentTypeError(f"{text} has no name; write NAME=PLACE, such as zephyr=models/zephyr")
    return name, place


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no count; write 1 or more")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port; write a number from 1 to 65535")
    return int(text)
