"""MinkowskiEngine's enumerations. Those that choose between its own implementations choose nothing here."""

from __future__ import annotations

from enum import Enum


class RegionType(Enum):
    """Shape of a kernel."""

    HYPER_CUBE = 0
    HYPER_CROSS = 1
    CUSTOM = 2


class PoolingMode(Enum):
    """What a pooling layer computes; MinkowskiEngine has several ways to compute a global one."""

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
    """How the features of an image meet those of its sites (MinkowskiEngine's spelling)."""

    ELEMENTWISE_ADDITON = 0
    ELEMENTWISE_MULTIPLICATION = 1


class ConvolutionMode(Enum):
    """Which of MinkowskiEngine's kernels runs; chooses nothing here."""

    DEFAULT = 0
    DIRECT_GEMM = 1
    COPY_GEMM = 2


class MinkowskiAlgorithm(Enum):
    """MinkowskiEngine's trade of memory for speed; chooses nothing here."""

    DEFAULT = 0
    MEMORY_EFFICIENT = 1
    SPEED_OPTIMIZED = 2


class CoordinateMapType(Enum):
    """Where MinkowskiEngine keeps coordinates; here they lie where the coordinates do."""

    CPU = 0
    CUDA = 1


class GPUMemoryAllocatorType(Enum):
    """MinkowskiEngine's allocators; here it is always torch's."""

    PYTORCH = 0
    CUDA = 1


class SparseTensorOperationMode(Enum):
    """Whether tensors made from coordinates share one manager."""

    SEPARATE_COORDINATE_MANAGER = 0
    SHARE_COORDINATE_MANAGER = 1


class SparseTensorQuantizationMode(Enum):
    """What becomes of several rows at one site."""

    RANDOM_SUBSAMPLE = 0
    UNWEIGHTED_AVERAGE = 1
    UNWEIGHTED_SUM = 2
    NO_QUANTIZATION = 3
    MAX_POOL = 4
    SPLAT_LINEAR_INTERPOLATION = 5
