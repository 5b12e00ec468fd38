"""Real image files of every kind: the values that are read are those that were written."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sparsecnx.train.data import formats
from sparsecnx.train.data.formats import decode, read_header
from sparsecnx.train.data.pictures import UnsupportedImage, upright
from sparsecnx.train.data.scale import as_floats

tifffile = pytest.importorskip("tifffile", reason="needs the extra [train]")
imagecodecs = pytest.importorskip("imagecodecs", reason="needs the extra [train]")

RANDOM = np.random.default_rng(3)
BANDS = RANDOM.integers(0, 65536, (5, 33, 40)).astype(np.uint16)  # (C, H, W)
TYPES = ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64")


def write_tiff(path, bands, planar=False, **options):
    """Write bands `(C, H, W)` as one page."""
    array = bands if planar or len(bands) == 1 else bands.transpose(1, 2, 0)
    config = None if len(bands) == 1 else "separate" if planar else "contig"
    tifffile.imwrite(path, array, photometric="minisblack", planarconfig=config, metadata=None, **options)
    return str(path)


def png_of(bands):
    return imagecodecs.png_encode(np.ascontiguousarray(bands.transpose(1, 2, 0)))


OPTIONS = {
    "plain": {},
    "lzw": {"compression": "lzw"},
    "deflate": {"compression": "deflate", "predictor": 2},
    "zstd": {"compression": "zstd"},
    "tiled": {"tile": (16, 16)},
    "tiled-lzw": {"tile": (16, 16), "compression": "lzw"},
    "bigtiff": {"bigtiff": True},
    "motorola": {"byteorder": ">"},
}


@pytest.mark.parametrize("planar", [False, True], ids=["interleaved", "planar"])
@pytest.mark.parametrize("name", OPTIONS)
def test_tiff_of_many_bands(name, planar, tmp_path):
    path = write_tiff(tmp_path / "a.tif", BANDS, planar, **OPTIONS[name])
    header = read_header(path)
    assert (header.dtype, header.channels, header.colours) == ("uint16", 5, "")
    assert (header.height, header.width, header.pages) == (33, 40, 1)
    found = decode(path, 5)
    assert found.dtype == torch.float32 and np.array_equal(found.numpy(), BANDS)
    with pytest.raises(UnsupportedImage, match="has 5 channels: expected 3, as --in-chans or the others say"):
        decode(path, 3)


@pytest.mark.parametrize("dtype", TYPES)
def test_tiff_of_every_type(dtype, tmp_path):
    signed = np.dtype(dtype).kind in "if"
    bands = (BANDS[:2] % 251).astype(np.int64) - 125 * signed
    bands = (bands > 60 if dtype == "bool" else bands).astype(dtype)
    found = decode(write_tiff(tmp_path / "a.tif", bands, planar=dtype == "bool"), 2)
    assert found.dtype == (torch.uint8 if dtype == "uint8" else torch.float32)
    assert np.array_equal(found.numpy(), bands.astype(np.float32))


def test_missing_values(tmp_path):
    bands = BANDS[:2].astype(np.float32)
    bands[0, 3, 4] = np.nan
    bands[1, 5, 6] = -9999
    nodata = [(42113, "s", 0, "-9999", True)]
    path = write_tiff(tmp_path / "a.tif", bands, extratags=nodata)
    assert read_header(path).nodata == -9999
    found = decode(path, 2)
    assert found.isnan().sum() == 2 and found[0, 3, 4].isnan() and found[1, 5, 6].isnan()
    assert np.array_equal(found[~found.isnan()].numpy(), bands[~found.isnan().numpy()])
    assert decode(path, 2, nodata=float(bands[0, 0, 0])).isnan().sum() == 2 + (bands == bands[0, 0, 0]).sum()
    eight = write_tiff(tmp_path / "b.tif", np.array([[[0, 7, 255]]], np.uint8), extratags=[(42113, "s", 0, "0", True)])
    assert decode(eight, 1).dtype == torch.float32 and decode(eight, 1)[0, 0, 1:].tolist() == [7, 255]
    assert decode(eight, 1)[0, 0, 0].isnan() and not read_header(eight).picture
    large = np.array([[[2**32 - 1, 2**32 - 2]]], np.uint32)  # the same number in float32
    assert decode(write_tiff(tmp_path / "c.tif", large), 1, nodata=2.0**32 - 1).isnan().flatten().tolist() == [
        True,
        False,
    ]


def test_pages_are_channels_or_images(tmp_path):
    path = str(tmp_path / "a.tif")
    tifffile.imwrite(path, BANDS, photometric="minisblack")
    assert read_header(path).pages == 5
    with pytest.raises(UnsupportedImage, match="has 5 pages or frames: expected one image in a file; --pages channels"):
        decode(path, 1)
    assert np.array_equal(decode(path, 5, "channels").numpy(), BANDS)
    for page in range(5):
        assert np.array_equal(decode(path, 1, "images", page).numpy(), BANDS[page : page + 1])
    tifffile.imwrite(path, BANDS[:3].astype(np.uint8).transpose(1, 2, 0)[None].repeat(2, 0), photometric="rgb")
    assert decode(path, 6, "channels").dtype == torch.uint8 and decode(path, 3, "images", 1).shape == (3, 33, 40)
    with tifffile.TiffWriter(path) as file:
        file.write(BANDS[0], photometric="minisblack")
        file.write(BANDS[0, ::2], photometric="minisblack")
    with pytest.raises(UnsupportedImage, match="has pages of different kinds"):
        read_header(path)


def test_smaller_copies_are_no_pages(tmp_path):
    path = str(tmp_path / "a.tif")
    with tifffile.TiffWriter(path) as file:
        file.write(BANDS[0], photometric="minisblack")
        file.write(BANDS[0, ::2, ::2], photometric="minisblack", subfiletype=1)
    assert read_header(path).pages == 1
    assert np.array_equal(decode(path, 1).numpy(), BANDS[:1])


def test_a_fourth_band_is_no_transparency(tmp_path):
    four = RANDOM.integers(0, 256, (33, 40, 4)).astype(np.uint8)
    path = str(tmp_path / "a.tif")
    tifffile.imwrite(path, four, photometric="rgb", extrasamples=["unspecified"])
    header = read_header(path)
    assert (header.channels_as(None), header.picture) == (4, False)
    assert np.array_equal(decode(path, 4).permute(1, 2, 0).numpy(), four)
    tifffile.imwrite(path, four, photometric="rgb", extrasamples=["unassalpha"])
    assert read_header(path).channels_as(None) == 3
    assert np.array_equal(decode(path, 4).permute(1, 2, 0).numpy(), four)
    assert np.array_equal(decode(path, 3).permute(1, 2, 0).numpy(), four[..., :3])


@pytest.mark.parametrize("colours", ["L", "LA", "RGB", "RGBA"])
def test_png_of_16_bits(colours, tmp_path):
    array = RANDOM.integers(0, 65536, (7, 9, len(colours))).astype(np.uint16)
    (tmp_path / "a.png").write_bytes(png_of(array.transpose(2, 0, 1)))
    path, values = str(tmp_path / "a.png"), array.transpose(2, 0, 1).astype(np.float32)
    header = read_header(path)
    assert (header.dtype, header.colours, header.channels_as(None)) == ("uint16", colours, len(colours.strip("A")))
    assert np.array_equal(decode(path, len(colours)).numpy(), values)
    plain = values[: len(colours.strip("A"))]
    if len(plain) == 3:
        assert np.array_equal(decode(path, 3).numpy(), plain)
        grey = (plain * np.array([0.299, 0.587, 0.114])[:, None, None]).sum(0)
        np.testing.assert_allclose(decode(path, 1)[0].numpy(), grey, rtol=1e-5)
    else:
        assert np.array_equal(decode(path, 3).numpy(), plain.repeat(3, 0))
    with pytest.raises(UnsupportedImage, match="expected 7"):
        decode(path, 7)


def test_a_transparent_colour_of_a_16_bit_png(tmp_path):
    rows = b"\0" + np.array([1000, 2000], ">u2").tobytes()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0)), (b"tRNS", struct.pack(">H", 1000))]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    with open(tmp_path / "a.png", "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, body in chunks:
            file.write(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)))
    assert decode(str(tmp_path / "a.png"), 1).flatten().tolist() == [1000, 2000]


@pytest.mark.parametrize("ending", ["tif", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_bands_are_turned_upright(orientation, ending, tmp_path):
    path = str(tmp_path / f"a.{ending}")
    bands = BANDS[:3] if ending == "png" else BANDS
    if ending == "tif":
        write_tiff(path, bands, extratags=[(274, "H", 1, orientation, True)])
    else:
        exif = Image.Exif()
        exif[274] = orientation
        body, png = exif.tobytes().removeprefix(b"Exif\0\0"), png_of(bands)
        chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
        with open(path, "wb") as file:
            file.write(png[:33] + chunk + png[33:])
    turn = turn_of(orientation)
    expected = np.stack([np.asarray(turn(Image.fromarray(band.astype(np.float32)))) for band in bands])
    assert np.array_equal(decode(path, len(bands)).numpy(), expected)
    assert np.array_equal(upright(bands, orientation), expected)


def turn_of(orientation):
    """Return Pillow's turn of an image with an EXIF orientation."""
    exif = Image.Exif()
    exif[274] = orientation

    def turn(image):
        image.info["exif"] = exif.tobytes()
        return ImageOps.exif_transpose(image)

    return turn


