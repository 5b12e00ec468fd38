import errno
import os

import pytest
from PIL import Image

from sparsecnx.common.errors import InputError
from sparsecnx.train.data.find import find_data
from sparsecnx.train.data.formats import decode
from sparsecnx.train.data.images import ImageSet, wheel_photographs
from sparsecnx.train.data.pictures import UnsupportedImage
from sparsecnx.train.recipe import Recipe


def test_find_data_looks_everywhere_and_at_images_only(photos, tmp_path):
    (photos / "notes.txt").write_text("no image")
    (tmp_path / "elsewhere").mkdir()
    (photos / "0.png").rename(tmp_path / "elsewhere" / "0.JPG")
    os.symlink(tmp_path / "elsewhere", photos / "linked")
    expected = ("3.png", "6.png", "cat/1.png", "cat/4.png", "cat/7.png")
    assert find_data(photos).names == (*expected, "dog/small/2.png", "dog/small/5.png", "linked/0.JPG")


def test_fingerprints_follow_names_sizes_and_contents_and_not_the_place(photos, tmp_path):
    before = find_data(photos).fingerprint()
    moved = photos.rename(tmp_path / "moved")
    assert find_data(moved).fingerprint() == before

    whole = (moved / "3.png").read_bytes()
    (moved / "3.png").write_bytes(whole + b"\0")
    larger = find_data(moved).fingerprint()
    assert larger.names == before.names and larger.sizes != before.sizes
    (moved / "3.png").write_bytes(whole[:-1] + b"?")
    other = find_data(moved).fingerprint()
    assert other[:2] == before[:2] and other.contents != before.contents

    (moved / "3.png").rename(moved / "4.png")
    assert find_data(moved).fingerprint().names != before.names


def test_a_sample_is_spread_over_all_images():
    assert ImageSet("", tuple("abcd")).sample() == [0, 1, 2, 3]
    sample = ImageSet("", ("a",) * 1000).sample()
    assert len(set(sample)) == 256 and sample[0] == 0 and sample[-1] > 990


def test_a_folder_that_cannot_be_listed_is_not_left_out(photos, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("cat"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"photos: cannot be listed \(.*Permission denied.*cat"):
        find_data(photos)


def test_data_folder_missing_a_file_or_empty(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, reason in (("missing", "no such folder"), ("file", "not a folder"), ("empty", "holds no images")):
        with pytest.raises(InputError, match=f"data is .*{name}: {reason}"):
            find_data(tmp_path / name)


def test_wheel_photographs_are_two_dozen_readable_ones():
    images = wheel_photographs()
    assert len(images.names) >= 20
    for index in range(len(images.names)):
        pixels = decode(images.path(index), 3)
        assert pixels.shape[0] == 3
        assert pixels.float().std() > 5, images.names[index]


def test_a_link_to_a_parent_is_not_followed_round_and_round(photos):
    before = find_data(photos)
    os.symlink(photos, photos / "cat" / "round")
    assert find_data(photos) == before


UNSUPPORTED = {
    "colour10.ppm": (lambda path: path.write_bytes(b"P6 2 1 1023\n" + bytes(12)), "more than 8 bits"),
    "pages.tif": (lambda path: two_pages(path), "2 pages or frames: expected one image in a file; --pages channels or"),
    "frames.webp": (lambda path: two_pages(path), "2 pages or frames: expected one"),
    "large.png": (
        lambda path: Image.new("1", (9000, 8000)).save(path),
        "9000 x 8000 pixels, more than --max-pixels, 64",
    ),
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
        decode(str(photos / name), 3, max_pixels=Recipe.max_pixels)
    with pytest.raises(InputError, match=rf"data is .*photos: holds {name}, which .*{reason}"):
        find_data(photos).check(Recipe())


def test_a_larger_limit_of_pixels_lets_an_image_in(tmp_path):
    Image.new("L", (20, 10)).save(tmp_path / "a.png")
    with pytest.raises(UnsupportedImage, match="has 20 x 10 pixels, more than --max-pixels, 199; a larger one"):
        decode(str(tmp_path / "a.png"), 3, max_pixels=199)
    assert decode(str(tmp_path / "a.png"), 3, max_pixels=200).shape == (3, 10, 20)


def test_the_preview_behind_a_photograph_of_a_phone_is_no_page(tmp_path):
    photograph = Image.new("RGB", (4, 4), "red")
    photograph.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[photograph.resize((2, 2))])
    assert decode(str(tmp_path / "a.jpg"), 3).shape == (3, 4, 4)


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
        pixels = decode(str(tmp_path / f"a.{ending}"), 3).float()
        assert pixels.shape == (3, 32, 64), orientation
        assert pixels[:, :12, :12].mean() > 250, orientation
        assert pixels[:, 20:].mean() < 5, orientation
        assert pixels[:, :, 20:].mean() < 5, orientation


def test_damaged_exif_data_do_not_hide_a_photograph(tmp_path):
    Image.new("RGB", (4, 8)).save(tmp_path / "a.jpg", exif=b"Exif\0\0no TIFF header")
    assert decode(str(tmp_path / "a.jpg"), 3).shape == (3, 8, 4)
