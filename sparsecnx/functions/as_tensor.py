"""A torch.Tensor that stands for a SparseTensor, for networks that ask whether their input is one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsecnx.tensor import SparseTensor, refuse


class SparseImage(Tensor):
    """Stands for a SparseTensor where a network tests `isinstance(x, torch.Tensor)`: `x.as_tensor()` makes one.

    It answers the same functions, and its results are SparseImages; `sparse` is the SparseTensor. It is no argument of
    a compiled network, where torch would lose its gradient.

    Attributes:
        sparse: the SparseTensor.
    """

    sparse: SparseTensor

    @staticmethod
    def __new__(cls, x: SparseTensor) -> SparseImage:
        image: SparseImage = Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)
        image.sparse = x
        return image

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = _unwrapped(args), _unwrapped(kwargs or {})
        if getattr(function, "__name__", "") == "__get__":  # of an attribute such as shape
            return _wrapped(getattr(args[0], function.__self__.__name__))
        return _wrapped(SparseTensor.__torch_function__(function, types, args, kwargs))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        refuse(str(function), "torch took a SparseImage for an ordinary tensor", "give it x.sparse, or x.dense()")

    def dense(self, fill: float | Tensor = 0.0) -> Tensor:
        """Return `sparse.dense(fill)`, an ordinary tensor."""
        return self.sparse.dense(fill)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"SparseImage({self.sparse!r})"


def _unwrapped(value: Any) -> Any:
    """Return a value with SparseTensors in the place of SparseImages."""
    if isinstance(value, SparseImage):
        return value.sparse
    if isinstance(value, dict):
        return {key: _unwrapped(part) for key, part in value.items()}
    return type(value)(_unwrapped(part) for part in value) if type(value) in (tuple, list) else value


def _wrapped(value: Any) -> Any:
    if isinstance(value, SparseTensor):
        return SparseImage(value)
    return type(value)(map(_wrapped, value)) if type(value) in (tuple, list) else value


def as_tensor(x: SparseTensor) -> SparseImage:
    """Return a torch.Tensor that stands for `x`, for networks that test `isinstance(x, torch.Tensor)`.

    The result of the network is one too: its attribute `sparse` is the SparseTensor.
    """
    return SparseImage(x)


SparseTensor.as_tensor = as_tensor  # type: ignore[attr-defined]
