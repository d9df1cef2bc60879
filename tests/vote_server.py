"""A server of votes in a process of its own, for tests and measurements: FILE PORT PAIRS; the key is its first line."""

from __future__ import annotations

import sys
from pathlib import Path

from alignlab.people.ballots import Ballots, Match

MODELS = ("model-alpha", "model-beta")
HOSTILE = "<script>document.title='planted'</script><img src=x onerror=alert(1)> \u202e\x1b[31m\x00 &amp;"


def matches(pairs: int) -> list[Match]:
    """Pairs of replies without a model's name: every third long, every fourth hostile, one empty."""
    long = "A reply that goes on for a while, with words and more words. " * 40

    def reply(number: int, side: str) -> str:
        more = long if number % 3 == (side == "a") else HOSTILE if number % 4 == 0 else "So."
        return "" if (number, side) == (1, "b") else f" Reply {number} of {side}. {more}"

    asked = "\n\nHuman: First <b>question</b> {0}?\n\nAssistant: An answer.\n\nHuman: And then {0}?\n\nAssistant:"
    return [Match(asked.format(n), *MODELS, reply(n, "a"), reply(n, "b")) for n in range(pairs)]


if __name__ == "__main__":
    from alignlab.people.vote import serve_votes

    ballots = Ballots(Path(sys.argv[1]))
    ballots.put(matches(int(sys.argv[3])))
    print(ballots.key, flush=True)
    serve_votes(ballots, "127.0.0.1", int(sys.argv[2]))
