"""Operations that can be adapted: one file each, registered in ``OPERATIONS``."""

from tfimm_lora.lora.operations.base import Operation
from tfimm_lora.lora.operations.conv2d import Conv2DOperation
from tfimm_lora.lora.operations.dense import DenseOperation
from tfimm_lora.lora.operations.depthwise_conv2d import DepthwiseConv2DOperation
from tfimm_lora.lora.operations.einsum_dense import EinsumDenseOperation

OPERATIONS: dict[type, Operation] = {
    operation.layer_class: operation
    for operation in (
        DenseOperation(),
        Conv2DOperation(),
        DepthwiseConv2DOperation(),
        EinsumDenseOperation(),
    )
}

__all__ = [
    "OPERATIONS",
    "Conv2DOperation",
    "DenseOperation",
    "DepthwiseConv2DOperation",
    "EinsumDenseOperation",
    "Operation",
]
