"""How `make docs` builds the site.

The pages are plain Markdown that also reads well without Sphinx; what only the site needs is added here. Sphinx runs
with -W, so a link or an anchor that leads nowhere is an error.
"""

from importlib.metadata import version as installed_version

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

project = "migfw"
author = "the migfw authors"
version = release = installed_version("migfw")

extensions = ["myst_parser"]
exclude_patterns = ["requirements.txt"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"migfw {release}"
html_show_copyright = False

CONTENTS = """

```{toctree}
:hidden:
:glob:

*
decisions/*
```

<p><a href="api/corefw.html">Reference of the modules</a>, from their docstrings.</p>
"""


def add_contents(_app: Sphinx, page: str, source: list[str]) -> None:
    """Give the first page the table of all pages, which Markdown has no word for."""
    if page == "index":
        source[0] += CONTENTS


def setup(app: Sphinx) -> None:
    """Called by Sphinx. Diagrams are shown as the text that they are: drawing them would need the network."""
    app.add_lexer("mermaid", TextLexer)
    app.connect("source-read", add_contents)
