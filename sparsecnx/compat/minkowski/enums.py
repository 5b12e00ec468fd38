"""Enumerations of MinkowskiEngine. Those that choose between its implementations have no effect here."""

from __future__ import annotations

from enum import Enum


class RegionType(Enum):
    """Shape of a kernel."""

    HYPER_CUBE = 0
    HYPER_CROSS = 1
    CUSTOM = 2


class PoolingMode(Enum):
    """The function of a pooling layer. The kinds of global pooling compute the same here."""

    LOCAL_SUM_POOLING = 0
    LOCAL_AVG_POOLING = 1
    LOCAL_MAX_POOLING = 2
    GLOBAL_SUM_POOLING_DEFAULT = 3
    GLOBAL_AVG_POOLING_DEFAULT = 4
    GLOBAL_MAX_POOLING_DEFAULT = 5
    GLOBAL_SUM_POOLING_KERNEL = 6
    GLOBAL_AVG_POOLING_KERNEL = 7
    GLOBAL_MAX_POOLING_KERNEL = 8
    GLOBAL_SUM_POOLING_PYTORCH_INDEX = 9
    GLOBAL_AVG_POOLING_PYTORCH_INDEX = 10
    GLOBAL_MAX_POOLING_PYTORCH_INDEX = 11

    @property
    def reduction(self) -> str:
        """`"sum"`, `"avg"` or `"max"`."""
        return self.name.split("_")[1].lower()


class BroadcastMode(Enum):
    """The operation between the features of an image and those of its sites."""

    ELEMENTWISE_ADDITON = 0  # spelled as in MinkowskiEngine
    ELEMENTWISE_MULTIPLICATION = 1


class ConvolutionMode(Enum):
    """The kernel of MinkowskiEngine that runs; has no effect here."""

    DEFAULT = 0
    DIRECT_GEMM = 1
    COPY_GEMM = 2


class MinkowskiAlgorithm(Enum):
    """MinkowskiEngine's trade of memory for speed; has no effect here."""

    DEFAULT = 0
    MEMORY_EFFICIENT = 1
    SPEED_OPTIMIZED = 2


class CoordinateMapType(Enum):
    """The device of MinkowskiEngine's maps; here maps lie on the device of the coordinates."""

    CPU = 0
    CUDA = 1


class GPUMemoryAllocatorType(Enum):
    """The allocator of MinkowskiEngine; here it is always that of torch."""

    PYTORCH = 0
    CUDA = 1


class SparseTensorOperationMode(Enum):
    """The choice between one manager for each tensor and one for all."""

    SEPARATE_COORDINATE_MANAGER = 0
    SHARE_COORDINATE_MANAGER = 1


class SparseTensorQuantizationMode(Enum):
    """The treatment of several rows at one site."""

    RANDOM_SUBSAMPLE = 0
    UNWEIGHTED_AVERAGE = 1
    UNWEIGHTED_SUM = 2
    NO_QUANTIZATION = 3
    MAX_POOL = 4
    SPLAT_LINEAR_INTERPOLATION = 5
