"""Pure tensor functions: rewards, margin, accuracy, KL and perplexity, each with its equation.

Shapes: B replies or pairs, T tokens of a reply, V words of the vocabulary. Log-probabilities are in nats.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logps(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """log p(token) of each token under the logits that predict it; shape (B, T), float32."""
    return torch.gather(logits_BTV.float().log_softmax(-1), -1, ids_BT.unsqueeze(-1)).squeeze(-1)


def rewards(policy_logps_B: Tensor, reference_logps_B: Tensor, beta: float) -> Tensor:
    """The implicit reward of each reply: β (log π(y|x) − log π_ref(y|x)) (arXiv 2305.18290, section 4)."""
    return beta * (policy_logps_B - reference_logps_B)


def dpo_loss(chosen_rewards_B: Tensor, rejected_rewards_B: Tensor) -> Tensor:
    """−log σ(r_chosen − r_rejected) of each pair (arXiv 2305.18290, equation 7)."""
    return -F.logsigmoid(chosen_rewards_B - rejected_rewards_B)


def perplexity(logps_B: Tensor, tokens_B: Tensor) -> float:
    """exp(−Σ log p ÷ Σ tokens): over all tokens, not a mean of replies' perplexities."""
    return math.exp(-logps_B.double().sum().item() / tokens_B.sum().item())


def kl_per_token(policy_logits_BTV: Tensor, reference_logits_BTV: Tensor) -> Tensor:
    """KL(policy ‖ reference) of each next-token distribution, in nats; shape (B, T).

    Where the policy gives a token no probability it adds nothing, as 0 log 0 = 0; logits that are nan stay nan.
    """
    policy_BTV = policy_logits_BTV.float().log_softmax(-1)
    reference_BTV = reference_logits_BTV.float().log_softmax(-1)
    kl_BTV = F.kl_div(reference_BTV, policy_BTV, reduction="none", log_target=True)
    return kl_BTV.masked_fill(policy_BTV == -math.inf, 0.0).sum(-1)


def kl_per_reply(policy_logits_BTV: Tensor, reference_logits_BTV: Tensor, mask_BT: Tensor) -> Tensor:
    """KL(policy ‖ reference) of each sampled reply, in nats; shape (B,).

    The replies must be samples from the policy. Sums over reply tokens the exact KL between the two next-token
    distributions: an unbiased estimate of the KL between the two distributions over whole replies, never negative,
    with less variance than log-ratios of the sampled tokens (Rao-Blackwell).
    """
    return (kl_per_token(policy_logits_BTV, reference_logits_BTV) * mask_BT).sum(-1)
