"""Mixed precision under a budget: measure what each scheme costs each linear, choose, and say it as a recipe."""

from quamba.budget.found import Found, search

__all__ = ["Found", "search"]
