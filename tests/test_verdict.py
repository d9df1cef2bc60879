"""The verdict: every branch, never surer than the numbers, and a headline of at most 25 words."""

from __future__ import annotations

from dataclasses import replace

import pytest
from built import KL, evaluation, run_facts, share, warned, wins
from hypothesis import given
from hypothesis import strategies as st

from alignlab.reports.verdict import MOST_WORDS, compare_verdict, duration, side, signs, sweep_verdict, verdict
from alignlab.runs.facts import Evaluated, OnTest
from alignlab.runs.run import Limits, Rows, Sweep, SweepMember
from alignlab.text.estimate import Estimate
from alignlab.text.tables import number, percent

ACCURATE = OnTest(kl=KL, accuracy=share(1.0, 0.0, 250))


def headline(**facts) -> str:
    return verdict(run_facts(**facts)).headline


def test_better():
    said = verdict(run_facts(win_rate=wins(24, 4, 4)))
    assert said.headline == "DPO's replies are better than SFT's: 24 wins, 4 ties, 4 losses of 32 comparisons."
    assert str(said).endswith(
        "Win rate over SFT by the toy's rule: 81% of 32 comparisons (24 wins, 4 ties, 4 losses; 95% interval 66% to "
        "92%; chance is 50%; a tie counts half). The KL from the reference is 0.53 nats per reply (95% interval "
        "0.45 to 0.61). No guard warned."
    )


def test_worse():
    assert headline(win_rate=wins(4, 4, 24)).startswith("DPO's replies are worse than SFT's: 4 wins")


def test_not_distinguishable():
    said = headline(win_rate=wins(15, 6, 11))
    assert said.startswith("It cannot be told whether DPO's replies are better than SFT's: 15 wins, 6 ties, 11 losses")


def test_a_single_comparison_says_nothing():
    said = verdict(run_facts(win_rate=wins(1, 0, 0)))
    assert said.headline.startswith("It cannot be told whether") and "1 win, 0 ties, 0 losses" in said.headline
    assert "how sure that is cannot be said" in str(said)


def test_without_a_win_rate_nothing_is_said_of_the_replies():
    said = headline(test=OnTest(kl=KL, accuracy=share(0.91, 0.018, 250)))
    assert said == "DPO ranks the preferred reply higher in 91% of 250 test pairs; nobody judged its own replies."


@pytest.mark.parametrize(
    ("accuracy", "said"),
    [
        (0.55, "DPO's ranking of 32 test pairs cannot be told from chance."),
        (0.1, "DPO ranks the rejected reply higher in 90% of 32 test pairs"),
    ],
)
def test_accuracy_that_is_no_success_is_not_called_one(accuracy, said):
    assert headline(test=OnTest(accuracy=share(accuracy, 0.06, 32))).startswith(said)


# --- accuracy is weighed against KL, the replies and their signs ---


def same(count: int, of: int) -> list[dict]:
    return [{"prompt": "?", "reply": "a", "reference_reply": "a" if i < count else "b"} for i in range(of)]


def test_replies_equal_to_the_references_are_no_success():
    """Accuracy 100 %, KL 5e-6: margins are tiny and all of one sign, and not a letter differs."""
    test = replace(ACCURATE, kl=Estimate(5e-6, 1e-6, 32).with_interval())
    said = verdict(run_facts(test=test, samples=same(32, 32)))
    assert said.headline == "DPO changed nothing: all 32 replies are the same as SFT's, letter by letter."
    assert "100% of 250" in str(said)
    assert headline(test=test, samples=same(30, 32)).startswith(
        "DPO changed almost nothing: its replies are 5e-06 nats"
    )


def test_replies_that_eval_found_equal_are_no_success():
    rate = wins(0, 117, 0)
    said = verdict(run_facts(test=ACCURATE, win_rate=rate, evaluation=evaluation(rate, identical=117)))
    assert said.headline == "DPO changed nothing: all 117 replies are the same as SFT's, letter by letter."


