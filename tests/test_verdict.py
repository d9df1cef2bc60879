"""The verdict: every branch, and never surer than the numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignlab.report.verdict import (
    compare_verdict,
    duration,
    number,
    percent,
    side,
    sweep_verdict,
    verdict,
    with_interval,
)

FINISHED = {
    "name": "dpo",
    "stage": "dpo",
    "status": "finished",
    "stop_reason": "all 200 steps done; best checkpoint at step 150",
    "ended": None,
    "steps": 200,
    "planned_steps": 200,
    "silent_seconds": 60,
    "warnings": [],
    "limits": {"max_kl": 20.0, "max_accuracy": 0.95, "action": "warn"},
    "versus": "SFT",
    "win_rate": None,
    "test": {"kl": {"mean": 0.53, "stderr": 0.04, "n": 32, "low": 0.45, "high": 0.61}},
    "evaluations": {"last": {"step": 200, "loss": 1.03, "accuracy": 0.82, "kl": 0.66}},
}


def estimate(mean: float, stderr: float | None, n: int) -> dict:
    return with_interval({"mean": mean, "stderr": stderr, "n": n}, share=True)


def wins(mean: float, stderr: float | None = 0.05, n: int = 32) -> dict:
    return {**estimate(mean, stderr, n), "judge": "by the toy's rule"}


def run(**facts) -> dict:
    return {**FINISHED, **facts}


def test_better():
    assert verdict(run(win_rate=wins(0.8))) == (
        "DPO is better than SFT: its replies win 80% of 32 comparisons by the toy's rule (95% interval 67% to 89%; "
        "chance is 50%), at a KL of 0.53 nats per reply (0.45 to 0.61); no guard warned."
    )


def test_worse():
    assert verdict(run(win_rate=wins(0.2))).startswith("DPO is worse than SFT: its replies win 20% of 32 comparisons")


def test_not_distinguishable():
    said = verdict(run(win_rate=wins(0.55)))
    assert said.startswith("DPO cannot be told from SFT at n=32: its replies win 55% of 32 comparisons")


def test_a_single_comparison_says_nothing():
    said = verdict(run(win_rate=wins(1.0, None, 1)))
    assert said.startswith("DPO cannot be told from SFT at n=1")
    assert "how sure that is cannot be said" in said


def test_without_a_win_rate_the_preferences_are_judged_and_not_the_replies():
    said = verdict(run(test={**FINISHED["test"], "accuracy": estimate(0.91, 0.018, 250)}))
    assert said.startswith("DPO has learned the preferences: it ranks the chosen reply higher in 91% of 250 test pairs")
    assert said.endswith("whether its own replies are better was not judged; no guard warned.")


@pytest.mark.parametrize(
    ("accuracy", "said"),
    [(0.55, "DPO cannot be told from chance at n=32"), (0.1, "DPO has learned the opposite of the preferences")],
)
def test_accuracy_that_is_no_success_is_not_called_one(accuracy, said):
    assert verdict(run(test={"accuracy": estimate(accuracy, 0.06, 32)})).startswith(said)


def test_a_kl_that_was_not_measured_is_said():
    assert "at a KL that was not measured" in verdict(run(win_rate=wins(0.8), test={}))


def test_stopped_by_a_guard():
    facts = {
        "status": "stopped",
        "ended": "guard",
        "steps": 60,
        "warnings": [{"guard": "kl", "step": 60, "message": "x"}],
    }
    said = verdict(run(**facts, win_rate=wins(0.8)))
    assert said.startswith("Stopped by a guard at step 60 of 200 (KL): DPO is better than SFT: its replies win 80%")


def test_a_warning_is_in_the_sentence():
    facts = {
        "warnings": [{"guard": "length", "step": 60, "message": "x"}, {"guard": "eos", "step": 60, "message": "x"}]
    }
    assert verdict(run(**facts, win_rate=wins(0.8))).endswith("; warning on reply length and unfinished replies.")


def test_failed():
    said = verdict(run(status="failed", steps=40, stop_reason="RuntimeError: out of memory", test={}))
    assert said.startswith("Failed at step 40 of 200: RuntimeError: out of memory; at its last evaluation, step 200")


def test_failed_before_anything_was_logged():
    said = verdict(run(status="failed", steps=None, stop_reason="OSError: x", test={}, evaluations={}))
    assert said == "Failed before the first logged step: OSError: x; nothing was measured yet."


def test_running():
    said = verdict(
        run(status="running", steps=60, test={}, evaluations={"last": {"step": 50, "accuracy": 0.8, "kl": 0.7}})
    )
    assert said == (
        "Still running at step 60 of 200; at its last evaluation, step 50: held-out accuracy 80%, "
        "KL 0.7 nats per reply."
    )


def test_a_run_that_has_been_silent_for_hours_may_have_been_killed():
    said = verdict(run(status="running", steps=60, silent_seconds=5 * 3600, test={}))
    assert said.startswith("Says it is running at step 60 of 200, but has logged nothing for 5 h")


def test_interrupted():
    said = verdict(run(status="stopped", ended="interrupted", steps=60, test={}))
    assert said.startswith("Interrupted at step 60 of 200, and the same command goes on from there")


def test_finished_without_test_figures():
    said = verdict(run(test={}))
    assert said.startswith("Finished, but nothing was measured on the test split; at its last evaluation, step 200")


def test_sft():
    facts = {
        "stage": "sft",
        "test": {"perplexity": {"mean": 1.484, "stderr": None, "n": 250, "low": None, "high": None}},
    }
    assert verdict(run(**facts, evaluations={"first": {"step": 0, "perplexity": 7.1}})) == (
        "Supervised fine-tuning is done: perplexity 1.48 on the test replies, where on validation replies it was 7.1 "
        "before training."
    )


@given(st.floats(0, 1), st.floats(0.0001, 0.3), st.integers(2, 500))
def test_better_and_worse_mirror_each_other(mean, stderr, n):
    assert side(estimate(mean, stderr, n)) == -side(estimate(1 - mean, stderr, n))


@given(st.integers(2, 200))
def test_a_share_is_never_certain(n):
    """All of n draws won: the standard error is 0, the interval is not."""
    found = estimate(1.0, 0.0, n)
    assert found["low"] < 1 and found["high"] == 1


def test_the_interval_of_a_share_adds_one_win_and_one_loss():
    """20 wins of 20: 21 of 22, mean 0.9545, s² = 22·0.9545·0.0455/21 = 0.04545, error 0.04545, t(21) = 2.0796."""
    assert estimate(1.0, 0.0, 20)["low"] == pytest.approx(0.9545 - 2.0796 * 0.04545, abs=1e-3)


def test_an_interval_that_was_measured_is_kept():
    assert with_interval({"mean": 0.6, "stderr": 0.1, "n": 9, "low": 0.2, "high": 0.9}, share=True)["low"] == 0.2


@pytest.mark.parametrize("nothing", [None, {}, {"mean": None, "n": 0}, {"mean": float("nan"), "stderr": 0.1, "n": 4}])
def test_no_figure_is_no_figure(nothing):
    assert with_interval(nothing) is None


# --- several runs ---

SWEEP = {"members": [{}, {}, {}], "choice": "dpo-beta0.3", "why": "largest margin among members with KL below 10."}


def test_a_sweep_says_what_was_chosen_why_and_what_came_of_it():
    said = sweep_verdict(SWEEP, [run(name="dpo-beta0.3", win_rate=wins(0.8))])
    assert said.startswith(
        "dpo-beta0.3 was chosen of 3 (largest margin among members with KL below 10): DPO is better than SFT"
    )


def test_a_sweep_without_a_choice():
    said = sweep_verdict({**SWEEP, "choice": None, "why": "every member is above the limit"}, [])
    assert said == "None of 3 members was chosen: every member is above the limit."


def test_the_leader_is_named_only_where_it_can_be_told():
    """0.9 − 0.6 = 0.3 against 1.96·√(0.05² + 0.05²) = 0.139; 0.7 − 0.6 = 0.1 is within it."""
    far = [run(name="a", win_rate=wins(0.9)), run(name="b", win_rate=wins(0.6))]
    near = [run(name="a", win_rate=wins(0.7)), run(name="b", win_rate=wins(0.6))]
    assert compare_verdict(far, True) == "a has the highest win rate, 90% (n=32) against 60% (n=32) of b."
    assert compare_verdict(near, True) == "a and b cannot be told apart: win rate 70% (n=32) against 60% (n=32) of b."


def test_runs_of_different_data_are_not_ranked():
    assert compare_verdict([run(), run()], False) == "2 runs of different data: their figures do not rank them."


def test_what_has_no_figure_is_named():
    said = compare_verdict(
        [run(name=n, win_rate=w) for n, w in (("a", wins(0.9)), ("b", wins(0.6)), ("c", None))], True
    )
    assert said.endswith("of b; no win rate of c.")


def test_nothing_to_compare():
    assert "fewer than two have figures" in compare_verdict([run(), run()], True)


# --- words ---


@pytest.mark.parametrize(("share", "said"), [(0, "0%"), (1, "100%"), (0.797, "80%"), (0.996, "99.6%"), (0.012, "1.2%")])
def test_percent(share, said):
    assert percent(share) == said


@pytest.mark.parametrize(("value", "said"), [(0.53042, "0.53"), (1234.5, "1,234"), (-2.0, "-2"), (1e300, "1e+300")])
def test_number(value, said):
    assert number(value) == said


@pytest.mark.parametrize(("seconds", "said"), [(90, "90 s"), (720, "12 min"), (18720, "5.2 h"), (86400 * 3, "3 days")])
def test_duration(seconds, said):
    assert duration(seconds) == said
