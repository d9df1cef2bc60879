r"""Token ids a word at a time: each different word is tokenized once, and a text's ids are those of its words in a row.

A text is cut before each space that follows a character which is no space. This gives the tokenizer's own ids where
no token of a text can hold such a space in its middle (`cuts_at_spaces` reads that off the tokenizer): then neither a
merge nor a pre-tokenizer's match reaches across a cut, and what stands behind one is the same to a pattern that looks
ahead for white space as the end of the text. Any other tokenizer is given whole texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_CHARACTERS = 4_000_000  # of different words; then they are forgotten: 160,000 HH pairs have about 1,000,000
ODD_SPACES = ("   ", *(f"{c} " for c in map(chr, range(128)) if c.isspace() and c != " "))
ANCHOR = "a"  # stands before a word that is not at the beginning of its text
# What splits a text into pieces whose tokens do not merge: none of these matches a space behind another character.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",  # Llama 3, cl100k
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",  # Qwen 2
}

Ids = np.ndarray  # int32


def encode_whole(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], bos: bool) -> list[list[int]]:
    """The tokenizer's ids of whole texts, in one call."""
    if not texts:
        return []
    return tokenizer(
        list(texts),
        add_special_tokens=bos,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


class Encoder:
    """Texts → token ids, as the tokenizer gives them; `by_words` says whether word by word."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, bos: bool, end: str | None = None):
        """`bos`: whether the tokenizer adds its BOS; not where a chat template has written it.

        `end` is the token behind a reply, where that is not the EOS.
        """
        self.tokenizer, self.bos, self.end = tokenizer, bos, end or tokenizer.eos_token
        self._end_id = tokenizer.convert_tokens_to_ids(self.end)
        space = cuts_at_spaces(tokenizer)
        self._cut_anywhere = re.compile(rf" (?<=[^\s{space or ''}] )").split
        self._is_gap = re.compile(rf"[^\s{space or ''}] ").match
        self._words: dict[str, bytes] = {}
        self._firsts: dict[str, bytes] = {}  # words that begin a text, with the BOS before them
        self._held = 0
        self.by_words = space is not None and self._agrees("Say: it's  a\n\ntest, é ") and self._agrees("a b")

    def prompts(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, BOS included."""
        if not self.by_words:
            return [np.array(ids, np.int32) for ids in encode_whole(self.tokenizer, texts, self.bos)]
        self._forget()
        cut = [self._cut(text) for text in texts]
        self._learn_firsts([words[0] for words in cut])
        return self._joined([(self._firsts[words[0]], words[1:]) for words in cut])

    def replies(self, prompts: Sequence[str], prompt_ids: Sequence[Ids], replies: Sequence[str]) -> list[Ids | None]:
        """The ids of each reply and its end as they stand behind the prompt; none where the two merge into a token."""
        if not self.by_words:
            texts = [prompt + reply + self.end for prompt, reply in zip(prompts, replies, strict=True)]
            wholes = [np.array(ids, np.int32) for ids in encode_whole(self.tokenizer, texts, self.bos)]
            return [_behind(start, whole) for start, whole in zip(prompt_ids, wholes, strict=True)]
        found = self._replies(prompts, replies)
        if found and found[0] is not None:  # one of each batch, to hold the law of this module to the tokenizer
            whole = encode_whole(self.tokenizer, [prompts[0] + replies[0]], self.bos)[0]
            assert whole == [*prompt_ids[0], *found[0][:-1]], "words and the whole text have other token ids"
        return found

    def _replies(self, prompts: Sequence[str], replies: Sequence[str]) -> list[Ids | None]:
        """The last word of each prompt with its reply, less the ids of that word alone."""
        lasts = [self._last_word(prompt) for prompt in prompts]
        texts = [self._cut(last + reply) for (last, _), reply in zip(lasts, replies, strict=True)]
        begun = [word for (last, first), words in zip(lasts, texts, strict=True) if first for word in (last, words[0])]
        self._learn_firsts(begun)
        self._learn(last for last, is_first in lasts if not is_first)
        self._learn(words[0] for words in texts)
        heads = []
        for (last, is_first), words in zip(lasts, texts, strict=True):
            known = self._firsts if is_first else self._words
            alone, head = known[last], known[words[0]]
            heads.append(head[len(alone) :] if head.startswith(alone) else None)
        end = np.array([self._end_id], np.int32).tobytes()
        ids = self._joined([(head or b"", words[1:]) for head, words in zip(heads, texts, strict=True)], end)
        return [None if head is None else found for head, found in zip(heads, ids, strict=True)]

    def _last_word(self, text: str) -> tuple[str, bool]:
        """What stands behind the last cut of a text, and whether that is all of it."""
        at = text.rfind(" ")
        while at > 0 and not self._is_gap(text, at - 1):
            at = text.rfind(" ", 0, at)
        return (text[at + 1 :], False) if at > 0 else (text, True)

    def _cut(self, text: str) -> list[str]:
        """The words of a text, each without the space it is cut before; as `_cut_anywhere`, mostly by `str.split`."""
        if not text.isascii() or text.startswith(" "):
            return self._cut_anywhere(text)
        for spaces in ODD_SPACES:
            if spaces in text:
                return self._cut_anywhere(text)
        if "  " not in text:
            return text.split(" ")
        first, *others = text.split("  ")
        words = first.split(" ")
        for other in others:  # of two spaces the second belongs to the word
            start, *rest = other.split(" ")
            words += [f" {start}", *rest]
        return words

    def _joined(self, texts: Sequence[tuple[bytes, Sequence[str]]], end: bytes = b"") -> list[Ids]:
        """The ids of texts given by their first id bytes and further words, learning those words that are new."""
        get, found, unknown = self._words.__getitem__, [], []
        for place, (head, words) in enumerate(texts):
            try:
                found.append(b"".join([head, *map(get, words), end]))
            except KeyError:
                found.append(b"")
                unknown.append(place)
        self._learn(chain.from_iterable(texts[place][1] for place in unknown))
        for place in unknown:
            head, words = texts[place]
            found[place] = b"".join([head, *map(get, words), end])
        return [np.frombuffer(ids, np.int32) for ids in found]

    def _forget(self) -> None:
        if self._held > HELD_CHARACTERS:
            self._words.clear()
            self._firsts.clear()
            self._held = 0

    def _learn_firsts(self, words: Iterable[str]) -> None:
        """Tokenizes words that begin a text and are new."""
        new = [*set(words).difference(self._firsts)]
        self._held += sum(map(len, new))
        for word, ids in zip(new, encode_whole(self.tokenizer, new, self.bos), strict=True):
            self._firsts[word] = _as_bytes(ids)

    def _learn(self, words: Iterable[str]) -> None:
        """Tokenizes words that do not begin a text and are new."""
        new = [*set(words).difference(self._words)]
        if new:
            self._held += sum(map(len, new))
            anchor = encode_whole(self.tokenizer, [ANCHOR], False)[0]
            for word, ids in zip(new, self._encode([f"{ANCHOR} {word}" for word in new]), strict=True):
                assert ids[: len(anchor)] == anchor, "a word merges with the one before it"
                self._words[word] = _as_bytes(ids[len(anchor) :])

    def _encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """As `encode_whole`, just after it (which switches padding and truncation off), at half the time."""
        backend = self.tokenizer.backend_tokenizer
        return (found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False))

    def _agrees(self, text: str) -> bool:
        """Whether words give the ids of the whole text, and an end behind it is one id more."""
        whole = encode_whole(self.tokenizer, [text, text + self.end], self.bos)
        first, *words = self._cut(text)
        self._learn_firsts([first])
        ids = self._joined([(self._firsts[first], words)])[0].tolist()
        return [ids, [*ids, self._end_id]] == whole


