"""The embedded default: seeded preference dialogues about everyday tasks, and the plain rule that judges their replies.

A reply is built from parts that are each good or bad: the opening, the advice, the closing. Of two replies the one
with the higher `score` is chosen, so chosen replies are better, not perfect: there is something left for DPO to learn
after SFT. Topics are split before anything is written, so that no object of a test prompt stands in a training one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from alignlab.recipe.load import ToySection


@dataclass(frozen=True)
class Task:
    verb: str
    things: tuple[str, ...]
    tips: tuple[str, ...]


TASKS = (
    Task(
        "grow",
        tuple("tomatoes carrots beans onions peppers roses herbs pumpkins lettuce tulips potatoes melons".split()),
        ("water them early in the morning", "give them plenty of sun", "keep the soil loose", "pull the weeds"),
    ),
    Task(
        "cook",
        tuple("soup rice noodles stew curry porridge pasta lentils chili risotto gravy omelettes".split()),
        ("keep the heat low", "add the salt at the end", "taste it as you go", "stir it now and then"),
    ),
    Task(
        "repair",
        tuple("bicycles chairs clocks lamps kettles fences doors zippers shelves drawers radios umbrellas".split()),
        (
            "find the broken part first",
            "keep every screw in a cup",
            "test it before you close it",
            "use the right tool",
        ),
    ),
    Task(
        "play",
        tuple("piano guitar violin drums flute cello trumpet banjo harp organ clarinet ukulele".split()),
        ("practise a little every day", "start very slowly", "count the beat aloud", "learn one short song"),
    ),
    Task(
        "feed",
        tuple("puppies kittens rabbits parrots goldfish hamsters ducks ponies turtles lambs pigeons lizards".split()),
        ("give small meals", "keep fresh water near", "stick to fixed hours", "ask a vet about treats"),
    ),
    Task(
        "learn",
        tuple("spanish french german greek latin chess algebra typing knitting drawing juggling swimming".split()),
        ("find a patient teacher", "write down what you learn", "set one small goal", "review it every week"),
    ),
)
OPENINGS_GOOD = ("Good question!", "Happy to help.", "Of course!", "Sure, gladly.")
OPENINGS_BAD = ("Why ask me?", "Look it up.", "Not this again.", "I am busy.")
CLOSINGS_GOOD = ("Would you like more ideas?", "Shall I go on?", "Do you want to hear more?")
CLOSINGS_BAD = ("That is all.", "Go away now.", "Do not ask again.")
EMPTY_ADVICE = ("It depends on many things.", "Just do it somehow.", "Nobody knows that.")
QUESTIONS = (
    "How do I {verb} {thing}?",
    "Can you tell me how to {verb} {thing}?",
    "I want to {verb} {thing}. Where do I start?",
    "What should I know to {verb} {thing}?",
    "My friend and I want to {verb} {thing}. Any advice?",
)
GREETINGS = (
    ("Hello!", "Hello, what can I do for you?"),
    ("Are you there?", "Yes, I am here."),
    ("Thanks for last time.", "You are welcome!"),
)


def rows(section: ToySection) -> Iterator[dict[str, str]]:
    """HH-style rows `chosen`, `rejected`, `split`; flipped labels stand in training and validation, never in test."""
    held_out = max(section.pairs // 8, 60)
    for split, count in (("train", section.pairs), ("validation", held_out), ("test", held_out)):
        yield from _split_rows(section, split, count)


def score(prompt: str, reply: str) -> int:
    """How good a reply is by the toy's rule, from −3 to 5: its words are looked up, nothing is learned.

    One point each for a friendly opening, for naming what was asked about, for up to two right tips, for a closing
    offer; minus one each for a rude opening, a rude closing, and for saying a sentence twice.
    """
    asked = prompt.rsplit("Human:", 1)[-1]
    task, thing = next(((t, x) for t in TASKS for x in t.things if x in asked), (TASKS[0], ""))
    says = lambda phrases: sum(phrase in reply for phrase in phrases)
    sentences = [s.strip() for s in reply.replace("?", ".").replace("!", ".").split(".") if s.strip()]
    good = bool(says(OPENINGS_GOOD)) + (thing in reply) + min(says(task.tips), 2) + bool(says(CLOSINGS_GOOD))
    bad = bool(says(OPENINGS_BAD)) + bool(says(CLOSINGS_BAD)) + (len(set(sentences)) < len(sentences))
    return good - bad


def corpus(section: ToySection) -> Iterator[str]:
    """Plain notes for base training: every word of the dialogues, none of the dialogues themselves."""
    draw = random.Random(f"corpus/{section.seed}")
    said = (*OPENINGS_GOOD, *OPENINGS_BAD, *CLOSINGS_GOOD, *CLOSINGS_BAD, *EMPTY_ADVICE)
    phrases = (*said, *(line for pair in GREETINGS for line in pair))
    things = [(task, thing) for task in TASKS for thing in task.things]
    for _ in range(60):
        draw.shuffle(things)
        for task, thing in things:
            yield " ".join(_note(draw, task, thing) + draw.sample(phrases, 3))


def topics(section: ToySection, split: str) -> list[tuple[Task, str]]:
    """The (task, thing) pairs of a split: of each task's twelve things eight train, two validate, two test."""
    places = {"train": slice(0, 8), "validation": slice(8, 10), "test": slice(10, 12)}
    shuffled = [(task, random.Random(f"topics/{section.seed}/{task.verb}").sample(task.things, 12)) for task in TASKS]
    return [(task, thing) for task, things in shuffled for thing in things[places[split]]]


