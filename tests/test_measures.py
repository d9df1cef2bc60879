"""The measures, on numbers that a reader can redo by hand."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignlab.measure.formulas import dpo_loss, kl_per_reply, kl_per_token, perplexity, rewards, token_logps

LN2, LN3 = math.log(2), math.log(3)
logits = st.lists(st.floats(-20, 20), min_size=5, max_size=5)


@pytest.mark.parametrize(
    ("chosen", "rejected", "loss"),
    [(0.0, 0.0, LN2), (LN3, 0.0, math.log(4 / 3)), (0.0, LN3, math.log(4)), (50.0, 0.0, 0.0), (0.0, 50.0, 50.0)],
)
def test_dpo_loss_is_minus_log_sigmoid_of_the_margin(chosen, rejected, loss):
    """σ(0) = 1/2; σ(ln 3) = 3/4; σ(−ln 3) = 1/4; σ(50) ≈ 1; −ln σ(−50) ≈ 50."""
    assert dpo_loss(torch.tensor([chosen]), torch.tensor([rejected])).item() == pytest.approx(loss, abs=1e-6)


@given(st.floats(-30, 30), st.floats(-30, 30))
def test_swapping_chosen_and_rejected_changes_the_loss_by_the_margin(chosen, rejected):
    """−ln σ(−m) = m − ln σ(m)."""
    a, b = torch.tensor([chosen]).double(), torch.tensor([rejected]).double()
    assert dpo_loss(b, a).item() == pytest.approx((a - b + dpo_loss(a, b)).item(), abs=1e-9)


def test_reward_is_beta_times_the_log_ratio():
    """0.1 × (−4 − (−6)) = 0.2."""
    assert rewards(torch.tensor([-4.0]), torch.tensor([-6.0]), 0.1).tolist() == pytest.approx([0.2])


def test_token_logps_are_of_the_tokens_asked_for():
    """Logits 0, ln 2, ln 5 are probabilities 1/8, 2/8, 5/8."""
    logits_BTV = torch.tensor([[[0.0, LN2, math.log(5)]] * 3])
    found = token_logps(logits_BTV, torch.tensor([[2, 0, 1]]))
    assert found.exp().tolist() == [pytest.approx([5 / 8, 1 / 8, 2 / 8])]


def test_token_logps_of_half_precision_logits_are_computed_in_float32():
    found = token_logps(torch.zeros(1, 1, 1000, dtype=torch.bfloat16), torch.tensor([[0]]))
    assert found.dtype == torch.float32 and found.item() == pytest.approx(-math.log(1000), rel=1e-6)


def test_perplexity_is_over_tokens_not_over_replies():
    """One token at p = 1/2 and three tokens at p = 1/8 each: exp((ln 2 + 9 ln 2) / 4) = 2^2.5, not (2 + 8) / 2."""
    assert perplexity(torch.tensor([-LN2, -9 * LN2]), torch.tensor([1, 3])) == pytest.approx(2**2.5)


def test_perplexity_of_even_guessing_is_the_size_of_the_vocabulary():
    assert perplexity(torch.tensor([-5 * math.log(7)]), torch.tensor([5])) == pytest.approx(7)


@given(logits)
def test_kl_of_equal_models_is_exactly_zero(row):
    logits_BTV = torch.tensor([[row] * 2])
    assert kl_per_reply(logits_BTV, logits_BTV.clone(), torch.ones(1, 2)).tolist() == [0.0]


@given(logits, logits)
def test_kl_is_never_negative(policy, reference):
    assert kl_per_token(torch.tensor([[policy]]), torch.tensor([[reference]])).item() >= -1e-5


def test_kl_by_hand():
    """Policy (1/2, 1/2), reference (1/4, 3/4): ½ ln 2 + ½ ln ⅔ = 0.1438; the token outside the mask adds nothing."""
    policy = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]).log()
    reference = torch.tensor([[[0.25, 0.75], [0.1, 0.9]]]).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_per_reply(policy, reference, torch.tensor([[1, 0]])).tolist() == pytest.approx([expected])


def test_a_token_the_policy_never_says_adds_nothing_to_the_kl():
    """Policy (1, 0), reference (1/2, 1/2): 1 × ln 2 + 0."""
    policy, reference = torch.tensor([[[0.0, -math.inf]]]), torch.zeros(1, 1, 2)
    assert kl_per_token(policy, reference).item() == pytest.approx(LN2)
    assert kl_per_token(policy, policy).item() == 0


def test_a_token_the_reference_never_says_makes_the_kl_infinite():
    assert kl_per_token(torch.zeros(1, 1, 2), torch.tensor([[[0.0, -math.inf]]])).item() == math.inf


def test_broken_logits_do_not_pass_for_a_kl_of_zero():
    broken = torch.full((1, 1, 2), math.nan)
    assert math.isnan(kl_per_token(broken, torch.zeros(1, 1, 2)).item())
    assert math.isnan(kl_per_token(torch.zeros(1, 1, 2), broken).item())


def test_expected_kl_per_reply_is_the_kl_between_whole_replies():
    """Every reply of up to three words over {stop, a, b}: Σ p(y) kl(y) = Σ p(y) ln p(y)/q(y)."""
    generator = torch.Generator().manual_seed(0)
    prefixes = [prefix for n in range(3) for prefix in product((1, 2), repeat=n)]
    policy, reference = (
        {prefix: torch.randn(3, generator=generator, dtype=torch.float64) for prefix in prefixes} for _ in range(2)
    )
    replies = [(*prefix, 0) for prefix in prefixes] + list(product((1, 2), repeat=3))
    expected = exact = total = 0.0
    for reply in replies:
        before = [reply[:n] for n in range(len(reply))]
        log_p, log_q = (
            sum(model[prefix].log_softmax(-1)[word].item() for prefix, word in zip(before, reply, strict=True))
            for model in (policy, reference)
        )
        stacked = [torch.stack([model[prefix] for prefix in before])[None] for model in (policy, reference)]
        expected += math.exp(log_p) * kl_per_reply(*stacked, torch.ones(1, len(reply))).item()
        exact += math.exp(log_p) * (log_p - log_q)
        total += math.exp(log_p)
    assert total == pytest.approx(1)
    assert expected == pytest.approx(exact, abs=1e-6)
