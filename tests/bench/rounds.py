"""The table of docs/rounds.md: rounds on `tiny` over seeds, by the rule, by a coin, and by a judge that likes length.

    python tests/bench/rounds.py [--seeds 0 1 2 3 4] [--judges rule coin length] [--root FOLDER] [--table]

Data, tokenizer, base model, splits, SFT, DPO and sampling take the seed. Runs that are finished are used as they are,
so that the command goes on where it was stopped; `--table` trains nothing and prints what there is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ |= {"WANDB_MODE": "disabled", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import numpy as np
from scipy.special import stdtrit

from alignlab.disk import write_json
from alignlab.evaluation.evaluator import Options, evaluate
from alignlab.evaluation.judge import Contest, Judge, Verdict
from alignlab.models import pretrain
from alignlab.recipe.load import Recipe, load_recipe, run_name
from alignlab.rounds.rounds import run_rounds
from alignlab.runs.evaluation import read_evaluation
from alignlab.runs.run import Run
from alignlab.text.estimate import share_estimate

HERE = Path(__file__).parent
SEEDED = ("data.toy.seed", "data.seed", "sft.seed", "dpo.seed", "rounds.seed")


def coin(contests: Sequence[Contest]) -> list[Verdict]:
    """A coin that falls alike whichever reply is shown first."""
    return [Verdict(float(_falls(c) == (c.reply_a < c.reply_b)), "judged") for c in contests]


def _falls(contest: Contest) -> bool:
    seen = repr((contest.prompt, *sorted((contest.reply_a, contest.reply_b))))
    return bool(hashlib.sha256(seen.encode()).digest()[0] % 2)


def of_length(recipe: Recipe) -> Judge:
    """The longer reply, in the tokens that evaluations count, is better."""
    tokenizer = pretrain.tokenizer(recipe.data.toy)
    tokens = lambda reply: len(tokenizer(reply, add_special_tokens=False)["input_ids"])

    def length(contests: Sequence[Contest]) -> list[Verdict]:
        leads = [tokens(c.reply_a) - tokens(c.reply_b) for c in contests]
        return [Verdict(0.5 if lead == 0 else float(lead > 0), "judged") for lead in leads]

    return length


JUDGES: dict[str, Callable[[Recipe], Judge | None]] = {
    "rule": lambda recipe: None,  # the recipe's own
    "coin": lambda recipe: coin,
    "length": of_length,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--judges", nargs="+", choices=JUDGES, default=[*JUDGES])
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides, such as rounds.prompts=200"
    )
    parser.add_argument("--root", type=Path, default=Path("runs/rounds"))
    parser.add_argument("--table", action="store_true", help="train nothing")
    args = parser.parse_args()
    for judge in args.judges if not args.table else ():
        for seed in args.seeds:
            recipe = load_recipe(
                "tiny", [*(f"{key}={seed}" for key in SEEDED), f"rounds.count={args.count}", *args.set]
            )
            root = args.root / f"seed{seed}"
            found = run_rounds(recipe, root=root, name=judge, judge=JUDGES[judge](recipe))
            _by_the_rule(root / recipe.name, run_name(recipe, "sft"), [each.run for each in found.rounds])
    seeds = {judge: _there(args.root, judge) for judge in JUDGES}
    write_json(HERE / "results" / "rounds.json", seeds)
    print("\n".join(table(seeds)))


def _by_the_rule(folder: Path, sft: str, names: Sequence[str]) -> None:
    """What the toy's rule says of all rounds side by side, whoever judged them; kept beside the runs."""
    found = read_evaluation(evaluate([Run(folder / name) for name in (sft, *names)], Options(judge="rule")))
    rates = {f"{a}/{b}": vars(found.over(a, b)) for a in names for b in (sft, names[0]) if a != b}
    told = {key.replace(sft, "sft"): rate for key, rate in rates.items()}
    write_json(folder / f"{names[0].rpartition('-')[0]}.rule.json", told)


def _there(root: Path, judge: str) -> dict[str, dict]:
    """By seed: what the rounds say of themselves, and what the rule says of them."""
    found = {}
    for file in sorted(root.glob(f"seed*/tiny/{judge}.json")):
        rule = file.with_suffix(".rule.json")
        told = json.loads(rule.read_text()) if rule.is_file() else {}
        found[file.parts[-3]] = {"rounds": json.loads(file.read_text()), "rule": told}
    return found


def table(seeds: dict[str, dict[str, dict]]) -> Iterator[str]:
    yield "| what | seeds | found |\n|---|---|---|"
    rule = seeds["rule"]
    first = [its["rounds"]["rounds"][0]["win_rate_vs_sft"] for its in rule.values()]
    yield f"| by the rule, round 1 over SFT | {len(first)} | {'; '.join(map(_rate, first))} |"
    over_first = [its["rule"]["rule-3/rule-1"] for its in rule.values() if "rule-3/rule-1" in its["rule"]]
    if over_first:
        yield f"| by the rule, round 3 over round 1, seeds together | {len(over_first)} | {_pooled(over_first)} |"
    for k in (1, 2, 3):
        its = [r for one in rule.values() for r in one["rounds"]["rounds"] if r["k"] == k]
        kls = "; ".join(f"{r['kl']:.2f} ± {r['kl_stderr']:.2f}" for r in its)
        yield f"| by the rule, KL of round {k} from SFT, nats a reply | {len(its)} | {kls} |"
    guards = [guard for its in rule.values() for r in its["rounds"]["rounds"] for guard in r["guards"]]
    yield f"| by the rule, guards that spoke | {len(rule)} | {'; '.join(guards) or 'none'} |"
    yield from _coin(seeds["coin"])
    for name, its in seeds["length"].items():
        for r in its["rounds"]["rounds"]:
            fair, said = r["at_equal_length"], "; ".join(r["guards"]) or "no guard"
            equal = "not known" if fair is None else _rate(fair)
            yield f"| by length, round {r['k']}, {name}: at equal length | 1 | {equal}; {said} |"


def _coin(seeds: dict[str, dict]) -> Iterator[str]:
    """Each round's interval, Bonferroni over rounds and seeds, by the coin and by the rule."""
    own = [r["win_rate_vs_sft"] for its in seeds.values() for r in its["rounds"]["rounds"]]
    by_rule = [rate for its in seeds.values() for key, rate in its["rule"].items() if key.endswith("/sft")]
    for name, rates in (("the coin itself", own), ("the rule", by_rule)):
        if rates:
            lowest = [rate["mean"] - _quantile(rate["n"], len(rates)) * rate["stderr"] for rate in rates]
            above = sum(low > 0.5 for low in lowest)
            means = "; ".join(f"{rate['mean']:.2f}" for rate in rates)
            said = f"{above} of {len(rates)} intervals above 0.5: {means}"
            yield f"| by a coin, judged by {name} | {len(seeds)} | {said} |"


def _quantile(n: int, tests: int) -> float:
    return float(stdtrit(n - 1, 1 - 0.025 / tests))


def _rate(rate: dict) -> str:
    return f"{rate['mean']:.2f} ({rate['low']:.2f} to {rate['high']:.2f}, n={rate['n']})"


def _pooled(rates: Sequence[dict]) -> str:
    outcomes = [y for rate in rates for y in [1] * rate["wins"] + [0.5] * rate["ties"] + [0] * rate["losses"]]
    found = share_estimate(np.array(outcomes))
    return f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f}, n={found.n})"


if __name__ == "__main__":
    main()
