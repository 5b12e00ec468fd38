"""Pictures of 8 bits in TIFF of every kind, and files that are refused before anything is decoded."""

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from sparsecnx.train.data.formats import decode, read_header
from sparsecnx.train.data.pictures import UnsupportedImage

tifffile = pytest.importorskip("tifffile", reason="needs the extra [train]")
imagecodecs = pytest.importorskip("imagecodecs", reason="needs the extra [train]")

RANDOM = np.random.default_rng(4)
BANDS = RANDOM.integers(0, 65536, (4, 33, 40)).astype(np.uint16)  # (C, H, W)


def test_a_picture_with_smaller_copies(tmp_path):
    """Every cloud-optimised GeoTIFF of 8 bits has such copies."""
    path, picture = str(tmp_path / "a.tif"), RANDOM.integers(0, 256, (64, 48, 3)).astype(np.uint8)
    with tifffile.TiffWriter(path) as file:
        file.write(picture, photometric="rgb", tile=(16, 16))
        file.write(picture[::2, ::2], photometric="rgb", subfiletype=1)
    assert read_header(path).picture and read_header(path).pages == 1
    assert np.array_equal(decode(path, 3).permute(1, 2, 0).numpy(), picture)
    with tifffile.TiffWriter(path) as file:  # the copies of a palette lie behind it or before it
        for side in (1, 2):
            colormap = RANDOM.integers(0, 65536, (3, 256)).astype(np.uint16)
            file.write(picture[::side, ::side, 0], photometric="palette", colormap=colormap, subfiletype=side - 1)
    assert decode(path, 3).shape == (3, 64, 48)
    with tifffile.TiffWriter(path) as file:
        file.write(picture[::2, ::2, 0], photometric="palette", colormap=colormap, subfiletype=1, metadata=None)
        file.write(picture[..., 0], photometric="palette", colormap=colormap, metadata=None)
    assert decode(path, 3).shape == (3, 64, 48)


LOSSLESS = {
    "png": {"compression": "png"},
    "jpeg2000": {"compression": "jpeg2000", "compressionargs": {"reversible": True}},
    "jpegxl": {"compression": "jpegxl", "compressionargs": {"lossless": True}},
    "webp": {"compression": "webp", "compressionargs": {"lossless": True}},
    "lerc": {"compression": "lerc"},
    "zstd": {"compression": "zstd"},
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_picture_in_every_compression(name, tmp_path):
    path, picture = str(tmp_path / "a.tif"), RANDOM.integers(0, 256, (64, 48, 3)).astype(np.uint8)
    tifffile.imwrite(path, picture, photometric="rgb", tile=(32, 32), **LOSSLESS[name])
    for channels, mode in ((1, "L"), (3, "RGB"), (4, "RGBA")):
        expected = np.asarray(Image.fromarray(picture).convert(mode)).reshape(64, 48, channels)
        assert np.array_equal(decode(path, channels).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_white_is_zero(compression, tmp_path):
    """Grey is inverted at 8 bits and less, as everywhere, and is refused where that might not be what is meant."""
    path, grey = str(tmp_path / "a.tif"), RANDOM.integers(0, 256, (33, 40)).astype(np.uint8)
    tifffile.imwrite(path, grey, photometric="miniswhite", compression=compression)
    assert np.array_equal(decode(path, 1)[0].numpy(), 255 - grey)
    tifffile.imwrite(path, grey > 99, photometric="miniswhite", compression=compression)
    assert np.array_equal(decode(path, 1)[0].numpy(), np.where(grey > 99, 0, 255))
    tifffile.imwrite(path, BANDS[0], photometric="miniswhite", compression=compression)
    with pytest.raises(UnsupportedImage, match="colours of the kind MINISWHITE in 16 bits: expected grey"):
        read_header(path)


def test_the_number_of_bands_is_compared_before_they_are_decoded(tmp_path, monkeypatch):
    path, many = str(tmp_path / "a.tif"), np.zeros((16, 16, 500), np.uint16)
    tifffile.imwrite(path, many, photometric="minisblack", planarconfig="contig", compression="deflate")

    def decoded(*arguments, **options):
        pytest.fail("the bands were decoded")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", decoded)
    with pytest.raises(UnsupportedImage, match="has 500 channels: expected 3, as --in-chans or the others say"):
        decode(path, 3)
    (tmp_path / "b.png").write_bytes(imagecodecs.png_encode(np.ascontiguousarray(BANDS.transpose(1, 2, 0))))
    monkeypatch.setattr(imagecodecs, "png_decode", decoded)
    with pytest.raises(UnsupportedImage, match=r"has 4 channels \(RGBA\): expected 5, as --in-chans or the others say"):
        decode(str(tmp_path / "b.png"), 5)


def test_no_other_program_is_run_for_an_image(tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript, whatever its name ends in."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(UnidentifiedImageError):
        decode(str(tmp_path / "a.jpg"), 3)


@pytest.mark.parametrize("colours", ["ycbcr", "rgb"])
def test_a_cloud_optimised_geotiff_in_jpeg(colours, tmp_path):
    rasterio = pytest.importorskip("rasterio", reason="needs the extra [geo]")
    path = str(tmp_path / "a.tif")
    coarse = Image.fromarray(RANDOM.integers(0, 256, (4, 4, 3)).astype(np.uint8))
    smooth = np.asarray(coarse.resize((96, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    profile = {"driver": "GTiff", "width": 96, "height": 64, "count": 3, "dtype": "uint8", "compress": "jpeg"}
    with rasterio.open(path, "w", photometric=colours, tiled=True, blockxsize=32, blockysize=32, **profile) as file:
        file.write(smooth)
        file.build_overviews([2, 4])
    with rasterio.open(path) as file:
        expected = file.read()
    assert read_header(path).picture
    # Decoders enlarge the colours, which have half the resolution, in different ways.
    assert np.abs(decode(path, 3).numpy().astype(int) - expected.astype(int)).mean() < 1
