"""Facts of runs and evaluations, built by hand for tests of what is said of them."""

from __future__ import annotations

from typing import Any

from alignlab.runs.evaluation import Comparison, Evaluation, ModelFacts
from alignlab.runs.facts import Evaluated, OnTest, RunFacts
from alignlab.runs.run import Limits, Manifest, Warned
from alignlab.text.estimate import Estimate
from alignlab.text.tables import WinRate

KL = Estimate(0.53, 0.04, 32, 0.45, 0.61)
MANIFEST = {"stage": "dpo", "status": "finished", "steps": 200, "best_step": 150, "stop_reason": "all 200 steps done"}
LIMITS = Limits(max_kl=20.0, max_accuracy=0.95, action="warn")


def share(mean: float, stderr: float | None = 0.05, n: int | None = 32) -> Estimate:
    return Estimate(mean, stderr, n).with_interval(share=True)


def wins(won: int, tied: int, lost: int) -> WinRate:
    """The win rate of so many wins, ties and losses."""
    outcomes = [1.0] * won + [0.5] * tied + [0.0] * lost
    mean = sum(outcomes) / len(outcomes)
    variance = sum((y - mean) ** 2 for y in outcomes) / max(1, len(outcomes) - 1)
    stderr = (variance / len(outcomes)) ** 0.5 if len(outcomes) > 1 else None
    return WinRate(**vars(share(mean, stderr, len(outcomes))), wins=won, ties=tied, losses=lost)


def run_facts(**facts: Any) -> RunFacts:
    """A finished DPO run; whatever belongs to its manifest may be named like anything else."""
    manifest = {**MANIFEST, "limits": LIMITS}
    manifest |= {
        name: facts.pop(name) for name in list(facts) if name in Manifest.__dataclass_fields__ and name != "test"
    }
    its = {
        "name": "dpo",
        "recipe": "tiny",
        "folder": "runs/tiny/dpo",
        "manifest": Manifest(**manifest),
        "steps": manifest["steps"],
        "planned_steps": 200,
        "silent_seconds": 60,
        "test": OnTest(kl=KL),
        "win_rate": None,
        "judge": "by the toy's rule",
        "versus": "SFT",
        "before": None,
        "first": None,
        "kept": None,
        "last": Evaluated(step=200, loss=1.03, accuracy=0.82, kl=0.66),
        "evaluation": None,
        "others": (),
        "targets": (),
        "examination": None,
        "settings": {},
        "recipe_text": "",
        "notices": (),
        "rows": (),
        "samples": (),
    }
    return RunFacts(**{**its, **facts})


def warned(*guards: str, step: int = 60) -> list[Warned]:
    return [Warned(guard=guard, step=step, message="x") for guard in guards]


def evaluation(rate: WinRate, a: str = "dpo", b: str = "sft", identical: int = 0, **facts: Any) -> Evaluation:
    """Two models judged side by side."""
    counted = {"wins": rate.wins, "ties": rate.ties, "losses": rate.losses, "n": rate.n}
    whole = Estimate(rate.mean, rate.stderr, rate.n, rate.low, rate.high)
    pair = Comparison(a=a, b=b, win_rate=whole, tally={"identical": identical}, p_value=0.5, **counted)
    models = [ModelFacts(name=b, path=f"runs/tiny/{b}"), ModelFacts(name=a, path=f"runs/tiny/{a}")]
    its = {"models": models, "against": b, "judge": "rule", "prompts": rate.n, "win_rates": [pair]}
    return Evaluation(**{**its, **facts})