def test_some_equal_replies_are_counted():
    rate = wins(68, 40, 9)
    said = verdict(run_facts(win_rate=rate, evaluation=evaluation(rate, identical=25)))
    assert "25 of 117 replies are the same as SFT's, letter by letter." in str(said)


@pytest.mark.parametrize("limit", [20.0, None])
def test_replies_far_from_the_reference_are_no_success(limit):
    """Letter salad: accuracy 100 % at a KL of 50.6 nats, also where the guard's limit is switched off."""
    test = replace(ACCURATE, kl=Estimate(50.6, 2.0, 32).with_interval())
    said = verdict(run_facts(test=test, limits=Limits(max_kl=limit)))
    assert said.headline == "DPO went too far, whatever its accuracy says; warning signs: KL."
    assert "Its KL of 50.6 nats per reply is above 20." in str(said)


BEFORE = {"step": 0, "eval/loss": 0.69, "eval/eos_rate": 0.95, "eval/reply_tokens": 20.0}
BEFORE |= {"eval/repetition": 0.05, "eval/distinct_2": 0.5}


@pytest.mark.parametrize(
    ("after", "name"),
    [
        ({"eval/eos_rate": 0.1}, "unfinished replies"),
        ({"eval/repetition": 0.6, "eval/repetition_stderr": 0.01, "eval/loss": 0.4}, "reply quality"),
    ],
)
def test_text_that_got_worse_is_no_success(after, name):
    """At the step that was kept, by the guards' own rules; what a guard said of other steps is another matter."""
    rows = [BEFORE, {**BEFORE, "step": 150, **after}, {**BEFORE, "step": 200}]
    run = run_facts(test=ACCURATE, rows=rows)
    assert list(signs(run)) == [name] and verdict(run).headline.endswith(f"warning signs: {name}.")
    assert not signs(run_facts(test=ACCURATE, rows=rows, best_step=200))


def test_chosen_replies_that_became_unlikely_are_a_sign():
    test = replace(ACCURATE, reference_perplexity=Estimate(1.5), perplexity=Estimate(2.0))
    assert "perplexity" in headline(test=test)


def test_what_eval_saw_in_the_text_stands_in_the_headline_of_a_winner():
    rate = wins(68, 40, 9)
    found = evaluation(rate, signs={"dpo": ["empty replies 0% → 40%"]})
    said = verdict(run_facts(win_rate=rate, evaluation=found))
    assert said.headline.endswith("9 losses of 117 comparisons; warning signs: text.")
    assert "Empty replies 0% → 40%." in str(said)


def test_wins_by_length_alone_are_qualified():
    rate = wins(68, 40, 9)
    (pair,) = evaluation(rate).win_rates
    longer = replace(pair, length_controlled=Estimate(0.52, 0.04, 117, 0.44, 0.6))
    said = verdict(run_facts(win_rate=rate, evaluation=evaluation(rate, win_rates=[longer])))
    assert said.headline.endswith("; warning signs: not at equal length.") and "counting words" in str(said)


def test_longer_replies_alone_are_not_called_damage():
    rows = [BEFORE, {**BEFORE, "step": 150, "eval/reply_tokens": 90.0}]
    said = headline(test=OnTest(kl=KL, accuracy=share(0.9, 0.02, 250)), rows=rows)
    assert said.startswith("DPO ranks the preferred reply higher") and said.endswith("warning signs: reply length.")


@pytest.mark.parametrize("versus", ["SFT", "the base model", "the model it started from"])
def test_a_headline_has_at_most_25_words(versus):
    """Every sign at once, with the longest name of a reference."""
    test = OnTest(kl=Estimate(5000.0, 2.0, 32), accuracy=share(0.9, 0.02, 2500))
    test = replace(test, reference_perplexity=Estimate(1.5), perplexity=Estimate(20.0))
    worst = {"eval/eos_rate": 0.1, "eval/repetition": 0.6, "eval/repetition_stderr": 0.01, "eval/loss": 0.4}
    rows = [BEFORE, {**BEFORE, "step": 150, **worst, "eval/reply_tokens": 90.0}]
    for rate in (None, wins(1680, 400, 900), wins(900, 400, 1680), wins(1000, 400, 1000)):
        for facts in ({}, {"rows": rows, "test": test}):
            said = headline(versus=versus, win_rate=rate, **facts)
            assert len(said.split()) <= MOST_WORDS, said


