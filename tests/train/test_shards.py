import gzip
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import tarfile
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("webdataset", reason="needs the extra [webdataset]")

from small_runs import logged, signal_after, train
from small_shards import png, served, write_shards, write_tar

from sparsecnx.common.errors import InputError, TrainingStopped
from sparsecnx.common.torch_files import save_torch
from sparsecnx.train import checkpoint
from sparsecnx.train.data import shard_files
from sparsecnx.train.data.crops import Crops, Draw, draws
from sparsecnx.train.data.find import find_source
from sparsecnx.train.data.loader import load_batches
from sparsecnx.train.data.opening import open_source
from sparsecnx.train.data.order import shuffled_by_shard
from sparsecnx.train.data.shard_files import Copies, Shard
from sparsecnx.train.data.shard_index import index_tar
from sparsecnx.train.processes import Processes
from sparsecnx.train.recipe import Recipe
from sparsecnx.train.reconstruct import reconstruct

RECIPE = Recipe(image_size=64, epochs=2, batch_size=2, seed=5)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep indexes and copies in a folder of the test, and fail soon."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_files, "SECONDS_BETWEEN", 0.01)
    return tmp_path / "cache" / "sparsecnx" / "shards"


def numbers(source):
    """Return the number that the first pixel of each image tells."""
    return [int(source.read(i, RECIPE)[0, 0, 0]) for i in range(len(source))]


def order(counts, ranks=1, batch=4, repeats=1, epoch=0, window=2):
    return shuffled_by_shard(counts, repeats, 3, epoch, window=window, batch=batch, ranks=ranks).tolist()


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("counts", [[9, 3, 20, 1, 12, 7, 12], [64], [1, 63]], ids=len)
def test_the_order_shows_every_entry_once_over_all_ranks(counts, ranks):
    """With fewer shards than ranks, too: the ranks have equal parts of the samples, not of the shards."""
    assert sorted(order(counts, ranks)) == list(range(64))
    assert order(counts, ranks) == order(counts, ranks) != order(counts, ranks, epoch=1)
    assert set(Counter(order(counts, ranks, repeats=3)).values()) == {3}


def test_what_fills_no_batch_is_left_out():
    shown = order([10, 11, 10], ranks=2, batch=8)
    assert len(shown) == 24 and len(set(shown)) == 24


