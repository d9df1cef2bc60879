"""Arguments → calls; the only place that catches, and where logging is configured."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from alignlab.cli.options import read_arguments
from alignlab.disk import explain
from alignlab.errors import AlignlabError, RecipeError, RunError, need
from alignlab.recipe.objectives import STAGES
from alignlab.text.safe import harmless, harmless_json, one_line
from alignlab.train.launch import Killed, leave
from alignlab.train.machine import explain_import, refuse_other_versions

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_ERROR_REPORTING": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",  # that ORPO is experimental, alignlab says itself
    "TRANSFORMERS_VERBOSITY": "error",  # its warnings speak to who writes training code
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 `--fail-on`, 2 a fault the user can mend (one line on stderr), 130 interrupted."""
    quiet = QUIET if sys.stderr.isatty() else {**QUIET, "TQDM_DISABLE": "1"}  # no bars in log files
    os.environ.update({name: value for name, value in quiet.items() if name not in os.environ})
    _configure_logging()
    args = read_arguments(argv)
    if getattr(args, "json", False) and os.environ.get("WANDB_MODE") == "offline":
        _import_transformers_unheard()
    try:
        os.getcwd()  # where that is gone, torch's libraries would end the process
        refuse_other_versions()
        code = CALLS[args.command](args) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read this has read enough, as `head` does
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as of a process that SIGPIPE has ended
    except KeyboardInterrupt as e:
        return _say(str(e) or "interrupted; the same command goes on from the last checkpoint", 130)
    except Killed as e:
        return _say(f"{e}; the same command goes on from the last checkpoint", 128 + e.number)
    except AlignlabError as e:
        faults = str(e).splitlines() if isinstance(e, RecipeError) else [one_line(str(e))]
        return _fail("\n".join(faults), args)
    except Exception as e:
        missing = explain_import(e) if isinstance(e, ImportError) else None
        if (fault := missing or explain(e)) is None:
            raise
        return _fail(fault, args)
    finally:
        leave()


def _list(args: argparse.Namespace) -> None:
    from alignlab.recipe.show import list_recipes

    found = list_recipes()
    width = max(len(name) for name, _, _ in found)
    for name, about, _ in found:
        _print(f"{name:{width}}  {one_line(about)}")


def _show(args: argparse.Namespace) -> None:
    recipe = _recipe(args)
    from alignlab.recipe.arguments import TrainingContext, trl_arguments
    from alignlab.recipe.load import run_name, stages_of
    from alignlab.recipe.show import recipe_facts, show_arguments, show_recipe

    arguments = {}
    for stage in stages_of(recipe):
        here = TrainingContext(Path("runs") / recipe.name / run_name(recipe, stage) / "checkpoints")
        arguments[stage] = trl_arguments(recipe, stage, here)
    if args.json:
        from alignlab.train.stages import stops_of

        _print(harmless_json({**recipe_facts(recipe, arguments), "stops": stops_of(recipe)}))
        return
    _print(show_recipe(recipe))
    for stage, given in arguments.items():
        _print("\n" + show_arguments(stage, given, recipe))


def _data(args: argparse.Namespace) -> int:
    recipe = _recipe(args)
    from alignlab.doctor.gate import failures, read_limits

    limits = read_limits(args.fail_on)
    from alignlab.data.format import Format
    from alignlab.data.prepare import write_pairs
    from alignlab.data.prompts import texts_of
    from alignlab.doctor.examination import examine, write_examination
    from alignlab.doctor.page import render
    from alignlab.models.load import find_stops
    from alignlab.train.stages import prepare_data

    tokenizer, pairs = prepare_data(recipe)
    if args.out:
        write_pairs(pairs, Path(args.out))
    asked = {Path(file).name: texts_of(Path(file), args.prompt_column) for file in args.prompts}
    stops = find_stops(recipe.model, Format(recipe.data.format, tokenizer)).said
    examination = {**examine(pairs, recipe, tokenizer, asked), "stops": stops}
    kept = write_examination(examination, Path("runs") / recipe.name)
    _print(harmless_json(examination) if args.json else f"{render(examination)}\n\n{kept}")
    failed = failures(examination["findings"], limits)
    return _say("\n".join(f"data: {line}" for line in failed), 1) if failed else 0


def _report(args: argparse.Namespace) -> None:
    from alignlab.reports.find import find_runs
    from alignlab.reports.page import write_report
    from alignlab.runs.run import find_run

    paths = [find_run(args.recipe, best=True).path] if args.best else find_runs(args.recipe, args.run)
    for path in paths:
        _print(str(write_report(path, Path(args.figures) if args.figures else None)))


