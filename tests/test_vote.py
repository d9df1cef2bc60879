"""Blind votes: each counted once whatever happens, by a real server, in a real browser, and against attackers."""

from __future__ import annotations

import contextlib
import http.client
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import pytest
from vote_server import MODELS, matches

from alignlab.errors import RunError
from alignlab.people.ballots import Ballots, Refused

SERVER = Path(__file__).with_name("vote_server.py")
CHOICES = ("left", "right", "tie", "both_bad")


@dataclass
class Server:
    file: Path
    port: int
    pairs: int
    process: subprocess.Popen | None = None
    key: str = ""

    def start(self) -> None:
        command = [sys.executable, str(SERVER), str(self.file), str(self.port), str(self.pairs)]
        log = self.file.with_suffix(".log").open("a")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        self.key = self.process.stdout.readline().strip()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.02)
        raise AssertionError(self.log)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    @property
    def log(self) -> str:
        return self.file.with_suffix(".log").read_text()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def serving(file: Path, pairs: int) -> Iterator[Server]:
    server = Server(file, free_port(), pairs)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("votes") / "votes.db", 40) as found:
        yield found


class Voter:
    """A browser without a window: one connection, one cookie."""

    def __init__(self, server: Server, name: str = ""):
        self.server, self.cookie, self.connection = server, "", None
        if name:
            status, headers, _ = self.ask("POST", "/voter", {"name": name})
            assert status == 303, status
            self.cookie = headers["set-cookie"].partition(";")[0]

    def ask(self, method: str, path: str, form=None, **headers: str):
        if self.connection is None:
            self.connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=120)
        body = form if isinstance(form, bytes | None) else urlencode(form)
        sent = {"Content-Type": "application/x-www-form-urlencoded", "Cookie": self.cookie}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            self.connection.request(method, path, body, sent)
            response = self.connection.getresponse()
            return response.status, response.headers, response.read().decode()
        except (OSError, http.client.HTTPException):
            self.connection.close()
            self.connection = None
            raise

    def ballot(self) -> str | None:
        """The code on the page; none at the end."""
        found = re.search(r'name="ballot" value="([^"]+)"', self.ask("GET", "/pair")[2])
        return found and found[1]

    def vote(self, code: str, choice: str = "left", **more: str) -> int:
        return self.ask("POST", "/vote", {"ballot": code, "choice": choice, **more})[0]


# The box


@pytest.fixture
def box(tmp_path) -> Ballots:
    found = Ballots(tmp_path / "votes.db")
    found.put(matches(20))
    return found


def cast_all(box: Ballots, voter: int, choose=lambda ballot: "left") -> list:
    seen = []
    while ballot := box.ballot(voter):
        seen.append(ballot)
        box.vote(voter, ballot.code, choose(ballot), {})
    return seen


def test_a_voter_sees_each_pair_once_and_one_in_ten_again_with_its_sides_swapped(box):
    voter = box.voter(box.enter("Ada"))
    seen = cast_all(box, voter)
    assert box.progress(voter) == (22, 22) and len(seen) == 22
    times = Counter(ballot.prompt for ballot in seen)
    assert sorted(times.values()) == [1] * 18 + [2] * 2
    for prompt in (prompt for prompt, n in times.items() if n == 2):
        first, again = (ballot for ballot in seen if ballot.prompt == prompt)
        assert (first.left, first.right) == (again.right, again.left)
        assert seen.index(again) - seen.index(first) > 3
    assert len(box.votes()) == 20 and len(box.repeated()) == 2


def test_a_vote_is_the_models_whatever_the_side(box):
    """The voter takes the reply of a, which names itself; its sides are drawn, so that both occur."""
    voter = box.voter(box.enter("Ada"))
    cast_all(box, voter, lambda ballot: "left" if " of a." in ballot.left else "right")
    votes = box.votes()
    assert {vote.winner for vote in votes} == {MODELS[0]} and {vote.left for vote in votes} == {*MODELS}
    assert all(first.winner == again.winner and first.left != again.left for first, again in box.repeated())


def test_scores_belong_to_the_models_whatever_the_side(box):
    voter = box.voter(box.enter("Ada"))
    ballot = box.ballot(voter)
    side = "left" if " of a." in ballot.left else "right"
    box.vote(voter, ballot.code, "tie", {f"helpfulness_{side}": 4})
    [vote] = box.votes()
    assert vote.helpfulness == {MODELS[0]: 4} and vote.harmlessness is None and vote.winner == "tie"


