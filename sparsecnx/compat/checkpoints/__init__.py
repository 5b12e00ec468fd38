"""Conversion of ConvNeXt and FCMAE checkpoints between libraries.

docs/checkpoints.md lists the formats. For example:

    loaded = checkpoints.load("convnextv2_tiny_22k_224_ema.pt")
    conversion = checkpoints.convert(loaded.state_dict, "timm")
    timm.create_model("convnextv2_tiny", num_classes=21841).load_state_dict(conversion.state_dict)
    checkpoints.save("tiny.safetensors", conversion)
"""

from sparsecnx.common.errors import CheckpointError
from sparsecnx.common.limits import MOST_BYTES
from sparsecnx.compat.checkpoints.architecture import Architecture, Decoder
from sparsecnx.compat.checkpoints.conversion import Conversion, convert, detect_format
from sparsecnx.compat.checkpoints.files import Loaded, PartError, is_inside, load, overwrites, path_problem, save
from sparsecnx.compat.checkpoints.formats import NAMES as FORMATS
from sparsecnx.compat.checkpoints.formats import Format
from sparsecnx.compat.checkpoints.loading import as_it_is, load_encoder

__all__ = [
    "FORMATS",
    "MOST_BYTES",
    "Architecture",
    "CheckpointError",
    "Conversion",
    "Decoder",
    "Format",
    "Loaded",
    "PartError",
    "as_it_is",
    "convert",
    "detect_format",
    "is_inside",
    "load",
    "load_encoder",
    "overwrites",
    "path_problem",
    "save",
]
