"""Pages from run directories: of any fate, harmless, self-contained, quick, and readable by everyone."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path

import pytest

from alignlab import disk
from alignlab.cli import commands as cli
from alignlab.errors import RunError
from alignlab.reports.find import find_runs
from alignlab.reports.page import report_line, write_comparison, write_report
from alignlab.runs import run as runs
from alignlab.runs.run import Run, find_run

SCRIPT = "<script>document.title='planted'</script><img src=x onerror=\"document.title='planted'\">"
HOSTILE = (
    f"{SCRIPT} \u202egnitirw\u202c \x00\x1b[31m \ud800 </div></article></section> {{{{ 7*7 }}}} &amp; "
    + "w" * 3_000_000
)
THINGS = "tomatoes carrots beans onions peppers roses".split()


def estimate(mean: float, stderr: float, n: int = 250) -> dict:
    return {"mean": mean, "stderr": stderr, "n": n}


TEST = {
    "rewards/margins": estimate(0.62, 0.04),
    "rewards/accuracies": estimate(0.91, 0.02),
    "perplexity": 1.54,
    "reference_perplexity": 1.48,
    "kl": 0.53,
    "kl_stderr": 0.04,
    "win_rate": {**estimate(0.8, 0.06, 32), "wins": 24, "ties": 3, "losses": 5},
}
FINISHED = {
    "status": "finished",
    "stop_reason": "all 40 steps done; best checkpoint at step 30",
    "best_step": 30,
    "steps": 40,
    "world_size": 1,
    "training_seconds": 3600.0,
    "peak_memory_gib": 0.7,
    "limits": {"max_kl": 20.0, "max_accuracy": 0.95, "action": "warn"},
    "warnings": [],
    "data": {
        "rows": 100,
        "kept": {"train": 80, "test": 10},
        "dropped": {"empty reply": 10},
        "repaired": {},
        "fingerprint": "f1",
    },
    "test": TEST,
}


def metrics(steps: int, every: int = 10, evaluations: int = 4, seed: int = 0) -> list[dict]:
    """Rows as a DPO run logs them, `steps` of training and some held-out ones: synthetic, in the real format."""
    draw = random.Random(seed)
    rows = []
    for at in range(steps + 1):
        step, rise, noise = at * every, 1 - math.exp(-3 * at / steps), lambda size: draw.gauss(0, size)
        figures = {
            "loss": 0.7 - 0.2 * rise + noise(0.02),
            "rewards/chosen": -rise + noise(0.1),
            "rewards/rejected": -2 * rise + noise(0.1),
            "rewards/accuracies": 0.5 + 0.3 * rise + noise(0.02),
            "rewards/margins": rise + noise(0.1),
            "logps/chosen": -10 + noise(1),
            "logps/rejected": -20 + noise(1),
            "logits/chosen": -1.7 + noise(0.1),
            "logits/rejected": -1.7 + noise(0.1),
            "entropy": 0.5 + noise(0.1),
            "mean_token_accuracy": 0.8 + noise(0.01),
            "num_tokens": 1000.0 * step,
        }
        training = {"grad_norm": 1 + noise(0.1), "learning_rate": 5e-7 * (1 - at / steps), "epoch": step / 1000}
        answers = {"kl": 3 * rise, "kl_stderr": 0.1, "reply_tokens": 25 + noise(1), "perplexity": 1.5 + 0.1 * rise}
        when = {"step": step, "time": time.time()}
        rows += [{**when, **{f"train/{n}": v for n, v in {**figures, **training}.items()}}] if at else []
        if at % (steps // evaluations) == 0:
            rows.append({**when, **{f"eval/{n}": v for n, v in {**figures, **answers}.items()}})
    return rows


def samples(reply: str = " Of course! Give them plenty of sun.") -> list[dict]:
    its = {"step": 30, "split": "test", "tokens": 9, "ended": True, "kl": 0.5, "reference_reply": " Look it up."}
    return [{**its, "prompt": f"\n\nHuman: How do I grow {thing}?\n\nAssistant:", "reply": reply} for thing in THINGS]


def make(path: Path, rows=None, replies=None, beta: float = 0.1, source: str = "toy", **facts) -> Path:
    """A DPO run directory, written by the functions that write real ones."""
    consumed = {
        "data": {"source": source},
        "model": {"name": "toy", "reference": "sft"},
        "dpo": {"beta": beta, "max_steps": 40},
    }
    with runs.opened(path, "dpo", consumed, f"about: x\nmodel:\n  name: toy\ndpo:\n  beta: {beta}\n") as run:
        disk.write_lines(run.metrics_file, metrics(4) if rows is None else rows)
        lines = (json.dumps(row) for row in (samples() if replies is None else replies))  # ASCII: lone surrogates too
        run.samples_file.write_text("".join(f"{line}\n" for line in lines))
        run.note(**{**FINISHED, **facts})
    return path


def make_sweep(folder: Path, names: Mapping[str, float], choice: str | None, **facts) -> Path:
    members = [
        {
            "run": name,
            "path": str(folder / name),
            "settings": {"dpo.beta": beta},
            "status": "finished",
            "error": None,
            "margin": estimate(1 + beta, 0.05),
            "margin_over_beta": estimate((1 + beta) / beta, 0.5),
            "accuracy": estimate(0.8, 0.02),
            "kl": estimate(1 / beta, 0.2, 64),
            "win_rate": estimate(0.7, 0.05, 32),
            "perplexity_change": 0.012,
        }
        for name, beta in names.items()
    ]
    sweep = {
        "recipe": "tiny",
        "rule": "largest margin with KL below 10",
        "max_kl": 10.0,
        "choice": choice,
        "why": "it is",
    }
    disk.write_json(folder / "sweep.json", {**sweep, "members": members, **facts})
    return folder


def facts_beside(page: Path) -> dict:
    return json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))


class Elements(HTMLParser):
    """The elements of a page, with the text of each kind."""

    def __init__(self, page: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.said: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- one run, whatever its fate ---


def test_the_page_says_it_all_from_top_to_bottom(tmp_path):
    text = Elements(write_report(make(tmp_path / "tiny" / "dpo"))).text
    text = text[text.index("DPO's replies are better than SFT's: 24 wins, 3 ties, 5 losses") :]
    order = [
        "DPO's replies are better",
        "model: toy; data: toy, 80 training pairs",
        "Win rate over SFT by the toy's rule",
    ]
    order += ["KL says how far", "target wanted measured outcome", "win rate above 60.0%"]
    order += ["perplexity of chosen lower is better", "A ring marks the step whose weights were kept", "Reward margin"]
    order += ["Furthest from the reference", "A random draw", "All of them: the replies to 6 prompts"]
    order += ["rows dropped", "10: empty reply 10", "kept weights", "CPU-hours", "The command that repeats it"]
    order += ["recipe.yaml --run again", "The recipe", "beta: 0.1", "report.json"]
    places = [text.index(words) for words in order]
    assert places == sorted(places)


def test_the_json_holds_the_plotted_numbers(tmp_path):
    page = write_report(make(tmp_path / "tiny" / "dpo"))
    facts = facts_beside(page)
    margin = facts["charts"][0]
    assert margin["title"] == "Reward margin" and margin["series"][1]["metric"] == "eval/rewards/margins"
    wanted = [round(row["eval/rewards/margins"], 4) for row in metrics(4) if "eval/loss" in row]
    assert [round(point[1], 4) for point in margin["series"][1]["points"]] == wanted
    assert all(f"<td>{point[1]}" in page.read_text() for point in margin["series"][1]["points"])
    assert facts["verdict"]["headline"] in Elements(page).text


@pytest.mark.parametrize(
    ("facts", "verdict"),
    [
        ({"status": "running", "stop_reason": None, "test": {}}, "This run is still going at step 40"),
        (
            {"status": "failed", "stop_reason": "RuntimeError: out of memory", "test": {}},
            "This run failed at step 40 of 40. model: toy",
        ),
        (
            {"status": "stopped", "stop_reason": "interrupted at step 20", "steps": 20, "test": {}},
            "This run was interrupted at step 20 of 40",
        ),
        (
            {
                "status": "stopped",
                "stop_reason": "stopped at step 20: KL above 20",
                "steps": 20,
                "limits": {"max_kl": 20.0, "max_accuracy": None, "action": "stop"},
                "warnings": [{"guard": "kl", "step": 20, "message": "the policy is far away; stop earlier"}],
            },
            "A guard stopped it at step 20 of 40: KL.",
        ),
    ],
)
def test_a_run_of_any_fate_has_a_page(tmp_path, facts, verdict):
    page = write_report(make(tmp_path / "tiny" / "dpo", **facts))
    text = Elements(page).text
    assert verdict in text and "Curves" in text
    assert all(warning["message"] in text for warning in facts.get("warnings", []))


def test_a_run_that_failed_before_its_first_step_has_a_page(tmp_path):
    path = make(
        tmp_path / "tiny" / "dpo",
        rows=[],
        replies=[],
        status="failed",
        stop_reason="ModelError: no such model",
        test={},
    )
    Run(path).metrics_file.unlink()
    text = Elements(write_report(path)).text
    assert "failed" in text and "ModelError: no such model" in text and "No replies were sampled" in text


def test_a_bare_manifest_is_enough(tmp_path):
    """What a run has in its first second."""
    with runs.opened(tmp_path / "tiny" / "dpo", "dpo", {"dpo": {}}, "about: x\n"):
        assert "still going before the first logged step" in Elements(write_report(tmp_path / "tiny" / "dpo")).text


def test_a_metrics_file_cut_off_by_a_crash_is_used_and_said(tmp_path):
    path = make(tmp_path / "tiny" / "dpo", status="running")
    with Run(path).metrics_file.open("ab") as file:
        file.write(b'{"step": 50, "train/lo')
    page = write_report(path)
    assert "is cut off, by a crash or a write under way: used up to step 40" in Elements(page).text


def test_a_moved_run_keeps_its_base_column(tmp_path):
    """The SFT run is found beside the DPO run, wherever both were moved."""
    make(tmp_path / "tiny" / "dpo", parent={"run": "runs/elsewhere/sft", "weights": "x"})
    first = {"step": 0, "time": 1.0, "eval/loss": 1.9, "eval/perplexity": 7.095}
    (tmp_path / "tiny" / "sft").mkdir()
    disk.write_lines(tmp_path / "tiny" / "sft" / "metrics.jsonl", [first])
    moved = shutil.move(tmp_path / "tiny", tmp_path / "copied")
    facts = facts_beside(write_report(Path(moved) / "dpo"))
    assert facts["columns"] == ["base", "SFT", "DPO"]
    assert [row["values"]["base"]["mean"] for row in facts["rows"] if "base" in row["values"]] == [7.095]


def test_gpu_hours_count_every_process(tmp_path):
    """8 processes for an hour are 8 GPU-hours."""
    machine = {"platform": "Linux", "gpus": ["NVIDIA H100"] * 8}
    page = write_report(make(tmp_path / "tiny" / "dpo", machine=machine, world_size=8))
    assert "GPU-hours 8 (8 processes)" in Elements(page).text


def test_an_evaluation_is_shown_whatever_it_measured(tmp_path):
    path = make(tmp_path / "tiny" / "dpo")
    interval = {**estimate(0.7, 0.05, 64), "low": 0.6, "high": 0.8}
    row = {"group": "safety", "measure": "refuses <b>harm</b>", "unit": "share", "better": "higher", "note": "XSTest"}
    prompt = {"prompts": "held-out", "number": 0, "prompt": "\n\nHuman: Why?\n\nAssistant:", "tokens": 3}
    ours = {**prompt, "model": "dpo", "reply": "yes", "outcomes": {"sft": 1}}
    evaluation = {
        "models": [{"name": "sft", "path": "x"}, {"name": "dpo", "path": "y"}],
        "against": "sft",
        "split": "test",
        "prompts": 64,
        "judge": "llm:some-model",
        "table": [{**row, "values": {"sft": interval, "dpo": interval}, "change": {"dpo": None}}],
        "win_rates": [{"a": "dpo", "b": "sft", "win_rate": interval, "wins": 43, "ties": 3, "losses": 18, "n": 64}],
        "ratings": [{"model": "dpo", "elo": estimate(1020.0, 12.0, 64)}],
        "warnings": ["the judge prefers the first reply"],
    }
    disk.write_json(path / "eval.json", evaluation)
    disk.write_lines(path / "replies.jsonl", [{**prompt, "model": "sft", "reply": "no"}, ours])
    text = Elements(write_report(path)).text
    assert "DPO's replies are better than SFT's: 43 wins, 3 ties, 18 losses of 64 comparisons." in text
    assert "Win rate over SFT judged by some-model: 70% of 64 comparisons" in text and "95% interval 60% to 80%" in text
    for words in ("refuses <b>harm</b>", "the judge prefers the first reply", "1,020", "Who wins", "wins, 1"):
        assert words in text


def test_an_sft_run_has_a_page(tmp_path):
    with runs.opened(tmp_path / "tiny" / "sft", "sft", {"sft": {"max_steps": 4}}, "about: x\n") as run:
        disk.write_lines(
            run.metrics_file, [{"step": 0, "eval/loss": 1.9, "eval/perplexity": 7.1}, {"step": 4, "train/loss": 1.0}]
        )
        run.note(
            status="finished", steps=4, best_step=4, test={"perplexity": 1.48, "n": 250}, stop_reason="all 4 steps done"
        )
    text = Elements(write_report(tmp_path / "tiny" / "sft")).text
    assert "Supervised fine-tuning is done: perplexity 1.48" in text and "chosen and rejected" not in text.lower()


# --- several ---


def test_a_sweep_shows_frontier_choice_and_what_is_missing(tmp_path):
    names = {"dpo-beta0.5": 0.5, "dpo-beta0.1": 0.1}
    for name, beta in names.items():
        make(tmp_path / "tiny" / name, beta=beta)
    make_sweep(tmp_path / "tiny", {**names, "dpo-beta0.01": 0.01}, "dpo-beta0.5")
    page = write_report(tmp_path / "tiny")
    text = Elements(page).text
    assert page == tmp_path / "tiny" / "report.html"
    assert "dpo-beta0.5 was chosen of 3 finished members." in text and "Why: it is." in text
    assert "dpo-beta0.01 is not there; shown as sweep.json knows it" in text
    assert "beta 0.5 (chosen)" in text and "limit 10" in text
    assert facts_beside(page)["sweep"]["members"][0]["kl"]["mean"] == 2


def test_a_sweep_whose_runs_are_gone_still_has_its_table(tmp_path):
    (tmp_path / "tiny").mkdir()
    text = Elements(write_report(make_sweep(tmp_path / "tiny", {"dpo-beta0.5": 0.5}, None))).text
    assert "No member was chosen of 1 finished member." in text and "margin ÷ beta" in text


def test_compared_runs_show_what_differs_first(tmp_path):
    paths = [make(tmp_path / "tiny" / f"dpo-{beta}", beta=beta) for beta in (0.1, 0.5)]
    page = write_comparison(paths)
    assert page == tmp_path / "tiny" / "compare.html"
    assert facts_beside(page)["differences"] == [["dpo.beta", ["0.1", "0.5"]]]
    headings = re.findall(r"<h2>([^<]+)", page.read_text())
    assert headings[:3] == ["What differs", "Figures", "Curves"]


@pytest.mark.parametrize("damaged", ["{}", "[1]", '{"kind": '])
def test_the_facts_of_a_page_are_made_again_whatever_became_of_them(damaged, tmp_path):
    page = write_report(make(tmp_path / "tiny" / "dpo"))
    sound = facts_beside(page)
    page.with_suffix(".json").write_text(damaged)
    write_report(page.parent)
    assert facts_beside(page).keys() == sound.keys()


def test_runs_of_different_data_are_compared_with_a_banner(tmp_path):
    paths = [make(tmp_path / name / "dpo", data={**FINISHED["data"], "fingerprint": name}) for name in ("aaa", "bbb")]
    text = Elements(write_comparison(paths)).text
    assert "were made from different data, so their figures cannot be compared one to one: aaa/dpo from aaa" in text
    assert "2 runs of different data: their figures do not rank them." in text


def judge(folder: Path, *names: str, made: str = "2026-06-01T00:00:00Z", **models: str) -> None:
    """An evaluation of runs side by side, as `alignlab eval --runs` leaves it in the folder that holds them."""
    rate = {"mean": 0.75, "stderr": 0.05, "n": 40, "low": 0.65, "high": 0.85}
    pair = {
        "a": names[1],
        "b": names[0],
        "win_rate": rate,
        "wins": 28,
        "ties": 4,
        "losses": 8,
        "n": 40,
        "p_value": 0.01,
    }
    facts = [{"name": name, "path": str(folder / name)} for name in names]
    found = {"models": facts, "against": names[0], "judge": "rule", "win_rates": [pair], "made": made, "prompts": 40}
    ratings = [{"model": names[0], "elo": {"mean": 1000.0}}, {"model": names[1], "elo": {"mean": 1190.0}}]
    (folder / "eval").mkdir(exist_ok=True)
    disk.write_json(folder / "eval" / "abc.json", {**found, "ratings": ratings})


def test_an_evaluation_of_several_runs_is_found_and_ranks_them(tmp_path):
    paths = [make(tmp_path / "tiny" / f"dpo-beta{beta}", beta=beta) for beta in (0.1, 0.5)]
    before = Elements(write_comparison(paths)).text
    assert "These 2 runs were not judged side by side, so their replies are not ranked." in before
    judge(tmp_path / "tiny", "dpo-beta0.1", "dpo-beta0.5")
    text = Elements(write_comparison(paths)).text
    assert "dpo-beta0.5 answers better than dpo-beta0.1: 28 wins, 4 ties, 8 losses of 40." in text
    assert "win rate over dpo-beta0.1" in text


def test_an_evaluation_of_a_run_that_was_trained_again_since_ranks_nothing(tmp_path):
    paths = [make(tmp_path / "tiny" / name, finished="2026-07-01T00:00:00Z") for name in ("dpo", "other")]
    judge(tmp_path / "tiny", "dpo", "other")
    assert "were not judged side by side" in Elements(write_comparison(paths)).text


def make_sft(path: Path) -> Path:
    with runs.opened(path, "sft", {"sft": {"max_steps": 4}}, "about: x\nmodel:\n  name: toy\n") as run:
        disk.write_lines(run.metrics_file, [{"step": 0, "eval/loss": 1.9, "eval/perplexity": 7.1}])
        run.note(status="finished", steps=4, best_step=4, test={"perplexity": 1.48, "n": 250})
    return path


def test_one_recipe_stands_for_all_of_its_runs_sft_among_them(here, capsys):
    make_sft(Path("runs/mine/sft"))
    for beta in (0.1, 0.5):
        make(Path(f"runs/mine/dpo-beta{beta}"), beta=beta)
    assert cli.main(["compare", "mine", "--table", "mine.md", "--figures", "figures"]) == 0
    page = Path("runs/mine/compare.html")
    assert capsys.readouterr().out.splitlines() == ["mine.md", str(page.absolute())]
    assert [run["name"] for run in facts_beside(page)["runs"]] == ["sft", "dpo-beta0.1", "dpo-beta0.5"]
    assert Path("mine.md").read_text().startswith("|  | sft | dpo-beta0.1 | dpo-beta0.5 |")
    assert "stage" in [key for key, _ in facts_beside(page)["differences"]]
    svg = Path("figures/reward-margin.svg").read_text()
    assert svg.startswith("<?xml") and "var(--" not in svg


def test_seeds_of_one_setting_are_one_column_over_seeds(tmp_path):
    """Margins 0.5, 0.6 and 0.7: the mean of three seeds, and the interval of their scatter."""
    paths = []
    for seed, margin in enumerate((0.5, 0.6, 0.7)):
        path = make(tmp_path / "tiny" / f"dpo-seed{seed}", test={**TEST, "rewards/margins": estimate(margin, 0.04)})
        Run(path).recipe_file.write_text(f"about: x\ndpo:\n  beta: 0.1\n  seed: {seed}\n")
        paths.append(path)
    facts = facts_beside(write_comparison(paths))
    assert facts["columns"] == ["dpo-seed0, 3 seeds"]
    margin = next(row for row in facts["rows"] if row["measure"] == "margin")["values"]["dpo-seed0, 3 seeds"]
    assert (margin["mean"], margin["n"]) == (pytest.approx(0.6), 3)
    assert margin["high"] == pytest.approx(0.6 + 4.303 * 0.1 / math.sqrt(3), abs=1e-3)


def test_no_path_of_this_machine_and_no_empty_list_stands_on_a_page(tmp_path):
    machine = {"platform": "Linux", "cpus": 2, "gpus": []}
    base = {"name": f"{tmp_path}/cache/toy-base", "weights": "x"}
    command, why = f"alignlab dpo {tmp_path}/my.yaml", f"OSError: {tmp_path}/x"
    path = make(tmp_path / "tiny" / "dpo", machine=machine, base=base, command=command, stop_reason=why)
    page = write_report(path)
    for file in (page, page.with_suffix(".json")):
        assert str(tmp_path) not in file.read_text() and "/tmp/" not in file.read_text()
    text = Elements(page).text
    assert "gpus" not in text and "machine 2 CPUs, Linux" in text and "toy-base" in text


def test_the_words_of_the_field_are_explained_where_they_stand(tmp_path):
    text = Elements(write_report(make(tmp_path / "tiny" / "dpo"))).text
    for word in ("KL says how far", "1 nat is a factor of 2.7", "implicit reward of a reply is", "A guard is a check"):
        assert text.index(word) < text.index("Figures")


# --- bad input: one line each ---

NO_DOP = "there is no run at runs/tiny/dop (there: bare, dpo, older, sft)"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["report", "mistral"],
            "there is no run of mistral yet (looked in runs/mistral); make one with alignlab dpo mistral",
        ),
        (["report", "tiny", "--run", "nope"], "there is no run at runs/tiny/nope (there: bare, dpo, older, sft)"),
        (["report", "tiny", "--run", "dop"], f"{NO_DOP}; did you mean 'dpo'?"),
        (["report", "runs/tiny/dop"], f"{NO_DOP}; did you mean 'dpo'?"),
        (["compare", "tiny", "runs/tiny/dop"], f"{NO_DOP}; did you mean 'dpo'?"),
        (["eval", "runs/tiny/dop"], f"{NO_DOP}; did you mean 'dpo'?"),
        (["eval", "tiny", "--runs", "dpo", "dop"], f"{NO_DOP}; did you mean 'dpo'?"),
        (["export", "tiny", "--run", "dop", "--to", "x"], f"{NO_DOP}; did you mean 'dpo'?"),
        (["report", "tinny"], "no recipe 'tinny' (looked in recipes and "),
        (["report", "tiny", "--best"], "there is no runs/tiny/sweep.json with a best run; make it with alignlab sweep"),
        (["report", "runs/tiny/bare"], "runs/tiny/bare is finished, but has no metrics.jsonl"),
        (["report", "runs/tiny/folder"], "runs/tiny/folder has no manifest.json, so it is no run directory"),
        (["compare", "runs/tiny/dpo"], "one run cannot be compared; name two or more"),
        (["compare", "runs/tiny/dpo", "tiny"], "the same run is named twice: runs/tiny/dpo, runs/tiny/dpo"),
        (["compare", "tiny", "runs/tiny/older", "--out", "no/folder/x.html"], "no/folder/x.html cannot be written"),
    ],
)
def test_bad_input_is_one_line(here, capsys, arguments, said):
    make(Path("runs/tiny/dpo"), started="2026-02-02T00:00:00Z")
    make(Path("runs/tiny/older"), started="2026-01-01T00:00:00Z")
    Run(make(Path("runs/tiny/bare"), started="2026-01-01T00:00:00Z")).metrics_file.unlink()
    Path("runs/tiny/folder").mkdir()
    Path("runs/tiny/folder/metrics.jsonl").write_text('{"step": 0}\n')
    with runs.opened(Path("runs/tiny/sft"), "sft", {}, "about: x\n"):
        pass
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_broken_sweep_or_evaluation_is_one_line(tmp_path):
    path = make(tmp_path / "tiny" / "dpo")
    (path / "eval.json").write_text("{")
    with pytest.raises(RunError, match=r"eval\.json is not JSON"):
        write_report(path)
    (tmp_path / "tiny" / "sweep.json").write_text('{"members": [{}]}')
    with pytest.raises(RunError, match=r"sweep\.json: members\.0\.run is missing"):
        write_report(tmp_path / "tiny")


def test_no_run_fails_for_its_report(tmp_path):
    good, bad = make(tmp_path / "tiny" / "dpo"), make(tmp_path / "tiny" / "other", test=[1])
    assert report_line(good) == str(good / "report.html")
    Run(bad).manifest_file.write_text('["no manifest"]')
    assert report_line(bad).startswith(f"no report of {bad} (") and "\n" not in report_line(bad)


# --- which run ---


def test_a_recipe_is_a_name_a_file_or_a_folder_and_need_not_exist(here):
    make(Path("runs/mine/dpo"), started="2026-01-01T00:00:00Z")
    make(Path("runs/mine/dpo-beta0.3"), started="2026-01-02T00:00:00Z")
    assert (
        find_runs("mine") == find_runs("recipes/mine.yaml") == find_runs("runs/mine") == [Path("runs/mine/dpo-beta0.3")]
    )
    assert find_runs("runs/mine/dpo") == [Path("runs/mine/dpo")]
    assert find_runs("mine", ["dpo", "dpo-beta0.3"]) == [Path("runs/mine/dpo"), Path("runs/mine/dpo-beta0.3")]
    make_sweep(Path("runs/mine"), {"dpo": 0.1}, "dpo")
    assert find_runs("mine") == [Path("runs/mine")] and find_run("mine").path == Path("runs/mine/dpo-beta0.3")


def test_the_command_ends_with_the_path(here, capsys):
    make(Path("runs/tiny/dpo"))
    assert cli.main(["report", "tiny"]) == 0
    assert capsys.readouterr().out == "runs/tiny/dpo/report.html\n"


def test_best_is_the_run_that_the_sweep_chose(here, capsys):
    names = {"dpo": 0.1, "dpo-beta0.3": 0.3}
    for name, beta in names.items():
        make(Path("runs/mine") / name, beta=beta)
    make_sweep(Path("runs/mine"), names, "dpo-beta0.3")
    for recipe in ("mine", "recipes/mine.yaml", "runs/mine"):
        assert cli.main(["report", recipe, "--best"]) == 0
        assert capsys.readouterr().out == "runs/mine/dpo-beta0.3/report.html\n"
    make_sweep(Path("runs/mine"), names, None, why="no member has a KL below 10")
    assert cli.main(["report", "mine", "--best"]) == 2
    said = "runs/mine/sweep.json has chosen no member: no member has a KL below 10; name a run with --run\n"
    assert capsys.readouterr().err == said


# --- hostile text ---


def examination(text: str) -> dict:
    """What `alignlab data` writes, as far as a report reads it."""
    shown = {"split": "train", "number": 3, "what": text, "file": text, "line": 4}
    found = {"level": "wrong", "says": text, "of": 90, "share": 1 / 90, "advice": text}
    few = {"median": 9, "p95": 20, "max": 30}
    return {
        "fingerprint": FINISHED["data"]["fingerprint"],
        "tokens": {name: few for name in ("prompt", "chosen", "rejected")},
        "histogram": {"edges": [0, 10, 20, 31], "prompt": [80, 9, 1], "chosen": [0, 1200, 3], "rejected": [1, 0, 2]},
        "findings": [
            {**found, "name": "contradictions", "count": 1, "shown": [shown, {"what": text}]},
            {**found, "name": "mojibake", "count": 0, "shown": []},
        ],
        "features": [
            {"name": f"feature {text}", "accuracy": 0.62, "low": 0.58, "high": 0.66, "n": 80, "ties": 10},
            {"name": "question marks", "accuracy": None, "low": None, "high": None, "n": 0, "ties": 90},
        ],
    }


def hostile(folder: Path) -> Path:
    (folder / "tiny").mkdir(parents=True, exist_ok=True)
    (folder / "tiny" / runs.EXAMINATION).write_text(json.dumps(examination(HOSTILE[:200].replace("\ud800", "\u202e"))))
    warning = {"guard": "kl", "step": 1, "message": SCRIPT}
    rows = [{**row, "prompt": f"\n\nHuman: {HOSTILE}{i}\n\nAssistant:"} for i, row in enumerate(samples(HOSTILE))]
    facts = {"stop_reason": SCRIPT, "command": SCRIPT, "warnings": [warning], "machine": {"platform": SCRIPT}}
    return make(folder / "tiny" / "dpo-<img src=x onerror=alert(1)>", replies=rows, source=SCRIPT, **facts)


def test_hostile_dialogue_is_shown_as_text_and_shortened(tmp_path):
    page = write_report(hostile(tmp_path))
    found = Elements(page)
    assert page.stat().st_size < 300_000
    assert not {"script", "img", "iframe", "object", "form"} & {tag for tag, _ in found.tags}
    assert not [attrs for _, attrs in found.tags if any(name.startswith("on") for name in attrs)]
    assert SCRIPT in found.text and "⟨U+202E⟩gnitirw" in found.text and "⟨U+0000⟩⟨U+001B⟩" in found.text
    assert "more characters]" in found.text and "{{ 7*7 }}" in found.text
    assert not set(page.read_text(encoding="utf-8")) & set("\u202e\u202c\x00\x1b")
    assert len(Run(page.parent).samples()[0]["reply"]) == len(HOSTILE)


def test_findings_in_the_data_stand_in_the_page_with_their_pairs(tmp_path):
    path = make(tmp_path / "tiny" / "dpo")
    before = Elements(write_report(path)).text
    assert "alignlab data tiny" in before, "what would put them there is said"
    (tmp_path / "tiny" / runs.EXAMINATION).write_text(json.dumps(examination("a plain sentence")))
    page = write_report(path)
    found = Elements(page).text
    assert "contradictions" in found and "a plain sentence:4" in found and "→ a plain sentence" in found
    assert "feature a plain sentence 62.0% (58.0% to 66.0%)" in found and "longest 30" in found
    assert "Looked for, and not there: mojibake" in " ".join(found.split())
    assert facts_beside(page)["runs"][0]["examination"]["findings"][0]["count"] == 1


def test_an_examination_of_other_rows_is_not_shown(tmp_path):
    path = make(tmp_path / "tiny" / "dpo")
    (tmp_path / "tiny" / runs.EXAMINATION).write_text(json.dumps(examination("x") | {"fingerprint": "f2"}))
    assert "Findings" not in Elements(write_report(path)).text


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"fingerprint": "f1"}', '{"fingerprint": "f1", "findings": 3}'])
def test_a_broken_examination_is_said_and_left_out(tmp_path, text):
    path = make(tmp_path / "tiny" / "dpo")
    (tmp_path / "tiny" / runs.EXAMINATION).write_text(text)
    page = Elements(write_report(path)).text
    assert "Findings" not in page and "data.json" in page and "make it anew with alignlab data tiny" in page


def test_the_page_loads_nothing(tmp_path):
    page = write_report(make(tmp_path / "tiny" / "dpo"))
    outside = [a for tag, a in Elements(page).tags if tag in ("script", "link", "img", "iframe") or "src" in a]
    assert outside == [{"rel": "icon", "href": "data:,"}]
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/(1999/xlink|2000/svg))", page.read_text())


# --- size and speed ---


def test_the_page_of_a_long_sweep_stays_small(tmp_path):
    """8 runs of 5,000 logged steps: under 1.5 MB."""
    folder, betas = tmp_path / "tiny", {f"dpo-beta{i / 20}": i / 20 for i in range(1, 9)}
    for at, (name, beta) in enumerate(betas.items()):
        make(folder / name, rows=metrics(5000, evaluations=100, seed=at), beta=beta)
    page = write_report(make_sweep(folder, betas, "dpo-beta0.3"))
    assert max(page.stat().st_size, page.with_suffix(".json").stat().st_size) < 1_500_000


def test_reports_import_no_torch():
    heavy = "[name for name in ('torch', 'transformers', 'trl', 'datasets', 'pandas', 'scipy') if name in sys.modules]"
    program = f"import sys, alignlab.reports.page, alignlab.reports.charts; print({heavy})"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- in a browser ---


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """One page of each kind, hostile text in the first."""
    root = tmp_path_factory.mktemp("pages")
    betas = {"dpo-beta0.1": 0.1, "dpo-beta0.5": 0.5}
    paths = [make(root / "swept" / name, beta=beta) for name, beta in betas.items()]
    (root / "swept" / runs.EXAMINATION).write_text(json.dumps(examination("a plain sentence")))
    return {
        "run": write_report(hostile(root)),
        "sweep": write_report(make_sweep(root / "swept", betas, "dpo-beta0.5")),
        "compare": write_comparison(paths),
    }


@pytest.mark.parametrize("kind", ["run", "sweep", "compare"])
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")])
def test_a_browser_finds_nothing_to_complain_of(browser, pages, kind, width, scheme):
    """No console message, no request but the page's own, no script run, nothing wider than the screen."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    messages, requests = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(pages[kind].as_uri())
    for summary in page.query_selector_all("summary"):
        summary.click()
    assert messages == [] and requests == [pages[kind].as_uri()]
    assert "planted" not in page.title()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


