import errno
import os
import pickle
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from sparsecnx.common.errors import InputError
from sparsecnx.train import data
from sparsecnx.train.data import (
    Crops,
    Draw,
    UnsupportedImage,
    find_images,
    load_batches,
    normalize,
    read_image,
    wheel_photographs,
)
from sparsecnx.train.recipe import MAX_PIXELS, Recipe

SMALL = Recipe(image_size=64, epochs=2, batch_size=2, seed=5)


def draws(start=0, images=8, **fields):
    return list(data.draws(replace(SMALL, **fields), images, start=start))


def test_find_images_looks_everywhere_and_at_images_only(photos, tmp_path):
    (photos / "notes.txt").write_text("no image")
    (tmp_path / "elsewhere").mkdir()
    (photos / "0.png").rename(tmp_path / "elsewhere" / "0.JPG")
    os.symlink(tmp_path / "elsewhere", photos / "linked")
    expected = ("3.png", "6.png", "cat/1.png", "cat/4.png", "cat/7.png")
    assert find_images(photos).names == (*expected, "dog/small/2.png", "dog/small/5.png", "linked/0.JPG")


def test_fingerprints_follow_names_sizes_and_contents_and_not_the_place(photos, tmp_path):
    before = find_images(photos).fingerprint()
    moved = photos.rename(tmp_path / "moved")
    assert find_images(moved).fingerprint() == before

    whole = (moved / "3.png").read_bytes()
    (moved / "3.png").write_bytes(whole + b"\0")
    larger = find_images(moved).fingerprint()
    assert larger.names == before.names and larger.sizes != before.sizes
    (moved / "3.png").write_bytes(whole[:-1] + b"?")
    other = find_images(moved).fingerprint()
    assert other[:2] == before[:2] and other.contents != before.contents

    (moved / "3.png").rename(moved / "4.png")
    assert find_images(moved).fingerprint().names != before.names


def test_a_sample_is_spread_over_all_images():
    assert data.ImageSet("", tuple("abcd"), False).sample() == [0, 1, 2, 3]
    sample = data.ImageSet("", ("a",) * 1000, False).sample()
    assert len(set(sample)) == 256 and sample[0] == 0 and sample[-1] > 990


