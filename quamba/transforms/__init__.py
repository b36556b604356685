"""Exact changes of a float block: fold norms, rotate, permute. Each acts on a dict of tensors, or says why not."""

from quamba.transforms.cluster import Clusters, sort_and_cluster
from quamba.transforms.fold import fold_factors, fold_norms, folding_illegal
from quamba.transforms.legality import TRANSFORMS, Transform, legal, residual_rotation_obstacle
from quamba.transforms.permute import Permutation, permute
from quamba.transforms.rotate import (
    output_block,
    residual_rotation,
    rotate_output,
    rotate_residual,
    rotate_values,
)

__all__ = [
    "TRANSFORMS", "Clusters", "Permutation", "Transform", "fold_factors", "fold_norms", "folding_illegal", "legal",
    "output_block", "permute", "residual_rotation", "residual_rotation_obstacle", "rotate_output", "rotate_residual",
    "rotate_values", "sort_and_cluster",
]  # fmt: skip
