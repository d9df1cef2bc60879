"""What can go wrong for a user: each of these is one line on the terminal, exit code 2, and no traceback.

AlignlabError
├── RecipeError    a recipe that cannot be used; one line per fault
├── DataError      rows that cannot be read, or none that can be used
├── ModelError     a model, tokenizer or adapter that is missing or does not fit
├── RunError       a run directory in use, of another recipe, or damaged
└── MachineError   what this machine lacks: a GPU, bfloat16, disk space, the network, a library
"""

import importlib.util


class AlignlabError(Exception):
    """A fault the user can mend; the message says what is wrong, with the value, and what to do."""


class RecipeError(AlignlabError):
    """A recipe that cannot be used; `str()` holds one line per fault, each with its file and line."""


class DataError(AlignlabError):
    """Rows that cannot be read, or none that can be used."""


class ModelError(AlignlabError):
    """A model, tokenizer or adapter that is missing or does not fit."""


class RunError(AlignlabError):
    """A run directory in use, of another recipe, or damaged."""


class MachineError(AlignlabError):
    """What this machine lacks: a GPU, bfloat16, disk space, the network, a library."""


def need(what: str, extra: str, *modules: str) -> None:
    """Raises MachineError where a module is missing that `what` needs, and the extra that brings it."""
    if line := lacks(what, extra, *modules):
        raise MachineError(line)


def lacks(what: str, extra: str, *modules: str) -> str | None:
    """Which of the modules that `what` needs are missing, in one line that says how to install them; else none."""
    missing = [name.replace("_", "-") for name in modules if not _is_there(name)]
    if not missing:
        return None
    are = "is" if len(missing) == 1 else "are"
    return f"{what} needs {' and '.join(missing)}, which {are} not installed; pip install 'alignlab[{extra}]'"


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False
