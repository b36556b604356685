"""Look at a model without changing it: what its parts cost and hide, and how far two models lie apart."""

from quamba.inspection.model import Inspection, Rotation, Row, inspect
from quamba.inspection.pair import Comparison, Divergence, compare

__all__ = ["Comparison", "Divergence", "Inspection", "Rotation", "Row", "compare", "inspect"]
