"""A chat with finished runs on the terminal: prompts written as in training, replies that end as in training."""

from __future__ import annotations

import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from alignlab.data.format import Dialogue, Format, Stops
from alignlab.data.transcript import Turn, shorten
from alignlab.disk import append_line
from alignlab.errors import AlignlabError, DataError
from alignlab.evaluation.candidates import Candidate, LoadedModels, choose_models, refuse_what_cannot_be_compared
from alignlab.measure.generate import Reply, sample_replies
from alignlab.models import load as models
from alignlab.runs.run import Run
from alignlab.runs.selection import names_of
from alignlab.text.safe import harmless, one_line

HELP = "/reset begins anew, /save [FILE] keeps the dialogue, /quit ends"
COLUMN, GAP = 38, 4  # characters of one of two columns, and between them


@dataclass
class Speaker:
    """One model in the chat, and its side of the dialogue."""

    name: str
    candidate: Candidate
    form: Format
    stops: Stops
    room: int  # tokens of the longest prompt that leaves room for a reply
    turns: list[Turn] = field(default_factory=list)

    def prompt_ids(self, said: str) -> list[int]:
        """The prompt of this dialogue and what is said last; the oldest turns go first where it is too long."""
        if token := self.form.special_token_in(said):
            raise DataError(f"{token} ends a turn of this model; write it otherwise")
        turns = [*self.turns, Turn("Human", f" {said}")]
        fits = lambda turns: len(self.form.prompt_ids(Dialogue(turns))) <= self.room
        kept = shorten(turns[-1:] if self.form.name == "plain" else turns, fits)
        if kept is None:
            raise DataError(f"this is longer than the {self.room} tokens that the model takes")
        return self.form.prompt_ids(Dialogue(kept))


class Chat:
    """One model, or two side by side, that answer what a user says."""

    def __init__(self, runs: Sequence[Run], *, greedy: bool, max_new_tokens: int | None, seed: int):
        candidates = [choose_models([run]).ours for run in runs]
        refuse_what_cannot_be_compared(candidates)
        recipe = candidates[0].recipe
        self.greedy, self.seed = greedy, seed
        self.max_new_tokens = max_new_tokens or recipe.data.max_reply_tokens
        self.bench = LoadedModels()
        self.bench.hold(*candidates)
        names = names_of(runs)
        self.speakers = [self._speaker(*each) for each in zip(names, candidates, strict=True)]

    def _speaker(self, name: str, candidate: Candidate) -> Speaker:
        recipe = candidate.recipe
        form = Format(recipe.data.format, models.load_tokenizer(recipe.model))
        config = models.load_config(recipe.model, candidate.weights).get_text_config()
        room = (getattr(config, "max_position_embeddings", None) or 1 << 20) - self.max_new_tokens
        return Speaker(name, candidate, form, models.find_stops(recipe.model, form), room)

    def answer(self, said: str) -> list[str]:
        """What each model replies, after which it is part of the dialogue; `said` stays unsaid where one cannot."""
        prompts = [speaker.prompt_ids(said) for speaker in self.speakers]
        replies = [self._reply(*each).text for each in zip(self.speakers, prompts, strict=True)]
        self._remember(said, replies)
        return replies

    def stream(self, said: str) -> Iterator[str]:
        """The only model's reply, piece by piece as it comes."""
        from transformers import TextIteratorStreamer

        (speaker,) = self.speakers
        prompt = speaker.prompt_ids(said)
        streamer, replies = TextIteratorStreamer(speaker.form.tokenizer, skip_prompt=True), []

        def reply() -> None:
            try:
                replies.append(self._reply(speaker, prompt, streamer))
            finally:
                streamer.end()  # what waits for a piece does not wait for ever

        thread = threading.Thread(target=reply, daemon=True)
        thread.start()
        shown = ""
        for text in _growing(streamer):
            sure = before_stop(text, speaker.stops)
            yield sure[len(shown) :]
            shown = sure
        thread.join()
        if not replies:
            raise AssertionError("the model could not reply")
        yield replies[0].text[len(shown) :]
        self._remember(said, [replies[0].text])

    def _reply(self, speaker: Speaker, prompt: Sequence[int], streamer: Any = None) -> Reply:
        number = sum(turn.role == "Assistant" for turn in speaker.turns)
        with self.bench.on(speaker.candidate) as model:
            [reply] = sample_replies(
                model,
                speaker.form.tokenizer,
                [prompt],
                max_new_tokens=self.max_new_tokens,
                seed=self.seed,
                stops=speaker.stops,
                greedy=self.greedy,
                first=number,
                streamer=streamer,
            )
        return reply

    def _remember(self, said: str, replies: Sequence[str]) -> None:
        for speaker, reply in zip(self.speakers, replies, strict=True):
            speaker.turns += [Turn("Human", f" {said}"), Turn("Assistant", reply)]

    def reset(self) -> None:
        for speaker in self.speakers:
            speaker.turns.clear()

    def save(self, file: Path) -> None:
        """Appends each model's dialogue as one JSON line of chat messages."""
        roles = {"Human": "user", "Assistant": "assistant"}
        for speaker in self.speakers:
            messages = [{"role": roles[turn.role], "content": turn.text.strip()} for turn in speaker.turns]
            append_line(file, {"model": speaker.name, "messages": messages})


