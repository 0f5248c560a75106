"""What becomes of outcomes: a table on the terminal, a JSON document, an HTML page that needs nothing else."""
