"""An OpenAI-compatible endpoint for a finished run: exported once, then served by vllm or transformers themselves."""

from __future__ import annotations

import ctypes
import json
import logging
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from alignlab.disk import cache_folder, digest, hash_file, make_once, write_json
from alignlab.errors import MachineError, need
from alignlab.runs.run import Run

log = logging.getLogger(__name__)

NEEDS = ("fastapi", "uvicorn", "openai", "rich")  # what transformers[serving] asks for beyond our own
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


def serve(run: Run, host: str, port: int) -> int:
    """Serves until it is told to stop; the exit code of the server, which ends with this process."""
    folder = export_once(run)
    command = server_command(folder, host, port)
    log.info("serve: %s", " ".join(command))
    with subprocess.Popen(command, stdout=sys.stderr, preexec_fn=_die_with_parent) as server:
        handler = lambda number, frame: server.send_signal(number)
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            if _answers(server, f"http://{host}:{port}/health"):
                print("\n".join(_how_to_use(folder, f"http://{host}:{port}/v1")), flush=True)
            code = server.wait()
        finally:
            server.kill()
            for number, handler_before in before.items():
                signal.signal(number, handler_before)
    return code if code >= 0 else 128 - code


def export_once(run: Run) -> Path:
    """The folder of the merged model, made once for these weights and this recipe.

    In it, and not in other exports, a reply also ends at the format's texts where a request names none: `generate`
    refuses such a setting without a tokenizer, and `transformers serve` always hands one over.
    """
    from alignlab.evaluation.candidates import choose_models
    from alignlab.exports.export import export

    content = digest([choose_models([run]).ours.key, hash_file(run.recipe_file)])
    name = f"{run.path.resolve().parent.name}-{run.path.name}"
    folder = cache_folder() / "exports" / content

    def make(beside: Path) -> None:
        made = export(run, beside / name)
        if made.stops.texts:
            file = beside / name / "generation_config.json"
            write_json(file, {**json.loads(file.read_text()), "stop_strings": list(made.stops.texts)})

    make_once(folder, f"serve: {run.path} as a merged model", make)
    return next(path for path in folder.iterdir() if path.is_dir())


def server_command(folder: Path, host: str, port: int) -> list[str]:
    """`vllm serve` where vllm and a GPU are, `transformers serve` elsewhere; MachineError where neither can run."""
    import torch

    where = ["--host", host, "--port", str(port)]
    if (vllm := shutil.which("vllm")) and torch.cuda.is_available():
        return [vllm, "serve", str(folder), "--served-model-name", str(folder), "--generation-config", "auto", *where]
    need("transformers serve", "people", *NEEDS)
    beside = Path(sys.executable).with_name("transformers")
    return [str(beside) if beside.exists() else "transformers", "serve", str(folder), *where]


def check_address(host: str, port: int) -> None:
    """MachineError where nothing can listen there: better before the work than after it."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as e:
        raise MachineError(f"nothing can listen on {host}:{port} ({e.strerror or e}); choose another --port") from None


def _die_with_parent() -> None:
    """In the child: it is told to end when this process is gone, also where that was killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGTERM)


def _answers(server: subprocess.Popen, url: str) -> bool:
    """Waits until the server answers; false where it has ended before."""
    while server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return True
        except OSError:
            time.sleep(0.2)
    log.warning("serve: the server ended with code %s before it answered; its last lines say why", server.returncode)
    return False


def _how_to_use(folder: Path, url: str) -> Sequence[str]:
    stops = json.loads((folder / "generation_config.json").read_text()).get("stop_strings")
    has_template = (folder / "chat_template.jinja").is_file()
    asked = {"messages": [{"role": "user", "content": "Hello"}]} if has_template else {"prompt": "Hello"}
    body = {"model": str(folder), **asked, "temperature": 0, **({"stop": stops} if stops else {})}
    place = "chat/completions" if has_template else "completions"
    quoted = json.dumps(body).replace("'", r"'\''")
    return [
        f"ready {url}",
        f"curl {url}/{place} -H 'Content-Type: application/json' -d '{quoted}'",
        "Ctrl-C stops it",
    ]
