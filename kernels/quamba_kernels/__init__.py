"""Low-bit operators for recurrent language models: one contract (``ops``), interchangeable backends.

Knows nothing of models, recipes or checkpoints.
"""

from quamba_kernels import backends, ops
from quamba_kernels.registry import OPS, Backend, BackendUnavailable, Op, Setting, doctor

__all__ = ["OPS", "Backend", "BackendUnavailable", "Op", "Setting", "backends", "doctor", "ops"]
