"""Volumes in files: what is read, how it is normalised, and what is refused."""

import errno
import gzip
import math
import os
import re
import struct

import numpy as np
import pytest
import torch

from sparsecnx.common.errors import InputError, MissingExtra
from sparsecnx.train.data import crops as crops_module
from sparsecnx.train.data import scale, volumes
from sparsecnx.train.data.crops import Crops, Draw
from sparsecnx.train.data.find import find_data
from sparsecnx.train.data.scale import UnsupportedValues, scale_of, scaled
from sparsecnx.train.data.source import Decoded
from sparsecnx.train.data.volumes import UnsupportedVolume, open_volume
from sparsecnx.train.recipe import Recipe

VALUES = np.random.default_rng(5).normal(100, 20, (10, 12, 14)).astype(np.float32)


@pytest.fixture
def nibabel():
    return pytest.importorskip("nibabel", reason="needs the extra [volumes]")


@pytest.fixture
def zarr():
    return pytest.importorskip("zarr", reason="needs the extra [volumes]")


def recipe(size=8, patch=4, ndim=3, **fields):
    fields = {"in_chans": 1, "normalize": "zscore", "mask_ratio": 0.5, "crop_area": None, **fields}
    return Recipe(ndim=ndim, image_size=size, patch_size=patch, **fields)


def saved(folder, **arrays):
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def whole(path, ndim=None):
    volume = open_volume(str(path), ndim)
    return volume.read([0] * len(volume.size), volume.size).numpy()


def test_a_box_of_npy_is_read_alone(tmp_path):
    np.save(tmp_path / "a.npy", VALUES)
    volume = open_volume(str(tmp_path / "a.npy"))
    assert (volume.channels, volume.size) == (1, VALUES.shape) and isinstance(volume.array, np.memmap)
    box = volume.read((1, 2, 3), (4, 5, 6))
    assert torch.equal(box, torch.from_numpy(VALUES[None, 1:5, 2:7, 3:9]))


@pytest.mark.parametrize(
    ("shape", "ndim", "channels", "size"),
    [
        ((9,), None, 1, (9,)),
        ((2, 9), None, 2, (9,)),
        ((9, 2), None, 2, (9,)),
        ((7, 8, 9), None, 1, (7, 8, 9)),
        ((2, 7, 8, 9), None, 2, (7, 8, 9)),
        ((7, 8, 9, 2), None, 2, (7, 8, 9)),
        ((7, 8, 9, 7), None, 7, (8, 9, 7)),
        ((1, 2, 7, 8, 9), None, 2, (7, 8, 9)),
        ((3, 8, 9), 2, 3, (8, 9)),
        ((8, 9), 2, 1, (8, 9)),
    ],
)
def test_dimensions_and_channels_follow_from_the_axes(shape, ndim, channels, size, tmp_path):
    array = np.arange(np.prod(shape)).reshape(shape)
    np.save(tmp_path / "a.npy", array)
    volume = open_volume(str(tmp_path / "a.npy"), ndim)
    assert (volume.channels, volume.size) == (channels, size)
    array = array[0] if len(shape) == 5 else array
    last = array.ndim > len(size) and array.shape[-1] < array.shape[0]
    expected = np.moveaxis(array, -1, 0) if last else array
    assert np.array_equal(whole(tmp_path / "a.npy", ndim), expected.reshape(channels, *size))


@pytest.mark.parametrize(
    ("shape", "in_chans", "channels"),
    [
        ((181, 56, 56), 181, 181),
        ((181, 56, 56), 56, 56),
        ((56, 56, 181), 181, 181),
        ((40, 50, 40), 40, 40),
        ((19, 50, 11), 19, 19),
        ((11, 50, 19), None, 11),
        ((40, 50, 600), None, 40),
    ],
)
def test_the_channels_that_are_named_tell_their_axis(shape, in_chans, channels, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(shape))
    assert open_volume(str(tmp_path / "a.npy"), 2, in_chans=in_chans).channels == channels
    files = find_data(tmp_path, 2, in_chans=in_chans)
    read = files.read(0, recipe(ndim=2, in_chans=channels))
    assert (files.channels, read.channels) == (channels, channels)