# --- how it ended ---

GUARDED = {"action": "stop", "max_kl": 20.0}
STOPPED = {"stop_reason": "stopped at step 60: KL above 20; kept", "steps": 60, "limits": Limits(**GUARDED)}


def test_a_run_that_fell_back_to_its_start_compares_sft_with_itself():
    said = verdict(run_facts(**STOPPED, best_step=0, warnings=warned("kl"), win_rate=wins(0, 32, 0), test=ACCURATE))
    assert said.headline == (
        "A guard stopped this run and kept SFT's own weights: every figure compares SFT with itself."
    )
    assert "A guard stopped it at step 60 of 200: KL." in str(said)


def test_stopped_by_a_guard_with_a_checkpoint_inside_the_limits():
    said = verdict(run_facts(**STOPPED, best_step=40, warnings=warned("kl"), win_rate=wins(24, 4, 4)))
    assert said.headline.startswith("DPO's replies are better than SFT's")
    assert "A guard stopped it at step 60 of 200: KL." in str(said)


def test_a_warning_is_in_the_sentences():
    said = verdict(run_facts(warnings=warned("length", "eos"), win_rate=wins(24, 4, 4)))
    assert "Guards warned of: reply length, unfinished replies." in str(said)


def test_failed():
    said = verdict(run_facts(status="failed", steps=40, stop_reason="RuntimeError: out of memory", test=OnTest()))
    assert said.headline == "This run failed at step 40 of 200."
    assert "It ended with: RuntimeError: out of memory. At its last evaluation, step 200: held-out accuracy" in str(
        said
    )


def test_failed_before_anything_was_logged():
    said = verdict(run_facts(status="failed", steps=None, stop_reason="OSError: x", test=OnTest(), last=None))
    assert (
        str(said)
        == "This run failed before the first logged step. It ended with: OSError: x. Nothing was measured yet."
    )


def test_running():
    last = Evaluated(step=50, accuracy=0.8, kl=0.7)
    said = verdict(run_facts(status="running", steps=60, test=OnTest(), last=last))
    assert str(said) == (
        "This run is still going at step 60 of 200. At its last evaluation, step 50: held-out accuracy 80%, "
        "KL 0.7 nats per reply."
    )


def test_a_run_that_has_been_silent_for_hours_may_have_been_killed():
    said = headline(status="running", steps=60, silent_seconds=5 * 3600, test=OnTest())
    assert said.startswith("This run has logged nothing for 5 h at step 60 of 200; if it was killed")


def test_interrupted():
    said = headline(status="stopped", stop_reason="interrupted at step 60", steps=60, test=OnTest())
    assert said == "This run was interrupted at step 60 of 200; the same command goes on."


def test_finished_without_test_figures():
    said = verdict(run_facts(test=OnTest()))
    assert said.headline == "DPO is finished, but nothing was measured on the test split."
    assert "At its last evaluation, step 200" in str(said)


def test_sft():
    test = OnTest(perplexity=Estimate(1.484, None, 250))
    assert str(verdict(run_facts(stage="sft", test=test, first=Evaluated(step=0, perplexity=7.1)))) == (
        "Supervised fine-tuning is done: perplexity 1.48 on the test replies. Before training it was 7.1 on validation "
        "replies."
    )


@given(st.floats(0, 1), st.floats(0.0001, 0.3), st.integers(2, 500))
def test_better_and_worse_mirror_each_other(mean, stderr, n):
    assert side(share(mean, stderr, n)) == -side(share(1 - mean, stderr, n))


# --- several runs ---


