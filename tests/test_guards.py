"""Guards: each speaks on numbers made to set off that one, stays silent on noise, and says what to try."""

from __future__ import annotations

import math

import pytest

from alignlab.recipe.load import MonitorSection
from alignlab.train.guards import GUARDS, alarms

START = {
    "step": 0,
    "eval_loss": 0.693,
    "eval_rewards/chosen": 0.0,
    "eval_rewards/margins": 0.0,
    "eval_rewards/accuracies": 0.0,
    "eval_rewards/accuracies_stderr": 0.0,
    "eval_kl": 0.0,
    "eval_kl_stderr": 0.0,
    "eval_reply_tokens": 40.0,
    "eval_reply_tokens_stderr": 2.0,
    "eval_eos_rate": 0.95,
    "eval_distinct_2": 0.6,
    "eval_repetition": 0.05,
    "eval_repetition_stderr": 0.01,
}
HEALTHY = START | {"step": 50, "eval_loss": 0.6, "eval_kl": 3.0, "eval_kl_stderr": 0.2, "eval_rewards/margins": 0.4}
LIMITS = MonitorSection(max_kl=20.0, max_accuracy=0.95)


def guards_after(*rows: dict) -> list[str]:
    return [alarm.guard for alarm in alarms([START, *rows], LIMITS)]


def test_a_healthy_run_is_left_in_peace():
    assert guards_after() == guards_after(HEALTHY) == alarms([], LIMITS) == []


@pytest.mark.parametrize(
    ("changed", "guard"),
    [
        ({"eval_kl": 21.0}, "kl"),
        ({"eval_kl": math.nan}, "kl"),
        ({"eval_kl": math.inf}, "kl"),
        ({"eval_rewards/accuracies": 0.99, "eval_rewards/accuracies_stderr": 0.01}, "accuracy"),
        ({"eval_reply_tokens": 70.0}, "length"),
        ({"eval_eos_rate": 0.5}, "eos"),
        ({"eval_repetition": 0.4}, "quality"),
        ({"eval_distinct_2": 0.3}, "quality"),
    ],
)
def test_each_sign_sets_off_its_own_guard(changed, guard):
    (alarm,) = alarms([START, HEALTHY | changed], LIMITS)
    assert (alarm.guard, alarm.step, alarm.stops) == (guard, 50, True)
    assert "\n" not in alarm.message and ("dpo." in alarm.message)


@pytest.mark.parametrize(
    "changed",
    [
        {"eval_kl": 21.0, "eval_kl_stderr": 0.6},  # 21 − 1.2 is below 20
        {"eval_kl": 20.0},
        {"eval_kl": 3.0, "eval_kl_stderr": math.nan},  # the error of one reply is unknown
        {"eval_rewards/accuracies": 0.99, "eval_rewards/accuracies_stderr": 0.03},
        {"eval_reply_tokens": 63.0},  # 63 − 2 · 2 is below 1.5 · 40
        {"eval_eos_rate": 0.75},  # of 64 replies: 0.2 is within 0.1 + 2 · 0.061
        {"eval_repetition": 0.16},
        {"eval_repetition": 0.4, "eval_loss": 0.7},  # the loss says so too
    ],
)
def test_noise_and_values_at_the_limit_say_nothing(changed):
    assert guards_after(HEALTHY | changed) == []


def test_a_remedy_that_the_run_uses_already_is_not_offered():
    rows = [START, HEALTHY | {"eval_eos_rate": 0.5}]
    (free,), (anchored,) = alarms(rows, LIMITS), alarms(rows, LIMITS, anchored=True)
    assert (
        "[sigmoid,sft]" in free.message and "[sigmoid,sft]" not in anchored.message and "dpo.beta" in anchored.message
    )


def test_limits_can_be_switched_off():
    row = HEALTHY | {"eval_kl": 500.0, "eval_rewards/accuracies": 1.0}
    assert [a.guard for a in alarms([START, row], MonitorSection(max_kl=None, max_accuracy=None))] == []


def test_chosen_falling_while_the_margin_grows_is_said_after_two_such_steps_and_does_not_stop():
    rows = [
        HEALTHY | {"eval_rewards/chosen": chosen, "eval_rewards/margins": margin}
        for chosen, margin in ((-0.1, 0.2), (-0.2, 0.3), (-0.3, 0.4))
    ]
    assert guards_after(*rows[:2]) == []
    (alarm,) = alarms([START, *rows], LIMITS)
    assert (alarm.guard, alarm.stops) == ("chosen_reward", False) and "[sigmoid,sft]" in alarm.message
    rows[1] |= {"eval_rewards/margins": 0.5}  # once the margin shrinks
    assert guards_after(*rows) == []


def test_an_sft_run_sets_off_nothing():
    sft = {"eval_loss": 1.0, "eval_reply_tokens": 40.0, "eval_reply_tokens_stderr": 2.0, "eval_eos_rate": 0.9}
    assert alarms([{"step": 0, **sft}, {"step": 10, **sft, "eval_loss": 0.8}], LIMITS) == []


def test_nothing_changed_is_said_after_two_evaluations_and_does_not_stop():
    """KL 5e-6 with an accuracy of 100 %: margins are tiny, and all of one sign."""
    still = HEALTHY | {"eval_kl": 5e-6, "eval_kl_stderr": 1e-6, "eval_rewards/margins": 1e-7}
    assert guards_after(still) == [] and guards_after(HEALTHY, still) == []
    (alarm,) = alarms([START, still, still | {"step": 100}], LIMITS)
    assert (alarm.guard, alarm.stops) == ("unmoved", False)
    assert "5e-06 nats a reply" in alarm.message and "a larger dpo.learning_rate" in alarm.message
    noisy = still | {"eval_kl_stderr": math.nan}
    assert guards_after(noisy, noisy) == ["unmoved"]


def test_a_slow_start_is_not_called_nothing():
    assert guards_after(HEALTHY | {"eval_kl": 0.005}, HEALTHY | {"eval_kl": 0.02, "eval_kl_stderr": 0.001}) == []


def test_every_guard_has_been_set_off_here():
    assert set(GUARDS) == {"kl", "accuracy", "length", "eos", "quality", "chosen_reward", "unmoved"}


def test_remedies_name_the_stages_own_settings_and_orpo_has_no_reference_to_measure_from():
    """KL 99 and replies of 40 tokens after 20: two signs of KTO, none of ORPO."""
    rows = [{"step": 0, "eval_loss": 1.0, "eval_reply_tokens": 20.0}]
    rows.append({"step": 9, "eval_loss": 1.0, "eval_reply_tokens": 40.0, "eval_kl": 99.0})
    kl, length = alarms(rows, LIMITS, True, "kto")
    assert (kl.guard, length.guard) == ("kl", "length")
    assert "kto.beta" in kl.message and "kto.learning_rate" in kl.message and "dpo." not in kl.message
    assert alarms(rows, LIMITS, True, "orpo") == []
