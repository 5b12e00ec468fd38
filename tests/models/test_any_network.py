"""Networks that know nothing of masks, on a SparseTensor: they equal dense networks masked after every function."""

from __future__ import annotations

import torch
from masked_network import run_masked
from torch import Tensor


def test_the_masked_dense_computation_is_its_formulas() -> None:
    """The computation that everything else is held to, against sums over sites that are written out."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(2, 3, 3, padding=1, dtype=torch.float64)
    norm = torch.nn.BatchNorm2d(3, dtype=torch.float64)
    pool = torch.nn.MaxPool2d(3, 2, 1)
    images = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    mask = torch.tensor([[[False, True], [False, False]], [[True, True], [False, True]]])
    seen: dict[str, Tensor] = {}

    def network(x: Tensor) -> Tensor:
        seen["conv"] = conv(x)
        seen["norm"] = norm(seen["conv"] + 1.0)
        seen["pool"] = pool(seen["norm"])
        seen["mean"] = seen["pool"].permute(0, 2, 3, 1).mean((1, 2))
        return seen["mean"]

    run_masked(network, images, mask)

    visible = [(b, y, x) for b in range(2) for y in range(4) for x in range(4) if not mask[b, y // 2, x // 2]]
    expected = {name: torch.zeros_like(value) for name, value in seen.items()}
    around = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    for b, y, x in visible:
        taps = [(b, y + dy, x + dx, dy, dx) for dy, dx in around if (b, y + dy, x + dx) in visible]
        sums = [conv.weight[:, :, dy + 1, dx + 1] @ images[b, :, v, u] for b, v, u, dy, dx in taps]
        expected["conv"][b, :, y, x] = conv.bias + torch.stack(sums).sum(0)
    values = torch.stack([expected["conv"][b, :, y, x] + 1.0 for b, y, x in visible])
    variance, mean = torch.var_mean(values, 0, correction=0)
    for (b, y, x), value in zip(visible, values, strict=True):
        expected["norm"][b, :, y, x] = (value - mean) / (variance + norm.eps).sqrt()
    coarse = [(b, y, x) for b in range(2) for y in range(2) for x in range(2) if not mask[b, y, x]]
    for b, y, x in coarse:
        sites = [(b, 2 * y + dy, 2 * x + dx) for dy, dx in around if (b, 2 * y + dy, 2 * x + dx) in visible]
        expected["pool"][b, :, y, x] = torch.stack([expected["norm"][b, :, v, u] for b, v, u in sites]).amax(0)
    for b in range(2):
        expected["mean"][b] = torch.stack([expected["pool"][b, :, y, x] for c, y, x in coarse if c == b]).mean(0)

    for name, value in expected.items():
        assert torch.allclose(seen[name], value, rtol=0, atol=1e-13), name
    count = len(visible)
    assert torch.allclose(norm.running_mean, 0.1 * mean)
    assert torch.allclose(norm.running_var, 0.9 + 0.1 * variance * count / (count - 1))
