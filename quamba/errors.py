"""What the user got wrong, as opposed to our own bugs."""


class UserError(Exception):
    """One clear sentence: the thing, what was expected, what came, what to do. Commands exit with code 2 on it."""
