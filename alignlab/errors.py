"""What can go wrong for a user: each of these is one line on the terminal, exit code 2, and no traceback.

AlignlabError
├── RecipeError    a recipe that cannot be used; one line per fault
├── DataError      rows that cannot be read, or none that can be used
├── ModelError     a model, tokenizer or adapter that is missing or does not fit
├── RunError       a run directory in use, of another recipe, or damaged
└── MachineError   what this machine lacks: a GPU, bfloat16, disk space, the network
"""


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
    """What this machine lacks: a GPU, bfloat16, disk space, the network."""