def test_voters_share_out_the_pairs(box):
    """Two voters with ten votes each have voted on all twenty pairs once."""
    for name in ("Ada", "Bo"):
        voter = box.voter(box.enter(name))
        for _ in range(10):
            box.vote(voter, box.ballot(voter).code, "tie", {})
    assert len({vote.prompt for vote in box.votes()}) == 20


def test_undo_takes_back_the_last_vote_and_shows_its_pair_next(box):
    voter = box.voter(box.enter("Ada"))
    first = box.ballot(voter)
    box.vote(voter, first.code, "left", {"helpfulness_left": 3})
    second = box.ballot(voter)
    box.undo(voter)
    assert box.votes() == [] and box.ballot(voter) == first
    box.vote(voter, first.code, "tie", {})
    assert box.ballot(voter) == second and [vote.winner for vote in box.votes()] == ["tie"]
    assert box.votes()[0].helpfulness is None
    box.undo(voter)
    with pytest.raises(Refused):
        box.undo(voter)


def test_nobody_votes_twice_or_for_another(box):
    ada, bo = (box.voter(box.enter(name)) for name in ("Ada", "Bo"))
    ballot = box.ballot(ada)
    for voter, code, choice, scores, status in (
        (bo, ballot.code, "left", {}, 403),
        (ada, "made-up", "left", {}, 403),
        (ada, ballot.code, "base", {}, 400),
        (ada, ballot.code, "left", {"helpfulness_left": 6}, 400),
    ):
        with pytest.raises(Refused) as caught:
            box.vote(voter, code, choice, scores)
        assert caught.value.status == status
    box.vote(ada, ballot.code, "left", {})
    with pytest.raises(Refused) as caught:
        box.vote(ada, ballot.code, "right", {})
    assert caught.value.status == 409 and len(box.votes()) == 1


@pytest.mark.parametrize("name", ["", "   ", "a" * 41, "a\x00b", "a\u202eb", "\x1b[31m"])
def test_a_name_can_be_printed(box, name):
    with pytest.raises(Refused):
        box.enter(name)


def test_a_name_is_one_voters(box):
    box.enter("Ada <b>")
    with pytest.raises(Refused):
        box.enter(" ada  <B> ")


def test_votes_on_other_replies_are_not_mixed_with_these(box):
    box.put(matches(25))  # more of the same
    with pytest.raises(RunError, match="--db"):
        box.put(matches(10))


def test_a_file_that_is_no_database_is_one_line(tmp_path):
    (tmp_path / "votes.db").write_text("no database, but some text that is long enough to be looked at" * 9)
    with pytest.raises(RunError, match="--db"):
        Ballots(tmp_path / "votes.db")


# The server


def test_what_an_attacker_sends_is_refused_and_logged_and_nothing_is_lost(server):
    voter = Voter(server, "Honest")
    code = voter.ballot()
    forged = Voter(server)
    forged.cookie = f"{voter.cookie.partition('=')[0]}=forged"
    for status, ask in (
        (403, lambda: forged.ask("POST", "/vote", {"ballot": code, "choice": "left"})),
        (403, lambda: Voter(server, "Other").ask("POST", "/vote", {"ballot": code, "choice": "left"})),
        (421, lambda: voter.ask("POST", "/vote", {"ballot": code, "choice": "left"}, Host="evil.example")),
        (421, lambda: voter.ask("GET", "/pair", Host="evil.example:8100")),
        (403, lambda: voter.ask("POST", "/vote", {"ballot": code, "choice": "left"}, Origin="http://evil.example")),
        (403, lambda: voter.ask("POST", "/vote", {"ballot": code, "choice": "left"}, Origin="null")),
        (400, lambda: voter.ask("POST", "/vote", {"ballot": code, "choice": "model-alpha"})),
        (400, lambda: voter.ask("POST", "/vote", {"ballot": code, "choice": "left", "helpfulness_left": "9"})),
        (400, lambda: voter.ask("POST", "/vote", b"\xff\xfe=%")),
        (400, lambda: voter.ask("POST", "/voter", {"name": "\x1b[31m\x00"})),
        (403, lambda: voter.ask("GET", "/results")),
        (403, lambda: voter.ask("GET", "/results?key=%00wrong")),
        (404, lambda: voter.ask("GET", "/../../etc/passwd")),
        (404, lambda: voter.ask("GET", "/%2e%2e%2fvote.py")),
        (404, lambda: voter.ask("GET", "/vote.py")),
        (405, lambda: voter.ask("DELETE", "/pair")),
    ):
        found, headers, text = ask()
        assert found == status, (status, found, text)
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "Traceback" not in text and "evil" not in text
    assert server.log.count("refused:") >= 16 and "Traceback" not in server.log
    assert "\x1b" not in server.log
    assert voter.vote(code) == 303 and voter.vote(code) == 409