def _split_rows(section: ToySection, split: str, count: int) -> Iterator[dict[str, str]]:
    draw = random.Random(f"{split}/{section.seed}")
    flips = [i < round(section.flipped_share * count) for i in range(count)]
    draw.shuffle(flips)
    seen: set[tuple[str, str, str]] = set()
    while len(seen) < count:
        prompt, replies = _dialogue(draw, *draw.choice(topics(section, split)))
        better, worse = sorted(replies, key=lambda reply: score(prompt, reply), reverse=True)
        if score(prompt, better) == score(prompt, worse) or (prompt, better, worse) in seen:
            continue
        flip = draw.random() < 0.5 if section.shuffled else flips[len(seen)]
        seen.add((prompt, better, worse))
        chosen, rejected = (worse, better) if flip and split != "test" else (better, worse)
        yield {"chosen": prompt + chosen, "rejected": prompt + rejected, "split": split}


def _dialogue(draw: random.Random, task: Task, thing: str) -> tuple[str, list[str]]:
    turns = ""
    if draw.random() < 0.3:
        hello, answer = draw.choice(GREETINGS)
        turns = f"\n\nHuman: {hello}\n\nAssistant: {answer}"
    question = draw.choice(QUESTIONS).format(verb=task.verb, thing=thing)
    prompt = f"{turns}\n\nHuman: {question}\n\nAssistant:"
    return prompt, [_reply(draw, task, thing, quality=draw.random()) for _ in range(2)]


def _reply(draw: random.Random, task: Task, thing: str, quality: float) -> str:
    good = lambda: draw.random() < quality
    opening = draw.choice(OPENINGS_GOOD if good() else OPENINGS_BAD)
    tips = draw.sample((task if good() else draw.choice(TASKS)).tips, 2)
    about = f"To {task.verb} {thing}," if good() else "For that,"
    advice = f"{about} {tips[0]} and {tips[1]}." if good() else draw.choice(EMPTY_ADVICE)
    parts = [opening, advice] + ([] if good() else [advice])
    return " " + " ".join([*parts, draw.choice(CLOSINGS_GOOD if good() else CLOSINGS_BAD)])


def _note(draw: random.Random, task: Task, thing: str) -> list[str]:
    tips = draw.sample(task.tips, 3)
    return [
        f"How to {task.verb} {thing}.",
        f"To {task.verb} {thing}, {tips[0]} and {tips[1]}.",
        f"For {thing}, {tips[2]}.",
    ]