RGBA = Image.fromarray(RANDOM.integers(0, 256, (12, 16, 4)).astype(np.uint8), "RGBA")
PICTURES = {
    "L.png": RGBA.convert("L"),
    "LA.png": RGBA.convert("LA"),
    "1.png": RGBA.convert("1"),
    "RGBA.png": RGBA,
    "CMYK.jpg": RGBA.convert("RGB").convert("CMYK"),
    "CMYK.tif": RGBA.convert("RGB").convert("CMYK"),
    "P.gif": RGBA.convert("RGB").quantize(16),
    "L.tif": RGBA.convert("L"),
    "RGBA.webp": RGBA,
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_every_kind(name, tmp_path):
    PICTURES[name].save(tmp_path / name, **({"lossless": True} if "webp" in name else {}))
    for channels, mode in ((1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")):
        with Image.open(tmp_path / name) as image:
            expected = np.asarray(image.convert(mode)).reshape(12, 16, channels)
        found = decode(str(tmp_path / name), channels)
        assert found.dtype == torch.uint8 and np.array_equal(found.permute(1, 2, 0).numpy(), expected)
    with pytest.raises(UnsupportedImage, match=r"is a picture .*: expected 5 channels"):
        decode(str(tmp_path / name), 5)


def test_colours_of_cmyk_are_not_inverted(tmp_path):
    """Adobe's programs write CMYK inverted into JPEG, and say so; Pillow writes it likewise."""
    red = Image.new("RGB", (16, 16), (250, 10, 20))
    red.convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    assert b"Adobe" in (tmp_path / "a.jpg").read_bytes()
    assert (decode(str(tmp_path / "a.jpg"), 3).float().mean((1, 2)) - torch.tensor([250.0, 10, 20])).abs().max() < 6


def test_transparency_of_a_palette(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=1)
    assert decode(str(tmp_path / "a.png"), 3)[:, 0].T.tolist() == [[10, 20, 30], [40, 50, 60]]  # dropped
    assert decode(str(tmp_path / "a.png"), 4)[:, 0].T.tolist() == [[10, 20, 30, 255], [40, 50, 60, 0]]


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({}, ValueError, "failed to read 13200 bytes, got"),
        ({"compression": "deflate"}, imagecodecs.DeflateError, "BAD_DATA"),
        ({"tile": (16, 16)}, tifffile.TiffFileError, "corrupted tile"),
    ],
    ids=["plain", "deflate", "tiled"],
)
def test_a_truncated_tiff_is_not_read(options, error, reason, tmp_path):
    path = write_tiff(tmp_path / "a.tif", BANDS, **options)
    whole = (tmp_path / "a.tif").read_bytes()
    for share in (0.1, 0.5, 0.99):
        (tmp_path / "a.tif").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(error, match=reason):
            decode(path, 5)
    (tmp_path / "a.tif").write_bytes(whole)
    assert np.array_equal(decode(path, 5).numpy(), BANDS)


def test_a_truncated_png_is_not_read(tmp_path):
    png = png_of(BANDS[:3])
    for share in (0.3, 0.9):
        (tmp_path / "a.png").write_bytes(png[: int(len(png) * share)])
        with pytest.raises(imagecodecs.PngError, match="input stream too small"):
            decode(str(tmp_path / "a.png"), 3)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: tifffile.imwrite(path, BANDS[:4].transpose(1, 2, 0), photometric="separated"), "SEPARATED in 16"),
        (lambda path: tifffile.imwrite(path, BANDS[0].astype(complex)), "of type complex128: expected numbers"),
        (lambda path: tifffile.imwrite(path, BANDS, imagej=True, metadata={"axes": "ZYX"}, contiguous=True), "5 pages"),
        (lambda path: write_tiff(path, BANDS[:2] > 9), "has 1 bits in a band, interleaved: expected 8 or more"),
        (lambda path: write_tiff(path, BANDS[:1], extratags=[(42113, "s", 0, "none", True)]), "'none' stands for no"),
    ],
    ids=["cmyk", "complex", "imagej", "bits", "nodata"],
)
def test_a_tiff_that_is_refused(write, reason, tmp_path):
    write(tmp_path / "a.tif")
    with pytest.raises(UnsupportedImage, match=reason):
        decode(str(tmp_path / "a.tif"), 4)


