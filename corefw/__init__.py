"""migfw: live migration as a framework. Start reading at docs/architecture.md."""

__version__ = "0.1.0"
