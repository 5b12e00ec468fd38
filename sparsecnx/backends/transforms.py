"""Hold what `torch.func` and forward-mode derivatives need of torch's internals, all in one place.

A later torch may rename these. Then the package still imports and works, and only gradients inside transforms of
`torch.func` are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

transforms_active: Callable[[], bool]  # whether a transform of torch.func is running: grad, vmap and so on
SingleLevelFunction: Any  # an autograd.Function for one level of torch.func
single_level: Callable[[], AbstractContextManager[Any]]  # the context in which torch lets one be applied
set_forward_mode: Callable[[bool], AbstractContextManager[Any]]
missing: str | None = None  # the first name that torch no longer has

try:
    from torch._functorch.utils import enable_single_level_autograd_function as single_level
    from torch.autograd.forward_ad import _set_fwd_grad_enabled as set_forward_mode
    from torch.autograd.function import _SingleLevelFunction as SingleLevelFunction
except ImportError as error:
    missing = str(error)
    SingleLevelFunction, single_level, set_forward_mode = torch.autograd.Function, nullcontext, nullcontext
try:
    from torch._C import _are_functorch_transforms_active as transforms_active
except ImportError as error:  # torch itself then refuses a function that is not made for transforms.
    missing = str(error)

    def transforms_active() -> bool:
        return False


_forward_mode_enabled: Callable[[], bool] = getattr(torch._C, "_is_fwd_grad_enabled", lambda: True)
# `levels._current_level` is the innermost level of dual tensors, -1 where there is none. It is read at every call.
levels: Any = forward_ad if hasattr(forward_ad, "_current_level") else SimpleNamespace(_current_level=0)


def have_tangents(inputs: tuple[Any, ...]) -> bool:
    """Return whether one of the inputs is a dual tensor, and forward mode is on."""
    return _forward_mode_enabled() and any(
        forward_ad.unpack_dual(x).tangent is not None for x in inputs if isinstance(x, Tensor)
    )
