"""The one exception that is shown to people without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """What the user got wrong, in one clear sentence.

    The sentence says what was expected, what came and, where it helps, what to do. The command line prints it to
    stderr and exits with status 2; a traceback is for our own mistakes only.
    """
