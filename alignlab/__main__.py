"""`python -m alignlab`, as `accelerate launch -m alignlab` needs it."""

import atexit
import os
import sys

from alignlab.cli.commands import main


def _end(code: int) -> None:
    """Ends a process of several without taking the interpreter down.

    A thread of gloo that asks for the interpreter while that ends is "terminate called without an active exception",
    and a launch that has done all its work ends with 134.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


code = main()
if os.environ.get("WORLD_SIZE", "1") != "1":
    _end(code)
sys.exit(code)
