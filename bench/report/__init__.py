"""Reports of outcomes: a table on the terminal, a JSON document, and a self-contained HTML page."""
