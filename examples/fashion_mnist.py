"""A small ConvNeXt V2 for the 28 x 28 pixels of Fashion-MNIST, in patches of 4.

The 70,000 images (MIT licence) come with Debian: apt install dataset-fashion-mnist. See docs/finetuning.md.

    sparsecnx pretrain --model fashion_mnist:encoder --data torchvision:FashionMNIST:data ...
"""

from sparsecnx.models import ConvNeXtV2Encoder


def encoder():
    return ConvNeXtV2Encoder(depths=(2, 2), dims=(32, 64), in_chans=1, stem=2, strides=2)