def test_a_rank_reads_few_shards_at_a_time_and_each_only_once():
    counts, ranks, window = [50] * 40, 4, 3
    shown = torch.tensor(order(counts, ranks, batch=8, window=window)).view(-1, ranks, 2)
    for rank in range(ranks):
        shards = (shown[:, rank].flatten() // 50).tolist()
        assert len(set(shards)) <= 40 // ranks + 1
        spans = {s: (shards.index(s), len(shards) - shards[::-1].index(s)) for s in set(shards)}
        open_at_once = [sum(first <= i < last for first, last in spans.values()) for i in range(len(shards))]
        assert max(open_at_once) <= window + 1
        middle = shards[200:300]
        assert len(set(middle)) > 2, "the shards of a window are mixed"


@pytest.mark.parametrize("pattern", ["train-{000..002}.tar", "train-*.tar", "train-{000,001}.tar::{}/train-002.tar"])
def test_shards_are_read_by_their_number(tmp_path, pattern):
    write_shards(tmp_path / "data", [3, 1, 4])
    source = open_source(f"wds:{tmp_path}/data/{pattern.replace('{}', str(tmp_path / 'data'))}")
    assert len(source) == 8 and numbers(source) == list(range(8))
    assert source.name(3) == "train-001.tar/a/00003"
    assert sorted(os.listdir(tmp_path / "data")) == ["train-000.tar", "train-001.tar", "train-002.tar"]


def test_a_list_of_shards_tells_their_numbers(tmp_path):
    paths = write_shards(tmp_path, [3, 2])
    listed = [{"url": path.name, "nsamples": n} for path, n in zip(paths, [3, 2], strict=True)]
    (tmp_path / "index.json").write_text(json.dumps({"wids_version": 1, "shardlist": listed}))
    assert numbers(open_source(f"wds:{tmp_path}/index.json")) == list(range(5))
    listed[1]["nsamples"] = 4
    (tmp_path / "index.json").write_text(json.dumps({"wids_version": 1, "shardlist": listed}))
    with pytest.raises(InputError, match=r"train-001\.tar holds 2 samples, not 4 as the list says"):
        open_source(f"wds:{tmp_path}/index.json")


def test_samples_are_counted_once_and_again_where_a_shard_changed(tmp_path, cache, monkeypatch):
    (path,) = write_shards(tmp_path, [3])
    before = open_source(f"wds:{path}").fingerprint()
    (index,) = cache.glob("*.json")
    kept = index.read_bytes()
    index.write_bytes(kept[:-20])
    assert len(open_source(f"wds:{path}")) == 3, "a damaged index is written again"
    assert index.read_bytes() == kept
    with monkeypatch.context() as patch:
        patch.setattr("sparsecnx.train.data.shards.index_tar", None)
        assert open_source(f"wds:{path}").fingerprint() == before
    write_shards(tmp_path, [4])
    assert len(open_source(f"wds:{path}")) == 4


def test_the_fingerprint_notices_other_shards_and_not_another_folder(tmp_path):
    write_shards(tmp_path / "a", [3, 2])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, moved = (open_source(f"wds:{tmp_path}/{f}/*.tar").fingerprint() for f in "ab")
    assert first == moved
    data = bytearray((tmp_path / "b" / "train-000.tar").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "b" / "train-000.tar").write_bytes(data)
    changed = open_source(f"wds:{tmp_path}/b/*.tar").fingerprint()
    assert changed[:2] == first[:2] and changed.contents != first.contents
    assert open_source(f"wds:{tmp_path}/b/train-001.tar").fingerprint().names != first.names


def test_the_image_of_a_sample(tmp_path):
    files = {f"{i}.{side}.png": png(10 * i + n) for i in range(2) for n, side in enumerate(["left", "right"])}
    write_tar(tmp_path / "pairs.tar", files)
    with pytest.raises(InputError, match=r"pairs\.tar/0, which has several images in left\.png, right\.png"):
        open_source(f"wds:{tmp_path}/pairs.tar").check(RECIPE)
    assert numbers(open_source(f"wds:{tmp_path}/pairs.tar?image=right.png")) == [1, 11]
    write_tar(tmp_path / "words.tar", {"0.txt": b"a", "0.json": b"{}"})
    with pytest.raises(InputError, match=r"words\.tar/0, which has no image in txt, json"):
        open_source(f"wds:{tmp_path}/words.tar").check(RECIPE)


def test_arrays_in_shards(tmp_path):
    np.save(tmp_path / "0.npy", np.full((5, 6, 3), 7, np.uint8))
    write_tar(tmp_path / "arrays.tar", {"0.npy": (tmp_path / "0.npy").read_bytes()})
    pixels = open_source(f"wds:{tmp_path}/arrays.tar").read(0, RECIPE)
    assert torch.equal(pixels, torch.full((3, 5, 6), 7, dtype=torch.uint8))


def damaged(path, how):
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "empty":
        write_tar(path, {})
    elif how == "only metadata":
        write_tar(path, {"__info__": b"{}"})
    else:
        with tarfile.open(path) as tar:
            second = tar.getmembers()[2].offset
        contents = {
            "cut off": data[:700],
            "cut between files": data[:second],
            "cut in its end": data[: len(data.rstrip(b"\0")) // 512 * 512 + 1024],
            "bad header": data[:second] + b"x" * 512 + data[second + 512 :],
            "zeros between files": data[:second] + bytes(512) + data[second + 512 :],
            "joined": data + data,
            "gzip": gzip.compress(data),
            "a page": b"<html>" * 500,
        }
        path.write_bytes(contents[how])


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("gone", "no such file"),
        ("empty", "holds no sample; expected files such as 000.jpg"),
        ("only metadata", "holds no sample"),
        ("cut off", "is no whole tar file (unexpected end of data)"),
        ("cut between files", "is no whole tar file (is cut off)"),
        ("cut in its end", "is no whole tar file (is cut off)"),
        ("bad header", "is no whole tar file (is damaged behind byte"),
        ("zeros between files", "is no whole tar file (is damaged behind byte"),
        ("joined", "is no whole tar file (is damaged behind byte"),
        ("gzip", "is no whole tar file"),
        ("a page", "is no whole tar file"),
    ],
)
def test_a_shard_that_cannot_be_read_is_named_before_the_first_step(tmp_path, how, problem):
    paths = write_shards(tmp_path / "data", [4, 4])
    damaged(paths[1], how)
    with pytest.raises(InputError, match=rf"train-001\.tar (is )?{re.escape(problem)}"):
        train(f"wds:{tmp_path}/data/train-{{000..001}}.tar", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rest", "problem"),
    [
        ("nothing-*.tar", "no file fits"),
        ("train-000.tar::{}/train-000.tar", "more than once"),
        ("train-000.tar?windw=3", "has the option windw; expected image, window, cache, cache_gb"),
        ("train-000.tar?window=0", "has the option window=0; expected a whole number, 1 or more"),
        ("gone.json", "cannot be read (FileNotFoundError"),
    ],
)
def test_addresses_that_name_no_shards(tmp_path, rest, problem):
    write_shards(tmp_path, [2])
    with pytest.raises(InputError, match=re.escape(problem)):
        open_source(f"wds:{tmp_path}/{rest.replace('{}', str(tmp_path))}")
    with pytest.raises(InputError, match="names a command"):
        open_source("wds:pipe:touch /tmp/x")