def test_rasterio_reads_what_tifffile_refuses(tmp_path, monkeypatch):
    rasterio = pytest.importorskip("rasterio", reason="needs the extra [geo]")
    path = str(tmp_path / "a.tif")
    profile = {"driver": "GTiff", "width": 40, "height": 33, "count": 5, "dtype": "uint16", "nodata": 7}
    with rasterio.open(path, "w", tiled=True, blockxsize=16, blockysize=16, compress="lzw", **profile) as file:
        file.write(BANDS)
    expected = np.where(BANDS == 7, np.nan, BANDS.astype(np.float32))
    assert np.array_equal(decode(path, 5).numpy(), expected, equal_nan=True)

    def refuse(page):
        raise ValueError("this codec is not known")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", refuse)
    assert np.array_equal(decode(path, 5).numpy(), expected, equal_nan=True)
    monkeypatch.setattr(
        formats.importlib, "import_module", lambda name: tifffile if name == "tifffile" else missing(name)
    )
    with pytest.raises(ValueError, match="this codec is not known"):
        decode(path, 5)


def missing(name):
    raise ImportError(name)


@pytest.mark.parametrize(
    ("values", "number", "missing"),
    [
        (np.float32([0, 1, 2]), 1e-50, [False, False, False]),
        (np.float32([-np.inf, 1, 2]), -1.7976931348623157e308, [False, False, False]),
        (np.float16([np.inf, 1, 2]), 1e10, [False, False, False]),
        (np.float64([0.3, 1e-300, 0]), float(np.float32(0.3)), [True, False, False]),
        (np.float64([1e-300, 0]), 1e-300, [True, False]),
        (np.array([2**63 - 2, 2**63 - 1]), 2.0**63 - 1, [False, False]),
        (np.array([True, False]), 2.0**63, [False, False]),
        (np.array([True, False]), 1.0, [True, False]),
    ],
)
def test_values_are_compared_with_nodata_as_they_are_stored(values, number, missing):
    """A number that a type does not hold is none of its values, neither the 0 nor the infinity that it rounds to."""
    assert np.isnan(as_floats(values, number)).tolist() == missing
