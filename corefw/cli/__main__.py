"""`python -m corefw.cli` is `migfw`, for whoever has the interpreter and not the script."""

from __future__ import annotations

import sys

from corefw.cli import main

sys.exit(main())