def _as_bytes(ids: Sequence[int]) -> bytes:
    return np.array(ids, np.int32).tobytes()


def _behind(start: Ids, whole: Ids) -> Ids | None:
    return whole[len(start) :] if np.array_equal(whole[: len(start)], start) else None


def cuts_at_spaces(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """How the tokenizer writes a space, where no token holds one behind another character; none otherwise.

    Known are BPE models that never drop merges, over whole texts (SentencePiece's) or over the matches of a known
    pattern, with added tokens that take no white space from around them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(tokenizer, "split_special_tokens", False):
        return None
    state = json.loads(backend.to_str())
    normalizers, pieces = _steps(state["normalizer"], "normalizers"), _steps(state["pre_tokenizer"], "pretokenizers")
    model = state["model"]
    space = _space(normalizers, pieces)
    is_plain = (
        model["type"] == "BPE"
        and not any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and (_is_split(pieces) or not model.get("ignore_merges"))
        and all(_stands_alone(token) for token in state["added_tokens"])
        and not (normalizers and any(token["normalized"] for token in state["added_tokens"]))
        and tokenizer.eos_token in {token["content"] for token in state["added_tokens"]}
    )
    if space is None or not is_plain:
        return None
    if _is_split(pieces):
        return ""
    added = {token["content"] for token in state["added_tokens"]}
    crossing = (space in word.lstrip(space) for word in model["vocab"] if word not in added)
    return space if space in model["vocab"] and not any(crossing) else None


def _steps(state: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if state is None:
        return []
    return [step for inner in state[name] for step in _steps(inner, name)] if state["type"] == "Sequence" else [state]


def _space(normalizers: Sequence[dict[str, Any]], pieces: Sequence[dict[str, Any]]) -> str | None:
    """The character that a space becomes; none where a step is not known."""
    space = " "
    for step in normalizers:
        if step["type"] == "Replace" and step["pattern"] == {"String": " "} and len(step["content"]) == 1:
            space = step["content"]
        elif step["type"] not in ("Prepend", "NFC"):
            return None
    for step in pieces:
        if step["type"] == "Metaspace":
            space = step["replacement"]
        elif step["type"] == "ByteLevel":
            space = "Ġ"
        elif not _known_split(step):
            return None
    return space


def _known_split(step: dict[str, Any]) -> bool:
    return (
        step["type"] == "Split"
        and step["pattern"].get("Regex") in PATTERNS
        and step["behavior"] == "Isolated"
        and not step["invert"]
    )


def _is_split(pieces: Sequence[dict[str, Any]]) -> bool:
    return any(_known_split(step) or (step["type"] == "ByteLevel" and step["use_regex"]) for step in pieces)


def _stands_alone(token: dict[str, Any]) -> bool:
    takes_more = token["lstrip"] or token["rstrip"] or token["single_word"]
    return not takes_more and not any(character.isspace() for character in token["content"])