def sweep(*statuses: str, **facts) -> Sweep:
    members = [SweepMember(run=f"dpo-beta0.{i}", status=status) for i, status in enumerate(statuses)]
    return Sweep(members=members, **facts)


def test_a_sweep_says_what_was_chosen_why_and_what_came_of_it():
    found = sweep("finished", "finished", choice="dpo-beta0.1", why="largest margin with KL below 10.")
    said = sweep_verdict(found, [run_facts(name="dpo-beta0.1", win_rate=wins(24, 4, 4))])
    assert said.headline == "dpo-beta0.1 was chosen of 2 finished members."
    assert "Why: largest margin with KL below 10. dpo-beta0.1: DPO's replies are better than SFT's" in str(said)


def test_members_that_are_missing_are_not_among_those_it_was_chosen_of():
    said = sweep_verdict(sweep("finished", "missing", "failed", "missing", choice="dpo-beta0.0", why="x"), [])
    assert said.headline == "dpo-beta0.0 was chosen of 1 finished member (3 of 4 did not finish)."


def test_a_sweep_without_a_choice():
    said = sweep_verdict(sweep("finished", choice=None, why="every member is above the limit"), [])
    assert str(said) == "No member was chosen of 1 finished member. Why: every member is above the limit."


def test_runs_that_were_not_judged_side_by_side_are_not_ranked():
    """Each was judged against its own reference: 0.9 and 0.6 of different games."""
    runs = [run_facts(name="a", win_rate=wins(28, 1, 3)), run_facts(name="b", win_rate=wins(18, 4, 10))]
    said = compare_verdict(runs, {}, None)
    assert said.headline == "These 2 runs were not judged side by side, so their replies are not ranked."
    assert "alignlab eval --runs runs/tiny/dpo runs/tiny/dpo judges them." in str(said)
    assert "a over its own SFT: 89%, 28 wins, 1 tie, 3 losses." in str(said)
    assert "told apart" not in str(said)


def test_runs_that_were_judged_side_by_side_are_ranked_where_they_can_be():
    runs, names = [run_facts(name="a"), run_facts(name="b")], {"a": "a", "b": "b"}
    far, near = evaluation(wins(24, 4, 4), "a", "b"), evaluation(wins(15, 6, 11), "a", "b")
    assert compare_verdict(runs, names, far).headline == "a answers better than b: 24 wins, 4 ties, 4 losses of 32."
    assert compare_verdict(runs, names, near).headline == (
        "a and b cannot be told apart: 15 wins, 6 ties, 11 losses of 32."
    )
    assert compare_verdict(runs, names, evaluation(wins(4, 4, 24), "a", "b")).headline.startswith("b answers better")


def test_a_run_that_was_not_judged_with_the_others_is_named():
    runs = [run_facts(name="a"), run_facts(name="b"), run_facts(name="c")]
    said = compare_verdict(runs, {"a": "a", "b": "b"}, evaluation(wins(24, 4, 4), "a", "b"))
    assert "Not judged side by side with the others: c." in str(said)


def test_runs_of_different_data_are_not_ranked():
    runs = [run_facts(name=name, data=Rows(fingerprint=name)) for name in "ab"]
    assert compare_verdict(runs, {}, None).headline == "2 runs of different data: their figures do not rank them."


# --- words ---


@pytest.mark.parametrize(("value", "said"), [(0, "0%"), (1, "100%"), (0.797, "80%"), (0.996, "99.6%"), (0.012, "1.2%")])
def test_percent(value, said):
    assert percent(value) == said


@pytest.mark.parametrize(("value", "said"), [(0.53042, "0.53"), (1234.5, "1,234"), (-2.0, "-2"), (1e300, "1e+300")])
def test_number(value, said):
    assert number(value) == said


@pytest.mark.parametrize(("seconds", "said"), [(90, "90 s"), (720, "12 min"), (18720, "5.2 h"), (86400 * 3, "3 days")])
def test_duration(seconds, said):
    assert duration(seconds) == said
