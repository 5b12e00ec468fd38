import gzip
import io
import re
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import logged, signal_after, train
from small_shards import png
from torch.utils.data import TensorDataset

from sparsecnx.common.errors import InputError
from sparsecnx.train.data.address import parse
from sparsecnx.train.data.formats import decode
from sparsecnx.train.data.items import first_image
from sparsecnx.train.data.memory import memory_header, memory_pixels
from sparsecnx.train.data.pictures import UnsupportedImage
from sparsecnx.train.data.sources import of_checkpoint, open_source
from sparsecnx.train.recipe import Recipe
from sparsecnx.train.reconstruct import reconstruct

RECIPE = Recipe(image_size=64)


@pytest.mark.parametrize(
    ("data", "kind", "what", "options"),
    [
        ("torchvision:CIFAR10:/data?train=false", "torchvision", "CIFAR10:/data", {"train": "false"}),
        ("hf:name/of-it?split=train&column=image", "hf", "name/of-it", {"split": "train", "column": "image"}),
        ("wds:a-?.tar", "wds", "a-?.tar", {}),
        ("wds:https://x/a.json?key=3?image=jpg", "wds", "https://x/a.json?key=3", {"image": "jpg"}),
    ],
)
def test_the_parts_of_an_address(data, kind, what, options):
    address = parse(data)
    assert address == (kind, what, options) and str(address) == data


@pytest.mark.parametrize("folder", ["photos", "./hf:photos", "C:/photos", "/data/a:b", "HF:x"])
def test_folders_are_no_addresses(folder):
    assert parse(folder) is None


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("hf:", "names nothing"),
        ("hf:x?split=", "has the option 'split='; expected name=value"),
        ("hf:x?split=a&split=b", "has the option 'split=b'; expected name=value, each name once"),
        ("hf:x?splt=a", "has the option splt; expected split, column, config, revision"),
        ("torchvision:CIFAR", "torchvision has no data set 'CIFAR'"),
        ("torchvision:wrap_dataset_for_transforms_v2", "torchvision has no data set"),
        ("torchvision:CIFAR10:x?trian=1", "has the option trian; expected train, download"),
        ("torchvision:CIFAR10:x?train=1", "has the option train=1; expected true or false"),
        ("torchvision:FakeData?size=many", "has the option size=many; expected a number"),
        ("torchvision:FakeData?image_size=3", "has the option image_size; expected size, num_classes, random_offset"),
        (
            "torchvision:EMNIST:nowhere?split=letters&train=false&download=no",
            "has the option download=no; expected true",
        ),
        ("torchvision:EMNIST:nowhere?split=letters&train=false", "cannot be opened (RuntimeError: Dataset not found"),
        ("torchvision:QMNIST:nowhere?what=test&download=false", "cannot be opened (RuntimeError: Dataset not found"),
        ("torchvision:Imagenette:nowhere?download=false", "cannot be opened (RuntimeError: Dataset not found"),
        ("torchvision:CIFAR10", "cannot be opened (TypeError"),
        ("torchvision:CIFAR10:nowhere", "cannot be opened (RuntimeError: Dataset not found"),
        ("python:no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("python:torch:rand?size=3", "has the option size; expected none"),
    ],
)
def test_wrong_addresses_are_named(data, problem, tmp_path, monkeypatch):
    pytest.importorskip("torchvision", reason="needs a torchvision that fits this torch")
    pytest.importorskip("datasets", reason="needs the extra [hf]")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"data is {re.escape(data)}.*: {re.escape(problem)}"):
        open_source(data)


