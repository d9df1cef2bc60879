"""`python -m alignlab`, as `accelerate launch -m alignlab` needs it."""

import sys

from alignlab.cli.commands import main

sys.exit(main())