@pytest.mark.parametrize("shape", [(181, 56, 56), (56, 56, 181), (64, 64, 64)])
def test_many_bands_are_not_taken_for_a_side(shape, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(shape))
    told = f"of {shape[0]} or {shape[2]} channels: expected --in-chans {shape[0]}"
    problem = rf"is an array {re.escape(str(shape))}, {told}"
    with pytest.raises(UnsupportedVolume, match=problem):
        open_volume(str(tmp_path / "a.npy"), 2)
    with pytest.raises(InputError, match=rf"data is .*: holds a.npy, which {problem}"):
        find_data(tmp_path, 2)


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAL", "PIR"])
def test_nifti_lies_as_nibabels_canonical_images(axes, ending, nibabel, tmp_path):
    affine = nibabel.orientations.inv_ornt_aff(nibabel.orientations.axcodes2ornt(axes), VALUES.shape)
    image = nibabel.Nifti1Image((VALUES * 10).astype(np.int16), affine)
    image.header.set_slope_inter(0.25, -7)
    nibabel.save(image, tmp_path / f"a.{ending}")
    expected = nibabel.as_closest_canonical(nibabel.load(tmp_path / f"a.{ending}")).get_fdata(dtype=np.float32)
    volume = open_volume(str(tmp_path / f"a.{ending}"))
    assert volume.size == expected.shape and volume.compressed == (ending == "nii.gz")
    for read in (volume, volume.decompressed()):
        box = read.read((1, 2, 3), (4, 5, 6))
        assert torch.equal(box, torch.from_numpy(expected[None, 1:5, 2:7, 3:9].copy()))


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zarr_arrays_and_ome_zarr_images_are_volumes(zarr_format, zarr, tmp_path):
    try:
        plate = zarr.open_group(str(tmp_path / "plate.zarr"), mode="w", zarr_format=zarr_format)
    except TypeError:
        pytest.skip("needs zarr 3, which writes both formats")
    field = plate.create_group("A/1/0")
    datasets = {"multiscales": [{"datasets": [{"path": "0"}, {"path": "1"}]}]}
    field.attrs.update(datasets if zarr_format == 2 else {"ome": datasets})
    for name, array in (("0", VALUES[None, None]), ("1", VALUES[None, None, ::2, ::2, ::2])):
        field.create_array(name, data=array, chunks=(1, 1, 4, 4, 4))
    zarr.open_group(str(tmp_path / "more"), mode="w", zarr_format=zarr_format).create_array("raw", data=VALUES)

    files = find_data(tmp_path)
    assert (files.names, files.ndim, files.channels) == (("more/raw", "plate.zarr/A/1/0"), 3, 1)
    assert find_data(tmp_path / "more" / "raw").names == (".",)
    for name in files.names:
        assert np.array_equal(whole(tmp_path / name)[0], VALUES)
    before = files.fingerprint()
    chunk = max((p for p in (tmp_path / "more/raw").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    after = files.fingerprint()
    assert after[:2] == before[:2] and after.contents != before.contents
    chunk.unlink()
    assert files.fingerprint().sizes != before.sizes


def test_values_are_normalised_per_volume_and_channel(tmp_path):
    two = np.stack([VALUES, 1000 - 3 * VALUES]).astype(np.float64)
    np.save(tmp_path / "a.npy", two)
    volume = open_volume(str(tmp_path / "a.npy"))
    full = (volume, (0, 0, 0), VALUES.shape)

    def normalized(how):
        return scaled(volume.read(*full[1:]), scale_of(volume, how)).numpy()

    mean, std = (part(two, axis=(1, 2, 3), keepdims=True) for part in (np.mean, np.std))
    np.testing.assert_allclose(normalized("zscore"), (two - mean) / std, atol=1e-5)
    low, high = np.percentile(two, (0.5, 99.5), axis=(1, 2, 3), keepdims=True)
    np.testing.assert_allclose(normalized("percentiles"), np.clip((two - low) / (high - low), 0, 1), atol=1e-5)
    np.testing.assert_array_equal(normalized("none"), two.astype(np.float32))


def test_statistics_of_a_large_volume_are_of_parts_over_its_whole_length(tmp_path, monkeypatch):
    ramp = np.broadcast_to(np.arange(400.0)[:, None, None], (400, 5, 5))
    np.save(tmp_path / "a.npy", ramp)
    volume = open_volume(str(tmp_path / "a.npy"))
    exact = scale_of(volume, "zscore")
    monkeypatch.setattr(scale, "SAMPLED_VALUES", 16 * 3 * 25)
    sampled = scale_of(volume, "zscore")
    assert scale.sample_of(volume).shape == (1, 48, 5, 5)
    assert sampled.shift.item() == pytest.approx(exact.shift.item(), rel=0.01)
    assert sampled.scale.item() == pytest.approx(exact.scale.item(), rel=0.1)


def crops_of(folder, **fields):
    return Crops(find_data(folder), recipe(**fields))


def test_a_crop_depends_on_its_draw_alone(tmp_path):
    crops = crops_of(saved(tmp_path / "data", a=VALUES, b=VALUES + 1))
    first, *_ = crops[Draw(0, seed=1)]
    again, other = crops[Draw(0, seed=1)][0], crops[Draw(0, seed=2)][0]
    assert first.shape == (1, 8, 8, 8) and first.dtype == torch.float32
    assert torch.equal(first, again) and not torch.equal(first, other)
    fresh = crops_of(tmp_path / "data")
    assert torch.equal(fresh[Draw(0, seed=1)][0], first)


def test_crops_come_from_everywhere_and_are_mirrored(tmp_path):
    places = np.arange(10 * 9 * 8, dtype=np.float32).reshape(10, 9, 8)
    crops = crops_of(saved(tmp_path / "data", a=places), normalize="none")
    found = torch.stack([crops[Draw(0, seed)][0][0] for seed in range(300)]).long()
    corners = found.flatten(1).amin(1)
    starts = {(int(c) // 72, int(c) // 8 % 9, int(c) % 8) for c in corners}
    assert starts == {(i, j, 0) for i in range(3) for j in range(2)}
    signs = {
        tuple(int(s) for s in (c[-1, 0, 0] > c[0, 0, 0], c[0, -1, 0] > c[0, 0, 0], c[0, 0, -1] > c[0, 0, 0]))
        for c in found
    }
    assert len(signs) == 8
    signals = crops_of(saved(tmp_path / "signals", a=np.arange(99)), ndim=1, size=64, patch=32, normalize="none")
    assert all((signals[Draw(0, seed)][0].diff() == 1).all() for seed in range(20))


def test_decompressed_volumes_are_kept_while_there_is_room(nibabel, tmp_path, monkeypatch):
    for name in "abc":
        nibabel.save(nibabel.Nifti1Image(VALUES, np.eye(4)), tmp_path / f"{name}.nii.gz")
    crops = crops_of(tmp_path)
    monkeypatch.setattr(crops_module, "HELD_BYTES", 2 * VALUES.nbytes)
    for place in (0, 1, 0, 2):
        crops[Draw(place, seed=0)]
    assert list(crops.held) == [0, 2]


UNSUPPORTED = {
    "objects": (np.array([None, 1]), "holds Python objects: expected whole or floating-point"),
    "complex": (VALUES.astype(np.complex64), "holds values of type complex64: expected whole or floating"),
    "text": (np.array(["a", "b"]), "holds values of type <U1: expected whole"),
    "records": (np.zeros((4, 4, 4), [("r", "u1"), ("g", "u1")]), "holds values of type "),
    "series": (np.zeros((5, 2, 8, 8, 8)), r"is an array \(5, 2, 8, 8, 8\): expected .*; save each volume of a series"),
    "scalar": (np.float32(3), r"is an array \(\): expected \(L,\) or \(C, L\), \(D, H, W\) or"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_array_that_is_no_volume_is_refused(name, tmp_path):
    array, reason = UNSUPPORTED[name]
    saved(tmp_path / "data", good=VALUES)
    np.save(tmp_path / "data" / f"{name}.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match=rf"data is .*data: holds {name}.npy, which {reason}"):
        find_data(tmp_path / "data")


def nifti(nibabel, path, shape, dtype=np.float32, coded=True, corner=0.0):
    image = nibabel.Nifti1Image(np.zeros(shape, dtype), np.eye(4) if coded else None)
    nibabel.save(image, path)
    if math.isnan(corner):  # which nibabel would not write
        contents = bytearray(path.read_bytes())
        contents[280:284] = struct.pack("f", corner)  # srow_x[0]
        path.write_bytes(contents)


def test_a_nifti_file_that_is_no_volume_is_refused(nibabel, tmp_path, monkeypatch):
    for name, shape, options, reason in (
        ("series.nii", (8, 8, 8, 30), {}, "is 4-D, 8 x 8 x 8 x 30: a time series or several channels; .*four_to_three"),
        ("vectors.nii.gz", (8, 8, 8, 1, 3), {}, "is 5-D, 8 x 8 x 8 x 1 x 3: a time series"),
        ("slice.nii", (8, 8), {}, "has the sides 8 x 8: expected three"),
        ("bare.nii", (8, 8, 8), {"coded": False}, r"has no affine \(qform_code and sform_code are 0\)"),
        ("nan.nii", (8, 8, 8), {"corner": math.nan}, "has an affine with values that are not finite, so"),
        ("waves.nii", (8, 8, 8), {"dtype": np.complex64}, "holds values of type complex64"),
    ):
        nifti(nibabel, tmp_path / name, shape, **options)
        with pytest.raises(InputError, match=rf"holds {name}, which {reason}"):
            find_data(tmp_path)
        (tmp_path / name).unlink()
    nifti(nibabel, tmp_path / "trailing.nii", (8, 8, 8, 1, 1))
    assert find_data(tmp_path).sizes == (("trailing.nii", (8, 8, 8)),)
    nifti(nibabel, tmp_path / "large.nii.gz", (8, 8, 8))
    with pytest.raises(UnsupportedVolume, match="has 8 x 8 x 8 voxels, more than --max-pixels, 511; a larger one"):
        open_volume(str(tmp_path / "large.nii.gz"), max_voxels=511)
    with pytest.raises(InputError, match=r"large.nii.gz, which is NIfTI, of 3 dimensions: expected arrays \(H, W\)"):
        find_data(tmp_path, 2)


def test_a_folder_of_one_kind(photos, tmp_path):
    saved(photos, a=VALUES)
    with pytest.raises(InputError, match=r"holds images, such as 0.png, and volumes, such as a.npy; expected one kind"):
        find_data(photos)
    assert len(find_data(photos, photographs=True).names) == 8  # a run on images goes on
    assert find_data(photos, photographs=False).names == ("a.npy",)

    mixed = saved(tmp_path / "mixed", a=VALUES, b=np.zeros((2, 99)))
    with pytest.raises(InputError, match=r"a.npy of 3 dimensions and 1 channels and b.npy of 1 dim.* folders of their"):
        find_data(mixed)
    mixed = saved(tmp_path / "channels", a=VALUES, b=np.stack([VALUES] * 2))
    with pytest.raises(InputError, match=r"a.npy of 3 dim.* 1 channels and b.npy of 3 dimensions and 2 channels; exp"):
        find_data(mixed)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no images and no volumes; expected .*\.nii\.gz, or Zarr arrays"):
        find_data(tmp_path / "empty")


def test_a_volume_smaller_than_the_crop(tmp_path):
    folder = saved(tmp_path / "data", a=VALUES, b=VALUES[:1], c=VALUES[:, :5])
    with pytest.raises(
        InputError, match=r"holds b.npy, which is 1 x 12 x 14, smaller than the crop of 8 x 8 x 8; .*--im"
    ):
        find_data(folder).check(recipe())
    (folder / "b.npy").unlink()
    with pytest.raises(InputError, match=r"c.npy, which is 10 x 5 x 14, smaller than .*; a smaller --image-size takes"):
        find_data(folder).check(recipe())
    find_data(folder).check(recipe(size=4, patch=2))


def write_damaged(folder):
    """Write files that a run skips, and return what is said of each."""
    saved(folder, good=VALUES, hole=VALUES * np.nan, flat=np.full((9, 9, 9), 7), large=np.full((9, 9, 9), 1e300))
    for name, size in (("empty", 0), ("cut", 500)):
        (folder / f"{name}.npy").write_bytes((folder / "good.npy").read_bytes()[:size])
    return {
        "hole.npy": "has no values in channel 0: it cannot be normalised; move it elsewhere",
        "flat.npy": "is constant, 7: it cannot be normalised; move it elsewhere",
        "large.npy": r"holds inf in channel 0 at \(0, 0, 0\): expected finite values, or NaN",
        "empty.npy": "No data left in file|EOF",
        "cut.npy": "mmap length is greater than file size",
    }


def test_damaged_volumes_are_named_and_give_their_place_to_the_next(tmp_path):
    expected = write_damaged(tmp_path / "data")
    crops = crops_of(tmp_path / "data")
    names = crops.source.names
    good = crops[Draw(names.index("good.npy"), seed=3)][0]
    for name, reason in expected.items():
        crop, _, unreadable, _ = crops[Draw(names.index(name), seed=3)]
        assert torch.equal(crop, good) and "good.npy" not in unreadable
        assert re.search(reason, unreadable[name]), unreadable[name]
    (tmp_path / "data" / "good.npy").unlink()
    with pytest.raises(InputError, match=r"none of its 5 volume files can be read, first cut.npy"):
        crops_of(tmp_path / "data").try_out()


def with_holes(fill):
    """Return two channels in which a corner, and of the second the other half too, has no value."""
    two = np.stack([VALUES, 500 - VALUES])
    two[:, :8, :8, :8] = fill
    two[1, 8:] = fill
    return two


@pytest.mark.parametrize("normalize", ["zscore", "percentiles", "dataset", "none"])
@pytest.mark.parametrize("ending", ["npy", "zarr", "nii", "nii.gz"])
def test_voxels_without_values_change_nothing_else(ending, normalize, tmp_path):
    crops = []
    for name, fill in (("nan", np.nan), ("marked", -7.0)):
        (tmp_path / name).mkdir()
        path, values = str(tmp_path / name / f"a.{ending}"), with_holes(fill)
        if ending == "npy":
            np.save(path, values)
        elif ending == "zarr":
            pytest.importorskip("zarr", reason="needs the extra [volumes]").save_array(path, values)
        else:
            nibabel = pytest.importorskip("nibabel", reason="needs the extra [volumes]")
            nibabel.save(nibabel.Nifti1Image(values[0], np.eye(4)), path)
        files = find_data(tmp_path / name)
        given = {"ndim": 3, "image_size": 8, "patch_size": 4, "mask_ratio": 0.5, "normalize": normalize}
        given |= {} if name == "nan" else {"nodata": fill}
        drawn = Crops(files, Recipe(**{**files.defaults(given), **given}))
        crops.append((drawn.recipe, torch.stack([drawn[Draw(0, seed)][0] for seed in range(60)])))
    (one, first), (other, second) = crops
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    assert (one.mean, one.std) == (other.mean, other.std)
    assert first.isnan().flatten(1).all(1).any() and not first.isinf().any()  # a box may have no value at all
    there = first[:, 0][~first[:, 0].isnan()]
    low, high = {"zscore": (-4, 4), "percentiles": (0, 1)}.get(normalize, (20, 180))
    assert low <= there.min() < there.max() <= high


def test_nodata_is_found_as_it_is_typed(nibabel, tmp_path):
    counts = np.arange(512).reshape(8, 8, 8)
    large = 2**31 - 1 - counts  # more than 64 of them are the same number in float32
    for ending in ("nii", "nii.gz"):
        image = nibabel.Nifti1Image(counts.astype(np.int16), np.eye(4))
        image.header.set_slope_inter(0.1, -7)
        nibabel.save(image, tmp_path / f"scaled.{ending}")  # -6 is -5.999999985 in 64 bits
        nibabel.save(nibabel.Nifti1Image(large, np.eye(4), dtype=np.int64), tmp_path / f"whole.{ending}")
    np.save(tmp_path / "tenths.npy", (counts / np.float32(10)).astype(np.float64))
    np.save(tmp_path / "least.npy", np.where(counts == 10, -np.finfo(np.float64).max, counts))  # infinite in float32
    cases = {"tenths.npy": (1.1, 11), "least.npy": (-1.7976931348623157e308, 10)}
    cases |= {name: (-6.0, 10) for name in ("scaled.nii", "scaled.nii.gz")}
    cases |= {name: (2.0**31 - 1, 0) for name in ("whole.nii", "whole.nii.gz")}
    for name, (nodata, place) in cases.items():
        files = volumes.survey(str(tmp_path), (name,), 3)
        missing = files.read(0, recipe(nodata=nodata)).read((0, 0, 0), (8, 8, 8)).isnan()
        assert missing.flatten().nonzero().tolist() == [[place]], name


@pytest.mark.parametrize("normalize", ["zscore", "percentiles", "dataset", "none"])
def test_whether_an_array_has_a_value_is_asked_once(normalize, tmp_path, monkeypatch):
    half = VALUES.copy()
    half[:, :9] = np.nan
    folder = saved(tmp_path / "data", full=VALUES, half=half, hole=VALUES * np.nan)
    given = {"ndim": 3, "image_size": 8, "patch_size": 4, "mask_ratio": 0.5, "normalize": normalize}
    files, asked, look = find_data(folder), [], scale.has_a_value
    drawn = Recipe(**{**files.defaults(given), **given})
    first = next(seed for seed in range(99) if Crops(files, drawn)[Draw(1, seed)][0].isnan().all())
    crops = Crops(files, drawn)
    monkeypatch.setattr(crops_module, "has_a_value", lambda pixels: asked.append(look(pixels)) or asked[-1])
    for seed in range(first, first + 9):
        assert not crops[Draw(0, seed)].unreadable and not crops[Draw(1, seed)].unreadable
        assert crops[Draw(2, seed)].unreadable.keys() == {"hole.npy"}
    of_entries = {"dataset": [True, False], "none": [True, False]}.get(normalize, [])
    assert sorted(asked, reverse=True) == of_entries and files.names == ("full.npy", "half.npy", "hole.npy")
    monkeypatch.setattr(crops_module, "HELD_SCALES", 1)
    crops = Crops(files, drawn)
    for place in (0, 1, 0):
        assert not crops[Draw(place, first)].unreadable
    assert len(crops.with_value) == bool(of_entries)


def test_a_value_is_looked_for_from_the_middle(monkeypatch):
    starts = []

    class Thick(Decoded):
        def read(self, start, size):
            starts.append(start[0])
            return super().read(start, size)

    monkeypatch.setattr(scale, "SAMPLED_VALUES", 2 * 6)
    values = torch.full((1, 9, 6), torch.nan)
    assert not scale.has_a_value(Thick(values)) and sorted(starts) == [0, 2, 4, 6, 8]
    starts.clear()
    values[0, 4, 3] = 7
    assert scale.has_a_value(Thick(values)) and starts == [4]


def test_extremes_and_what_is_beyond_a_sample():
    values = torch.tensor([[[1.0, torch.nan], [5.0, 3.0]], [[torch.nan] * 2] * 2])
    low, high = scale.extremes(values)
    assert (low[0], high[0]) == (1, 5) and np.isnan([low[1], high[1]]).all()
    assert [part.tolist() for part in scale.extremes(torch.tensor([[[7, 200]]], dtype=torch.uint8))] == [[7], [200]]
    assert scale.outside(low, high, (1, 5)) is None and scale.outside(np.array([np.nan]), high[1:], (0, 1)) is None
    assert scale.outside(low, high, (2, 5)) == "holds values from 1 to 5: expected 2 to 5, --value-range"
    none = (math.nan, math.nan)
    for seen in ([], [(0.0, 3.0), (0.0, 0.0)], [(7.0, 7.0), (0.0, 1.0)], [none, none]):
        assert scale.far_beyond(values, seen) is None, seen
    values[1] = 60
    told = scale.far_beyond(values, [(0.0, 100.0), (0.0, 3.0)])  # within the range of the other channel
    assert told == "holds 60 to 60 in channel 1, the sample 0 to 3: other units, or a value for no data? " + (
        "--nodata, --value-range"
    )


@pytest.mark.parametrize("normalize", ["zscore", "percentiles", "dataset", "none"])
@pytest.mark.parametrize("shape", [(80,), (12, 12), (12, 12, 12)])
def test_arrays_without_any_value_are_skipped_and_named(shape, normalize, tmp_path):
    values = np.random.default_rng(1).random((2, *shape)).astype(np.float32)
    folder = saved(tmp_path / "data", a=values, b=values + 1, hole=values * np.nan)
    ndim = len(shape)
    given = {"ndim": ndim, "image_size": 64 if ndim == 1 else 8, "patch_size": 8 if ndim == 1 else 4}
    given |= {"mask_ratio": 0.5, "normalize": normalize, "in_chans": 2}
    files = find_data(folder, ndim)
    crops = Crops(files, Recipe(**{**files.defaults(given), **given}))
    reason = crops[Draw(2, seed=0)].unreadable["hole.npy"]
    assert re.search("UnsupportedValues: has no values? (in channel 0: it cannot|anywhere; move it elsewhere)", reason)
    with pytest.raises(UnsupportedValues, match="has no value"):
        crops.central(2)


def test_constant_percentiles_are_named(tmp_path):
    mostly = np.zeros((20, 20, 20))
    mostly[0, 0, :5] = 1
    np.save(tmp_path / "a.npy", mostly)
    with pytest.raises(UnsupportedValues, match=r"has equal percentiles \(0.5, 99.5\), 0; --normalize zscore"):
        scale_of(open_volume(str(tmp_path / "a.npy")), "percentiles")


def test_truncated_nifti_and_zarr(nibabel, zarr, tmp_path):
    for name in ("a.nii", "b.nii.gz"):
        nibabel.save(nibabel.Nifti1Image(VALUES, np.eye(4)), tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
    zarr.save_array(str(tmp_path / "c.zarr"), VALUES)
    chunk = max((p for p in (tmp_path / "c.zarr").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    chunk.write_bytes(chunk.read_bytes()[: chunk.stat().st_size // 2])
    np.save(tmp_path / "d.npy", VALUES)
    crops, unreadable = crops_of(tmp_path), {}
    for number in range(3):
        crop, _, skipped, _ = crops[Draw(number, seed=0)]
        assert crop.shape == (1, 8, 8, 8)
        unreadable |= skipped
    assert sorted(unreadable) == ["a.nii", "b.nii.gz", "c.zarr"]


def test_without_the_libraries(tmp_path, monkeypatch):
    def missing(name, *rest):
        raise ImportError(errno.ENOENT, name)

    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(bytes(400)))
    os.mkdir(tmp_path / "z")
    (tmp_path / "z" / ".zarray").write_text("{}")
    monkeypatch.setattr(volumes.importlib, "import_module", missing)
    with pytest.raises(MissingExtra, match=r"scan.nii.gz needs nibabel, which is not installed: pip install spar.*vol"):
        find_data(tmp_path)
    (tmp_path / "scan.nii.gz").unlink()
    with pytest.raises(MissingExtra, match=r"z needs zarr, which is not installed: pip install sparsecnx\[volumes\]"):
        find_data(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 10}, "image_size is 10: expected a multiple of the patch size, 4, such as 8 or 12"),
        ({"size": (8, 8, 10)}, "image_size is 8x8x10: expected a multiple of the patch size, 4, such as 8 or 12"),
        ({"size": (8, 8)}, r"image_size is \(8, 8\): expected a whole number, or three"),
        ({"patch": (4, 4, 12), "size": 24}, "patch_size is 4x4x12: expected 1, 2, 4, 8, 16 or a multiple of 32 on"),
        ({"normalize": "imagenet"}, "normalize is imagenet: expected one of dataset, zscore, percentiles, none, since"),
        ({"normalize": "minmax"}, "normalize is minmax: expected one of imagenet, dataset, zscore"),
        ({"below_tile": "dense"}, "below_tile is dense: expected raise, since fcmae takes the map of the largest"),
        ({"model": "no_such_module:net"}, "model is no_such_module:net: ModuleNotFoundError: No module named"),
        ({"model": "math:pi"}, "model is math:pi: TypeError: pi is a float; expected a Python module and a function"),
    ],
)
def test_a_field_that_does_not_fit_is_named(fields, message):
    with pytest.raises(InputError, match=message):
        recipe(**fields)
