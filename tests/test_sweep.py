"""A sweep: its members, what they share, what becomes of them, and the choice."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from commands import alignlab, same
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab import heldout
from alignlab import run as runs
from alignlab.choice import Figure, Row, choose, chosen_run, collect, render
from alignlab.cli import main
from alignlab.errors import RecipeError, RunError
from alignlab.members import Members, commands, find_members
from alignlab.recipe import consumed, load_recipe, run_name, write_yaml
from alignlab.report import write_report
from alignlab.run import Run
from alignlab.sweep import run_members
from alignlab.train import train_dpo
from alignlab.trainers import AlignDPOTrainer

RECIPE = """
about: seconds on a CPU
data: {{source: toy, max_prompt_tokens: 80, max_reply_tokens: 48, toy: {{pairs: 96}}}}
model: {{name: {name}, dtype: float32, lora: {{r: 4, target_modules: all-linear}}}}
sft: {{max_steps: 4, learning_rate: 1.0e-2, logging_steps: 1, eval_steps: 2, per_device_eval_batch_size: 8}}
dpo: {{max_steps: 4, learning_rate: 1.0e-3, logging_steps: 1, eval_steps: 2, per_device_eval_batch_size: 8}}
monitor: {{kl: {{prompts: 4, max_new_tokens: 8}}}}
"""


@pytest.fixture
def small(folders, tmp_path, monkeypatch) -> Path:
    """A working directory with the recipe `small`, whose runs take seconds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "small.yaml").write_text(RECIPE.format(name=folders["llama"]))
    return tmp_path


def stamps(run: Run) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in run.path.rglob("*") if file.is_file()}


# --- members ---


def test_members_are_each_beta_with_each_combination_of_the_grid(small):
    found = find_members("small", [], "0.3,0.1", ["dpo.learning_rate=5e-6,1e-6", "seed=0,1"])
    assert len(found.asked) == 2 * 2 * 2
    first = found.asked[0]
    assert first.settings == {"dpo.beta": 0.3, "dpo.learning_rate": 5e-6, "dpo.seed": 0}
    assert first.name == "dpo-beta0.3-learning_rate5e-06-seed0"
    assert len({member.name for member in found.asked}) == 8


def test_the_betas_are_the_recipes_unless_said_and_its_own_beta_is_the_plain_run(small):
    with_beta = (small / "recipes" / "small.yaml").read_text().replace("dpo: {", "dpo: {beta: 0.1, ")
    (small / "recipes" / "small.yaml").write_text(with_beta + "sweep: {betas: [0.2, 0.1]}\n")
    assert [member.name for member in find_members("small").asked] == ["dpo-beta0.2", "dpo"]
    assert [member.beta for member in find_members("small", [], "1, 5e-2").asked] == [1.0, 0.05]


def test_a_grid_setting_with_one_value_is_for_all_members(small):
    found = find_members("small", [], "0.3", ["sft.max_steps=2", "dpo.loss_type=[sigmoid,sft]"])
    assert found.shared == ['dpo.loss_type=["sigmoid", "sft"]', "sft.max_steps=2"]
    assert found.asked[0].settings == {"dpo.beta": 0.3}


