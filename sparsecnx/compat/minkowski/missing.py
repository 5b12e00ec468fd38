"""Parts of MinkowskiEngine that are not offered, and what comes nearest: they import, and raise when called."""

from __future__ import annotations

from sparsecnx.compat.minkowski.errors import placeholder

FIELD = "SparseTensor(features, coordinates, quantization_mode=SparseTensorQuantizationMode.UNWEIGHTED_AVERAGE)"

NEAREST = {
    "TensorField": FIELD,
    "MinkowskiInterpolation": "SparseTensor.features_at_coordinates, at whole coordinates",
    "MinkowskiInterpolationFunction": "SparseTensor.features_at_coordinates, at whole coordinates",
    "MinkowskiGenerativeConvolutionTranspose": "MinkowskiConvolutionTranspose, with the argument `coordinates`",
    "MinkowskiPoolingTranspose": "MinkowskiConvolutionTranspose",
    "MinkowskiConvolutionFunction": "MinkowskiConvolution, or sparsecnx.ops.mapped_conv",
    "MinkowskiConvolutionTransposeFunction": "MinkowskiConvolutionTranspose, or sparsecnx.ops.mapped_conv",
    "MinkowskiDepthwiseConvolutionFunction": "MinkowskiDepthwiseConvolution, or sparsecnx.ops.mapped_depthwise_conv",
    "MinkowskiLocalPoolingFunction": "MinkowskiMaxPooling and its kin, or sparsecnx.ops.mapped_pool",
    "MinkowskiLocalPoolingTransposeFunction": "MinkowskiConvolutionTranspose",
    "MinkowskiGlobalPoolingFunction": "MinkowskiGlobalPooling",
    "MinkowskiDirectMaxPoolingFunction": "MinkowskiMaxPooling, or sparsecnx.ops.mapped_pool",
    "MinkowskiBroadcastFunction": "MinkowskiBroadcastAddition, MinkowskiBroadcastMultiplication",
    "MinkowskiInstanceNormFunction": "MinkowskiInstanceNorm",
    "MinkowskiPruningFunction": "MinkowskiPruning",
    "MinkowskiUnionFunction": "MinkowskiUnion",
    "MinkowskiSPMMFunction": "torch.sparse.mm",
    "MinkowskiSPMMAverageFunction": "torch.sparse.mm",
    "spmm": "torch.sparse.mm",
    "KernelRegion": "KernelGenerator",
    "CoordsManager": "CoordinateManager",
    "get_gpu_memory_info": "torch.cuda.mem_get_info",
    "print_diagnostics": "the command `sparsecnx doctor`",
    "convert_region_type": "KernelGenerator",
    "get_kernel_volume": "KernelGenerator(...).kernel_volume",
    "convert_to_int_tensor": "convert_to_int_list",
    "cuda_version": "torch.version.cuda",
    "cudart_version": "torch.version.cuda",
}

PLACEHOLDERS = {name: placeholder(name, nearest) for name, nearest in NEAREST.items()}