def test_a_body_of_ten_megabytes_is_refused_before_it_is_read(server):
    voter = Voter(server, "Large")
    code = voter.ballot()
    with contextlib.suppress(OSError):  # the server may close the line while we are still sending
        assert voter.vote(code, more="x" * 10_000_000) == 413
    assert "(413)" in server.log
    assert Voter(server, "Next").ballot() and voter.vote(code) == 303


def test_no_name_of_a_model_is_in_what_a_voter_gets(server):
    voter, got = Voter(server, "Curious"), []
    while code := voter.ballot():
        got += [str(part) for part in voter.ask("GET", "/pair")[1:]]
        assert voter.vote(code, "right") == 303
    got += [str(part) for path in ("/", "/pair", "/vote.js", "/vote.css") for part in voter.ask("GET", path)[1:]]
    assert "Thank you" in got[-7] and len(got) == 2 * 44 + 8
    assert not any(name in text for text in got for name in MODELS)
    assert MODELS[0] in voter.ask("GET", f"/results?key={server.key}")[2]


def kill_and_count(tmp_path: Path, kills: int, seed: int) -> None:
    """Voters vote all the time while the server is killed again and again, at any moment.

    A vote that was acknowledged is in the file; one that was not may be there or not; none is there twice.
    """
    draw = random.Random(seed)
    server = Server(tmp_path / "votes.db", free_port(), 2000)
    acknowledged: dict[str, str] = {}
    server.start()
    voter = Voter(server, "Ada")
    for _ in range(kills):
        killer = threading.Timer(draw.uniform(0.02, 0.4), server.process.kill)
        killer.start()
        while True:
            try:
                code, choice = voter.ballot(), draw.choice(CHOICES)
                assert code and code not in acknowledged, "a pair that is voted on is not shown again"
                if voter.vote(code, choice) == 303:
                    acknowledged[code] = choice
            except (OSError, http.client.HTTPException):
                break
        server.process.wait()
        server.start()
    server.kill()
    db = sqlite3.connect(server.file)
    found = dict(db.execute("SELECT code, CASE winner WHEN left THEN 'left' ELSE winner END FROM ballots"))
    for code, choice in acknowledged.items():
        assert found[code] == (choice if choice != "right" else found[code]) and found[code] is not None
    counted = db.execute("SELECT count(*), count(DISTINCT code) FROM ballots WHERE winner IS NOT NULL").fetchone()
    assert counted[0] == counted[1] and len(acknowledged) <= counted[0] <= len(acknowledged) + kills
    assert db.execute("SELECT max(n) FROM (SELECT count(*) n FROM ballots GROUP BY voter, pair, again)").fetchone() == (
        1,
    )
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    print(f"{kills} kills, {len(acknowledged)} votes acknowledged, {counted[0]} in the file")


def test_a_killed_server_loses_no_acknowledged_vote(tmp_path):
    kill_and_count(tmp_path, 3, seed=0)


@pytest.mark.slow
def test_a_server_killed_fifty_times_loses_no_acknowledged_vote(tmp_path):
    kill_and_count(tmp_path, 50, seed=1)


# In a browser


def enter(page, server: Server, name: str) -> None:
    page.goto(server.url)
    page.fill("#name", name)
    page.click("text=Begin")
    page.wait_for_selector("#vote")


def press(page, key: str) -> None:
    """Presses a key that leads to another page."""
    with page.expect_navigation():
        page.keyboard.press(key)


def code_on(page) -> str:
    return page.get_attribute("[name=ballot]", "value")


