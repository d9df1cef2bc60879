"""The doctor's full report on as many pairs as HH-RLHF has, once they are prepared: seconds, memory, what it finds.

    python tests/bench/doctor.py --pairs 160000

The rows are those of data.py: real ones repeated with edits, so that there are near-duplicates to find.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from data import QUIET, RESULTS, THREADS, TOKENIZERS, Clock, memory, write_rows
from machine import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", default="gpt2")
    parser.add_argument("--pairs", type=int, default=160_000)
    parser.add_argument("--measure", metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(examined(Path(args.measure), args.tokenizer) | memory()))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(rows, args.pairs)
        command = [sys.executable, __file__, "--tokenizer", args.tokenizer, "--measure", str(rows)]
        environment = os.environ | QUIET | THREADS | {"ALIGNLAB_CACHE": str(Path(folder) / "cache")}
        done = subprocess.run(command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    load = round(os.getloadavg()[0], 2)
    found = {"rows": args.pairs, **json.loads(done.stdout.splitlines()[-1]), "machine": machine(load_after=load)}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "doctor.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def examined(file: Path, name: str) -> dict:
    from transformers import AutoTokenizer

    from alignlab.data.prepare import prepare
    from alignlab.doctor.examination import examine
    from alignlab.recipe.load import load_recipe

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / name)
    recipe = load_recipe("gpt2", [f"data.path={file}", "data.subset=null"])
    with Clock() as preparing:
        prepared = prepare(recipe.data, tokenizer)
    with Clock() as clock:
        examination = examine(prepared, recipe, tokenizer)
    counts = {finding["name"]: finding["count"] for finding in examination["findings"]}
    return {**clock.seconds, "preparing_seconds": preparing.seconds["seconds"], "findings": counts}


if __name__ == "__main__":
    main()
