"""The table of a sweep and the choice from it, on runs as training leaves them."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab import disk
from alignlab.cli import commands as cli
from alignlab.errors import RecipeError, RunError
from alignlab.recipe.load import consumed, write_yaml
from alignlab.runs import run as runs
from alignlab.runs.run import Run, find_run, read_sweep
from alignlab.runs.sweep import columns_of, settings_of
from alignlab.sweeps.choice import Measured, choose, collect, render
from alignlab.sweeps.members import Members, find_members
from alignlab.text.estimate import Estimate


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
        disk.write_lines(run.metrics_file, rows)
        disk.write_lines(run.samples_file, [{"step": 4, "split": "validation", "prompt": "?", "reply": "!"}] * 16)
        if scores is not None:
            written = [{"split": "validation", "pair": n, "chosen": c, "rejected": 0.0} for n, c in enumerate(scores)]
            disk.write_lines(path / "scores.jsonl", written)
        data = {
            "kept": {"train": 9, "validation": len(scores or range(100)), "test": 50},
            "fingerprint": "same",
            **facts,
        }
        run.note(status="finished", best_step=4, steps=4, data=data, test={})
    return run


def test_the_largest_margin_below_the_kl_limit_is_chosen(small):
    """Margins 2, 1, 0.5 at KL 12, 9.9, 1: the first is out, the second is near the limit and leads by margin."""
    members = find_members("small", [], "0.05,0.1,0.5")
    for number, (margin, kl) in enumerate([(0.5, 1.0), (1.0, 9.9), (2.0, 12.0)]):
        write_run(members, number, margin, kl)
    table = collect(members)
    assert table.choice == "dpo-beta0.1" and table.split == "validation"
    assert "of 2 members with KL below 10" in table.why
    assert "its KL of 9.9 ± 0.5 is within two standard errors of the limit" in table.why
    assert "margin ÷ beta is largest for dpo-beta0.1" in table.why
    row = table.members[1]
    assert row.margin_over_beta.mean == pytest.approx(1.0 / 0.1)
    assert row.perplexity_change == pytest.approx(2.1 / 2.0 - 1)
    assert (row.kl.n, row.accuracy.n) == (16, 100)
    assert row.accuracy.stderr == 0.04
    wider = collect(find_members("small", ["sweep.max_kl=15"], "0.05,0.1,0.5"))
    assert wider.choice == "dpo-beta0.05" and "KL below 15" in wider.rule


def test_where_no_member_is_inside_the_limit_none_is_chosen(small):
    members = find_members("small", [], "0.5,0.1")
    for number, kl in enumerate([12.0, 30.0]):
        write_run(members, number, 1.0, kl)
    table = collect(members)
    assert table.choice is None and "the lowest is 12 ± 0.5 of dpo-beta0.5" in table.why
    with pytest.raises(RunError, match="has chosen no member: no member has a KL below 10"):
        find_run(str(members.folder), best=True)


def test_two_members_are_compared_over_the_same_pairs(small):
    """Log-ratios 1, 2, 3, 4 against 2, 4, 6, 8 at betas 0.2 and 0.1: margins of each pair equal, difference 0 ± 0.

    With 0.4 in place of 0.2 the differences are 0.2, 0.4, 0.6, 0.8: mean 0.5, stderr √(0.0667/4) = 0.129.
    """
    members = find_members("small", [], "0.2,0.1")
    write_run(members, 0, 0.5, scores=[1.0, 2.0, 3.0, 4.0])
    write_run(members, 1, 0.5, scores=[2.0, 4.0, 6.0, 8.0])
    table = collect(members)
    assert "cannot be told apart" in table.why and "difference 0 ± 0, paired over the same 4 pairs" in table.why
    first = table.members[0]
    assert first.margin.mean == 0.5 and first.margin.n == 4
    assert first.margin.stderr == pytest.approx(math.sqrt(1 / 15 / 4))
    assert (first.accuracy.mean, first.accuracy.stderr, first.accuracy.high) == (1.0, 0.0, 1.0)
    assert first.accuracy.low == pytest.approx(0.405, abs=1e-3)  # of 1 1 1 1 1 0: 5/6 − 2.571·√(1/36)
    members = find_members("small", [], "0.4,0.1")
    write_run(members, [m.beta for m in members.all].index(0.4), 1.0, scores=[1.0, 2.0, 3.0, 4.0])
    assert "told apart from dpo-beta0.2 (0.5 ± 0.13): difference 0.5 ± 0.13, paired" in collect(members).why


def test_damaged_lines_are_named_and_other_figures_take_their_place(small, caplog):
    """Without one of its scores a run has the margin of its log; without a reply its KL is a mean over 15."""
    members = find_members("small", [], "0.1,0.2")
    write_run(members, 0, 0.5, scores=[1.0, 2.0, 3.0, 4.0])
    run = write_run(members, 1, 0.7, scores=[2.0, 4.0, 6.0, 8.0])
    for file in (run.scores_file, run.samples_file):
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join([*lines[:2], lines[2][:9] + b"\n", *lines[3:]]))
    member = next(member for member in collect(members).members if member.run == run.path.name)
    assert (member.margin.mean, member.kl.n) == (0.7, 15)
    assert caplog.messages == [f"{file}:3 is damaged and left out" for file in (run.scores_file, run.samples_file)]


def test_a_run_that_has_lost_its_first_evaluation_is_not_compared(small):
    """The next one would be taken for the perplexity before training."""
    members = find_members("small", [], "0.1,0.2")
    write_run(members, 0, 0.5)
    run = write_run(members, 1, 0.7)
    run.metrics_file.write_bytes(b"{\n" + run.metrics_file.read_bytes().splitlines(keepends=True)[1])
    member = next(member for member in collect(members).members if member.run == run.path.name)
    assert (member.status, member.error) == ("failed", f"{run.metrics_file} has no perplexity before the first step")


def test_runs_that_kept_no_scores_say_that_the_error_is_not_known(small):
    members = find_members("small", [], "0.5,0.1")
    write_run(members, 0, 1.0)
    write_run(members, 1, 0.9)
    assert "is not known, as their standard errors were not recorded" in collect(members).why


def test_runs_of_different_data_are_compared_with_a_banner(small):
    members = find_members("small", [], "0.5,0.1")
    write_run(members, 0, 1.0, scores=[1.0, 2.0])
    write_run(members, 1, 0.9, scores=[1.0, 2.0], fingerprint="other")
    table = collect(members)
    (warning,) = table.warnings
    assert warning.startswith("the members were made from different data") and "dpo-beta0.1 other" in warning
    assert table.choice == "dpo-beta0.5" and "as of independent estimates" in table.why
    assert f"warning: {warning}" in " ".join(render(table, members.folder).split())


def test_kl_measured_otherwise_is_said(small):
    write_run(find_members("small", ["monitor.kl.max_new_tokens=64"], "0.5"), 0, 1.0)
    members = find_members("small", [], "0.5,0.1")
    write_run(members, 1, 0.9)
    (warning,) = collect(members).warnings
    assert warning == "KL was not measured alike: monitor.kl.max_new_tokens is dpo-beta0.5 64, dpo-beta0.1 8"


def test_a_metrics_file_cut_off_by_a_crash_is_used_up_to_there_and_said(small, caplog):
    members = find_members("small", [], "0.5,0.1")
    cut = write_run(members, 0, 1.0)
    with cut.metrics_file.open("a") as file:
        file.write('{"step": 8, "eval/lo')
    write_run(members, 1, 0.9)
    assert collect(members).choice == "dpo-beta0.5"
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
    consumed = other.manifest.consumed
    other.note(consumed={**consumed, "dpo": {**consumed["dpo"], "max_steps": 3}})
    table = collect(members)
    assert [member.status for member in table.members] == ["finished", "failed", "failed", "failed", "missing"]
    errors = [member.error for member in table.members]
    assert "is finished, but has no metrics.jsonl" in errors[1] and "has no evaluation at step 2" in errors[2]
    assert "made from other settings: dpo.max_steps was 3, is 4" in errors[3] and errors[4] is None
    assert all("\n" not in error for error in errors if error)
    assert table.choice == "dpo-beta0.5" and "the one member with KL below 10" in table.why
    assert "missing" in render(table, members.folder)


def test_a_run_that_is_still_going_counts_once_it_is_finished(small):
    members = find_members("small", [], "0.5,0.1")
    write_run(members, 0, 1.0).note(status="running")
    write_run(members, 1, 0.9)
    table = collect(members)
    assert table.members[0].status == "running" and table.choice == "dpo-beta0.1"


def test_there_is_no_best_without_a_sweep(tmp_path):
    with pytest.raises(RunError, match="make it with alignlab sweep"):
        find_run(str(tmp_path / "small"), best=True)


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 20), st.sampled_from([0.5, 0.1])), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
@settings(max_examples=50, deadline=None)
def test_the_choice_is_inside_the_limit_beats_the_others_and_depends_on_no_order(figures, random):
    members = [measured(margin, kl, beta) for margin, kl, beta in figures]
    chosen, why = choose(members, 10.0)
    inside = [member.margin.mean for member in members if member.kl.mean < 10]
    assert (chosen is None) == (not inside) and "\n" not in why
    if chosen:
        assert chosen.margin.mean == max(inside) and chosen.kl.mean < 10
        random.shuffle(members)
        assert choose(members, 10.0)[0].margin == chosen.margin


def measured(margin: float, kl: float, beta: float) -> Measured:
    return Measured(
        name=f"dpo-beta{beta}",
        beta=beta,
        margin=Estimate(margin, 0.1, 100),
        margin_over_beta=Estimate(margin / beta, 0.1 / beta, 100),
        accuracy=Estimate(0.5, 0.05, 100),
        kl=Estimate(kl, 0.5, 32),
    )


def test_a_recipe_that_changed_leaves_its_old_members_out(small):
    members = find_members("small", [], "0.5")
    write_run(members, 0, 1.0)
    collect(members)
    text = (small / "recipes" / "small.yaml").read_text()
    (small / "recipes" / "small.yaml").write_text(text.replace("beta: 0.7", "beta: 0.5"))
    assert find_members("small", [], "0.1").earlier == []
    with pytest.raises(RecipeError):
        find_members("nothing")


def grid(*seeds: int) -> Members:
    return find_members("small", [], None, ["beta=0.5,0.1", f"seed={','.join(map(str, seeds))}"])


def test_seeds_of_one_setting_are_one_column_with_an_interval_over_seeds(small):
    """Margins 0.8, 1.0, 1.2 of three seeds at beta 0.5: mean 1, stderr 0.2 / √3 = 0.115, t(2) = 4.303."""
    members = grid(0, 1, 2)
    margins = {0: 0.8, 1: 1.0, 2: 1.2}
    for number, member in enumerate(members.all):
        write_run(members, number, margins[member.settings["dpo.seed"]] * (1 if member.beta == 0.5 else 0.5))
    table = collect(members)
    assert len(table.members) == 6 and columns_of(table) == [
        "beta 0.5, seeds 3",
        "beta 0.1, seeds 3",
    ]
    margin = settings_of(table)[0].margin
    assert (margin.mean, margin.n) == (pytest.approx(1.0), 3) and margin.stderr == pytest.approx(0.2 / math.sqrt(3))
    assert margin.high == pytest.approx(1.0 + 4.303 * 0.2 / math.sqrt(3), abs=1e-3)
    assert "seeds 3" in render(table, members.folder)


def test_one_seed_of_a_setting_is_itself(small):
    members = grid(0)
    write_run(members, 0, 1.0)
    assert settings_of(collect(members))[0].margin.n == 100


@pytest.mark.parametrize("betas", ["0.5,0.1", "0.5,0.4,0.3,0.2,0.1,0.05"])
def test_the_terminal_is_80_columns_wide(small, betas):
    members = find_members("small", [], betas)
    for number in range(len(members.all) - 1):
        write_run(members, number, 1.0 + number, kl=3.0 + number, scores=[1.0, 2.0, 3.0])
    shown = render(collect(members), members.folder)
    assert max(map(len, shown.splitlines())) <= 80
    assert f"{len(members.all) - 1} of {len(members.all)} members finished" in shown and "missing" in shown


def test_a_win_rate_has_its_counts_in_the_table_and_on_the_terminal(small):
    members = find_members("small", [], "0.5,0.1")
    run = write_run(members, 0, 1.0)
    run.note(test={"win_rate": {"mean": 0.75, "stderr": 0.1, "n": 20, "wins": 12, "ties": 6, "losses": 2}})
    table = collect(members)
    assert (table.members[0].win_rate.wins, table.members[0].win_rate.losses) == (12, 2)
    assert "beta 0.5: 12 wins, 6 ties, 2 losses" in render(table, members.folder)
    assert read_sweep(members.folder).members[0].win_rate == table.members[0].win_rate


@pytest.mark.parametrize("name", ["figures.csv", "figures.md"])
def test_a_sweep_is_carried_away_as_a_table(small, monkeypatch, name, capsys):
    members = find_members("small", [], "0.5,0.1")
    for number in range(2):
        write_run(members, number, 1.0)
    assert cli.main(["sweep", "small", "--betas", "0.5,0.1", "--collect", "--table", name]) == 0
    written = Path(name).read_text()
    assert "margin" in written and ("beta 0.5" in written) and written.count("\n") > 5
    if name.endswith(".csv"):
        rows = list(csv.DictReader(io.StringIO(written)))
        assert float(next(row for row in rows if row["measure"] == "margin")["mean"]) == 1.0


def test_a_table_of_another_kind_is_refused_before_anything_is_done(small, capsys):
    assert cli.main(["sweep", "small", "--collect", "--table", "figures.xlsx"]) == 2
    assert "--table figures.xlsx: a table is written as CSV or Markdown; end the name in .csv or .md" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "sweep.json is not JSON"),
        ('{"members": [{}]}', "sweep.json: members.0.run is missing"),
        ('{"members": 3}', "sweep.json: members is 3"),
        ('{"members": [{"run": "x", "margin": {"mean": "much"}}]}', "members.0.margin.mean is 'much'"),
    ],
)
def test_a_sweep_of_another_hand_is_one_line(tmp_path, text, said):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(RunError) as error:
        read_sweep(tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value)
