"""Folders that cannot be written, files in the way, and working folders that are gone: one line each, exit code 2."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alignlab.disk import BESIDE, explain

EVAL = ("eval", "plain", "--replies", "8", "--max-new-tokens", "8")
SWEEP, EXPORT = ("sweep", "plain", "--betas", "0.3"), ("export", "plain", "--to", "out")
OF_OTHERS = 12345  # a user's number


def give_up_roots_rights() -> None:
    """Makes permission bits count for root as they do for anybody, in this process and what it starts.

    Out of the bounding set go CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_FOWNER.
    """
    if os.geteuid() == 0:
        system = ctypes.CDLL(None, use_errno=True)
        for capability in (1, 2, 3):
            assert system.prctl(24, capability, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())


def command(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "ALIGNLAB_CACHE": str(folder / "cache"), **environment}
    return subprocess.run(
        [sys.executable, "-m", "alignlab", *words],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        preexec_fn=give_up_roots_rights,
    )


@pytest.fixture(scope="module")
def finished(folders, of_seconds, tmp_path_factory) -> Path:
    """A folder with a base model, the recipe `plain` on it, its finished runs, and a cache of its own."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(folders["llama"], folder / "base")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "plain.yaml").write_text(of_seconds("base"))
    done = command(folder, "dpo", "plain")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    yield folder
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)


def close(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)


def give_away(folder: Path) -> None:
    """To somebody else where root may do so; else what is closed is as good."""
    if os.geteuid() != 0:
        return close(folder)
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, OF_OTHERS, OF_OTHERS)
    return None


def put_a_file_there(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file")


def refused(done: subprocess.CompletedProcess) -> str:
    """The line in which a command says why it ends."""
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "; " in last and not any(BESIDE.search(word) for word in last.split())
    return last


def test_a_closed_folder_is_closed_to_these_commands(tmp_path):
    """Or the tests below would show nothing."""
    close(tmp_path)
    program = f"open({str(tmp_path / 'file')!r}, 'w')"
    done = subprocess.run([sys.executable, "-c", program], preexec_fn=give_up_roots_rights, capture_output=True)
    assert b"PermissionError" in done.stderr and not (tmp_path / "file").exists()
    tmp_path.chmod(0o755)


@pytest.mark.parametrize("spoil", [close, give_away, put_a_file_there])
@pytest.mark.parametrize(
    "words", [("data", "plain"), ("dpo", "plain", "--run", "more"), SWEEP, EVAL], ids=lambda words: words[0]
)
def test_runs_that_cannot_be_written(copy, spoil, words):
    spoil(copy / "runs")
    assert "runs" in refused(command(copy, *words))


def test_runs_that_can_only_be_read_are_read(copy):
    close(copy / "runs")
    again = command(copy, "dpo", "plain")
    assert again.returncode == 0 and "is finished" in again.stderr
    assert command(copy, *EXPORT).returncode == 0
    assert "report.html" in refused(command(copy, "report", "plain"))


@pytest.mark.parametrize("where", ["closed/out", "base/config.json/out"])
def test_an_export_that_cannot_be_written(copy, where):
    (copy / "closed").mkdir()
    close(copy / "closed")
    assert where.partition("/out")[0] in refused(command(copy, "export", "plain", "--to", where))


@pytest.mark.parametrize("spoil", [close, put_a_file_there])
def test_a_cache_that_cannot_be_written_serves_what_it_holds(copy, spoil):
    """And where it holds nothing, rows are prepared and the reference is asked without it."""
    spoil(copy / "cache")
    done = command(copy, "dpo", "plain", "--run", "more")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert ("from the cache" in done.stderr) == (spoil is close)


def test_a_closed_cache_is_not_cleared(copy):
    close(copy / "cache")
    assert "cannot be removed" in refused(command(copy, "cache", "--clear"))


TOY = """
from alignlab.models import pretrain
from alignlab.cli.commands import main
pretrain.TRAINING["max_steps"] = 1
raise SystemExit(main(["data", "small", "data.toy.pairs=200"]))
"""


def test_a_closed_cache_serves_the_embedded_base_model(small):
    """What was made by somebody who may write there is used by everybody; what must be made names the way out."""
    env = {**os.environ, "ALIGNLAB_CACHE": str(small / "cache")}
    how = {"cwd": small, "env": env, "capture_output": True, "text": True, "preexec_fn": give_up_roots_rights}
    (small / "cache").mkdir()
    close(small / "cache")
    line = refused(subprocess.run([sys.executable, "-c", TOY], **how))
    assert str(small / "cache") in line and line.endswith("set ALIGNLAB_CACHE to a folder of your own")
    (small / "cache").chmod(0o755)
    assert subprocess.run([sys.executable, "-c", TOY], **how).returncode == 0
    close(small / "cache")
    done = subprocess.run([sys.executable, "-c", TOY], **how)
    assert done.returncode == 0 and "from the cache" in done.stderr, done.stderr


@pytest.mark.parametrize("words", [("list",), ("dpo", "plain"), EXPORT, ("cache",)], ids=lambda words: words[0])
def test_a_working_folder_that_is_gone(tmp_path, words):
    program = "import os, sys; os.rmdir(os.getcwd()); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    (tmp_path / "gone").mkdir()
    line = [sys.executable, "-c", program, "-m", "alignlab", *words]
    done = subprocess.run(line, cwd=tmp_path / "gone", capture_output=True, text=True)
    assert "the working folder is gone" in refused(done)


def test_a_name_that_is_too_long_for_the_disk(copy):
    assert "x" * 30 in refused(command(copy, "export", "plain", "--to", "x" * 300))


def test_errors_of_other_kinds_are_not_explained():
    assert explain(ValueError("x")) is None and explain(FileNotFoundError(2, "No such file", "x")) is None
    outer = RuntimeError("while saving")
    outer.__cause__ = PermissionError(13, "Permission denied", "runs/x/.manifest.json.12-0123abcd.tmp")
    assert explain(outer).startswith("runs/x/manifest.json cannot be opened or written (Permission denied); ")
