"""`python -m corefw.cli` is `migfw`, for environments without the script."""

from __future__ import annotations

import sys

from corefw.cli import main

sys.exit(main())
