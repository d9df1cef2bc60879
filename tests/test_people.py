"""A run talked to, served and voted on: one model, one answer, whichever way it is asked."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from commands import alignlab

from alignlab.cli.commands import main
from alignlab.data.format import Stops
from alignlab.data.transcript import ASSISTANT
from alignlab.errors import DataError
from alignlab.evaluation.candidates import choose_models
from alignlab.evaluation.evaluator import Evaluator, Options
from alignlab.people.chat import Chat, before_stop, side_by_side
from alignlab.people.replies import make_matches
from alignlab.people.votes import Vote, write_votes
from alignlab.recipe.load import load_recipe
from alignlab.runs.run import Run
from alignlab.text.safe import harmless
from alignlab.train.stages import train_dpo

MOST = 48  # tokens of a reply here


@pytest.fixture(scope="module")
def home(folders, of_seconds, tmp_path_factory) -> Path:
    """A folder with a recipe, mine.yaml, and its runs sft and dpo."""
    root = tmp_path_factory.mktemp("people")
    text = of_seconds(folders["llama"])
    (root / "mine.yaml").write_text(text)
    train_dpo(load_recipe(str(root / "mine.yaml")), root=root / "runs")
    return root


@pytest.fixture(scope="module")
def run(home) -> Run:
    return Run(home / "runs" / "mine" / "dpo")


@pytest.fixture(scope="module")
def evaluated(run) -> dict[str, str]:
    """What `eval --greedy` has of eight held-out prompts of one turn: question → reply."""
    evaluator = Evaluator(choose_models([run]), Options(greedy=True, judge="none", replies=8))
    replies = evaluator.replies_to(evaluator.held_out)["dpo"]
    asked = [prompt.transcript.removesuffix(ASSISTANT) for prompt in evaluator.held_out.prompts]
    found = {text.removeprefix("\n\nHuman: "): reply.text for text, reply in zip(asked, replies, strict=True)}
    return {question: reply for question, reply in found.items() if "\n\n" not in question}


# Chat


def test_a_chat_answers_as_an_evaluation(run, evaluated):
    assert evaluated
    for question, reply in evaluated.items():
        talk = Chat([run], greedy=True, max_new_tokens=None, seed=0)
        pieces = list(talk.stream(question))
        assert "".join(pieces) == reply and talk.answer(question) is not None
        talk.reset()
        assert talk.answer(question) == [reply]


def test_a_chat_remembers_what_was_said(run):
    talk = Chat([run], greedy=True, max_new_tokens=4, seed=0)
    first = talk.prompt = talk.speakers[0].prompt_ids("Hi")
    [reply] = talk.answer("Hi")
    second = talk.speakers[0].prompt_ids("Why?")
    text = talk.speakers[0].form.tokenizer.decode(second)
    assert len(second) > len(first)
    assert text == f"\n\nHuman: Hi\n\nAssistant:{reply}\n\nHuman: Why?\n\nAssistant:"
    talk.reset()
    assert talk.speakers[0].prompt_ids("Hi") == first


def test_a_dialogue_that_grows_too_long_loses_its_oldest_turns(run):
    talk = Chat([run], greedy=True, max_new_tokens=8, seed=0)
    for _ in range(12):
        talk.answer("How do I grow beans in a pot?")
    assert len(talk.speakers[0].prompt_ids("Why?")) <= talk.speakers[0].room
    with pytest.raises(DataError, match="longer than"):
        talk.answer("bean " * 500)


def test_what_would_end_a_turn_is_refused(run):
    talk = Chat([run], greedy=True, max_new_tokens=8, seed=0)
    with pytest.raises(DataError, match="<eos>"):
        talk.answer("Hi <eos>")
    assert talk.speakers[0].turns == []


def test_a_stop_is_never_shown_nor_its_beginning():
    stops = Stops((0,), ("<eos>",), ("\n\nHuman:",))
    assert before_stop("Yes.", stops) == "Yes."
    assert before_stop("Yes.\n\nHum", stops) == before_stop("Yes.\n\nHuman: And", stops) == "Yes."
    assert before_stop("Yes<eos>", stops) == "Yes" and before_stop("a < b", stops) == "a < b"


def test_two_replies_stand_side_by_side_in_eighty_columns():
    lines = side_by_side(["dpo", "sft"], ["word " * 30 + "\nend", "short \x1b[31m"]).splitlines()
    assert max(map(len, lines)) <= 80 and lines[0].split() == ["dpo", "sft"] and "\x1b" not in "".join(lines)


def test_a_chat_on_the_terminal(home, evaluated, tmp_path):
    question, reply = next(iter(evaluated.items()))
    said = f"{question}\n/save {tmp_path / 'said.jsonl'}\n/reset\n/nonsense\nHi <eos>\n/quit\nnot read\n"
    command = [sys.executable, "-m", "alignlab", "chat", "mine.yaml", "--greedy"]
    done = subprocess.run(command, input=said, capture_output=True, text=True, cwd=home, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(harmless(reply.strip()) + "\n") and "not read" not in done.stdout
    assert "<eos> ends a turn" in done.stderr and "Traceback" not in done.stderr
    saved = json.loads((tmp_path / "said.jsonl").read_text())
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"]
    both = subprocess.run(
        [*command, "--against", "sft"], input="Hi\n", capture_output=True, text=True, cwd=home, timeout=300
    )
    assert both.stdout.splitlines()[0].split() == ["dpo", "sft"], both.stderr


# Serve


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def children(process: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def wait_for_end(process: int) -> None:
    deadline = time.monotonic() + 60
    while Path(f"/proc/{process}").exists() and "Z" not in Path(f"/proc/{process}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def served(home):
    """A function that starts `alignlab serve` and waits until it is ready: the process and the lines it printed."""
    for package in ("fastapi", "uvicorn", "openai", "rich"):
        pytest.importorskip(package, reason="`transformers serve` needs transformers[serving]")
    started = []

    def start() -> tuple[subprocess.Popen, list[str]]:
        (home / "hub").mkdir(exist_ok=True)
        env = {"HF_HUB_CACHE": str(home / "hub"), "HF_HUB_OFFLINE": "1"}
        process = alignlab(home, "serve", "mine.yaml", "--port", str(free_port()), wait=False, **env)
        started.append(process)
        lines = [process.stdout.readline() for _ in range(3)]
        assert lines[0].startswith("ready http://127.0.0.1:"), process.communicate()
        return process, lines

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ask(curl: str, question: str) -> str:
    """What the printed curl line gets, by another question."""
    url, _, quoted = curl.removeprefix("curl ").partition(" ")
    body = json.loads(quoted[quoted.index("{") : quoted.rindex("}") + 1])
    body |= {"messages": [{"role": "user", "content": question}], "max_tokens": MOST}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())["choices"][0]["message"]["content"]


@pytest.mark.slow
def test_a_served_run_answers_as_chat_and_evaluation_and_ends_with_its_child(served, evaluated):
    """`transformers serve` leaves a stop text at the end of a reply, and special tokens within it out."""
    process, lines = served()
    for question, reply in evaluated.items():
        assert ask(lines[1], question).removesuffix("\n\nHuman:") == reply.replace("<pad>", "")
    (child,) = children(process.pid)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM, process.communicate()
    wait_for_end(child)
    process, _ = served()  # exported before
    (child,) = children(process.pid)
    process.kill()
    wait_for_end(child)
    process, _ = served()
    (child,) = children(process.pid)
    os.kill(child, signal.SIGKILL)
    assert process.wait(60) == 128 + signal.SIGKILL


def test_a_port_that_is_taken_is_one_line(home, monkeypatch, capfd):
    monkeypatch.chdir(home)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for command in ("serve", "vote"):
            assert main([command, "mine.yaml", "--port", port]) == 2
            said = capfd.readouterr().err.strip().splitlines()[-1]
            assert f"127.0.0.1:{port}" in said and "--port" in said


# Votes are data


def test_what_is_voted_on_is_what_an_evaluation_judges(run):
    """The replies of both models to the first prompts, whether four or eight of them are voted on."""
    few, more = make_matches([run], [], 4), make_matches([run], [], 8)
    evaluator = Evaluator(choose_models([run]), Options(judge="none"))
    texts = {name: [reply.text for reply in its] for name, its in evaluator.replies_to(evaluator.held_out).items()}
    prompts = [prompt.transcript for prompt in evaluator.held_out.prompts]
    assert few == more[: len(few)] and {(m.a, m.b) for m in more} == {("dpo", "sft")}
    for match in more:
        place = prompts.index(match.prompt)
        assert (match.reply_a, match.reply_b) == (texts["dpo"][place], texts["sft"][place])


def test_votes_are_collected_exported_and_judged_by(home, run, monkeypatch, capfd):
    """From the page to an evaluation: n is what was voted on, and the rest is said."""
    monkeypatch.chdir(home)
    from alignlab.people.ballots import Ballots

    assert main(["vote", "mine.yaml", "--export", "votes.jsonl"]) == 2
    assert "no votes yet" in capfd.readouterr().err
    box = Ballots(home / "runs" / "mine" / "votes.db")
    box.put(make_matches([run], [], 8))
    voter = box.voter(box.enter("Ada"))
    for choice in ("left", "both_bad", "tie"):
        box.vote(voter, box.ballot(voter).code, choice, {"helpfulness_left": 4})
    assert main(["vote", "mine.yaml", "--export", "votes.jsonl"]) == 0
    rows = [json.loads(line) for line in Path("votes.jsonl").read_text().splitlines()]
    wanted = {"prompt", "models", "left", "winner", "voter", "at", "helpfulness", "harmlessness", "replies"}
    assert len(rows) == 3 and all(row.keys() == wanted for row in rows)
    assert main(["eval", "mine.yaml", "--judge", "votes:votes.jsonl"]) == 0
    capfd.readouterr()
    found = json.loads((run.path / "eval.json").read_text())
    (voted,) = (each for each in found["win_rates"] if {each["a"], each["b"]} == {"sft", "dpo"})
    assert voted["n"] - voted["tally"].get("identical", 0) == 3
    assert voted["tally"]["not voted on"] == found["prompts"] - voted["n"]
    assert any("were not voted on" in line for line in found["warnings"])
    rows[1].pop("winner")
    Path("votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["eval", "mine.yaml", "--judge", "votes:votes.jsonl"]) == 2
    assert "votes.jsonl:2: winner is missing" in capfd.readouterr().err


def test_a_file_of_prompts_is_voted_on(run, tmp_path):
    words = "beans soup tea rice a-song a-house trees a-boat".split()
    (tmp_path / "asked.jsonl").write_text("".join(f'{{"prompt": "How do I make {word}?"}}\n' for word in words))
    found = make_matches([run], [tmp_path / "asked.jsonl"], 7)
    asked = [f"\n\nHuman: How do I make {word}?\n\nAssistant:" for word in words[:7]]
    assert found and {match.prompt for match in found} <= {*asked}


def test_votes_written_by_hand_are_the_same_data(tmp_path):
    write_votes(tmp_path / "v.jsonl", [Vote(prompt="Hi", models=("a", "b"), winner="a")])
    assert json.loads((tmp_path / "v.jsonl").read_text())["winner"] == "a"