def _compare(args: argparse.Namespace) -> None:
    from alignlab.text.tables import check_table, write_table

    check_table(args.table)
    from alignlab.reports.find import runs_to_compare
    from alignlab.reports.page import page_of_runs, write_comparison

    paths = runs_to_compare(args.runs)
    if args.table:
        page = page_of_runs(paths)
        write_table(Path(args.table), page.rows, page.columns)
        _print(args.table)
    out, figures = (Path(name) if name else None for name in (args.out, args.figures))
    _print(str(write_comparison(paths, out, figures)))


def _eval(args: argparse.Namespace) -> None:
    from alignlab.evaluation.judge import read_judge
    from alignlab.runs.selection import find_runs

    read_judge(args.judge)
    runs = find_runs(args.recipe, args.overrides, run=args.run, runs=args.runs, best=args.best)
    from alignlab.text.tables import check_table, write_table

    check_table(args.table)
    from alignlab.evaluation.evaluator import Options, evaluate
    from alignlab.evaluation.scoreboard import show
    from alignlab.reports.page import report_line
    from alignlab.runs.evaluation import read_evaluation
    from alignlab.runs.selection import folder_of

    paths: dict[str, Any] = {"prompts": [Path(file) for file in args.prompts], "bias": args.bias and Path(args.bias)}
    folder = args.tasks_folder and Path(args.tasks_folder)
    same = ("judge", "url", "max_requests", "judge_tokens", "classifier", "lm_eval", "greedy", "max_new_tokens")
    more = ("replies", "limit", "batch_size", "seed", "prompt_column", "models", "outputs")
    given = {name: getattr(args, name) for name in (*same, *more)}
    targets = _recipe(args).evaluate.targets if args.recipe and not Path(args.recipe).is_dir() else None
    options = Options(**paths, **given, harmful_labels=args.harmful_label, tasks_folder=folder, targets=targets)
    file = evaluate(runs, options)
    found = read_evaluation(file)
    assert found, "it has just been written"
    _print(show(found, file))
    if args.table:
        write_table(Path(args.table), found.table, found.names)
        _print(args.table)
    if (folder_of(runs) / "manifest.json").is_file():
        _print(report_line(folder_of(runs)))


def _plan(args: argparse.Namespace) -> int:
    recipe = _recipe(args)
    from alignlab.memory.page import GPUS, plan_facts, show_plan, stages_of
    from alignlab.memory.plan import plan

    stages, gpus = stages_of(recipe, args.of), args.gpu or GPUS
    if args.probe:
        from alignlab.train.probe import probe, show_probe

        for stage in stages:
            _print(show_probe(stage, probe(recipe, stage)))
        return 0
    cuda = bool(args.gpu) or not (args.cpu or recipe.model.name == "toy")
    plans = [plan(recipe, stage, cuda=cuda) for stage in stages]
    if args.json:
        _print(harmless_json(plan_facts(plans, gpus)))
    else:
        _print("\n\n".join(show_plan(each, gpus) for each in plans))
    return int(not all(each.fits(gpu) for each in plans for gpu in args.gpu or ()))


def _export(args: argparse.Namespace) -> None:
    if args.push:
        from alignlab.exports.hub import check_push

        check_push(args.push, args.public)
    from alignlab.exports.export import ExportOptions, export, summarize
    from alignlab.runs.run import Run, find_run, finished

    is_named = args.best or args.run is not None or Run(Path(args.recipe)).has_started
    run = finished(find_run(args.recipe, args.run if is_named else "dpo", best=args.best))
    options = ExportOptions(args.form, args.dtype, args.base, args.model, args.rows, args.force, args.push)
    made = export(run, Path(args.to or Path("exports", run.path.absolute().parent.name, run.path.name)), options)
    _print(summarize(made))
    if args.push:
        from alignlab.exports.hub import push

        _print(f"  push  {push(made.path, args.push, args.public, f'{run.path.parent.name}/{run.path.name}')}")