def _growing(pieces: Iterator[str]) -> Iterator[str]:
    text = ""
    for piece in pieces:
        text += piece
        yield text


def before_stop(text: str, stops: Stops) -> str:
    """What is sure to be said: up to the first stop, or to an end that may be the beginning of one.

    >>> before_stop("Yes.\\n\\nHum", Stops((0,), ("<eos>",), ("\\n\\nHuman:",)))
    'Yes.'
    """
    marks = stops.said
    cut = min((text.index(mark) for mark in marks if mark in text), default=None)
    if cut is None:
        begun = (n for mark in marks for n in range(1, len(mark)) if text.endswith(mark[:n]))
        cut = len(text) - max(begun, default=0)
    whole = stops.opening
    return "" if whole.startswith(text[:cut]) else text[:cut].removeprefix(whole)


def side_by_side(names: Sequence[str], replies: Sequence[str]) -> str:
    """Two replies in columns of a terminal of 80 characters."""
    columns = [_wrapped(harmless(text.strip())) for text in replies]
    rows = [tuple(names), tuple("─" * COLUMN for _ in names), *zip_longest(*columns, fillvalue="")]
    return "\n".join(f"{left:{COLUMN}}{' ' * GAP}{right}".rstrip() for left, right in rows)


def _wrapped(text: str) -> list[str]:
    return [part for line in text.split("\n") for part in textwrap.wrap(line, COLUMN) or [""]]


def chat(runs: Sequence[Run], *, greedy: bool, max_new_tokens: int | None, seed: int) -> None:
    """Reads lines until the input ends, and answers each."""
    talk = Chat(runs, greedy=greedy, max_new_tokens=max_new_tokens, seed=seed)
    is_person = sys.stdin.isatty()
    if is_person:
        import readline  # noqa: F401  # lets a person edit the line

        print(f"{' and '.join(speaker.name for speaker in talk.speakers)}; {HELP}")
    while (said := _read_line("> " if is_person else "")) is not None:
        if not said:
            continue
        try:
            if said.startswith("/"):
                if not _obey(talk, said):
                    return
            else:
                _say(talk, said)
        except AlignlabError as fault:
            print(one_line(str(fault)), file=sys.stderr)


def _read_line(prompt: str) -> str | None:
    try:
        return input(prompt).strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _obey(talk: Chat, said: str) -> bool:
    """Whether the chat goes on after a command."""
    command, _, rest = said.partition(" ")
    if command in ("/quit", "/exit"):
        return False
    if command == "/reset":
        talk.reset()
        print("a new dialogue")
    elif command == "/save":
        print(_save(talk, Path(rest.strip() or "chat.jsonl")))
    else:
        print(HELP)
    return True


def _save(talk: Chat, file: Path) -> str:
    try:
        talk.save(file)
    except OSError as e:
        raise DataError(f"{file} cannot be written ({e.strerror}); name another file") from None
    return f"saved in {harmless(str(file))}"


def _say(talk: Chat, said: str) -> None:
    if len(talk.speakers) == 2:
        print(side_by_side([speaker.name for speaker in talk.speakers], talk.answer(said)))
        return
    begun = False
    for piece in talk.stream(said):
        piece = harmless(piece if begun else piece.lstrip())
        begun = begun or bool(piece)
        print(piece, end="", flush=True)
    print()
