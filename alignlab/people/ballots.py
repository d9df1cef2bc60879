"""The ballot box: pairs, voters and votes in one SQLite file, where each change is whole or not there at all."""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from alignlab.errors import RunError
from alignlab.people.votes import BOTH_BAD, TIE, Vote

CHOICES = ("left", "right", TIE, BOTH_BAD)
SCORES = ("helpfulness", "harmlessness")  # the course's scores, 1 to 5
FIRST, AGAIN = 0, 1
AGAIN_EVERY = 10  # votes; then one pair comes again with its sides swapped
RECENT = 4  # pairs that do not come again yet
MOST_VOTERS = 10_000

SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS pairs (
  id INTEGER PRIMARY KEY, prompt TEXT NOT NULL, a TEXT NOT NULL, b TEXT NOT NULL,
  reply_a TEXT NOT NULL, reply_b TEXT NOT NULL, shown INTEGER NOT NULL DEFAULT 0, UNIQUE (prompt, a, b));
CREATE TABLE IF NOT EXISTS voters (
  id INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE, name TEXT NOT NULL UNIQUE COLLATE NOCASE, entered TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS ballots (
  id INTEGER PRIMARY KEY, code TEXT NOT NULL UNIQUE,
  voter INTEGER NOT NULL REFERENCES voters, pair INTEGER NOT NULL REFERENCES pairs,
  again INTEGER NOT NULL CHECK (again IN (0, 1)), left TEXT NOT NULL CHECK (left IN ('a', 'b')),
  winner TEXT CHECK (winner IN ('a', 'b', 'tie', 'both_bad')), at TEXT,
  helpfulness_a INTEGER CHECK (helpfulness_a BETWEEN 1 AND 5),
  helpfulness_b INTEGER CHECK (helpfulness_b BETWEEN 1 AND 5),
  harmlessness_a INTEGER CHECK (harmlessness_a BETWEEN 1 AND 5),
  harmlessness_b INTEGER CHECK (harmlessness_b BETWEEN 1 AND 5),
  UNIQUE (voter, pair, again));
CREATE INDEX IF NOT EXISTS by_voter ON ballots (voter, winner);
"""
OTHER_SIDE = {"a": "b", "b": "a"}


@dataclass(frozen=True)
class Match:
    """Two models' replies to one prompt, a transcript."""

    prompt: str
    a: str
    b: str
    reply_a: str
    reply_b: str


@dataclass(frozen=True)
class Ballot:
    """What a voter sees: two replies, and a code with which the vote is cast."""

    code: str
    prompt: str
    left: str
    right: str


class Refused(Exception):
    """A request that is not granted; the message is for the voter, `status` for the browser."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class Ballots:
    """The file of one vote. What a method has returned survives the end of the process, and a power cut."""

    def __init__(self, file: Path):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)  # it holds what tells the voters from others
            self.db = sqlite3.connect(file, isolation_level=None, timeout=10, check_same_thread=False)
            self.db.row_factory = sqlite3.Row
            self.db.execute("PRAGMA journal_mode=WAL")
            self.db.execute("PRAGMA synchronous=FULL")
            self.db.execute("PRAGMA foreign_keys=ON")
            self.db.executescript(SCHEMA)
        except sqlite3.Error as e:
            raise RunError(f"{file} cannot be used for votes ({e}); name another file with --db") from None
        self.file = file
        self.key, self.name = self._fact("key"), self._fact("name")

    def _fact(self, name: str) -> str:
        """A secret of this file, drawn once."""
        self.db.execute("INSERT OR IGNORE INTO facts VALUES (?, ?)", (name, secrets.token_urlsafe(16)))
        return self._one("SELECT value FROM facts WHERE name = ?", name)["value"]

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

    def _one(self, query: str, *values: Any) -> Any:
        return self.db.execute(query, values).fetchone()

    def _count(self, query: str, *values: Any) -> int:
        return self._one(query, *values)[0]

    # Pairs

    def put(self, matches: Sequence[Match]) -> None:
        """Adds what is voted on; RunError where the file holds other pairs, whose votes would be mixed with these."""
        new = {(m.prompt, m.a, m.b, m.reply_a, m.reply_b) for m in matches}
        with self._change():
            old = {tuple(row) for row in self.db.execute("SELECT prompt, a, b, reply_a, reply_b FROM pairs")}
            if not old <= new:
                raise RunError(
                    f"{self.file} holds votes on other replies ({len(old - new)} of its {len(old)} pairs are not "
                    f"among these {len(new)}); name another file with --db"
                )
            add = "INSERT INTO pairs (prompt, a, b, reply_a, reply_b) VALUES (?, ?, ?, ?, ?)"
            self.db.executemany(add, sorted(new - old))

    # Voters

    def enter(self, name: str) -> str:
        """A new voter's token; refused where the name is nobody's, or somebody else's."""
        name = " ".join(name.split())
        if not 1 <= len(name) <= 40 or not name.isprintable():
            raise Refused("A name has 1 to 40 characters that can be printed.")
        token = secrets.token_urlsafe(32)
        if self._count("SELECT count(*) FROM voters") >= MOST_VOTERS:
            raise Refused("There is no room for more voters.", 503)
        try:
            self.db.execute("INSERT INTO voters (token, name, entered) VALUES (?, ?, ?)", (token, name, _now()))
        except sqlite3.IntegrityError:
            raise Refused("Somebody votes under this name already; take another one.", 409) from None
        return token

    def voter(self, token: str | None) -> int | None:
        """The number of the voter with this token; none where there is no such voter."""
        found = self._one("SELECT id FROM voters WHERE token = ?", token or "")
        return found and found["id"]

    def progress(self, voter: int) -> tuple[int, int]:
        """How many votes a voter has cast, and of how many; pairs that come again are among them."""
        cast = self._count("SELECT count(*) FROM ballots WHERE voter = ? AND winner IS NOT NULL", voter)
        pairs = self._count("SELECT count(*) FROM pairs")
        return cast, pairs + pairs // AGAIN_EVERY

    # Voting

    def ballot(self, voter: int) -> Ballot | None:
        """The voter's open ballot, or a new one; none when there is nothing left to vote on."""
        with self._change():
            found = self._open(voter)
            if found is None and self._draw(voter):
                found = self._open(voter)
        if found is None:
            return None
        left, right = f"reply_{found['left']}", f"reply_{OTHER_SIDE[found['left']]}"
        return Ballot(found["code"], found["prompt"], found[left], found[right])

    def _open(self, voter: int) -> Any:
        query = "SELECT * FROM ballots JOIN pairs ON pairs.id = pair WHERE voter = ? AND winner IS NULL"
        return self._one(f"{query} ORDER BY ballots.id LIMIT 1", voter)

    def _draw(self, voter: int) -> bool:
        """Opens a ballot: a pair that comes again, swapped, where one is due; or else one of those shown least."""
        cast = "SELECT count(*) FROM ballots WHERE voter = ? AND again = ?"
        if self._count(cast, voter, FIRST) // AGAIN_EVERY > self._count(cast, voter, AGAIN):
            older = (
                "SELECT pair, left FROM ballots WHERE voter = ? AND again = 0 AND winner IS NOT NULL AND pair NOT IN "
                "(SELECT pair FROM ballots WHERE voter = ? ORDER BY id DESC LIMIT ?) AND pair NOT IN "
                "(SELECT pair FROM ballots WHERE voter = ? AND again = 1) ORDER BY random() LIMIT 1"
            )
            if found := self._one(older, voter, voter, RECENT, voter):
                self._add(voter, found["pair"], AGAIN, OTHER_SIDE[found["left"]])
                return True
        unseen = "SELECT id FROM pairs WHERE id NOT IN (SELECT pair FROM ballots WHERE voter = ?)"
        found = self._one(f"{unseen} ORDER BY shown, random() LIMIT 1", voter)
        if found is None:
            return False
        self.db.execute("UPDATE pairs SET shown = shown + 1 WHERE id = ?", (found["id"],))
        self._add(voter, found["id"], FIRST, secrets.choice("ab"))
        return True

    def _add(self, voter: int, pair: int, again: int, left: str) -> None:
        add = "INSERT INTO ballots (code, voter, pair, again, left) VALUES (?, ?, ?, ?, ?)"
        self.db.execute(add, (secrets.token_urlsafe(16), voter, pair, again, left))

    def vote(self, voter: int, code: str, choice: str, scores: Mapping[str, int | None]) -> None:
        """Casts a ballot; `scores` are of `helpfulness_left` and so on. Refused where it is not open, or another's."""
        if choice not in CHOICES:
            raise Refused("A vote is left, right, tie or both bad.")
        found = self._one("SELECT left, winner FROM ballots WHERE code = ? AND voter = ?", code, voter)
        if found is None:
            raise Refused("This is no ballot of yours.", 403)
        sides = {"left": found["left"], "right": OTHER_SIDE[found["left"]]}
        values = {f"{name}_{sides[side]}": scores.get(f"{name}_{side}") for name in SCORES for side in sides}
        if any(value not in (None, 1, 2, 3, 4, 5) for value in values.values()):
            raise Refused("A score is a whole number from 1 to 5.")
        cast = {"winner": sides.get(choice, choice), "at": _now(), **values}
        named = ", ".join(f"{name} = :{name}" for name in cast)
        change = f"UPDATE ballots SET {named} WHERE code = :code AND voter = :voter AND winner IS NULL"
        done = self.db.execute(change, {**cast, "code": code, "voter": voter})
        if not done.rowcount:
            raise Refused("Your vote on this pair is counted already.", 409)

    def undo(self, voter: int) -> None:
        """Takes the voter's last vote back: its pair is shown next."""
        last = "SELECT id FROM ballots WHERE voter = ? AND winner IS NOT NULL ORDER BY at DESC LIMIT 1"
        emptied = ", ".join(f"{name}_{side} = NULL" for name in SCORES for side in "ab")
        change = f"UPDATE ballots SET winner = NULL, at = NULL, {emptied} WHERE id = ({last})"
        if not self.db.execute(change, (voter,)).rowcount:
            raise Refused("There is no vote of yours to take back.", 409)

    # What came out

    def votes(self) -> list[Vote]:
        """All votes in the order in which they were cast, without those on pairs that came again."""
        return [vote for _, again, vote in self._cast() if not again]

    def repeated(self) -> list[tuple[Vote, Vote]]:
        """What the same voter said of the same pair, first and when it came again."""
        cast = {(pair, vote.voter, again): vote for pair, again, vote in self._cast()}
        return [(cast[pair, who, FIRST], vote) for (pair, who, again), vote in cast.items()
                if again and (pair, who, FIRST) in cast]  # fmt: skip

    def _cast(self) -> list[tuple[int, int, Vote]]:
        rows = self.db.execute(
            "SELECT ballots.*, prompt, a, b, reply_a, reply_b, name FROM ballots JOIN pairs ON pairs.id = pair "
            "JOIN voters ON voters.id = voter WHERE winner IS NOT NULL ORDER BY at"
        )
        return [(row["pair"], row["again"], _vote(row)) for row in rows]


def _vote(row: Any) -> Vote:
    names = {"a": row["a"], "b": row["b"]}
    given = {name: {names[side]: score for side in "ab" if (score := row[f"{name}_{side}"])} for name in SCORES}
    return Vote(
        prompt=row["prompt"],
        models=(row["a"], row["b"]),
        winner=names.get(row["winner"], row["winner"]),
        left=names[row["left"]],
        voter=row["name"],
        at=row["at"],
        helpfulness=given["helpfulness"] or None,
        harmlessness=given["harmlessness"] or None,
        replies={row["a"]: row["reply_a"], row["b"]: row["reply_b"]},
    )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")