def _pairs(args: argparse.Namespace) -> None:
    recipe = _recipe(args)
    from alignlab import make_pairs
    from alignlab.evaluation.judge import read_judge
    from alignlab.recipe.load import run_name
    from alignlab.rounds.pairs import next_command
    from alignlab.runs.run import find_run

    read_judge(args.judge)
    run, out = find_run(args.recipe, args.run or run_name(recipe, "sft")), Path(args.out)
    judge = args.judge or ("rule" if recipe.data.source == "toy" and not args.constitution else None)
    names = ("prompt_column", "limit", "samples", "keep", "url", "max_requests", "seed", "batch_size")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    prompts = None if args.prompts == "train" else Path(args.prompts)
    how = {"judge": judge, "constitution": args.constitution, "prompts": prompts, **given}
    made = make_pairs(recipe, run.path, out=out, **how)
    _print(f"{made}\n{out}\n{next_command(recipe, run, out)}")


def _rounds(args: argparse.Namespace) -> None:
    recipe = _recipe(args)
    from alignlab.rounds.rounds import NAME, render, run_rounds, write_page
    from alignlab.runs.run import RUNS

    asked = {"url": args.url, "max_requests": args.max_requests, "force": args.force}
    found = run_rounds(recipe, name=args.run, **asked)
    folder = RUNS / recipe.name
    file = folder / f"{args.run or NAME}.json"
    _print(f"\n{render(found, file)}")
    _print(str(write_page(found, folder, file)))


def _chat(args: argparse.Namespace) -> None:
    from alignlab.runs.run import find_run, finished

    run = finished(find_run(args.recipe, args.run, best=args.best))
    other = finished(find_run(args.recipe, args.against)) if args.against else None
    from alignlab.people.chat import chat

    chat([run, other] if other else [run], greedy=args.greedy, max_new_tokens=args.max_new_tokens, seed=args.seed)


def _serve(args: argparse.Namespace) -> int:
    from alignlab.people.serve import check_address, serve
    from alignlab.runs.run import find_run, finished

    check_address(args.host, args.port)
    return serve(finished(find_run(args.recipe, args.run, best=args.best)), args.host, args.port)


def _vote(args: argparse.Namespace) -> None:
    from alignlab.people.ballots import Ballots
    from alignlab.people.votes import write_votes
    from alignlab.runs.run import Run, find_run, finished, runs_folder

    folder = runs_folder(args.recipe)
    folder = folder.parent if Run(folder).has_started else folder
    file = Path(args.db) if args.db else folder / "votes.db"
    if args.export:
        if not file.is_file():
            raise RunError(f"there are no votes yet (looked in {file}); collect some with alignlab vote {args.recipe}")
        votes = Ballots(file).votes()
        write_votes(Path(args.export), votes)
        _print(f"{args.export}: {len(votes)} votes")
        return
    need("alignlab vote", "people", "fastapi", "uvicorn", "evalica")
    from alignlab.people.serve import check_address

    runs = [finished(find_run(args.recipe, name)) for name in args.runs or [None]]
    check_address(args.host, args.port)
    from alignlab.people.replies import make_matches
    from alignlab.people.vote import serve_votes

    ballots = Ballots(file)
    ballots.put(make_matches(runs, [Path(each) for each in args.prompts], args.replies))
    _print(
        f"vote at  http://{args.host}:{args.port}/\nresults  http://{args.host}:{args.port}/results?key={ballots.key}"
    )
    _print(f"votes are kept in {file}; Ctrl-C stops, and the same command goes on", sys.stderr)
    serve_votes(ballots, args.host, args.port, args.allow_host)


def _cache(args: argparse.Namespace) -> None:
    from alignlab.data.prepared import clear_prepared, list_prepared
    from alignlab.disk import cache_folder, left_in_cache, remove, size_of
    from alignlab.train.store import clear_store, list_store

    exports = sorted(cache_folder().glob("exports/*/*"))  # of `serve`: a folder each, with its seal
    exports = [path for path in exports if path.is_dir()]
    if args.clear:
        freed = sum(remove(path) for path in [*left_in_cache(), *(path.parent for path in exports)])
        freed += clear_store() + clear_prepared()
        _print(f"{freed / 2**20:.1f} MiB freed")
        return
    references: list[tuple[Any, str]] = [(entry, f"reference: {entry.reference}") for entry in list_store()]
    entries = [*references, *((entry, f"data: {entry.about}") for entry in list_prepared())]
    for entry, about in entries:
        used = datetime.fromtimestamp(entry.last_used).strftime("%Y-%m-%d %H:%M")
        _print(f"{entry.pairs:>9,} pairs  {entry.bytes / 2**20:7.1f} MiB  used {used}  {about}")
    for path in exports:
        _print(f"{'served':>15}  {size_of(path) / 2**20:7.1f} MiB  {path}")
    for path in left_in_cache():
        _print(f"{'left behind':>15}  {size_of(path) / 2**20:7.1f} MiB  {path}")


