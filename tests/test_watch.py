"""The look of replies by hand, and getting worse told apart from chance."""

from __future__ import annotations

from alignlab.evaluation.estimates import table_row
from alignlab.evaluation.watch import PERPLEXITY, copies, look_at, watch_rows, what_got_worse, worse_text
from alignlab.measure.generate import Reply

PROMPT = list(range(100, 120))
GOOD = Reply((1, 2, 3, 4, 5, 6, 0), " fine", True)
LOOP = Reply((1, 2) * 12, " a b" * 12, False)
EMPTY = Reply((0,), "  ", True)
COPY = Reply(tuple(PROMPT[4:16]), " what you said", True)


def rows_of(**replies):
    prompts = [PROMPT] * len(next(iter(replies.values())))
    return watch_rows({name: look_at(prompts, its) for name, its in replies.items()}, "sft")


def means(rows, name):
    return {row.measure: row.values[name].mean for row in rows}


def test_signs_by_hand():
    found = means(rows_of(sft=[GOOD, LOOP, EMPTY, COPY]), "sft")
    assert found["length"] == (7 + 24 + 1 + 12) / 4 and found["ended by itself"] == 0.75
    assert (found["empty"], found["loops"], found["copies of the prompt"]) == (0.25, 0.25, 0.25)
    assert found["repeated 4-grams"] == (1 - 2 / 21) / 4  # 21 4-grams, of which 2 are different


def test_half_of_a_reply_copied_is_no_copy():
    assert copies(PROMPT, [*PROMPT[:8], *range(8)]) == 1 / 9 and copies(PROMPT, PROMPT[:7]) == 0


def test_equal_replies_are_not_worse():
    assert what_got_worse(rows_of(sft=[GOOD, LOOP] * 20, dpo=[GOOD, LOOP] * 20), "dpo", "sft") == []


def test_one_bad_reply_of_twenty_is_not_worse():
    assert what_got_worse(rows_of(sft=[GOOD] * 20, dpo=[GOOD] * 19 + [LOOP]), "dpo", "sft") == []


def test_loss_falls_and_quality_falls_is_said():
    rows = rows_of(sft=[GOOD] * 30, dpo=[LOOP] * 12 + [EMPTY] * 6 + [GOOD] * 12)
    signs = what_got_worse(rows, "dpo", "sft")
    assert {sign.rpartition(" ")[0].partition(" 0")[0].partition(" 100")[0] for sign in signs} >= {"empty replies"}
    assert any("end by themselves 100% → 60%" in sign for sign in signs) and any("4-grams" in sign for sign in signs)
    (said,) = worse_text("dpo", "sft", signs, 0.4, 0.693)
    assert said.startswith("loss falls and quality falls: dpo's held-out DPO loss is 0.4 (0.693 before)")
    (said,) = worse_text("dpo", "sft", signs, None, 0.693)
    assert said.startswith("dpo's replies are worse than sft's")


def test_better_replies_are_not_worse():
    assert what_got_worse(rows_of(sft=[LOOP, EMPTY] * 15, dpo=[GOOD] * 30), "dpo", "sft") == []


def test_chosen_replies_that_have_become_unlikely_are_a_sign():
    dear = lambda after: table_row("cost", PERPLEXITY, {"sft": [1.5, 1.6] * 9, "dpo": [after, after + 0.1] * 9}, "sft")
    rows = rows_of(sft=[GOOD] * 9, dpo=[GOOD] * 9)
    assert what_got_worse([*rows, dear(1.6)], "dpo", "sft") == []
    assert what_got_worse([*rows, dear(2.0)], "dpo", "sft") == ["perplexity of the chosen replies 1.55 → 2.05"]
