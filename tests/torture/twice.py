"""Two of everything at once: one does the work, the other waits, reads, or says in one line that it is in use."""

from __future__ import annotations

import os
from pathlib import Path

from workplace import append, copied, differences, outcome, parts, run_command

PAIRS = (
    (("sft", "steps"), ("sft", "steps")),
    (("dpo", "steps"), ("dpo", "steps")),
    (("dpo", "steps"), ("dpo", "steps", "dpo.beta=0.3")),
    (("sweep", "steps"), ("sweep", "steps")),
    (("dpo", "steps"), ("data", "steps")),
    (("dpo", "steps"), ("cache", "--clear")),
    (("dpo", "steps"), ("report", "steps")),
    (("eval", "steps", "--replies", "8", "--max-new-tokens", "8"),) * 2,
    (("export", "steps", "--to", "out", "--rows", "4"),) * 2,
)
MADE = {"eval", "export"}  # commands that stand on a finished run


def campaign(template: Path, root: Path, results: Path, rounds: int = 3) -> None:
    done = parts(results, lambda row: (row["pair"], row["round"]))
    for pair in PAIRS:
        start = copied(template, root / "start")
        if pair[0][0] in MADE:
            assert run_command(start, ("dpo", "steps")).code == 0
        alone = copied(start, root / "alone")
        assert run_command(alone, pair[0]).code == 0
        expected = outcome(alone)
        for number in range(rounds):
            name = " | ".join(" ".join(command) for command in pair)
            if (name, number) not in done:
                append(results, {"pair": name, "round": number, **_at_once(start, root / "both", pair, expected)})


def _at_once(start: Path, folder: Path, pair, expected: dict[str, str]) -> dict:
    copied(start, folder)
    logs = folder.with_name("other")
    pid = os.fork()
    if pid == 0:
        ending = run_command(folder, pair[1], log=".other")
        logs.write_text(f"{ending.code}\n{ending.said}")
        os._exit(0)
    first = run_command(folder, pair[0])
    os.waitpid(pid, 0)
    code, _, said = logs.read_text().partition("\n")
    tracebacks = [text[-1500:] for text in (first.said, said) if "Traceback (most" in text]
    for command in pair:  # whoever was refused may try again
        run_command(folder, command)
    found = outcome(folder)
    wrong = [name for name in differences(expected, found) if name in expected]
    codes = [first.code, int(code)]
    fine = not tracebacks and not wrong and 0 in codes and set(codes) <= {0, 2}
    return {"codes": codes, "same": fine, "wrong": tracebacks or wrong[:10], "said": said.strip()[-160:]}
