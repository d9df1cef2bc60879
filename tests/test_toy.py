"""The laws of the embedded dialogues: seeded, split by topic, judged by a plain rule, flipped as often as asked."""

import random
from statistics import mean

import pytest

from alignlab.data import toy
from alignlab.recipe.load import ToySection

SPLITS = ("train", "validation", "test")
QUICK = ToySection(pairs=160)
PROMPT = "\n\nHuman: Hello!\n\nAssistant: Hello, what can I do for you?\n\nHuman: How do I cook soup?\n\nAssistant:"


def split_rows(section: ToySection, split: str) -> list[tuple[str, str, str]]:
    """(prompt, chosen reply, rejected reply) of a split."""
    cut = [(*row["chosen"].rpartition("Assistant:"), row) for row in toy.rows(section) if row["split"] == split]
    return [(a + b, chosen, row["rejected"].removeprefix(a + b)) for a, b, chosen, row in cut]


def wins(section: ToySection, split: str) -> list[bool]:
    """Whether the chosen reply is the better one by the rule."""
    return [toy.score(p, chosen) > toy.score(p, rejected) for p, chosen, rejected in split_rows(section, split)]


def test_the_same_seed_gives_the_same_rows_and_another_seed_gives_others():
    assert list(toy.rows(QUICK)) == list(toy.rows(ToySection(pairs=160)))
    assert list(toy.rows(QUICK)) != list(toy.rows(ToySection(pairs=160, seed=1)))
    assert list(toy.corpus(QUICK)) == list(toy.corpus(QUICK)) != list(toy.corpus(ToySection(seed=1)))


def test_making_rows_leaves_the_callers_random_state_alone():
    before = random.getstate()
    list(toy.rows(QUICK)), list(toy.corpus(QUICK))
    assert random.getstate() == before


@pytest.mark.parametrize("pairs", [1, 160, 800])
def test_each_split_has_as_many_pairs_as_asked_for(pairs):
    """Validation and test have an eighth of the training pairs, at least 60 (100 of 800)."""
    section = ToySection(pairs=pairs)
    assert [len(split_rows(section, split)) for split in SPLITS] == [pairs, *[max(60, pairs // 8)] * 2]


def test_no_pair_is_drawn_twice():
    rows = [(row["chosen"], row["rejected"]) for row in toy.rows(QUICK)]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("seed", range(5))
def test_each_topic_stands_in_one_split(seed):
    things = [[thing for _, thing in toy.topics(ToySection(seed=seed), split)] for split in SPLITS]
    assert [len(set(of)) for of in things] == [48, 12, 12]
    assert len(set().union(*things)) == 72


@pytest.mark.parametrize("seed", range(5))
def test_no_thing_of_a_held_out_split_stands_in_another_splits_text(seed):
    section = ToySection(pairs=160, seed=seed)
    texts = {split: " ".join("".join(row) for row in split_rows(section, split)) for split in SPLITS}
    for split in SPLITS:
        elsewhere = " ".join(texts[other] for other in SPLITS if other != split)
        assert not [thing for _, thing in toy.topics(section, split) if thing in elsewhere]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25])
def test_exactly_the_flipped_share_is_flipped_and_none_in_test(share):
    """0.1 of 160 training and of 60 validation pairs: 16 and 6."""
    section = ToySection(pairs=160, flipped_share=share)
    flipped = {split: wins(section, split).count(False) for split in SPLITS}
    assert flipped == {"train": round(160 * share), "validation": round(60 * share), "test": 0}


def test_the_chosen_reply_scores_higher_wherever_its_label_is_not_flipped():
    unflipped = ToySection(pairs=160, flipped_share=0)
    assert all(wins(unflipped, split) == [True] * len(wins(unflipped, split)) for split in SPLITS)


def test_chosen_replies_are_better_but_not_perfect():
    scores = [(toy.score(p, c), toy.score(p, r)) for p, c, r in split_rows(ToySection(), "train")]
    assert mean(c for c, _ in scores) > mean(r for _, r in scores) + 1
    assert any(c < 5 for c, _ in scores)


def test_shuffled_labels_say_nothing():
    """Of 2,000 coin flips 1,000 ± 22 come up heads; four standard errors either way."""
    share = mean(wins(ToySection(pairs=2000, shuffled=True), "train"))
    assert abs(share - 0.5) < 4 * 0.5 / 2000**0.5


@pytest.mark.parametrize(
    ("reply", "points"),
    [
        (" Of course! To cook soup, keep the heat low and taste it as you go. Shall I go on?", 1 + 1 + 2 + 1),
        (" Of course! To cook soup, keep the heat low and count the beat aloud. Shall I go on?", 1 + 1 + 1 + 1),
        (" Of course! For that, pull the weeds and keep the soil loose. That is all.", 1 - 1),
        (" Look it up. Nobody knows that. Nobody knows that. Go away now.", -1 - 1 - 1),
        (" Look it up. To cook soup, stir it now and then and keep the heat low. Go away now.", -1 + 1 + 2 - 1),
        (" Good question! Sure, gladly. Happy to help.", 1),
        ("", 0),
    ],
)
def test_score_by_hand(reply, points):
    assert toy.score(PROMPT, reply) == points


def test_score_knows_what_every_question_asks_about():
    for task in toy.TASKS:
        for thing in task.things:
            for question in toy.QUESTIONS:
                prompt = f"\n\nHuman: {question.format(verb=task.verb, thing=thing)}\n\nAssistant:"
                assert toy.score(prompt, f" To {task.verb} {thing}, {task.tips[0]} and {task.tips[1]}.") == 3


def test_score_looks_at_the_last_question_only():
    earlier = "\n\nHuman: How do I feed ducks?\n\nAssistant: Give them peas."
    reply = " To cook soup, keep the heat low and taste it as you go."
    assert toy.score(earlier + PROMPT, reply) == toy.score(PROMPT, reply) == 3


def test_the_corpus_knows_the_words_but_not_the_dialogues():
    notes = list(toy.corpus(QUICK))
    text = "\n".join(notes)
    questions = [
        prompt.rpartition("Human:")[2].partition("\n")[0].strip() for prompt, _, _ in split_rows(QUICK, "train")
    ]
    assert "Human" not in text and "Assistant" not in text
    assert not [question for question in questions if question in text]
    advice = [reply for _, *replies in split_rows(QUICK, "test") for reply in replies if " To " in reply]
    assert advice and not [reply for reply in advice if reply.strip() in text]
    assert all(thing in text for task in toy.TASKS for thing in task.things)
    assert all(tip in text for task in toy.TASKS for tip in task.tips)
