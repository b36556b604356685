"""The contract: signatures, shapes, dtypes, equations. The body of each op is its definition.

Axes, everywhere: B batch, T tokens, D d_model, I d_inner = H * P, H heads, P headdim, G state groups, N d_state,
W convolution width, M delta-rule steps of a token, K in features and O out features of a linear, S group size along K,
V vocabulary.

Every quantisation is symmetric, saturating, round half to even: value = scale * code.
"""

from quamba_kernels.ops.conv import causal_conv1d
from quamba_kernels.ops.decode import conv_decode, selective_decode, ssd_decode
from quamba_kernels.ops.delta import delta_scan, delta_update
from quamba_kernels.ops.dplr import dplr_scan, dplr_update
from quamba_kernels.ops.elementwise import elementwise_scan, elementwise_update
from quamba_kernels.ops.gla import gla_scan, gla_update
from quamba_kernels.ops.linear import embedding, linear_w4a8, linear_w4a16, linear_w8a8, norm_linear
from quamba_kernels.ops.rowwise import Activation, dequantize, gate_output, quantize, rms_norm, rotate_input
from quamba_kernels.ops.sampling import likeliest
from quamba_kernels.ops.selective import selective_prefill, selective_scan, selective_update
from quamba_kernels.ops.selective_stack import SelectiveBlock, selective_stack
from quamba_kernels.ops.ssd import ssd_prefill, ssd_scan, ssd_update
from quamba_kernels.ops.stack import BlockMemory, SsdBlock, ssd_stack
from quamba_kernels.ops.state import quantize_state, quantize_states

__all__ = [
    "Activation", "BlockMemory", "SelectiveBlock", "SsdBlock", "causal_conv1d", "conv_decode", "delta_scan",
    "delta_update", "dequantize", "dplr_scan", "dplr_update", "elementwise_scan", "elementwise_update", "embedding",
    "gate_output", "gla_scan", "gla_update", "likeliest", "linear_w4a16", "linear_w4a8", "linear_w8a8",
    "norm_linear", "quantize", "quantize_state", "quantize_states", "rms_norm", "rotate_input", "selective_decode",
    "selective_prefill", "selective_scan", "selective_stack", "selective_update", "ssd_decode", "ssd_prefill",
    "ssd_scan", "ssd_stack", "ssd_update",
]
