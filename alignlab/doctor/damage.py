"""Signs of damage over all pairs: how many show each, three of them, and whether refusing wins."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from alignlab.data.pairing import CUT
from alignlab.data.prepare import Prepared
from alignlab.doctor.finding import SHOWN, Finding, Shown, few
from alignlab.doctor.scan import scan
from alignlab.doctor.texts import AT_LINE_START, COLUMNS, REPLIES, Span, TextRule, excerpt, refuses, signs
from alignlab.measure.refusals import ERRORS
from alignlab.text.estimate import share_estimate

ONE_SIDED = 0.6  # ours: where the share of pairs won by refusing, or by not refusing, lies above it, it is a shortcut


@dataclass
class SignCounts:
    """What was seen in some pairs: counts of texts and of pairs, and the first few pairs of each sign."""

    texts: Counter[tuple[str, str]] = field(default_factory=Counter)  # by sign and column
    pairs: Counter[str] = field(default_factory=Counter)
    first: defaultdict[str, list[tuple[int, str]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, name: str, number: int, seen: Mapping[str, tuple[str, Span]]) -> None:
        """A pair in whose columns a sign was seen: the text and where."""
        self.pairs[name] += 1
        self.texts.update((name, column) for column in seen)
        if len(self.first[name]) < SHOWN:
            what = "; ".join(f"{column}: {excerpt(text, *span)}" for column, (text, span) in seen.items())
            self.first[name].append((number, what))


def find_damage(prepared: Prepared, format: str) -> list[Finding]:
    """Every sign in single texts, over all pairs of all splits; `format` is the recipe's `data.format`."""
    own = _own_words(prepared, format)
    tally, shown, pairs = SignCounts(), defaultdict(list), sum(prepared.kept.values())
    for split, start, found in scan(prepared, COLUMNS, partial(look, format=format, own=own)):
        tally.texts.update(found.texts)
        tally.pairs.update(found.pairs)
        for name, first in found.first.items():
            shown[name] += [Shown(split, start + number, what) for number, what in first]
    plain = [_finding(rule, tally, pairs, shown[rule.name]) for rule in signs(format, own)]
    return [*_with_preparation(plain, prepared), *_refusals(tally, pairs, shown)]


def look(batch: Mapping[str, Sequence[str]], format: str, own: frozenset[str]) -> SignCounts:
    """The signs in a batch of pairs."""
    tally, rules = SignCounts(), signs(format, own)
    for number, texts in enumerate(zip(*(batch[column] for column in COLUMNS), strict=True)):
        pair = dict(zip(COLUMNS, texts, strict=True))
        for rule in rules:
            found = {column: (pair[column], rule.find(pair[column])) for column in rule.columns}
            if seen := {column: (text, span) for column, (text, span) in found.items() if span}:
                tally.add(rule.name, number, seen)
        refusing = [column for column in REPLIES if refuses(pair[column])]
        if len(refusing) == 1:
            tally.add(f"refusals-{_WON[refusing[0]]}", number, {column: (pair[column], (0, 0)) for column in REPLIES})
    return tally


_WON = {"chosen": "preferred", "rejected": "rejected"}


def _own_words(prepared: Prepared, format: str) -> frozenset[str]:
    """The roles at line starts that the first prompts all hold: a template's own."""
    if format in ("hh", "alpaca"):
        return frozenset()
    _, _, batch = next(prepared.batches(["prompt"]))
    words = [{found.strip() for found in AT_LINE_START.findall(prompt)} for prompt in batch["prompt"]]
    return frozenset(set.intersection(*words))


_CALLED = {
    "prompt": ("prompt", "prompts"),
    "chosen": ("chosen reply", "chosen replies"),
    "rejected": ("rejected reply", "rejected replies"),
}


def _counted(count: int, one: str, several: str) -> str:
    return f"{count:,} {one if count == 1 else several}"


def _finding(rule: TextRule, tally: SignCounts, pairs: int, shown: Sequence[Shown]) -> Finding:
    counts = {column: _counted(tally.texts[rule.name, column], *_CALLED[column]) for column in COLUMNS}
    count = tally.pairs[rule.name]
    says = rule.says.format(pairs=_counted(count, "pair", "pairs"), **counts)
    return Finding(
        name=rule.name, level=rule.level, says=says, count=count, of=pairs, shown=few(shown), advice=rule.advice
    )


def _with_preparation(findings: Sequence[Finding], prepared: Prepared) -> Iterator[Finding]:
    """Beside replies that came cut, those that preparation has cut."""
    cut = prepared.repaired.get(CUT, 0)
    for finding in findings:
        if finding.name == "cut-off-replies" and cut:
            by_us = f"Preparation itself cut {_counted(cut, 'reply', 'replies')} at data.max_reply_tokens."
            finding = replace(finding, says=f"{finding.says} {by_us}")
        yield finding


def _refusals(tally: SignCounts, pairs: int, shown: Mapping[str, Sequence[Shown]]) -> Iterator[Finding]:
    """Of pairs in which one reply refuses and the other does not, which of the two people preferred."""
    preferred, rejected = tally.pairs["refusals-preferred"], tally.pairs["refusals-rejected"]
    yield _refusal("refusals-preferred", preferred, rejected, pairs, shown)
    yield _refusal("refusals-rejected", rejected, preferred, pairs, shown)


_REFUSAL_SAYS = {
    "refusals-preferred": "The chosen reply refuses and the rejected one does not in {pairs}",
    "refusals-rejected": "The rejected reply refuses and the chosen one does not in {pairs}",
}
_REFUSAL_ADVICE = {
    "refusals-preferred": "a policy can win by refusing: measure refusals of harmless prompts with `alignlab eval"
    " --prompts FILE` on prompts labelled safe and unsafe, and add pairs in which refusing a harmless prompt loses",
    "refusals-rejected": "a policy can win by never refusing: measure refusals of harmful prompts with `alignlab eval"
    " --prompts FILE` on prompts labelled safe and unsafe, and add pairs in which refusing a harmful prompt wins",
}


def _refusal(name: str, count: int, others: int, pairs: int, shown: Mapping[str, Sequence[Shown]]) -> Finding:
    says, level = _REFUSAL_SAYS[name].format(pairs=_counted(count, "pair", "pairs")), "note"
    if both := count + others:
        share = share_estimate([1.0] * count + [0.0] * others)
        level = "doubtful" if share.low > ONE_SIDED else "note"
        says += f", a share of {share.in_words()} of those in which just one refuses"
        assert share.n == both
    says += f" (by phrases, which miss {ERRORS['missed']} of {ERRORS['refusals']} labelled refusals)."
    return Finding(
        name=name,
        level=level,
        says=says,
        count=count,
        of=pairs,
        shown=few(shown[name]),
        advice=_REFUSAL_ADVICE[name],
    )