@pytest.mark.parametrize("kind", ["run", "sweep", "compare"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_accessibility_checker_finds_nothing(browser, pages, kind, scheme):
    """axe-core: contrast, headings, labels, tables, regions that scroll."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the package axe-playwright-python")
    page = browser.new_context(viewport={"width": 390, "height": 900}, color_scheme=scheme, bypass_csp=True).new_page()
    page.goto(pages[kind].as_uri())
    found = axe.Axe().run(page).response["violations"]
    assert [(rule["id"], [node["html"][:120] for node in rule["nodes"]]) for rule in found] == []
    page.context.close()


def test_graphics_stand_out_from_the_paper(browser, pages):
    """WCAG: text at least 4.5:1, graphics at least 3:1, in light, dark and print."""
    page = browser.new_page()
    page.goto(pages["run"].as_uri())
    names = ["ink", "soft", "accent", "warn", "paper", "raised"]
    for look in ({"color_scheme": "light"}, {"color_scheme": "dark"}, {"media": "print"}):
        page.emulate_media(**look)
        style = "n => getComputedStyle(document.documentElement).getPropertyValue('--' + n).trim()"
        colours = {name: luminance(page.evaluate(style, name)) for name in names}
        for name in names[:4]:
            for ground in ("paper", "raised"):
                low, high = sorted((colours[name], colours[ground]))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (look, name, ground)
    page.close()


def luminance(colour: str) -> float:
    """WCAG's relative luminance of `#rrggbb`."""
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
