"""The table of functions: every one is tested, and the page lists it."""

from __future__ import annotations

from pathlib import Path

import torch
from test_functions import AT_SITES, MAXIMA, OF_IMAGES, OF_THE_BATCH

from sparsecnx.functions.__main__ import table
from sparsecnx.functions.table import ENTRIES

# These answer a fact about x, or take what the tests of networks run: test_attributes.py and test_any_network.py.
ELSEWHERE = {
    *("size", "dim", "ndimension", "numel", "nelement", "is_contiguous", "__len__", "is_floating_point", "is_complex"),
    *("is_inference", "element_size", "get_device", "is_signed", "cuda", "double", "retain_grad", "register_hook"),
    *("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"),
}


def test_every_function_is_held_to_its_dense_counterpart() -> None:
    tested = {name.split()[0] for cases in (AT_SITES, OF_IMAGES, OF_THE_BATCH, MAXIMA) for name in cases}
    errors = {name for entry in ENTRIES if entry.meaning.startswith("an error") for name in entry.names}
    for entry in ENTRIES:
        for name in set(entry.names) - errors - ELSEWHERE:
            in_two_dimensions = name.replace("1d", "2d").replace("3d", "2d")
            assert in_two_dimensions in tested or (not hasattr(torch, name) and not hasattr(torch.Tensor, name)), name


def test_the_page_ends_in_the_table() -> None:
    """`python -m sparsecnx.functions` prints it."""
    assert Path(__file__).parents[2].joinpath("docs/functions.md").read_text().endswith(table())
