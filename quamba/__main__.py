"""`python -m quamba` is the `quamba` command."""

from quamba.cli import app

app()
