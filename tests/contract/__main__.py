"""TRL's own tests of its DPOTrainer, run on TRL's trainer and then on alignlab's: what passes there passes here.

    python tests/contract TRL_CHECKOUT [PYTEST_OPTION …]

TRL's wheel has no tests: clone its repository. Their models and datasets lie on the hub; `stand_ins` makes small ones
of the same architectures and columns, so that no network is needed. Exit code 1 where a test passes on stock TRL alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TRAINERS = {
    "stock": "TRL's DPOTrainer",
    "auto": "AlignDPOTrainer, prefix sharing auto",
    "true": "AlignDPOTrainer, prefix sharing true",
}
VISION = "not VLM and not Vision and not vlm and not vision"  # alignlab prepares text alone
# What alignlab refuses and TRL takes: sharing where a recipe asks for it and the model has none; to cut what was
# prepared to fit, which would cut replies without counting them
REFUSALS = ("model.prefix_sharing is true, but", "TRL would cut")


def main() -> int:
    parser = argparse.ArgumentParser(prog="contract", description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a clone of TRL's repository, of the version that is installed")
    args, options = parser.parse_known_args()
    if not (args.checkout / "tests" / "test_dpo_trainer.py").is_file():
        parser.error(f"{args.checkout} holds no tests/test_dpo_trainer.py: clone TRL's repository there")
    with tempfile.TemporaryDirectory() as folder:
        outcomes = {name: run(args.checkout.resolve(), name, Path(folder), options) for name in TRAINERS}
    print(f"{'trainer':40}{'passed':>8}{'failed':>8}{'skipped':>9}")
    for name, title in TRAINERS.items():
        count = Counter(outcome for outcome, _ in outcomes[name].values())
        print(f"{title:40}{count['passed']:8}{count['failed']:8}{count['skipped']:9}")
    lost = 0
    for name in ("auto", "true"):
        for test, (outcome, why) in outcomes[name].items():
            if outcome == "failed" and outcomes["stock"][test][0] == "passed":
                refused = any(words in why for words in REFUSALS)
                lost += not refused
                print(f"{'refused' if refused else 'LOST'} with {name}: {test}\n    {why}")
    for test, (outcome, why) in outcomes["stock"].items():
        if outcome == "failed":
            print(f"fails on stock TRL: {test}\n    {why}")
    return int(lost > 0)


def run(checkout: Path, trainer: str, folder: Path, options: list[str]) -> dict[str, tuple[str, str]]:
    """Test → what came of it, and the first line of why."""
    result = folder / f"{trainer}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "stand_ins", "-p", "no:cacheprovider", "-k", VISION]
    command += [f"--junit-xml={result}", *options, "tests/test_dpo_trainer.py"]
    environment = os.environ | {
        "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}",
        "CONTRACT_TRAINER": trainer,
        "CONTRACT_FOLDER": str(folder),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if not result.is_file():
        raise SystemExit(f"pytest has not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return {f"{case.get('name')}": outcome(case) for case in ElementTree.parse(result).iter("testcase")}


def outcome(case: ElementTree.Element) -> tuple[str, str]:
    for each in case:
        if each.tag in ("failure", "error", "skipped"):
            said = (each.get("message") or each.text or "").strip().splitlines()
            return ("skipped" if each.tag == "skipped" else "failed"), (said or [""])[0][:200]
    return "passed", ""


if __name__ == "__main__":
    sys.exit(main())
