"""Tar shards and a server of them, for tests."""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image


def png(number: int, side: int = 40) -> bytes:
    """Return an image whose pixels tell its number, in PNG."""
    generator = torch.Generator().manual_seed(number)
    coarse = torch.rand(1, 3, 4, 5, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, (side, side + number % 7), mode="bilinear")[0]
    pixels[:, 0, 0] = number / 255
    file = io.BytesIO()
    Image.fromarray(pixels.mul(255).round().byte().permute(1, 2, 0).numpy()).save(file, format="PNG")
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_shards(folder: Path, counts: list[int], side: int = 40) -> list[Path]:
    """Write shards of so many images, numbered through, each with a JSON file beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, number = [], 0
    for shard, count in enumerate(counts):
        files = {}
        for _ in range(count):
            files[f"a/{number:05d}.png"] = png(number, side)
            files[f"a/{number:05d}.json"] = json.dumps({"label": number}).encode()
            number += 1
        paths.append(folder / f"train-{shard:03d}.tar")
        write_tar(paths[-1], files)
    return paths


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder over HTTP; yields the address, and the names that were fetched."""
    fetched: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            fetched.append(self.path.rpartition("/")[2])
            super().do_GET()

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", fetched
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
