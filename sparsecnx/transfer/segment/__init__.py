"""Semantic segmentation: UPerNet and U-Net on any network with feature maps, trained and tested on label maps."""

from sparsecnx.transfer.segment.network import Encoder, segmenter

__all__ = ["Encoder", "segmenter"]