def test_a_folder_that_cannot_be_listed_is_not_left_out(photos, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("cat"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"photos: cannot be listed \(.*Permission denied.*cat"):
        find_images(photos)


def test_data_folder_missing_a_file_or_empty(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, reason in (("missing", "no such folder"), ("file", "not a folder"), ("empty", "holds no images")):
        with pytest.raises(InputError, match=f"data is .*{name}: {reason}"):
            find_images(tmp_path / name)


def test_wheel_photographs_are_two_dozen_readable_ones():
    images = wheel_photographs()
    assert len(images.names) >= 20
    for index in range(len(images.names)):
        pixels = read_image(images.path(index))
        assert pixels.shape[0] == 3
        assert pixels.float().std() > 5, images.names[index]


def test_normalize_is_imagenets():
    images = torch.tensor([0, 255]).to(torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    black, white = normalize(images).flatten(1)
    torch.testing.assert_close(black, torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]))
    torch.testing.assert_close(white, torch.tensor([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]))


def test_an_epoch_shows_every_image_epoch_repeats_times():
    batches = draws(epoch_repeats=3)
    assert len(batches) == 2 * 12
    shown = [draw.image for batch in batches[:12] for draw in batch]
    assert sorted(shown) == sorted(list(range(8)) * 3)


def test_epochs_differ_in_order_and_crops():
    first, second = draws()[:4], draws()[4:]
    assert [d.image for b in first for d in b] != [d.image for b in second for d in b]
    assert len({d.seed for b in first + second for d in b}) == 16
    assert draws(seed=6)[:4] != first


@pytest.mark.parametrize("start", [1, 4, 7])
def test_draws_go_on_where_they_stopped(start):
    assert draws(start=start) == draws()[start:]


def test_a_crop_depends_on_its_draw_alone(photos):
    crops = Crops(find_images(photos), 64)
    first, _ = crops[Draw(2, seed=1)]
    state = torch.get_rng_state()
    other, _ = crops[Draw(2, seed=2)]
    again, _ = crops[Draw(2, seed=1)]
    assert first.shape == (3, 64, 64)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def read_all(crops, **options):
    with load_batches(crops, SMALL, pin_memory=False, **options) as batches:
        return list(batches)


def test_batches_do_not_depend_on_the_number_of_workers(photos):
    crops = Crops(find_images(photos), 64)
    none, two = ([batch.images for batch in read_all(crops, start=1, workers=n)] for n in (0, 2))
    assert len(none) == len(two) == 7
    assert all(torch.equal(a, b) for a, b in zip(none, two, strict=True))


def test_unreadable_files_give_their_place_to_the_next(photos):
    whole = (photos / "6.png").read_bytes()
    (photos / "3.png").write_bytes(whole[: len(whole) // 2])
    (photos / "cat" / "1.png").write_bytes(b"not an image")
    crops = Crops(find_images(photos), 64)
    assert crops.images.names[1:4] == ("3.png", "6.png", "cat/1.png")

    pixels, unreadable = crops.read(1)
    assert torch.equal(pixels, pil_to_tensor(Image.open(photos / "6.png")))
    assert list(unreadable) == ["3.png"]
    assert "truncated" in unreadable["3.png"]

    batches = read_all(crops, start=0, workers=0)
    assert all(batch.images.shape == (2, 3, 64, 64) for batch in batches)
    assert {name for batch in batches for name in batch.unreadable} == {"3.png", "cat/1.png"}


def test_no_readable_file_at_all(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "b.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"none of its 2 image files can be read, first b\.jpg"):
        Crops(find_images(tmp_path), 64).read(1)


def test_a_link_to_a_parent_is_not_followed_round_and_round(photos):
    before = find_images(photos)
    os.symlink(photos, photos / "cat" / "round")
    assert find_images(photos) == before


def grey(values, dtype, path, **options):
    Image.fromarray(np.asarray(values, dtype).reshape(2, -1)).save(path, **options)


def png_of_16_bits(path):
    """Write a PNG of 16-bit RGB, which Pillow only reads, to 8 bits."""
    pixels = np.full((2, 13), 257, ">u2").tobytes()  # two rows, each with a zero byte for its filter, of 2 pixels
    rows = b"".join(b"\0" + pixels[i : i + 12] for i in (0, 12))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, body in chunks:
            file.write(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)))


UNSUPPORTED = {
    "float.tif": (lambda path: grey([0, 0.5, 0.7, 1], "float32", path), "mode F"),
    "int32.tif": (lambda path: grey([0, 500, 70_000, 1], "int32", path), "mode I"),
    "uint16.tif": (lambda path: grey([0, 500, 4095, 1], "uint16", path), "mode I;16"),
    "uint16.png": (lambda path: grey([0, 500, 4095, 1], "uint16", path), "more than 8 bits"),
    "colour16.png": (png_of_16_bits, "more than 8 bits"),
    "colour10.ppm": (lambda path: path.write_bytes(b"P6 2 1 1023\n" + bytes(12)), "more than 8 bits"),
    "signed.tif": (lambda path: Image.new("L", (2, 2)).save(path, tiffinfo={339: 2}), "or signed ones"),
    "pages.tif": (lambda path: two_pages(path), "2 pages or frames: expected one"),
    "frames.webp": (lambda path: two_pages(path), "2 pages or frames: expected one"),
    "large.png": (lambda path: Image.new("1", (9000, 8000)).save(path), "9000 x 8000 pixels, more than max_pixels, 64"),
    "fifo.png": (os.mkfifo, "is a FIFO; expected a regular file"),
    "zero.png": (lambda path: path.symlink_to("/dev/zero"), "is a device; expected a regular file"),
}


def two_pages(path):
    pages = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    pages[0].save(path, save_all=True, append_images=pages[1:])


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_image_that_would_be_cut_or_clipped_is_refused(name, photos):
    write, reason = UNSUPPORTED[name]
    write(photos / name)
    with pytest.raises(UnsupportedImage, match=reason):
        read_image(str(photos / name))
    with pytest.raises(InputError, match=rf"data is .*photos: holds {name}, which .*{reason}"):
        find_images(photos).refuse_unsupported(MAX_PIXELS)


def test_a_larger_limit_of_pixels_lets_an_image_in(tmp_path):
    Image.new("L", (20, 10)).save(tmp_path / "a.png")
    with pytest.raises(UnsupportedImage, match="has 20 x 10 pixels, more than max_pixels, 199; a larger max_pixels"):
        read_image(str(tmp_path / "a.png"), 199)
    assert read_image(str(tmp_path / "a.png"), 200).shape == (3, 10, 20)


def test_the_preview_behind_a_photograph_of_a_phone_is_no_page(tmp_path):
    photograph = Image.new("RGB", (4, 4), "red")
    photograph.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[photograph.resize((2, 2))])
    assert read_image(str(tmp_path / "a.jpg")).shape == (3, 4, 4)


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_photographs_are_turned_upright(ending, tmp_path):
    upright = Image.new("L", (64, 32))
    upright.paste(255, (0, 0, 16, 16))  # the top left corner is white
    # To be upright, a camera that was turned has to be turned back: the inverse of what readers do.
    lying = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    for orientation, method in lying.items():
        image = upright if method is None else upright.transpose(Image.Transpose(method))
        exif = Image.Exif()
        exif[274] = orientation
        image.convert("RGB").save(tmp_path / f"a.{ending}", exif=exif)
        pixels = read_image(str(tmp_path / f"a.{ending}")).float()
        assert pixels.shape == (3, 32, 64), orientation
        assert pixels[:, :12, :12].mean() > 250, orientation
        assert pixels[:, 20:].mean() < 5, orientation
        assert pixels[:, :, 20:].mean() < 5, orientation


def test_damaged_exif_data_do_not_hide_a_photograph(tmp_path):
    Image.new("RGB", (4, 8)).save(tmp_path / "a.jpg", exif=b"Exif\0\0no TIFF header")
    assert read_image(str(tmp_path / "a.jpg")).shape == (3, 8, 4)


def test_an_input_error_survives_pickling():
    error = pickle.loads(pickle.dumps(InputError("data", "here", "gone")))
    assert (str(error), error.argument, error.problem) == ("data is here: gone", "data", "is here: gone")