def resumes(data, tmp_path, monkeypatch):
    """Train a run and a stopped one, which goes on with the data that its checkpoint names; return their logs."""
    assert train(data, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        signal_after(3, patch)
        assert train(data, tmp_path / "parts", workers=2) == 143
    assert train(None, tmp_path / "parts", resume="newest", workers=1) == 0
    return logged(tmp_path / "whole"), logged(tmp_path / "parts")


def write_fashion_mnist(root, images):
    """Write images and labels as the files of FashionMNIST."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    count, height, width = images.shape
    labels = struct.pack(">2i", 2049, count) + bytes(count)
    pixels = struct.pack(">4i", 2051, count, height, width) + images.numpy().tobytes()
    for name, data in {"images-idx3": pixels, "labels-idx1": labels}.items():
        for part in ("train", "t10k"):
            (folder / f"{part}-{name}-ubyte").write_bytes(data)
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(data))


def test_data_sets_of_torchvision(tmp_path, monkeypatch):
    pytest.importorskip("torchvision", reason="needs a torchvision that fits this torch")
    images = torch.randint(256, (8, 28, 28), dtype=torch.uint8)
    write_fashion_mnist(tmp_path / "data", images)
    monkeypatch.chdir(tmp_path)
    source = open_source("torchvision:FashionMNIST:data?train=true")
    assert len(source) == 8 and source.place == f"torchvision:FashionMNIST:{tmp_path}/data?train=true"
    assert torch.equal(source.read(5, RECIPE), images[5].expand(3, 28, 28))

    whole, parts = resumes("torchvision:FashionMNIST:data", tmp_path, monkeypatch)
    assert whole == parts and len(whole) == 8


def test_other_data_under_the_same_name_are_noticed(tmp_path):
    pytest.importorskip("torchvision", reason="needs a torchvision that fits this torch")
    images = torch.randint(256, (8, 28, 28), dtype=torch.uint8)
    write_fashion_mnist(tmp_path / "data", images)
    data = f"torchvision:FashionMNIST:{tmp_path}/data"
    assert train(data, tmp_path / "run") == 0
    for folder, changed in {"fewer": images[:7], "other": images ^ 1, "same": images}.items():
        write_fashion_mnist(tmp_path / folder, changed)
    for folder, problem in {"fewer": "7 image", "other": "other contents"}.items():
        with pytest.raises(InputError, match=problem):
            train(data.replace("/data", f"/{folder}"), tmp_path / "run", resume="newest")
    assert train(data.replace("/data", "/same"), tmp_path / "run", resume="newest") == 0


def test_an_image_folder_of_torchvision_is_read_as_the_folder(photos, tmp_path):
    pytest.importorskip("torchvision", reason="needs a torchvision that fits this torch")
    (photos / "0.png").unlink()
    turned = Image.new("RGB", (30, 20), "red")
    turned.getexif()[274] = 6
    turned.save(photos / "cat" / "turned.jpg", exif=turned.getexif())
    source = open_source(f"torchvision:ImageFolder:{photos}")
    path, _ = source.items.samples[0]
    assert path.endswith("cat/1.png") and torch.equal(source.read(0, RECIPE), decode(path, 3))
    index = [path.rpartition("/")[2] for path, _ in source.items.samples].index("turned.jpg")
    assert source.read(index, RECIPE).shape == (3, 30, 20)


def test_an_image_folder_of_torchvision_keeps_16_bits_and_bands(photos, tmp_path):
    pytest.importorskip("torchvision", reason="needs a torchvision that fits this torch")
    tifffile = pytest.importorskip("tifffile", reason="needs tifffile")
    values = np.random.default_rng(0).integers(256, 65536, (3, 70, 80), np.uint16)
    (tmp_path / "deep" / "a").mkdir(parents=True)
    Image.fromarray(values[0]).save(tmp_path / "deep" / "a" / "0.png")
    tifffile.imwrite(tmp_path / "deep" / "a" / "1.tif", values, photometric="minisblack", planarconfig="separate")
    source = open_source(f"torchvision:ImageFolder:{tmp_path}/deep")
    assert [(source.header(i).dtype, source.header(i).channels) for i in (0, 1)] == [("uint16", 1), ("uint16", 3)]
    for index, channels in ((0, 1), (1, 3)):
        read = source.read(index, Recipe(image_size=64, in_chans=channels, normalize="none"))
        assert torch.equal(read, torch.from_numpy(values[:channels].astype(np.float32)))
    before = source.fingerprint()
    (tmp_path / "deep" / "a" / "0.png").write_bytes(b"")
    assert open_source(f"torchvision:ImageFolder:{tmp_path}/deep").fingerprint().contents != before.contents
    assert train(f"torchvision:ImageFolder:{photos}", tmp_path / "run") == 0


def test_the_channels_of_arrays_in_memory():
    many = np.zeros((181, 56, 48), np.float32)
    with pytest.raises(UnsupportedImage, match=r"of 181 or 48 channels: expected --in-chans 181 or --in-chans 48"):
        memory_header(many)
    for image, in_chans in ((many, 181), (torch.from_numpy(many), None), (many.transpose(1, 2, 0), 181)):
        assert (memory_header(image, in_chans).channels, memory_header(image, in_chans).width) == (181, 48)
    recipe = Recipe(image_size=32, patch_size=16, in_chans=181, normalize="none")
    assert memory_pixels(many.transpose(1, 2, 0), recipe).shape == many.shape
    assert memory_pixels(torch.zeros(5, 8, 3), replace(recipe, in_chans=5)).shape == (5, 8, 3)


def hugging_face():
    return pytest.importorskip("datasets", reason="needs the extra [hf]")


@pytest.fixture
def hf_home(tmp_path, monkeypatch):
    """Let Hugging Face keep what it prepares in a folder of the test."""
    datasets = hugging_face()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    return datasets


def photos_of(datasets, count=8, **columns):
    images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(count)]
    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    features |= {name: datasets.Image() for name in columns}
    rows = {"image": images, "label": list(range(count)), **dict.fromkeys(columns, images)}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def test_a_saved_data_set_of_hugging_face(tmp_path, monkeypatch, hf_home):
    photos_of(hf_home).save_to_disk(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    source = open_source("hf:saved")
    assert len(source) == 8 and source.place == f"hf:{tmp_path}/saved" and source.name(3) == "item 3 (3.png)"
    assert all(torch.equal(source.read(i, RECIPE), decode(png(i), 3)) for i in range(8))
    whole, parts = resumes("hf:saved", tmp_path, monkeypatch)
    assert whole == parts and len(whole) == 8


def test_files_of_hugging_face_and_their_splits(tmp_path, hf_home):
    hf_home.DatasetDict(train=photos_of(hf_home), test=photos_of(hf_home, 3)).save_to_disk(tmp_path / "both")
    assert len(open_source(f"hf:{tmp_path}/both")) == 8
    assert len(open_source(f"hf:{tmp_path}/both?split=test")) == 3
    with pytest.raises(InputError, match="has no split valid; expected split= one of train, test"):
        open_source(f"hf:{tmp_path}/both?split=valid")

    (tmp_path / "files").mkdir()
    photos_of(hf_home, 5).to_parquet(tmp_path / "files" / "train.parquet")
    source = open_source(f"hf:{tmp_path}/files?split=train")
    assert len(source) == 5 and torch.equal(source.read(4, RECIPE), decode(png(4), 3))
    with pytest.raises(InputError, match=r"cannot be loaded \("):
        open_source(f"hf:{tmp_path}/nothing")


def test_one_split_alone_is_loaded(tmp_path, monkeypatch, hf_home):
    (tmp_path / "files").mkdir()
    for count, split in ((5, "train"), (3, "test")):
        photos_of(hf_home, count).to_parquet(tmp_path / "files" / f"{split}.parquet")
    loaded, load = [], hf_home.load_dataset
    monkeypatch.setattr(hf_home, "load_dataset", lambda *a, **k: (loaded.append(k["split"]), load(*a, **k))[1])
    assert len(open_source(f"hf:{tmp_path}/files")) == 5
    assert len(open_source(f"hf:{tmp_path}/files?split=test")) == 3
    with pytest.raises(InputError, match=r"has no split valid; expected split= one of (test, train|train, test)"):
        open_source(f"hf:{tmp_path}/files?split=valid")
    assert loaded == ["train", "test"]


def test_the_column_of_images(tmp_path, hf_home):
    photos_of(hf_home, depth=None).save_to_disk(tmp_path / "two")
    with pytest.raises(InputError, match="has several columns of images, image, depth; expected column= one of them"):
        open_source(f"hf:{tmp_path}/two")
    assert len(open_source(f"hf:{tmp_path}/two?column=depth")) == 8
    with pytest.raises(InputError, match=r"in a column label; its columns are image \(Image\), label \(Value\)"):
        open_source(f"hf:{tmp_path}/two?column=label")
    photos_of(hf_home).remove_columns("image").save_to_disk(tmp_path / "none")
    with pytest.raises(InputError, match=r"has no column of type Image or Array; its columns are label \(Value\)"):
        open_source(f"hf:{tmp_path}/none")
    photos_of(hf_home).select([]).save_to_disk(tmp_path / "empty")
    with pytest.raises(InputError, match="cannot be loaded"):  # which is what load_from_disk does with it
        open_source(f"hf:{tmp_path}/empty")


def test_arrays_of_hugging_face(tmp_path, hf_home):
    features = hf_home.Features(array=hf_home.Array3D((3, 8, 9), "uint8"))
    arrays = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 9), np.uint8)
    hf_home.Dataset.from_dict({"array": list(arrays)}, features=features).save_to_disk(tmp_path / "arrays")
    source = open_source(f"hf:{tmp_path}/arrays")
    assert all(torch.equal(source.read(i, RECIPE), torch.from_numpy(arrays[i])) for i in range(4))


def test_a_row_without_an_image_is_skipped_and_named(tmp_path, capsys, hf_home):
    rows = {"image": [None if i == 3 else {"bytes": png(i), "path": None} for i in range(8)]}
    features = hf_home.Features(image=hf_home.Image())
    hf_home.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "holes")
    assert train(f"hf:{tmp_path}/holes", tmp_path / "run") == 0
    assert "skipped unreadable image item 3 (" in capsys.readouterr().out


CODE = """
from PIL import Image
from torch.utils.data import IterableDataset

class Squares:
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return Image.new("RGB", (40, 40), (index, 0, 0)), index

def squares():
    return Squares()

class Stream(IterableDataset):
    def __iter__(self):
        return iter(Squares())

def number():
    return 3

def nothing():
    return []

def stream():
    return Stream()
"""


def test_a_data_set_in_python_runs_only_where_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "squares_of_test.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    data = "python:squares_of_test:squares"
    source = open_source(data)
    assert [int(source.read(i, RECIPE)[0, 0, 0]) for i in range(8)] == list(range(8))
    assert train(data, tmp_path / "run") == 0
    with pytest.raises(InputError, match=f"its data are Python code, {data}, which runs only with"):
        train(None, tmp_path / "run", resume="newest")
    assert train(data, tmp_path / "run", resume="newest") == 0
    for function, problem in {"number": "returned a int", "stream": "returned a Stream"}.items():
        with pytest.raises(InputError, match=f"{problem}; expected a data set that gives items by their number"):
            open_source(f"python:squares_of_test:{function}")
    with pytest.raises(InputError, match="holds no item"):
        open_source("python:squares_of_test:nothing")


RANDOM = """
import torch
from torch.utils.data import Dataset

class Flipped(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        image = torch.arange(75, dtype=torch.uint8).view(3, 5, 5)
        return image.flip(2) if torch.rand(()) < 0.5 else image

def flipped():
    torch.manual_seed(0)
    return Flipped()
"""


def test_a_data_set_in_python_that_draws_random_numbers_is_refused(tmp_path, monkeypatch):
    (tmp_path / "random_of_test.py").write_text(RANDOM)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        InputError, match=r"item \d+ differs when it is read again; .* --transform takes random changes"
    ):
        train("python:random_of_test:flipped", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("saved", "kept"),
    [
        ("torchvision:CIFAR10:/data?train=true&download=true", "torchvision:CIFAR10:/data?train=true"),
        ("wds:https://x/{0..3}.tar?cache=/home&window=2&cache_gb=9", "wds:https://x/{0..3}.tar?window=2"),
        ("hf:name?split=train", "hf:name?split=train"),
        ("/data/photos?cache=x", "/data/photos?cache=x"),
        (None, None),
    ],
)
def test_an_address_in_a_checkpoint_chooses_no_place_to_write_to(saved, kept):
    assert of_checkpoint(saved) == kept


IMAGE = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3))


def two_frames():
    file = io.BytesIO()
    IMAGE.save(file, "GIF", save_all=True, append_images=[IMAGE.rotate(90)])
    return Image.open(file)


PIXELS = torch.arange(60, dtype=torch.uint8).view(4, 5, 3).permute(2, 0, 1)


@pytest.mark.parametrize(
    "item",
    [
        IMAGE,
        (IMAGE, 3),
        [PIXELS],
        {"label": 3, "image": IMAGE},
        np.array(IMAGE),
        PIXELS,
        TensorDataset(PIXELS[None])[0],
    ],
    ids=["image", "pair", "list", "dict", "array", "tensor", "tensors"],
)
def test_items(item):
    assert torch.equal(memory_pixels(first_image(item), RECIPE), PIXELS)


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        ("text", "is str: expected an image"),
        ((3, IMAGE), "begins with int: expected an image"),
        ((), "is tuple: expected an image"),
        (
            {"rgb": IMAGE, "depth": IMAGE},
            "is a dict of rgb, depth: expected an image or array in it, under",
        ),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "is an array of uint8 (2, 3, 4, 4): expected numbers"),
        (two_frames(), "--pages channels or --pages images says what those of a TIFF in a folder are"),
        (np.array([["a"]]), "is an array of <U1 (1, 1): expected numbers"),
        (Image.new("L", (100, 80)), "has 100 x 80 pixels, more than --max-pixels, 4096"),
        (torch.zeros(80, 100), "has 100 x 80 pixels, more than --max-pixels, 4096"),
        (torch.zeros(5, 8, 8), "has 5 channels: expected 3"),
    ],
)
def test_items_that_are_no_images(item, problem):
    with pytest.raises(UnsupportedImage, match=re.escape(problem)):
        memory_pixels(first_image(item), Recipe(image_size=64, max_pixels=4096))


@pytest.mark.parametrize(
    ("image", "kind", "channels", "values"),
    [
        (Image.fromarray(np.full((4, 5), 700, np.uint16)), "uint16", 1, 700.0),
        (Image.fromarray(np.full((4, 5), 0.5, np.float32)), "float32", 3, 0.5),
        (np.full((6, 8, 9), -3, np.int16), "int16", 6, -3.0),
        (torch.full((4, 30, 30), 1.5), "float32", 4, 1.5),
        (np.full((30, 30, 7), 9, np.uint8), "uint8", 7, 9.0),
    ],
    ids=["16 bits", "floats", "bands first", "tensor", "bands last"],
)
def test_images_of_other_depths_and_channels_keep_their_values(image, kind, channels, values):
    recipe = Recipe(image_size=64, in_chans=channels, normalize="none")
    pixels = memory_pixels(image, recipe)
    header = memory_header(image)
    assert (header.dtype, header.picture) == (kind, False)
    assert pixels.shape == (channels, header.height, header.width) and (pixels == values).all()


BANDS = """
import torch

class Bands:
    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.rand(5, 70, 80, generator=generator) * 10

def bands():
    return Bands()
"""


def test_arrays_of_many_bands_are_measured_and_trained_on(tmp_path, monkeypatch, capsys):
    (tmp_path / "bands_of_test.py").write_text(BANDS)
    monkeypatch.syspath_prepend(tmp_path)
    assert train("python:bands_of_test:bands", tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "8 looked at, 8 float32 5 bands; as 5 channels" in out
    assert re.search(r"mean (5\.0\d*|4\.9\d*) .* \(measured\), standard deviation 2\.8", out)
    with pytest.raises(InputError, match="expected names of images: those of the run come from Python code"):
        reconstruct(tmp_path / "run" / "last.pt", [], tmp_path / "grid.png")


def test_pages_are_images_in_a_folder_alone(photos, tmp_path):
    with pytest.raises(InputError, match="pages is images: expected channels, or a folder of files"):
        train(f"torchvision:ImageFolder:{photos}", tmp_path / "run", pages="images")
