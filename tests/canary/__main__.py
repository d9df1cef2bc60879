"""The newest TRL, transformers, peft, accelerate and bitsandbytes under the tests of alignlab's seams, and what breaks.

    python tests/canary [TEST_FILE …]

They are installed into a virtual environment beside this one, `.venv-canary`, which takes everything else, torch among
it, from this one. Nothing here is changed. Exit code 1 where a test fails.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".venv-canary"
PYTHON = FOLDER / ("Scripts" if os.name == "nt" else "bin") / "python"
NEWEST = ("trl", "transformers", "peft", "accelerate", "bitsandbytes")
SEAMS = ("train", "model", "packing", "reference", "resume", "generate", "recipe", "templates", "recipes")


def main(files: list[str]) -> int:
    install()
    print(f"{'library':14}{'pinned':20}{'here':12}newest")
    for name, pinned in pins().items():
        print(f"{name:14}{pinned:20}{importlib.metadata.version(name):12}{version_there(name)}")
    print(f"\n{'test file':24}{'passed':>8}{'failed':>8}{'skipped':>9}", flush=True)
    broken = [each for file in files or [f"tests/test_{name}.py" for name in SEAMS] for each in run(file)]
    print("\n".join(["", *broken] if broken else ["", "nothing broke"]))
    return int(bool(broken))


def install() -> None:
    if not PYTHON.is_file():
        venv.create(FOLDER, with_pip=True)
    packages = next(FOLDER.rglob("site-packages"))
    (packages / "beside.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade", *NEWEST]
    subprocess.run([*command, f"torch=={importlib.metadata.version('torch')}"], check=True)


def pins() -> dict[str, str]:
    needed = map(Requirement, importlib.metadata.requires("alignlab") or ())
    return {each.name: str(each.specifier) for each in needed if each.name in NEWEST}


def version_there(name: str) -> str:
    asked = f"from importlib.metadata import version; print(version({name!r}))"
    return subprocess.run([PYTHON, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()


def run(file: str) -> list[str]:
    """Runs one file of tests and prints its counts; a line for each test that fails."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.xml"
        command = [PYTHON, "-m", "pytest", "--numprocesses=0", "--tb=short", f"--junit-xml={result}", file]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        if not result.is_file():
            return [f"{file}: pytest has not run: {(done.stderr or done.stdout).strip().splitlines()[-1]}"]
        cases = list(ElementTree.parse(result).iter("testcase"))
    failed = {case: each for case in cases for each in case if each.tag in ("failure", "error")}
    skipped = sum(case.find("skipped") is not None for case in cases)
    name = Path(file).name
    print(f"{name:24}{len(cases) - len(failed) - skipped:8}{len(failed):8}{skipped:9}", flush=True)
    return [f"{name}: {case.get('name')}\n    {first_line(each)}" for case, each in failed.items()]


def first_line(failure: ElementTree.Element) -> str:
    return (failure.get("message") or failure.text or "").strip().splitlines()[0][:160]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
