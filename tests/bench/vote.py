"""How fast the vote page answers many voters at once: 50 voters, a minute, the slowest of a hundred requests.

Each voter loads a pair, thinks, and votes, as a browser does: a POST, and the page that it leads to. The voters are
threads of this process; server and voters share the machine.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_vote import Voter, serving


def measure(voters: int, seconds: float, think: float, pairs: int = 400) -> dict[str, float]:
    """Milliseconds of requests while voters vote; `think` is the mean of seconds between a page and the vote on it."""
    times: list[float] = []
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "votes.db", pairs) as server:
        end = time.monotonic() + seconds + 1

        def vote(number: int) -> None:
            draw, voter = random.Random(number), Voter(server, f"Voter {number}")
            time.sleep(draw.uniform(0, 1))
            code = voter.ballot()
            while code and time.monotonic() < end:
                time.sleep(draw.expovariate(1 / think) if think else 0)
                began = time.perf_counter()
                status = voter.vote(code, draw.choice(("left", "right", "tie")))
                between = time.perf_counter()
                code = voter.ballot()
                times.extend((between - began, time.perf_counter() - between))
                if status != 303:
                    faults.append(str(status))

        used = sum(psutil.Process(server.process.pid).cpu_times()[:2])
        threads = [threading.Thread(target=vote, args=(number,)) for number in range(voters)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        used = sum(psutil.Process(server.process.pid).cpu_times()[:2]) - used
    p50, p95, p99 = np.percentile(np.array(times) * 1000, [50, 95, 99]).round(1).tolist()
    found = {"requests": len(times), "faults": len(faults), "p50_ms": p50, "p95_ms": p95, "p99_ms": p99}
    return {**found, "cpu_ms": round(1000 * used / max(1, len(times)), 2)}  # of the server, a request


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--voters", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--think", type=float, default=1.0, help="mean seconds between a page and its vote")
    args = parser.parse_args(argv)
    print(json.dumps({**vars(args), **measure(args.voters, args.seconds, args.think)}))


if __name__ == "__main__":
    main()
