"""A judge on loopback that writes down each request, and which of them had their answer on the disk already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "faulty_judge.py"
JUDGE = "longer"  # its way of judging


class CountingJudge:
    """The server, which children find by their environment; it ends with this process."""

    def __init__(self, folder: Path):
        self.log = folder / "asked.jsonl"
        command = [sys.executable, str(SCRIPT), str(self.log)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        port = int(self.process.stdout.readline())
        os.environ |= {"OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1", "OPENAI_API_KEY": "right-key"}

    def requests(self) -> list[str]:
        """The keys of all requests so far, as the cache of answers has them."""
        from alignlab.disk import digest

        lines = self.log.read_text().splitlines() if self.log.is_file() else []
        texts = [row["question"] for row in map(json.loads, lines) if row["event"] == "request"]
        return [digest({"model": JUDGE, "text": text}) for text in texts]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def answers_on_disk(folder: Path) -> set[str]:
    """The keys of the answers that a folder's cache holds whole."""
    from alignlab.disk import ResultCache

    files = folder.glob("cache/judgements/*.jsonl")
    return {key for file in files for key in ResultCache(file).values}
