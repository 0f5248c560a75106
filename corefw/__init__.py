"""migfw: live migration as a framework. Start reading at docs/architecture.md."""

from typing import Final

__version__: Final = "0.1.0"