def test_commas_inside_of_a_value_are_its_own(small):
    found = find_members("small", [], "0.3", ["loss_type=[sigmoid,sft],[sigmoid]"])
    assert [member.settings["dpo.loss_type"] for member in found.asked] == [["sigmoid", "sft"], ["sigmoid"]]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--betas", ""], "--betas has no values"),
        (["--betas", "0.1,,"], "is no list of values"),
        (["--betas", "0.1,abc"], "sweep.betas is [0.1, 'abc']"),
        (["--betas", "0.1,-1"], "sweep.betas holds -1.0, but a beta is a number above 0"),
        (["--betas", "0"], "a beta is a number above 0"),
        (["--betas", "nan"], "expected list[float]"),
        (["--betas", "0.1,1e-1"], "sweep.betas holds 0.1 twice, which would be two equal members"),
        (["--grid", "dpo.seed="], "--grid dpo.seed= has no values"),
        (["--grid", "dpo.seed"], "is no setting with its values"),
        (["--grid", "dpo.seed=1,1"], "are two equal members"),
        (["--grid", "dpo.beta=0.1,0.10"], "are two equal members"),
        (["--grid", "dpo.sed=1,2"], "did you mean 'seed'?"),
        (["--grid", "dpo.learning_rate=1e-5,fast"], "dpo.learning_rate is 'fast'"),
        (["--grid", "monitor.patience=1,2"], "no DPO run depends on it"),
        (["--grid", "sft.learning_rate=1e-5,1e-4"], "no DPO run depends on it"),
        (["--grid", "dpo.seed=1,2", "dpo.seed=3"], "names dpo.seed twice"),
        (["--betas", "0.1", "--grid", "dpo.beta=0.1,0.2"], "both name betas"),
        (["dpo.beta=0.3"], "dpo.beta=0.3 is for all members, but dpo.beta is swept over"),
        (["sweep.betas=[]"], "sweep.betas is empty"),
        (["sweep.max_kl=0"], "expected a value above 0"),
    ],
)
def test_a_fault_is_one_line_and_exit_code_2(arguments, said, small, capsys):
    assert main(["sweep", "small", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (small / "runs").exists()


@given(
    st.lists(st.floats(1e-6, 1e6, allow_nan=False), min_size=1, max_size=4, unique=True),
    st.lists(st.integers(0, 9), min_size=2, max_size=3, unique=True),
)
@settings(max_examples=15, deadline=None)
def test_a_printed_command_names_the_members_own_run(betas, seeds):
    """Read back as a shell reads it, each line is the recipe of its member."""
    found = find_members(
        "tiny", ["data.max_pairs=9"], ",".join(map(repr, betas)), [f"seed={','.join(map(str, seeds))}"]
    )
    shared, *lines = [shlex.split(line) for line in commands(found)]
    assert shared[-1] == "--shared"
    read = [load_recipe(line[line.index("dpo") + 1], line[line.index("dpo") + 2 :]) for line in lines]
    assert [run_name(recipe, "dpo") for recipe in read] == [member.name for member in found.asked]
    assert [recipe.dpo["beta"] for recipe in read] == [member.beta for member in found.asked]


def test_printing_and_collecting_import_no_torch(small):
    heavy = "print([name for name in ('torch', 'trl', 'transformers', 'datasets') if name in sys.modules])"
    for mode in ("--print", "--collect"):
        program = f"import sys\nfrom alignlab.cli import main\nmain(['sweep', 'small', '{mode}'])\n{heavy}"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]", done


# --- real sweeps ---


def test_a_member_equals_a_separate_run_and_the_reference_scores_each_pair_once(small, monkeypatch):
    """Two betas and 96 + 60 + 60 pairs: 216 reference forwards; the member and a run of its own agree bit for bit."""
    monkeypatch.setenv("ALIGNLAB_CACHE", str(small / "cache"))
    asked, adapters = [], []
    score, held_out = AlignDPOTrainer.score_reference, heldout.score_pairs
    monkeypatch.setattr(AlignDPOTrainer, "score_reference", lambda *a: (asked.append(1), score(*a))[1])
    note = lambda model, *a: (adapters.append(getattr(model, "active_adapter", None)), held_out(model, *a))[1]
    monkeypatch.setattr(heldout, "score_pairs", note)
    table = run_members(find_members("small", [], "0.5,0.1"))
    assert [member["status"] for member in table["members"]] == ["finished"] * 2
    kept = Run(Path("runs/small/dpo-beta0.5")).manifest["data"]["kept"]
    assert len(asked) == sum(kept.values()) and "ref" not in adapters
    alone = train_dpo(load_recipe("small", ["dpo.beta=0.5"]), root=Path("apart"))
    same(Run(Path("runs/small/dpo-beta0.5")), alone)
    assert len(asked) == sum(kept.values())
    parents = {Run(Path(member["path"])).manifest["parent"]["run"] for member in table["members"]}
    assert parents == {"runs/small/sft"}


def test_a_further_beta_adds_one_run_and_the_report_shows_them_all(small, capsys):
    assert main(["sweep", "small", "--betas", "0.5"]) == 0
    before = stamps(Run(Path("runs/small/dpo-beta0.5")))
    assert main(["sweep", "small", "--betas", "0.1"]) == 0
    assert stamps(Run(Path("runs/small/dpo-beta0.5"))) == before
    table = json.loads((small / "runs/small/sweep.json").read_text())
    assert [member["settings"]["dpo.beta"] for member in table["members"]] == [0.5, 0.1]
    shown = capsys.readouterr().out
    assert f"chosen: {table['choice']}" in shown and "paired over the same" in shown and "its test split" in shown
    assert chosen_run(Path("runs/small")) == Path("runs/small") / table["choice"]
    assert f"{table['choice']} was chosen of 2" in write_report(Path("runs/small")).read_text()
    other = collect(find_members("small", ["dpo.max_steps=2"], "0.1"))
    assert [member["run"] for member in other["members"]] == ["dpo-beta0.1-max_steps2"]  # another sweep's table


def test_an_interrupted_sweep_goes_on_in_the_member_that_it_was_in(small):
    """Ctrl-C in the second member; then the same command: the first is left alone, and the second ends as if nothing
    had been."""
    members = find_members("small", ["dpo.max_steps=24", "dpo.eval_steps=24"], "0.5,0.1")
    second = Run(members.folder / members.asked[1].name)
    threading.Thread(target=interrupt_when, args=(lambda: len(second.metrics()) > 1,), daemon=True).start()
    with pytest.raises(KeyboardInterrupt, match=r"dpo-beta0.1.*: stopped at step \d+ with a checkpoint"):
        run_members(members)
    table = json.loads(members.table.read_text())
    assert table["choice"] == members.asked[0].name
    before = stamps(Run(members.folder / table["choice"]))
    table = run_members(members)
    assert [member["status"] for member in table["members"]] == ["finished"] * 2
    assert stamps(Run(members.folder / members.asked[0].name)) == before
    same(second, train_dpo(members.asked[1].recipe, root=Path("apart")))


def interrupt_when(moment) -> None:
    deadline = time.time() + 120
    while time.time() < deadline and not moment():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


def test_a_member_that_fails_is_named_and_the_others_go_on(small, capsys):
    """GaLore's optimizer needs a package that is not there; and one run's manifest is damaged."""
    grid = ["--betas", "0.5", "--grid", "optim=galore_adamw,adamw_torch,sgd"]
    damaged = small / "runs/small/dpo-beta0.5-optim=sgd"
    damaged.mkdir(parents=True)
    (damaged / "manifest.json").write_text("{")
    assert main(["sweep", "small", *grid]) == 2
    table = json.loads((small / "runs/small/sweep.json").read_text())
    found = {member["run"]: member for member in table["members"]}
    failed = found["dpo-beta0.5-optim=galore_adamw"]
    assert failed["status"] == "failed" and failed["error"].startswith("ImportError") and failed["margin"] is None
    assert "Traceback" in Path(failed["path"], "error.log").read_text()
    assert "is not JSON" in found["dpo-beta0.5-optim=sgd"]["error"]
    assert table["choice"] == "dpo-beta0.5-optim=adamw_torch"
    assert "failed: ImportError" in capsys.readouterr().out


def test_the_first_members_own_fault_does_not_end_the_sweep(small, caplog):
    """A prefetch factor without workers is refused by DPOConfig itself, so also while what all share is made."""
    table = run_members(find_members("small", [], "0.5", ["dataloader_prefetch_factor=2,null"]))
    assert caplog.text.count("dataloader_prefetch_factor can only be set") == 2
    assert {member["run"]: member["status"] for member in table["members"]} == {
        "dpo-beta0.5-dataloader_prefetch_factor2": "failed",
        "dpo-beta0.5-dataloader_prefetch_factor=null": "finished",
    }


def test_what_no_member_can_do_without_ends_the_sweep_in_one_line(small, capsys):
    assert main(["sweep", "small", "data.source=pairs", "data.path=nowhere.jsonl"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("nowhere.jsonl")


@pytest.mark.slow
def test_printed_commands_on_any_scheduler_make_the_same_sweep(small):
    """Two members at once, each a process; what is collected is what one process makes of them."""
    jobs = alignlab(small, "sweep", "small", "--betas", "0.5,0.1", "--print").stdout
    script = "head -n 1 jobs | sh && tail -n +2 jobs | xargs -d '\\n' -P 2 -I{} sh -c {}"
    (small / "jobs").write_text(jobs)
    done = subprocess.run(script, shell=True, cwd=small, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert alignlab(small, "sweep", "small", "--betas", "0.5,0.1", "--collect").returncode == 0
    apart = run_members(find_members("small", [], "0.5,0.1", root=Path("apart")))
    collected = json.loads((small / "runs/small/sweep.json").read_text())
    assert collected["choice"] == apart["choice"]
    for one, other in zip(collected["members"], apart["members"], strict=True):
        assert one["margin"] == other["margin"] and one["kl"] == other["kl"]


# --- the choice ---


def write_run(
    members: Members, number: int, margin: float, kl: float = 3.0, scores: list | None = None, **facts
) -> Run:
    """A finished run of a member as training leaves it: evaluated before the first step and at step 4."""
    member = members.all[number]
    at = {"eval/loss": 0.5, "eval/rewards/accuracies": 0.8, "eval/rewards/accuracies_stderr": 0.04}
    rows = [
        {"step": 0, **at, "eval/rewards/margins": 0.0, "eval/kl": 0.0, "eval/kl_stderr": 0.0, "eval/perplexity": 2.0},
        {"step": 4, **at, "eval/rewards/margins": margin, "eval/kl": kl, "eval/kl_stderr": 0.5, "eval/perplexity": 2.1},
    ]
    path = members.folder / member.name
    with runs.opened(path, "dpo", consumed(member.recipe, "dpo"), write_yaml(member.recipe)) as run:
        runs.write_lines(run.metrics_file, rows)
        runs.write_lines(run.samples_file, [{"step": 4, "split": "validation", "prompt": "?", "reply": "!"}] * 16)
        if scores is not None:
            written = [{"split": "validation", "pair": n, "chosen": c, "rejected": 0.0} for n, c in enumerate(scores)]
            runs.write_lines(path / "scores.jsonl", written)
        data = {"kept": {"train": 9, "validation": 100, "test": 50}, "fingerprint": "same", **facts}
        run.note(status="finished", best_step=4, steps=4, data=data, test={})
    return run


def test_the_largest_margin_below_the_kl_limit_is_chosen(small):
    """Margins 2, 1, 0.5 at KL 12, 9.9, 1: the first is out, the second is near the limit and leads by margin."""
    members = find_members("small", [], "0.05,0.1,0.5")
    for number, (margin, kl) in enumerate([(0.5, 1.0), (1.0, 9.9), (2.0, 12.0)]):
        write_run(members, number, margin, kl)
    table = collect(members)
    assert table["choice"] == "dpo-beta0.1" and table["split"] == "validation"
    assert "of 2 members with KL below 10" in table["why"]
    assert "its KL of 9.9 ± 0.5 is within two standard errors of the limit" in table["why"]
    assert "margin ÷ beta is largest for dpo-beta0.1" in table["why"]
    row = table["members"][1]
    assert row["margin_over_beta"]["mean"] == pytest.approx(1.0 / 0.1)
    assert row["perplexity_change"] == pytest.approx(2.1 / 2.0 - 1)
    assert (row["kl"]["n"], row["accuracy"]["n"]) == (16, 100)
    assert row["accuracy"]["stderr"] == 0.04
    wider = collect(find_members("small", ["sweep.max_kl=15"], "0.05,0.1,0.5"))
    assert wider["choice"] == "dpo-beta0.05" and "KL below 15" in wider["rule"]


def test_where_no_member_is_inside_the_limit_none_is_chosen(small):
    members = find_members("small", [], "0.5,0.1")
    for number, kl in enumerate([12.0, 30.0]):
        write_run(members, number, 1.0, kl)
    table = collect(members)
    assert table["choice"] is None and "the lowest is 12 ± 0.5 of dpo-beta0.5" in table["why"]
    with pytest.raises(RunError, match="has chosen no member: no member has a KL below 10"):
        chosen_run(members.folder)


def test_two_members_are_compared_over_the_same_pairs(small):
    """Log-ratios 1, 2, 3, 4 against 2, 4, 6, 8 at betas 0.2 and 0.1: margins of each pair equal, difference 0 ± 0.

    With 0.4 in place of 0.2 the differences are 0.2, 0.4, 0.6, 0.8: mean 0.5, stderr √(0.0667/4) = 0.129.
    """
    members = find_members("small", [], "0.2,0.1")
    write_run(members, 0, 0.5, scores=[1.0, 2.0, 3.0, 4.0])
    write_run(members, 1, 0.5, scores=[2.0, 4.0, 6.0, 8.0])
    table = collect(members)
    assert "cannot be told apart" in table["why"] and "difference 0 ± 0, paired over the same 4 pairs" in table["why"]
    assert table["members"][0]["margin"] == {"mean": 0.5, "stderr": pytest.approx(math.sqrt(1 / 15 / 4)), "n": 4}
    assert table["members"][0]["accuracy"] == {"mean": 1.0, "stderr": 0.0, "n": 4}
    members = find_members("small", [], "0.4,0.1")
    write_run(members, [m.beta for m in members.all].index(0.4), 1.0, scores=[1.0, 2.0, 3.0, 4.0])
    assert "told apart from dpo-beta0.2 (0.5 ± 0.13): difference 0.5 ± 0.13, paired" in collect(members)["why"]


def test_runs_that_kept_no_scores_say_that_the_error_is_not_known(small):
    members = find_members("small", [], "0.5,0.1")
    write_run(members, 0, 1.0)
    write_run(members, 1, 0.9)
    assert "is not known, as their standard errors were not recorded" in collect(members)["why"]


def test_runs_of_different_data_are_compared_with_a_banner(small):
    members = find_members("small", [], "0.5,0.1")
    write_run(members, 0, 1.0, scores=[1.0, 2.0])
    write_run(members, 1, 0.9, scores=[1.0, 2.0], fingerprint="other")
    table = collect(members)
    (warning,) = table["warnings"]
    assert warning.startswith("the members were made from different data") and "dpo-beta0.1 other" in warning
    assert table["choice"] == "dpo-beta0.5" and "as of independent estimates" in table["why"]
    assert f"! {warning}" in render(table, members.folder)


def test_kl_measured_otherwise_is_said(small):
    write_run(find_members("small", ["monitor.kl.max_new_tokens=64"], "0.5"), 0, 1.0)
    members = find_members("small", [], "0.5,0.1")
    write_run(members, 1, 0.9)
    (warning,) = collect(members)["warnings"]
    assert warning == "KL was not measured alike: monitor.kl.max_new_tokens is dpo-beta0.5 64, dpo-beta0.1 8"


def test_a_metrics_file_cut_off_by_a_crash_is_used_up_to_there_and_said(small, caplog):
    members = find_members("small", [], "0.5,0.1")
    cut = write_run(members, 0, 1.0)
    with cut.metrics_file.open("a") as file:
        file.write('{"step": 8, "eval/lo')
    write_run(members, 1, 0.9)
    assert collect(members)["choice"] == "dpo-beta0.5"
    assert (
        "the last line of metrics.jsonl is cut off, by a crash or a write under way: used up to step 4" in caplog.text
    )


def test_what_cannot_be_used_is_named_and_the_others_are_collected(small):
    """One of five is good; the others have no metrics, lack the step they kept, are of other settings, or missing."""
    members = find_members("small", [], "0.5,0.4,0.3,0.2,0.1")
    write_run(members, 0, 1.0)
    write_run(members, 1, 1.0).metrics_file.unlink()
    write_run(members, 2, 1.0).note(best_step=2)
    other = write_run(members, 3, 1.0)
    other.note(consumed={**other.manifest["consumed"], "dpo": {**other.manifest["consumed"]["dpo"], "max_steps": 3}})
    table = collect(members)
    assert [member["status"] for member in table["members"]] == ["finished", "failed", "failed", "failed", "missing"]
    errors = [member["error"] for member in table["members"]]
    assert "is finished, but has no metrics.jsonl" in errors[1] and "has no evaluation at step 2" in errors[2]
    assert "made from other settings: dpo.max_steps was 3, is 4" in errors[3] and errors[4] is None
    assert all("\n" not in error for error in errors if error)
    assert table["choice"] == "dpo-beta0.5" and "the one member with KL below 10" in table["why"]
    assert "missing" in render(table, members.folder)


def test_a_run_that_is_still_going_counts_once_it_is_finished(small):
    members = find_members("small", [], "0.5,0.1")
    write_run(members, 0, 1.0).note(status="running")
    write_run(members, 1, 0.9)
    table = collect(members)
    assert table["members"][0]["status"] == "running" and table["choice"] == "dpo-beta0.1"


def test_there_is_no_best_without_a_sweep(tmp_path):
    with pytest.raises(RunError, match="make it with alignlab sweep"):
        chosen_run(tmp_path / "small")


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 20), st.sampled_from([0.5, 0.1])), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
@settings(max_examples=50, deadline=None)
def test_the_choice_is_inside_the_limit_beats_the_others_and_depends_on_no_order(figures, random):
    tiny = find_members("tiny", [], "0.5,0.1")
    by_beta = {member.beta: member for member in tiny.asked}
    facts = {"data": {}, "settings": {}}
    rows = [
        Row(by_beta[beta], Path("x"), "finished", facts=facts, figures=figures_of(margin, kl, beta))
        for margin, kl, beta in figures
    ]
    chosen, why = choose(rows, 10.0)
    inside = [row.figures["margin"].mean for row in rows if row.figures["kl"].mean < 10]
    assert (chosen is None) == (not inside) and "\n" not in why
    if chosen:
        assert chosen.figures["margin"].mean == max(inside) and chosen.figures["kl"].mean < 10
        random.shuffle(rows)
        again = choose(rows, 10.0)[0]
        assert again.figures["margin"] == chosen.figures["margin"]


def figures_of(margin: float, kl: float, beta: float) -> dict[str, Figure]:
    return {
        "margin": Figure(margin, 0.1, 100),
        "margin_over_beta": Figure(margin / beta, 0.1 / beta, 100),
        "kl": Figure(kl, 0.5, 32),
    }


def test_several_processes_are_told_to_print(small, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="--print writes a command for each"):
        run_members(find_members("small"))


def test_a_recipe_that_changed_leaves_its_old_members_out(small):
    members = find_members("small", [], "0.5")
    write_run(members, 0, 1.0)
    collect(members)
    text = (small / "recipes" / "small.yaml").read_text()
    (small / "recipes" / "small.yaml").write_text(text.replace("dpo: {", "dpo: {beta: 0.5, "))
    assert find_members("small", [], "0.1").earlier == []
    with pytest.raises(RecipeError):
        find_members("nothing")
