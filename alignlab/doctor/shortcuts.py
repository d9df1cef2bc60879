"""What a model could win by without reading: simple features of two replies, and how often they tell which is chosen.

A policy that only learns to write longer, or to apologise, is rewarded wherever such a feature tells the chosen reply;
what it then wins on held-out pairs is to be read beside the figures here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignlab.data.prepare import Prepared
from alignlab.data.splits import SPLITS
from alignlab.doctor.finding import SHOWN, Finding, Level, Shown
from alignlab.doctor.scan import scan
from alignlab.doctor.texts import find_cut, refuses
from alignlab.text.estimate import Estimate, share_estimate

SHORTCUT = 0.6  # ours: just above 'the longer wins' on HH-RLHF's helpful-base (0.60), as common a bias as there is
READ_CHARACTERS = 100_000  # of a text in which words and signs are counted
HELD_OUT = ("validation", "test")
LONGEST = "characters"

_WORD = re.compile(r"\w+")
_LIST_ITEM = re.compile(r"^[ \t]{0,20}(?:[-*•]|\d{1,3}[.)])[ \t]", re.MULTILINE)
_DIGIT = re.compile(r"\d")
_CAPITAL = re.compile(r"[A-ZÀ-ÖØ-ÞΑ-ΩА-Я]")
_MARKUP = re.compile(r"\*\*|```|^#{1,6} ", re.MULTILINE)
_APOLOGY = re.compile(r"\b(?:sorry|apolog\w{1,8}|forgive me|unfortunately)\b", re.IGNORECASE)

# Of one reply; counts are compared on a logarithmic scale, and shares as they are
COUNTS = (
    LONGEST,
    "words",
    "lines",
    "list items",
    "question marks",
    "exclamation marks",
    "digits",
    "bold, headings and code",
    "apologies",
)
SHARES = (
    "capitals, share of characters",
    "different words, share of words",
    "words of the prompt, share of different words",
    "refuses",
    "ends in mid-sentence",
)
NAMES = COUNTS + SHARES


def measure(reply: str, prompt_words: frozenset[str]) -> list[float]:
    """The features of one reply, in the order of `NAMES`."""
    text = reply[:READ_CHARACTERS]
    words = _WORD.findall(text.lower())
    different = set(words)
    counts = [
        len(reply),
        len(words),
        text.count("\n") + 1,
        len(_LIST_ITEM.findall(text)),
        text.count("?"),
        text.count("!"),
        len(_DIGIT.findall(text)),
        len(_MARKUP.findall(text)),
        len(_APOLOGY.findall(text)),
    ]
    shares = [
        len(_CAPITAL.findall(text)) / max(len(text), 1),
        len(different) / max(len(words), 1),
        len(different & prompt_words) / max(len(different), 1),
        refuses(text),
        find_cut(text) is not None,
    ]
    return [*counts, *map(float, shares)]


def compare(batch: Mapping[str, Sequence[str]]) -> np.ndarray:
    """Chosen minus rejected, of each pair of a batch and each feature."""
    sides, asked, words = {"chosen": [], "rejected": []}, None, frozenset()
    for prompt, *replies in zip(batch["prompt"], batch["chosen"], batch["rejected"], strict=True):
        if prompt != asked:
            asked, words = prompt, words_of(prompt)
        for side, reply in zip(sides.values(), replies, strict=True):
            side.append(measure(reply, words))
    chosen, rejected = (np.array(side, dtype=float) for side in sides.values())
    chosen[:, : len(COUNTS)], rejected[:, : len(COUNTS)] = (
        np.log1p(side[:, : len(COUNTS)]) for side in (chosen, rejected)
    )
    return (chosen - rejected).astype(np.float32)


def words_of(prompt: str) -> frozenset[str]:
    """The words of a prompt, of a long one the last."""
    return frozenset(_WORD.findall(prompt[-READ_CHARACTERS:].lower()))


@dataclass(frozen=True)
class Shortcuts:
    """How often simple features tell the chosen reply; every interval takes pairs as independent."""

    findings: Sequence[Finding]
    # of each feature: name, accuracy of 'the larger wins' on training pairs with low and high of its 95 % interval
    # (none where all tie), n pairs in which it differs, and ties
    features: Sequence[Mapping[str, Any]]
    model: Estimate  # accuracy on held-out pairs of the logistic model of all features; a tie counts ½
    longest: Estimate  # accuracy on the same pairs of 'the reply with more characters wins'
    weights: Mapping[str, float]  # of the model: logits per standard deviation of a feature's difference


def find_shortcuts(prepared: Prepared) -> Shortcuts:
    """Each feature alone, and all of them in a model that training pairs teach and held-out pairs test."""
    found = {split: [np.empty((0, len(NAMES)), np.float32)] for split in SPLITS}
    for split, _, differences in scan(prepared, ("prompt", "chosen", "rejected"), compare):
        found[split].append(differences)
    by_split = {split: np.concatenate(batches) for split, batches in found.items()}
    train, held_out = by_split["train"], np.concatenate([by_split[split] for split in HELD_OUT])
    scale = np.sqrt((train.astype(float) ** 2).mean(axis=0))
    weights = fit(train / np.where(scale > 0, scale, 1.0)) / np.where(scale > 0, scale, 1.0)
    features = [feature(name, train[:, number]) for number, name in enumerate(NAMES)]
    model, longest = (accuracy(values) for values in (held_out @ weights, held_out[:, NAMES.index(LONGEST)]))
    findings = [_length_bias(prepared), _shallow(prepared, held_out, weights, model, longest)]
    return Shortcuts(findings, features, model, longest, dict(zip(NAMES, (weights * scale).tolist(), strict=True)))


def feature(name: str, differences: np.ndarray) -> dict[str, Any]:
    """How often the reply that has more of one feature is the chosen one; pairs that have equally much are left out."""
    differ = differences[differences != 0]
    facts = {"name": name, "n": len(differ), "ties": len(differences) - len(differ)}
    if not len(differ):
        return {**facts, "accuracy": None, "low": None, "high": None}
    share = share_estimate(differ > 0)
    return {**facts, "accuracy": share.mean, "low": share.low, "high": share.high}


def accuracy(scores: np.ndarray) -> Estimate:
    """How often a score of chosen minus rejected is above zero; zero itself counts ½, as a coin would."""
    return share_estimate((scores > 0) + 0.5 * (scores == 0))


def fit(X: np.ndarray) -> np.ndarray:
    """The weights w of P(chosen wins) = σ(x·w) for differences x in units of their size, with a penalty of ½|w|².

    There is no intercept: which reply stands first says nothing. The penalty is that of one pair's order, and keeps
    a feature that tells every pair from an infinite weight.
    """
    from scipy.optimize import minimize
    from scipy.special import expit, log_expit

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        logits = X @ weights
        return 0.5 * weights @ weights - log_expit(logits).sum(), weights - expit(-logits) @ X

    return minimize(loss, [0.0] * X.shape[1], jac=True, method="L-BFGS-B").x


# Findings


def _length_bias(prepared: Prepared) -> Finding:
    """In tokens, over all splits: the figure of `longer_is_chosen`."""
    count = prepared.token_counts
    longer_by = {split: count(split, "chosen") - count(split, "rejected") for split in SPLITS}
    every = np.concatenate(list(longer_by.values()))
    differ = every[every != 0]
    if not len(differ):
        return Finding(
            name="length-bias", level="note", says="No pair has replies of different length.", count=0, of=len(every)
        )
    share = share_estimate(differ > 0)
    return Finding(
        name="length-bias",
        level=_level(share),
        says=f"The longer reply, in tokens, is the chosen one in a share of {share.in_words()} of the pairs whose"
        f" replies differ in length; {len(every) - len(differ):,} do not.",
        count=int((differ > 0).sum()),
        of=len(differ),
        shown=_longest_ahead(prepared, longer_by["train"]),
        advice="read the length-controlled win rate of `alignlab eval`, and watch eval/reply_tokens while training;"
        " dpo.ld_alpha below 1 (LD-DPO) gives less weight to what one reply is longer by, and dpo.loss_type:"
        " sigmoid_norm compares log-probabilities per token",
    )


def _longest_ahead(prepared: Prepared, longer_by: np.ndarray) -> list[Shown]:
    """Training pairs whose chosen reply is longer by the most."""
    shown = []
    for number in (-longer_by).argsort(kind="stable")[:SHOWN].tolist():
        pair = prepared.train[number]
        chosen, rejected = len(pair["chosen_ids"]), len(pair["rejected_ids"])
        shown.append(Shown("train", number, f"chosen {chosen:,} tokens, rejected {rejected:,}"))
    return shown


def _shallow(
    prepared: Prepared, held_out: np.ndarray, weights: np.ndarray, model: Estimate, longest: Estimate
) -> Finding:
    return Finding(
        name="shallow-features",
        level="doubtful" if model.low > SHORTCUT else "note",
        says=f"A logistic model of {len(NAMES)} simple features, such as length, list items and apologies, which reads"
        f" nothing, tells the chosen reply of a held-out pair with accuracy {model.in_words()}; choosing the longer"
        f" one, in characters, has {longest.mean:.3g}, and a coin 0.5.",
        count=int((held_out @ weights > 0).sum()),
        of=model.n,
        shown=_surest(prepared, held_out, weights),
        advice="compare the accuracy of `alignlab eval` on held-out pairs with this figure: a policy that does not pass"
        " it may have learned no more than these features; read its win rate at equal length, and balance the feature"
        " that tells most (add pairs in which it loses)",
    )


def _surest(prepared: Prepared, held_out: np.ndarray, weights: np.ndarray) -> list[Shown]:
    """The held-out pairs that the model is surest to be right about, and the two features that say most."""
    shown, first = [], len(prepared.validation)
    for place in (-(held_out @ weights)).argsort(kind="stable")[:SHOWN].tolist():
        split, number = ("validation", place) if place < first else ("test", place - first)
        pair = getattr(prepared, split)[number]
        sides = [measure(pair[side], words_of(pair["prompt"])) for side in ("chosen", "rejected")]
        most = (-held_out[place] * weights).argsort(kind="stable")[:2].tolist()
        what = "; ".join(f"{NAMES[i]}: {_written(sides[0][i])} against {_written(sides[1][i])}" for i in most)
        shown.append(Shown(split, number, what))
    return shown


def _written(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.2f}"


def _level(share: Estimate) -> Level:
    """Doubtful where the larger, or the smaller, wins so often that a policy can live on it."""
    return "doubtful" if share.low > SHORTCUT or share.high < 1 - SHORTCUT else "note"
