"""Count the floating-point operations of operators for `torch.utils.flop_counter`.

Each multiply-add of a matrix product or convolution counts 2, as torch counts. Normalization, activations, biases,
pooling by the maximum and the moving of values count nothing. A row has every tap of a kernel: with all sites visible
the forward count is that of the dense network. So is the backward count, but for the gradient of a depthwise kernel,
which torch counts C times too high. What backward computes again is not counted. The formulas take the arguments of the
operator, with shapes in place of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Shape = Sequence[int]


def conv(x: Shape, weight: Shape, *_: Any, out_shape: Shape) -> int:
    """Return the count of a weight of every tap, channel in and channel out at each row of the coarser side."""
    return 2 * min(x[0], out_shape[0]) * math.prod(weight)


def conv_weight_grad(grad: Shape, x: Shape, weight: Shape, *_: Any, out_shape: Any) -> int:
    """Return the count of the gradient of the weight: that of the convolution."""
    return 2 * min(grad[0], x[0]) * math.prod(weight)


def linear(x: Shape, weight: Shape, *_: Any, out_shape: Any) -> int:
    """Return the count of rows `(rows, C)` times a matrix `(C_out, C)`."""
    return 2 * x[0] * math.prod(weight)


def linear_weight_grad(grad: Shape, x: Shape, out_shape: Any) -> int:
    """Return the count of the gradient of the matrix: that of the product."""
    return 2 * math.prod(grad) * x[1]


def depthwise_conv(x: Shape, weight: Shape, *_: Any, out_shape: Any) -> int:
    """Return the count of rows `(rows, C)` under kernels `(C, 1, *kernel)`."""
    return 2 * x[0] * math.prod(weight)


def depthwise_conv_weight_grad(grad: Shape, x: Shape, table: Shape, tile: Shape, kernel: Shape, out_shape: Any) -> int:
    """Return the count of the gradient of `(C, 1, *kernel)`: that of the convolution."""
    return 2 * math.prod(x) * math.prod(kernel)


def mapped_depthwise_conv(x: Shape, weight: Shape, *_: Any, out_shape: Shape) -> int:
    """Return the count of a kernel `(K, C)` at each row of the coarser side."""
    return 2 * min(x[0], out_shape[0]) * math.prod(weight)


def mapped_depthwise_conv_weight_grad(grad: Shape, x: Shape, *_: Any, out_shape: Any) -> int:
    """Return the count of the gradient of `(K, C)`, with or without that of a bias: that of the convolution."""
    weight: Shape = out_shape if isinstance(out_shape[0], int) else out_shape[0]
    return 2 * min(grad[0], x[0]) * math.prod(weight)


def block(x: Shape, dwconv_weight: Shape, *rest: Any, out_shape: Any) -> int:
    """Return the count of the depthwise convolution and the two matrices of a block."""
    pwconv1_weight, pwconv2_weight = rest[3], rest[7]
    return 2 * x[0] * sum(map(math.prod, (dwconv_weight, pwconv1_weight, pwconv2_weight)))


def block_backward(grad: Shape, x: Shape, *rest: Any, out_shape: Any) -> int:
    """Return the count of the gradients of rows and weights: twice that of the block."""
    return 2 * block(x, *rest, out_shape=out_shape)