def violations(page) -> list:
    """axe-core: contrast, headings, labels, regions that scroll."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the package axe-playwright-python")
    found = axe.Axe().run(page).response["violations"]
    return [(rule["id"], [node["html"][:120] for node in rule["nodes"]]) for rule in found]


def test_three_voters_vote_in_a_browser_and_every_vote_counts_once(browser, tmp_path):
    """Forty pairs each, by keys and by clicks, with undo, reload, the back button, two tabs, and on a phone."""
    looks = [((1280, 800), "light"), ((1280, 800), "dark"), ((390, 800), "light")]
    with serving(tmp_path / "votes.db", 40) as server:
        sent, messages = [], []
        for number, (size, scheme) in enumerate(looks):
            width, height = size
            context = browser.new_context(
                viewport={"width": width, "height": height},
                color_scheme=scheme,
                has_touch=width == 390,
                bypass_csp=True,
            )
            page = context.new_page()
            page.on("console", lambda message: messages.append(message.text))
            page.on("pageerror", lambda error: messages.append(str(error)))
            page.on("response", lambda response: sent.append(response))
            page.goto(server.url)
            assert violations(page) == []
            enter(page, server, f"Voter {number}")
            assert violations(page) == [] and page.evaluate("document.documentElement.scrollWidth") <= width
            for key in ("ArrowLeft", "ArrowRight", "ArrowDown", "b"):
                press(page, key)
            undone = code_on(page)
            press(page, "u")
            assert code_on(page) != undone and page.title() == "Pair 4 of 44"
            page.reload()
            assert page.title() == "Pair 4 of 44"
            page.click("summary >> nth=0")
            page.check("[name=helpfulness_left][value='4']")
            assert violations(page) == []
            with page.expect_navigation():
                page.click("text=Both are bad")
            page.go_back()
            page.wait_for_selector("#vote")
            assert page.title() == "Pair 5 of 44"
            other = context.new_page()  # the same pair in another tab: it counts once
            other.goto(f"{server.url}/pair")
            assert code_on(other) == code_on(page)
            with page.expect_navigation():
                page.click("text=Left is better")
            with other.expect_navigation():
                other.click("text=Right is better")
            assert "counted already" in other.inner_text("main") and violations(other) == []
            other.click("text=Go on voting")
            assert other.title() == "Pair 6 of 44"
            other.close()
            page.reload()
            page.wait_for_selector("#vote")
            while page.title() != "Thank you":
                press(page, "ArrowLeft")
            assert violations(page) == [] and "planted" not in page.title()
            context.close()
        db = sqlite3.connect(server.file)
        counts = db.execute(
            "SELECT voter, again, count(*), count(DISTINCT pair) FROM ballots WHERE winner NOT NULL GROUP BY 1, 2"
        )
        assert counts.fetchall() == [(voter, *each) for voter in (1, 2, 3) for each in ((0, 40, 40), (1, 4, 4))]
        results = browser.new_context(viewport={"width": 390, "height": 800}, bypass_csp=True).new_page()
        results.goto(f"{server.url}/results?key={server.key}")
        assert violations(results) == [] and "120 votes of 3 voters" in results.inner_text("main")
        results.context.close()
        assert [m for m in messages if "409" not in m] == []


def test_long_replies_scroll_together(browser, server):
    page = browser.new_page(viewport={"width": 1280, "height": 500}, bypass_csp=True)
    enter(page, server, "Reader")
    heights = (
        "n => { const t = document.querySelectorAll('.reply .scroll')[n]; return t.scrollHeight - t.clientHeight }"
    )
    page.evaluate(
        "() => document.querySelectorAll('.reply .scroll').forEach(t => t.textContent = 'word '.repeat(4000))"
    )
    assert page.evaluate(heights, 0) > 100
    page.evaluate("document.querySelectorAll('.reply .scroll')[0].scrollTop = 300")
    page.wait_for_function("document.querySelectorAll('.reply .scroll')[1].scrollTop >= 299")
    page.close()


def test_the_page_votes_without_script(browser, server):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    enter(page, server, "Plain")
    with page.expect_navigation():
        page.click("text=Equal")
    assert page.title() == "Pair 2 of 44"
    context.close()


def test_many_voters_at_once_are_answered(monkeypatch):
    """Three seconds of the measurement; how fast is told by `make bench-all`, on a machine with nothing else to do."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "bench"))
    from vote import measure

    found = measure(voters=20, seconds=3, think=0.5, pairs=100)
    assert found["faults"] == 0 and found["requests"] > 40