def _train(args: argparse.Namespace) -> int | None:
    recipe = _recipe(args)
    if args.run is not None:
        from alignlab.runs.run import check_name

        check_name(args.run)
    if args.launch:
        return _launch(args, recipe)
    from alignlab.train.machine import check_machine

    check_machine(recipe, args.command, name=args.run, force=args.force)
    from alignlab.reports.summary import summarize
    from alignlab.train import stages

    run = getattr(stages, f"train_{args.command}")(recipe, name=args.run, force=args.force)
    if _is_main_process():
        from alignlab.reports.page import report_line

        _print(summarize(run))
        _print(report_line(run.path))
    return None


def _sweep(args: argparse.Namespace) -> int | None:
    from alignlab.text.tables import check_table, write_table

    check_table(args.table)
    from alignlab.runs.sweep import columns_of, sweep_rows
    from alignlab.sweeps.choice import collect, render
    from alignlab.sweeps.members import commands, find_members

    members = find_members(args.recipe, args.overrides, args.betas, args.grid)
    if args.print:
        _print("\n".join(commands(members)))
        return None
    if args.collect:
        table = collect(members)
    else:
        from alignlab.train.machine import check_machine

        for member in members.asked:
            with contextlib.suppress(RunError):  # a damaged run, or settings at fault, are that member's own
                check_machine(member.recipe, "dpo", force=args.force, settings=False)
        from alignlab.sweeps.runner import run_members, share

        if args.shared:
            share(members)
            return None
        table = run_members(members)
    _print(render(table, members.folder))
    if args.table:
        write_table(Path(args.table), sweep_rows(table), columns_of(table))
        _print(args.table)
    return 2 if any(member.status == "failed" for member in table.members) else None


def _launch(args: argparse.Namespace, recipe) -> int:
    from alignlab.recipe.load import run_name
    from alignlab.runs.run import Run
    from alignlab.train.launch import launch

    own = [args.command, args.recipe, *args.overrides, *(["--run", args.run] if args.run else [])]
    own += ["--force"] * args.force + ["--debug"] * args.debug
    try:
        return launch(Path(args.launch), recipe.model, own, args.processes)
    except Killed as e:
        run = Run(Path("runs") / recipe.name / (args.run or run_name(recipe, args.command)))
        if run.has_started and not run.is_finished:
            run.note(status="failed", stop_reason=str(e))
        raise


def _recipe(args: argparse.Namespace):
    from alignlab import load_recipe

    return load_recipe(args.recipe, *args.overrides)


CALLS = {
    "list": _list,
    "show": _show,
    "data": _data,
    "plan": _plan,
    **dict.fromkeys(STAGES, _train),
    "sweep": _sweep,
    "eval": _eval,
    "report": _report,
    "compare": _compare,
    "export": _export,
    "pairs": _pairs,
    "rounds": _rounds,
    "chat": _chat,
    "serve": _serve,
    "vote": _vote,
    "cache": _cache,
}


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _fail(message: str, args: argparse.Namespace) -> int:
    if args.debug:
        logging.getLogger("alignlab").exception("traceback, as asked for by --debug")
    return _say(message, 2)


def _say(message: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")
    _print(message if rank == "0" else f"[rank {rank}] {message}", sys.stderr)
    return code


def _print(text: str, file: TextIO | None = None) -> None:
    """The one way to the terminal but for logging: what recipes, data and models hold cannot act on it."""
    print(harmless(text), file=file)


class _Harmless(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))


def _import_transformers_unheard() -> None:
    """transformers 5.23 prints a line on its import where wandb is offline, which would stand before the JSON."""
    with contextlib.redirect_stdout(io.StringIO()):
        import transformers.integrations.integration_utils  # noqa: F401


def _configure_logging() -> None:
    """Our lines on stderr as they are; other libraries' warnings, but for those nobody using alignlab can act on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Harmless("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("alignlab").setLevel(logging.INFO if _is_main_process() else logging.ERROR)
    # bitsandbytes asks for an optional CPU kernel from the hub and goes on without it
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # TRL 1.16 itself still passes gradient_checkpointing, which transformers 5.23 has renamed
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)


if __name__ == "__main__":
    sys.exit(main())