def test_an_unreadable_sample_is_skipped_and_named(tmp_path, capsys):
    files = {f"{i}.png": png(i) if i != 3 else b"no image" for i in range(8)}
    write_tar(tmp_path / "a.tar", files)
    assert train(f"wds:{tmp_path}/a.tar", tmp_path / "run") == 0
    assert "skipped unreadable image a.tar/3 (UnidentifiedImageError" in capsys.readouterr().out


def test_a_resumed_run_has_the_same_losses_with_any_number_of_workers(tmp_path, monkeypatch):
    write_shards(tmp_path / "data", [3, 2, 3])
    data = f"wds:{tmp_path}/data/train-{{000..002}}.tar?window=2"
    assert train(data, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        signal_after(3, patch)
        assert train("wds:data/train-{000..002}.tar?window=2", tmp_path / "parts", workers=2) == 143
    assert train(None, tmp_path / "parts", resume="newest", workers=1) == 0
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")


def read_all(source, workers):
    with load_batches(Crops(source, RECIPE), draws(RECIPE, source), workers=workers, pin_memory=False) as batches:
        return [batch.images for batch in batches]


def test_more_data_than_the_disk_holds(tmp_path, cache):
    paths = write_shards(tmp_path / "data", [6] * 12)
    size = paths[0].stat().st_size
    local = open_source(f"wds:{tmp_path}/data/train-{{000..011}}.tar?window=2")
    with served(tmp_path / "data") as (address, fetched):
        room = 4.5 * max(path.stat().st_size for path in paths) / 1e9
        data = f"wds:{address}/train-{{000..011}}.tar?window=2&cache_gb={room}"
        source = open_source(data)
        assert sorted(fetched) == [path.name for path in paths], "each shard is fetched once to count its samples"
        assert len(source) == 72 and numbers(source) == list(range(72))
        held = sum(file.stat().st_size for file in cache.glob("*.tar"))
        assert 2 * size < held <= room * 1e9
        expected = read_all(local, workers=0)
        for workers in (0, 2):
            fetched.clear()
            images = read_all(source, workers)
            assert all(torch.equal(a, b) for a, b in zip(images, expected, strict=True))
            assert 12 < len(fetched) <= 48, "two epochs fetch 12 shards about twice, not for each sample"
            assert sum(file.stat().st_size for file in cache.glob("*.tar")) <= room * 1e9
        assert not list(cache.glob("*.part"))
        fetched.clear()
        assert len(open_source(data)) == 72 and fetched == [], "the numbers are known"


def test_a_list_of_remote_shards_is_read_without_counting_them(tmp_path):
    paths = write_shards(tmp_path / "data", [2] * 6)
    listed = [{"url": path.name, "nsamples": 2, "filesize": path.stat().st_size} for path in paths]
    listed[4]["nsamples"] = 3
    (tmp_path / "data" / "index.json").write_text(json.dumps({"shardlist": listed}))
    with served(tmp_path / "data") as (address, fetched):
        source = open_source(f"wds:{address}/index.json")
        assert len(source) == 13 and fetched == ["index.json", "train-000.tar"]
        _, _, skipped, _ = Crops(source, RECIPE)[Draw(8, seed=0)]
    assert skipped == {f"{address}/train-004.tar": "BadShard: holds 2 samples, not 3 as the list says"}


def write_list(folder, counts, **others):
    """Write shards and a list of them, with their numbers and sizes, and fields of the second one."""
    paths = write_shards(folder, counts)
    sizes = [path.stat().st_size for path in paths]
    listed = [{"url": p.name, "nsamples": n, "filesize": s} for p, n, s in zip(paths, counts, sizes, strict=True)]
    listed[1] |= others
    (folder / "index.json").write_text(json.dumps({"shardlist": listed}))
    return paths


def test_a_remote_shard_that_is_gone_stops_the_run_by_name(tmp_path):
    """Whatever the number of workers: a run that goes on without it would have other losses in each of them."""
    paths = write_list(tmp_path / "data", [4, 4])
    with served(tmp_path / "data") as (address, _):
        data = f"wds:{address}/index.json"
        kept = paths[1].rename(tmp_path / "kept")
        logs = []
        for workers in (0, 2):
            stopped = r"step \d: data is .*train-001\.tar cannot be read \(OSError: FileNotFoundError.* in 5 attempts"
            with pytest.raises(TrainingStopped, match=stopped):
                train(data, tmp_path / f"run{workers}", workers=workers)
            logs.append(logged(tmp_path / f"run{workers}"))
        assert logs[0] == logs[1] and len(logs[0]) < 4
        with pytest.raises(InputError, match=r"train-001\.tar cannot be found \(FileNotFoundError"):
            open_source(f"wds:{address}/train-{{000..001}}.tar")
        kept.rename(paths[1])
        assert train(data, tmp_path / "run") == 0


def shown(crops, index):
    """Return the number of the image that is shown for an entry, see `png`, and what was skipped for it."""
    entry, skipped = crops._readable(index, crops.whole)
    return int(entry.pixels.values[0, 0, 0]), skipped


def test_other_samples_each_take_the_place_of_those_of_a_bad_shard(tmp_path):
    paths = write_list(tmp_path / "data", [10, 10, 10, 10])
    paths[1].write_bytes(b"x" * paths[1].stat().st_size)
    with served(tmp_path / "data") as (address, fetched):

        def read(entries):
            crops = Crops(open_source(f"wds:{address}/index.json"), RECIPE)
            return {i: shown(crops, i) for i in entries}

        lost = read(range(10, 20))
        found = {i: number for i, (number, _) in lost.items()}
        assert all(skipped.keys() == {f"{address}/train-001.tar"} for _, skipped in lost.values())
        assert sorted(found.values()) == list(range(20, 30)), "all from the next shard, each once"
        assert fetched.count("train-000.tar") == fetched.count("train-002.tar") == 1 and "train-003.tar" not in fetched
        again = {i: number for i, (number, _) in read(reversed(range(40))).items()}
        assert again == {i: i for i in range(40)} | found, "whatever was read before"


def test_other_files_each_take_the_place_of_unreadable_ones(tmp_path):
    for i in range(60):
        (tmp_path / f"{i:02d}.png").write_bytes(png(i) if i >= 30 else b"")
    source = find_source(str(tmp_path))
    crops = Crops(source, RECIPE)
    found = [shown(crops, i)[0] for i in range(30)]
    assert len(set(found)) > 15 and found == [shown(crops, i)[0] for i in range(30)]
    assert all(sorted(source.instead(i, 5)) == list(range(60)) for i in (0, 7, 59))


def test_the_name_of_a_sample_reads_nothing(tmp_path, monkeypatch):
    write_shards(tmp_path, [3, 2])
    source = open_source(f"wds:{tmp_path}/*.tar")
    with monkeypatch.context() as patch:
        patch.setattr(source, "_read_index", None)
        assert source.name(4) == "train-001.tar/1"
    source.read(4, RECIPE)
    assert source.name(4) == "train-001.tar/a/00004"


def test_a_copy_is_compared_with_the_sum_in_the_list(tmp_path):
    (tmp_path / "data").mkdir()
    write_tar(tmp_path / "data" / "other.tar", {"0.png": png(3)})
    sums = [hashlib.md5((tmp_path / "data" / "other.tar").read_bytes()).hexdigest()]
    paths = write_list(tmp_path / "data", [2, 2], md5sum=sums[0])
    with served(tmp_path / "data") as (address, _):
        source = open_source(f"wds:{address}/index.json")
        with pytest.raises(InputError, match=rf"train-001\.tar .* MD5 sum \w+, not {sums[0]} as the list says"):
            source.read(2, RECIPE)
        write_list(tmp_path / "data", [2, 2], md5sum=hashlib.md5(paths[1].read_bytes()).hexdigest())
        assert numbers(open_source(f"wds:{address}/index.json")) == [0, 1, 2, 3]


def test_files_of_the_user_in_the_cache_stay(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    size = max(path.stat().st_size for path in write_shards(tmp_path / "data", [3] * 6))
    with served(tmp_path / "data") as (address, _):
        data = f"wds:{address}/train-{{000..005}}.tar?window=1&cache={own}&cache_gb={3.5 * size / 1e9}"
        (own / "mine.tar").write_bytes(bytes(5 * size))
        (own / "mine.part").touch()
        assert len(open_source(data)) == 18
        ours = own / "sparsecnx-shards"
        for name in ("mine.tar", "mine.part", f"{'0' * 31}.tar"):
            (ours / name).touch()
        os.utime(ours / "mine.tar", (0, 0))
        assert numbers(open_source(data)) == list(range(18))
    assert sum(file.stat().st_size for file in ours.glob("*.tar")) <= 3.5 * size
    assert {file.name for file in own.iterdir()} == {"mine.tar", "mine.part", "sparsecnx-shards"}
    assert all((ours / name).exists() for name in ("mine.tar", "mine.part", f"{'0' * 31}.tar"))


def test_a_checkpoint_alone_chooses_no_cache(tmp_path, cache, capsys):
    write_shards(tmp_path / "data", [4, 4])
    own = tmp_path / "own"
    data = f"wds:{tmp_path}/data/*.tar?window=2&cache={own}&cache_gb=3"
    assert train(data, tmp_path / "run", normalize="zscore") == 0
    assert list(own.rglob("*.json")) and not cache.exists()
    shutil.rmtree(own)
    reconstruct(tmp_path / "run" / "last.pt", [], tmp_path / "grid.png")
    assert train(None, tmp_path / "run", resume="newest") == 0
    assert "a checkpoint alone neither chooses a cache nor downloads, --data does" in capsys.readouterr().out
    assert not own.exists() and list(cache.glob("*.json"))
    assert train(data, tmp_path / "run", resume="newest") == 0
    assert own.exists() and "a checkpoint alone" not in capsys.readouterr().out


def test_counting_remote_shards_is_said_once_and_stays_within_the_cache(tmp_path, cache, capsys, monkeypatch):
    paths = write_shards(tmp_path / "data", [2] * 8)
    most = int(3.5 * max(path.stat().st_size for path in paths))
    held = []

    def measured(file):
        with Copies(cache, most).lock("all"):
            held.append(bytes_of(cache))
        assert os.fstat(file.fileno()).st_nlink == 1, "its copy is not removed while it is indexed"
        time.sleep(0.02)
        return index_tar(file)

    monkeypatch.setattr("sparsecnx.train.data.shards.index_tar", measured)
    with served(tmp_path / "data") as (address, _):
        data = f"wds:{address}/train-{{000..007}}.tar?window=1&cache_gb={most / 1e9}"
        assert len(open_source(data)) == 16 and len(held) == 8 and max(held) <= most
        assert capsys.readouterr().out.startswith("counting the samples of 8 remote shards, ")
        assert len(open_source(data)) == 16 and capsys.readouterr().out == ""


def bytes_of(folder):
    """Return the bytes of copies, whole ones and those that are being made."""
    return sum(os.stat(file).st_size for kind in ("tar", "part") for file in folder.glob(f"*.{kind}"))


def test_a_copy_keeps_its_room_while_it_is_made(tmp_path, monkeypatch):
    """A file system opens the file to write with no byte in it, and others look for room at that moment."""
    begun, go_on = threading.Event(), threading.Event()

    def download(shard, part):
        with open(part, "wb") as file:
            begun.set()
            assert go_on.wait(20)
            file.write(bytes(shard.size))

    monkeypatch.setattr(shard_files, "_download", download)
    copies = Copies(tmp_path, 150)
    first, second = (
        threading.Thread(target=lambda url=url: copies.open(Shard(url, 100, "")).close()) for url in ("x://a", "x://b")
    )
    first.start()
    assert begun.wait(20)
    begun.clear()
    second.start()
    assert not begun.wait(0.5), "there is no room for the second"
    go_on.set()
    first.join(20)
    second.join(20)
    assert begun.is_set() and bytes_of(tmp_path) == 100
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob("*.held"))


@pytest.mark.timeout(20)
def test_the_room_of_a_killed_process_is_free_for_the_same_shard(tmp_path):
    (path,) = write_shards(tmp_path / "data", [2])
    with served(tmp_path / "data") as (address, _):
        shard = Shard(f"{address}/{path.name}", path.stat().st_size, "")
        copies = Copies(tmp_path / "copies", int(1.5 * shard.size))
        copies.folder.mkdir()
        for kind in ("part", "held"):
            (copies.folder / f"{shard.key}.{kind}").write_bytes(bytes(shard.size))
        with copies.open(shard) as file:
            assert file.read() == path.read_bytes()
    assert bytes_of(copies.folder) == shard.size


def test_a_cache_smaller_than_a_window_is_refused(tmp_path, monkeypatch):
    sizes = [path.stat().st_size for path in write_shards(tmp_path / "data", [2] * 6)]
    with served(tmp_path / "data") as (address, _):
        data = f"wds:{address}/train-{{000..005}}.tar?window=2&cache_gb={(sum(sizes) - 1) / 1e9}"
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
        assert len(open_source(data)) == 12
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        with pytest.raises(InputError, match=r"cache_gb is .*; expected at least .* the window of 2"):
            open_source(data)


def copy_all(folder, most, shards, failed):
    copies = Copies(folder, most)
    for shard in shards:
        with copies.open(shard) as file:
            if len(file.read()) != shard.size:
                failed.set()
        with copies.lock("all"):
            if bytes_of(folder) > most:
                failed.set()


def test_processes_share_the_copies(tmp_path):
    paths = write_shards(tmp_path / "data", [1] * 8)
    sizes = [path.stat().st_size for path in paths]
    failed = multiprocessing.Event()
    folder = tmp_path / "copies"
    folder.mkdir()
    for kind in ("part", "held"):
        (folder / f"{'a' * 32}.{kind}").write_bytes(bytes(max(sizes)))  # what a killed process leaves
    with served(tmp_path / "data") as (address, _):
        shards = [Shard(f"{address}/{p.name}", size, "") for p, size in zip(paths, sizes, strict=True)]
        arguments = [(folder, 3 * max(sizes), shards[i:] + shards[:i], failed) for i in (0, 3, 5)]
        processes = [multiprocessing.Process(target=copy_all, args=args) for args in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert not failed.is_set() and not list(folder.glob("*.part")) and not list(folder.glob("*.held"))


def test_workers_index_the_same_shard_at_the_same_time(tmp_path, cache):
    paths = write_shards(tmp_path / "data", [2] * 6)
    listed = [{"url": path.name, "nsamples": 2, "filesize": path.stat().st_size} for path in paths]
    (tmp_path / "data" / "index.json").write_text(json.dumps({"shardlist": listed}))
    local = open_source(f"wds:{tmp_path}/data/*.tar?window=6")
    with served(tmp_path / "data") as (address, fetched):
        source = open_source(f"wds:{address}/index.json?window=6")
        images = read_all(source, workers=2)
        assert sorted(fetched) == ["index.json", *(path.name for path in paths)]
    assert all(torch.equal(a, b) for a, b in zip(images, read_all(local, workers=0), strict=True))
    assert len(list(cache.glob("*.json"))) == 12


def test_the_next_shard_is_copied_before_it_is_read(tmp_path, cache):
    write_shards(tmp_path / "data", [2] * 6)
    local = open_source(f"wds:{tmp_path}/data/*.tar")
    assert local.ahead == 0
    with served(tmp_path / "data") as (address, fetched):
        source = open_source(f"wds:{address}/train-{{000..005}}.tar?window=1")
        for file in cache.glob("*.tar"):
            file.unlink()
        fetched.clear()
        for _ in range(3):
            source.expect([6, 7, 9])
        deadline = time.monotonic() + 20
        while len(list(cache.glob("*.tar"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert numbers(source)[6:10] == [6, 7, 8, 9]
        assert fetched.count("train-003.tar") == fetched.count("train-004.tar") == 1


def test_the_draws_tell_a_source_what_comes(tmp_path, monkeypatch):
    write_shards(tmp_path, [4] * 4)
    source = open_source(f"wds:{tmp_path}/*.tar")
    told = []
    monkeypatch.setattr(source, "ahead", 4)
    monkeypatch.setattr(source, "expect", told.append)
    drawn = [[draw.image for draw in batch] for batch in draws(RECIPE, source)]
    assert len(drawn) == 16 and told == [*drawn[2:8], [], [], *drawn[10:], [], []]


def test_bands_of_16_bits_in_shards(tmp_path, capsys):
    tifffile = pytest.importorskip("tifffile", reason="needs tifffile")
    images = np.random.default_rng(0).integers(0, 60000, (8, 5, 70, 80), np.uint16)
    files = {}
    for number, image in enumerate(images):
        file = io.BytesIO()
        tifffile.imwrite(file, image, photometric="minisblack", planarconfig="separate")
        files[f"{number}.tif"] = file.getvalue()
    write_tar(tmp_path / "bands.tar", files)
    data = f"wds:{tmp_path}/bands.tar"
    recipe = Recipe(image_size=64, in_chans=5, normalize="none")
    assert torch.equal(open_source(data).read(6, recipe), torch.from_numpy(images[6].astype(np.float32)))
    assert train(data, tmp_path / "run") == 0
    assert "8 looked at, 8 uint16 5 bands; as 5 channels" in capsys.readouterr().out
    reconstruct(tmp_path / "run" / "last.pt", [], tmp_path / "grid.png")


def test_ranks_read_parts_of_the_shards_and_no_sample_twice(tmp_path):
    write_shards(tmp_path, [3, 5, 2, 6, 4, 4])
    source, recipe = open_source(f"wds:{tmp_path}/*.tar?window=1"), Recipe(image_size=64, epochs=1, batch_size=4)
    read = []
    for rank in (0, 1):
        batches = draws(recipe, source, Processes(rank, 2).part, ranks=2)
        read.append([draw.image for batch in batches for draw in batch])
    assert sorted(read[0] + read[1]) == list(range(24))
    shards = [{source.name(index).partition("/")[0] for index in images} for images in read]
    assert len(shards[0] & shards[1]) <= 1, "at most the shard where the parts meet"


def test_a_run_that_goes_on_with_other_processes_says_that_the_order_changes(tmp_path, monkeypatch, capsys):
    write_shards(tmp_path / "data", [4, 4])
    with monkeypatch.context() as patch:
        signal_after(3, patch)
        assert train(f"wds:{tmp_path}/data/*.tar", tmp_path / "run") == 143
    state = checkpoint.read(tmp_path / "run" / "last.pt")
    save_torch(tmp_path / "run" / "checkpoint-00000003.pt", {**state, "processes": 2})
    assert train(None, tmp_path / "run", resume="newest") == 0
    assert "images in another order, the losses of another run from here on" in capsys.readouterr().out
