"""Enumerations of MinkowskiEngine. Those that choose between its implementations have no effect here."""

from __future__ import annotations

from enum import Enum

# The shape of a kernel.
RegionType = Enum("RegionType", "HYPER_CUBE HYPER_CROSS CUSTOM", start=0)

# The operation between the features of an image and those of its sites, spelled as in MinkowskiEngine.
BroadcastMode = Enum("BroadcastMode", "ELEMENTWISE_ADDITON ELEMENTWISE_MULTIPLICATION", start=0)

# The choice between one manager for each tensor that is made from coordinates, and one for all.
SparseTensorOperationMode = Enum(
    "SparseTensorOperationMode", "SEPARATE_COORDINATE_MANAGER SHARE_COORDINATE_MANAGER", start=0
)

# The treatment of several rows at one site.
SparseTensorQuantizationMode = Enum(
    "SparseTensorQuantizationMode",
    "RANDOM_SUBSAMPLE UNWEIGHTED_AVERAGE UNWEIGHTED_SUM NO_QUANTIZATION MAX_POOL SPLAT_LINEAR_INTERPOLATION",
    start=0,
)

# These have no effect.
ConvolutionMode = Enum("ConvolutionMode", "DEFAULT DIRECT_GEMM COPY_GEMM", start=0)
MinkowskiAlgorithm = Enum("MinkowskiAlgorithm", "DEFAULT MEMORY_EFFICIENT SPEED_OPTIMIZED", start=0)
CoordinateMapType = Enum("CoordinateMapType", "CPU CUDA", start=0)
GPUMemoryAllocatorType = Enum("GPUMemoryAllocatorType", "PYTORCH CUDA", start=0)

# The function of a pooling layer. The kinds of global pooling compute the same here.
PoolingMode = Enum(
    "PoolingMode",
    "LOCAL_SUM_POOLING LOCAL_AVG_POOLING LOCAL_MAX_POOLING "
    "GLOBAL_SUM_POOLING_DEFAULT GLOBAL_AVG_POOLING_DEFAULT GLOBAL_MAX_POOLING_DEFAULT "
    "GLOBAL_SUM_POOLING_KERNEL GLOBAL_AVG_POOLING_KERNEL GLOBAL_MAX_POOLING_KERNEL "
    "GLOBAL_SUM_POOLING_PYTORCH_INDEX GLOBAL_AVG_POOLING_PYTORCH_INDEX GLOBAL_MAX_POOLING_PYTORCH_INDEX",
    start=0,
)
