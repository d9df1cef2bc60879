"""SFT, DPO, KTO and ORPO of `tiny` on the same test prompts over several seeds: what they reach, and what they cost.

    python tests/bench/objectives.py [--seeds 5] [--only kto orpo] [--root FOLDER]

KTO learns from the pairs taken apart. Runs that are finished are used as they are, so that the command goes on where it
was stopped.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

os.environ |= {"WANDB_MODE": "disabled", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1"}

from machine import machine

from alignlab.disk import write_json
from alignlab.evaluation.evaluator import Options, evaluate
from alignlab.recipe.load import load_recipe
from alignlab.runs.evaluation import PERPLEXITY, read_evaluation
from alignlab.runs.facts import cost_of
from alignlab.runs.run import Run
from alignlab.train.stages import train_dpo, train_kto, train_orpo

HERE = Path(__file__).parent
SEEDED = ("data.toy.seed", "data.seed", "sft.seed", "dpo.seed", "kto.seed", "orpo.seed")
OBJECTIVES = {"dpo": train_dpo, "kto": train_kto, "orpo": train_orpo}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[*OBJECTIVES], choices=[*OBJECTIVES], metavar="NAME")
    parser.add_argument("--root", type=Path, default=Path("runs/objectives"))
    args = parser.parse_args()
    found = [figures(args.root / str(seed), seed, args.only) for seed in range(args.seeds)]
    write_json(HERE / "results" / "objectives.json", {"seeds": found, "machine": machine()})
    print("\n".join(rows(found)))


def figures(root: Path, seed: int, only: list[str]) -> dict[str, dict[str, float]]:
    """Of each objective its win rates, KL, length, perplexity and cost; a line as soon as each run is there."""
    recipe = load_recipe("tiny", [f"{key}={seed}" for key in SEEDED])
    runs = {name: OBJECTIVES[name](recipe, root=root, name=name) for name in only}
    for name, run in runs.items():
        wins = run.manifest.test.win_rate
        print(f"seed {seed}: {name} over its start {wins.mean:.2f} ± {wins.stderr:.2f} (n={wins.n})", flush=True)
    sft = Run(next(root.glob("*/sft*")))
    found = read_evaluation(evaluate([sft, *runs.values()], Options(seed=seed)))
    names = dict(zip(found.names, ["sft", *runs], strict=True))
    told = {}
    for model, name in names.items():
        run = {"sft": sft, **runs}[name]
        start = run.manifest.test.win_rate
        over_sft = found.over(model, found.against)
        kl, length = found.value("KL per reply", model), found.value("length", model)
        told[name] = {
            "over its start": start and start.mean,
            "over sft": over_sft and over_sft.mean,
            "low": over_sft and over_sft.low,
            "kl": kl and kl.mean,
            "length": length and length.mean,
            "perplexity": found.value(PERPLEXITY, model).mean,
            **cost_of(run),
        }
    return told


def rows(found: list[dict[str, dict[str, float]]]) -> list[str]:
    """A line for each objective: the median over seeds, and the lowest and highest win rate."""
    head = "win rate over its start | win rate over SFT | KL | tokens per reply | perplexity | steps | tokens | minutes"
    table = [f"| `tiny`, {len(found)} seeds | {head} |", "|---" * 9 + "|"]
    for name in found[0]:
        of = lambda key, name=name: [seed[name][key] for seed in found if seed[name].get(key) is not None]
        shown = [spread(of("over its start")), spread(of("over sft")), middle(of("kl"), ".1f")]
        shown += [middle(of("length"), ".0f"), middle(of("perplexity"), ".2f"), middle(of("steps"), ".0f")]
        shown += [middle(of("tokens"), ",.0f"), middle([60 * hours for hours in of("hours")], ".1f")]
        table.append(f"| {name} | {' | '.join(shown)} |")
    return table


def middle(values: list[float], form: str) -> str:
    return format(statistics.median(values), form) if values else "–"


def spread(values: list[float]) -> str:
    return f"{middle(values, '.2f')} ({min(values):.2f} to {max(values):.2f})" if values else "–"


if __name__ == "__main__":
    main()
