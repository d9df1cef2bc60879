"""The table of docs/results.md: `tiny` over five seeds, everything drawn anew, and its shuffled control.

    python tests/bench/reproduce.py [--seeds 5] [--root FOLDER] [--no-page]

Data, tokenizer, base model, splits, SFT, DPO and sampling take the seed. All figures are of test topics. Runs that are
finished are used as they are, so that the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

os.environ |= {"WANDB_MODE": "disabled", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}

from machine import machine

from alignlab.disk import write_json, write_text
from alignlab.recipe.load import load_recipe
from alignlab.train.stages import train_dpo

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "results.md"
BEGIN, END = "<!-- make reproduce -->", "<!-- end -->"
SEEDED = ("data.toy.seed", "data.seed", "sft.seed", "dpo.seed")
SHUFFLED = ["data.toy.shuffled=true", "dpo.max_steps=100"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--root", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--no-page", action="store_true", help="leave docs/results.md as it is")
    args = parser.parse_args()
    seeds = range(args.seeds)
    learned = [figures(args.root, seed, []) for seed in seeds]
    control = [figures(args.root, seed, SHUFFLED) for seed in seeds]
    found = {"seeds": list(seeds), "tiny": learned, "shuffled": control, "machine": machine()}
    write_json(HERE / "results" / "reproduce.json", found)
    table = "\n".join(rows(learned, control))
    print(table)
    if not args.no_page:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        assert END in rest, f"the page has no {BEGIN} … {END}"
        write_text(PAGE, f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}")


def figures(root: Path, seed: int, overrides: Sequence[str]) -> dict:
    recipe = load_recipe("tiny", [*(f"{key}={seed}" for key in SEEDED), *overrides])
    manifest = train_dpo(recipe, root=root).manifest
    test, warnings = manifest.test, [warning.guard for warning in manifest.warnings]
    change = test.perplexity / test.reference_perplexity - 1
    seconds = {"training_seconds": manifest.training_seconds, "sampling_seconds": manifest.sampling_seconds}
    return {
        "win_rate": asdict(test.win_rate),
        "rewards/accuracies": asdict(test.accuracy),
        "rewards/margins": asdict(test.margin),
        "kl": test.kl,
        "perplexity": change,
        **seconds,
        "warnings": warnings,
    }


def rows(learned: Sequence[dict], control: Sequence[dict]) -> list[str]:
    """A line for each figure: the median over seeds and their range."""
    mean = lambda runs, name: [run[name]["mean"] for run in runs]
    lines = [
        ("win rate of DPO over SFT by the toy's rule", mean(learned, "win_rate"), "{:.2f}"),
        ("reward accuracy", mean(learned, "rewards/accuracies"), "{:.3f}"),
        ("reward margin", mean(learned, "rewards/margins"), "{:.2f}"),
        ("KL from SFT, nats per reply", [run["kl"] for run in learned], "{:.2f}"),
        ("perplexity of chosen replies, against SFT", [run["perplexity"] for run in learned], "{:+.1%}"),
        ("shuffled labels: win rate", mean(control, "win_rate"), "{:.2f}"),
        ("shuffled labels: reward accuracy", mean(control, "rewards/accuracies"), "{:.3f}"),
        ("shuffled labels: reward margin", mean(control, "rewards/margins"), "{:+.3f}"),
        ("sampling and KL, share of training time", shares(learned), "{:.1%}"),
    ]
    n = learned[0]["win_rate"]["n"]
    head = [f"| `tiny`, {len(learned)} seeds, test topics | median | lowest to highest |", "|---|---|---|"]
    table = []
    for name, values, form in lines:
        middle, low, high = (form.format(of(values)) for of in (statistics.median, min, max))
        table.append(f"| {name} | {middle} | {low} to {high} |")
    rate, error = pooled(control)
    low, high = rate - 1.96 * error, rate + 1.96 * error
    interval = f"win rate {rate:.2f}, 95 % interval {low:.2f} to {high:.2f} (n={n * len(control)})"
    held = sum(abs(run["win_rate"]["mean"] - 0.5) <= 1.96 * run["win_rate"]["stderr"] for run in control)
    closing = (
        f"\nShuffled labels: {held} of {len(control)} seeds' 95 % intervals contain 0.5; all seeds together {interval}."
    )
    return [*head, *table, closing]


def shares(runs: Sequence[dict]) -> list[float]:
    return [run["sampling_seconds"] / run["training_seconds"] for run in runs]


def pooled(runs: Sequence[dict]) -> tuple[float, float]:
    """The mean of equally large samples and its standard error."""
    rates = [run["win_rate"] for run in runs]
    error = math.sqrt(sum(rate["stderr"] ** 2 for rate in rates)) / len(rates)
    return statistics.mean(rate["mean"] for rate in rates), error


if __name__ == "__main__":
    main()
