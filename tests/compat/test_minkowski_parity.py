"""The same programs on MinkowskiEngine 0.5.4 and on `sparsecnx.compat.minkowski`, side by side in one process.

MinkowskiEngine does not fix the order of rows, so that they are compared by coordinates. Everything is float64, and the
gradients come from a loss that gives each site and channel its own weight.
"""

# ruff: noqa: N803, N806 - ME is what everybody calls the library

from __future__ import annotations

import functools
import importlib
import types
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import needs_minkowski
from torch import Tensor

import sparsecnx.compat.minkowski as ours
from sparsecnx.backends import minkowski

pytestmark = [
    needs_minkowski,
    pytest.mark.filterwarnings("ignore:.*autograd function:DeprecationWarning"),  # MinkowskiEngine instantiates its own
]

BOUND = 1e-11
CHANNELS = 3


# --- sites


@dataclass(frozen=True)
class Sites:
    """The sites of an input: int32 `(rows, 1 + D)`, multiples of `stride`."""

    coordinates: Tensor
    stride: int = 1

    @property
    def axes(self) -> int:
        return self.coordinates.shape[1] - 1

    def features(self, channels: int = CHANNELS) -> Tensor:
        return torch.randn(len(self.coordinates), channels, dtype=torch.float64, generator=generator("features"))


def generator(name: str) -> torch.Generator:
    """Return a generator whose seed is the name."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def sites(pattern: str, axes: int) -> Sites:
    random = generator(pattern)
    size = {2: (9, 10), 3: (5, 4, 6)}[axes]
    mask = torch.rand(3, *size, generator=random) < 0.4
    if pattern == "patches":
        coarse = torch.rand(2, *[3] * axes, generator=random) < 0.5
        mask = functools.reduce(lambda mask, axis: mask.repeat_interleave(4, axis), range(1, axes + 1), coarse)
    elif pattern == "an empty image":
        mask[1] = False
    elif pattern == "single sites":
        mask = torch.zeros_like(mask)
        mask[0].flatten()[7] = mask[1].flatten()[0] = mask[2].flatten()[-1] = mask[2].flatten()[-2] = True
    found = mask.nonzero().int().contiguous()
    if pattern in ("shuffled", "negative", "stride 2"):
        found = found[torch.randperm(len(found), generator=random)]
    if pattern in ("negative", "stride 2"):
        found[:, 1:] -= 4
    if pattern == "stride 2":
        found[:, 1:] *= 2
        return Sites(found, 2)
    return Sites(found)


PATTERNS = ("raster", "shuffled", "negative", "patches", "an empty image", "single sites", "stride 2")
IN_SPACE = ("shuffled", "negative", "patches")
EVERYWHERE = [*((pattern, 2) for pattern in PATTERNS), *((pattern, 3) for pattern in IN_SPACE)]
SOMEWHERE = [("negative", 2), ("patches", 2), ("shuffled", 3)]
ON_PATTERNS = pytest.mark.parametrize(
    ("pattern", "axes"),
    EVERYWHERE,
    ids=lambda value: f"{value}-D" if isinstance(value, int) else value.replace(" ", "-"),
)


# --- programs and their results


class Run:
    """One library running one program.

    Attributes:
        ME: the library.
        found: results by name.
    """

    def __init__(self, library: Any) -> None:
        self.ME = library
        self.found: dict[str, Any] = {}
        self._leaves: dict[str, Tensor] = {}
        self._loss = torch.zeros((), dtype=torch.float64)

    def tensor(self, where: Sites, channels: int = CHANNELS, name: str = "x") -> Any:
        """Return an input of the program."""
        features = self.leaf(name, where.features(channels))
        return self.ME.SparseTensor(features, where.coordinates.clone(), tensor_stride=where.stride)

    def leaf(self, name: str, value: Tensor) -> Tensor:
        """Return a tensor whose gradient is compared."""
        self._leaves[name] = value.clone().requires_grad_()
        return self._leaves[name]

    def module(self, module: torch.nn.Module, name: str = "layer") -> Any:
        """Fill the parameters and statistics of a layer by their names and shapes, and return it."""
        module.double()
        state = module.state_dict()
        for key, value in state.items():
            if value.is_floating_point():
                noise = torch.rand(value.shape, dtype=torch.float64, generator=generator(key))
                value.copy_(0.5 + noise if "running" in key else noise - 0.5)
        self.state(module, name)
        self._leaves.update({f"{name}.{key}": value for key, value in module.named_parameters()})
        return module

    def state(self, module: torch.nn.Module, name: str) -> None:
        """Record the names, shapes and dtypes of the parameters and statistics of a layer."""
        state = module.state_dict()
        self.say(f"state of {name}", {key: (tuple(value.shape), value.dtype) for key, value in state.items()})

    def say(self, name: str, value: Any) -> None:
        """Record a result. Tensors also enter the loss."""
        assert name not in self.found
        if isinstance(value, Tensor):
            self.found[name] = value.detach()
            if value.requires_grad:
                self._loss = (
                    self._loss + (value * weights(torch.arange(value.numel())[:, None]).view(value.shape)).sum()
                )
        elif hasattr(value, "coordinate_map_key"):
            self._say_sparse(name, value)
        else:
            self.found[name] = value

    def _say_sparse(self, name: str, value: Any) -> None:
        coordinates, features = value.C, value.F
        assert coordinates.dtype == torch.int32 and len(coordinates) == len(features) == len(value)
        order = by_coordinates(coordinates)
        self.found[f"coordinates of {name}"] = coordinates[order]
        self.found[f"features of {name}"] = features.detach()[order]
        self.found[f"stride of {name}"] = list(value.tensor_stride)
        self.found[f"axes of {name}"] = value.D
        if features.requires_grad:
            channels = torch.arange(features.shape[1])
            places = [coordinates.repeat_interleave(len(channels), 0), channels.repeat(len(features))[:, None]]
            self._loss = self._loss + (features * weights(torch.cat(places, dim=1)).view(features.shape)).sum()

    def finish(self) -> dict[str, Any]:
        """Return all results, and the gradients of the loss."""
        if self._loss.requires_grad:
            gradients = torch.autograd.grad(self._loss, list(self._leaves.values()), allow_unused=True)
            self.found.update(
                {f"gradient of {name}": value for name, value in zip(self._leaves, gradients, strict=True)}
            )
        return self.found


def weights(places: Tensor) -> Tensor:
    """Return a number for each row of whole numbers; they are all different and in no order."""
    steps = torch.tensor([0.37, 1.93, 2.71, 0.83, 3.3], dtype=torch.float64)[: places.shape[1]]
    return torch.sin(places.double() @ steps) + 1.5


def by_coordinates(coordinates: Tensor) -> Tensor:
    """Return the permutation that sorts rows by coordinates."""
    order = torch.arange(len(coordinates))
    for column in reversed(range(coordinates.shape[1])):
        order = order[coordinates[order, column].argsort(stable=True)]
    return order


Program = Callable[[Run], None]


def agree(program: Program) -> dict[str, Any]:
    """Run the program on both libraries, compare the results, and return those of MinkowskiEngine."""
    results = []
    for library in (minkowski.library(), ours):
        torch.manual_seed(0)
        run = Run(library)
        program(run)
        results.append(run.finish())
    expected, found = results
    assert found.keys() == expected.keys()
    for name in expected:
        assert_equal(name, found[name], expected[name])
    return expected


def assert_equal(name: str, found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert found.shape == expected.shape and found.dtype == expected.dtype, name
        if expected.is_floating_point():
            torch.testing.assert_close(found, expected, rtol=BOUND, atol=BOUND, msg=lambda text: f"{name}: {text}")
        else:
            assert torch.equal(found, expected), name
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), name
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_equal(f"{name}[{number}]", one, other)
    else:
        assert found == expected, name


# --- layers


def kernels(layer: str) -> dict[str, Callable[[Any, int], torch.nn.Module]]:
    """Return functions by name that make a layer in many shapes, from a library and a number of axes."""

    def make(kernel: Any, stride: Any, dilation: Any, bias: bool | None) -> Callable[[Any, int], torch.nn.Module]:
        def layer_of(ME: Any, axes: int) -> torch.nn.Module:
            shape = {"kernel_size": kernel, "stride": stride, "dilation": dilation}
            shape = {key: list(value[:axes]) if isinstance(value, tuple) else value for key, value in shape.items()}
            channels = {"MinkowskiConvolution": (CHANNELS, 4), "MinkowskiChannelwiseConvolution": (CHANNELS,)}
            options = {} if bias is None else {"bias": bias}
            return getattr(ME, layer)(*channels.get(layer, ()), **shape, **options, dimension=axes)

        return layer_of

    shapes = [
        *[(kernel, stride, 1) for kernel in (1, 2, 3) for stride in (1, 2, 3)],
        *[(kernel, stride, 2) for kernel in (2, 3) for stride in (1, 2)],
        (5, 1, 1),
        (5, 2, 1),
        (4, 2, 1),
        ((3, 1, 2), 1, 1),
        ((2, 5, 3), (2, 1, 3), 1),
        ((1, 3, 3), (1, 2, 1), (2, 1, 2)),
    ]
    if "Pooling" not in layer:
        shapes += [(7, 1, 1)]
    found = {}
    for kernel, stride, dilation in shapes:
        bias = None if "Pooling" in layer else kernel in (1, 3, 5)
        name = f"k{kernel}-s{stride}-d{dilation}{'-bias' if bias else ''}"
        found[name.replace(" ", "")] = make(kernel, stride, dilation, bias)
    return found


LOCAL = {
    layer: kernels(f"Minkowski{layer}")
    for layer in ("Convolution", "ChannelwiseConvolution", "SumPooling", "AvgPooling", "MaxPooling")
}


def on_patterns(layers: dict[str, list[tuple[str, int]]]) -> Any:
    """Parametrise over every shape of these layers, each on its patterns."""
    return pytest.mark.parametrize(
        ("layer", "shape", "pattern", "axes"),
        [
            pytest.param(layer, shape, pattern, axes, id=f"{layer}-{shape}-{pattern.replace(' ', '-')}-{axes}-D")
            for layer, patterns in layers.items()
            for shape in LOCAL[layer]
            for pattern, axes in patterns
        ],
    )


@on_patterns(
    {"Convolution": EVERYWHERE, "ChannelwiseConvolution": SOMEWHERE, "SumPooling": SOMEWHERE, "AvgPooling": SOMEWHERE}
)
def test_convolution_and_pooling(layer: str, shape: str, pattern: str, axes: int) -> None:
    def program(run: Run) -> None:
        module = run.module(LOCAL[layer][shape](run.ME, axes))
        run.say("output", module(run.tensor(sites(pattern, axes))))

    agree(program)


@on_patterns({"MaxPooling": SOMEWHERE})
def test_max_pooling(layer: str, shape: str, pattern: str, axes: int) -> None:
    """Compare the outputs that an input reaches. MinkowskiEngine gives the others, as with a kernel smaller than its
    stride, the smallest number, and its backward writes outside of the gradient."""

    def program(run: Run) -> None:
        where = sites(pattern, axes)
        x, module = run.tensor(where), LOCAL[layer][shape](run.ME, axes)
        of_same_shape = LOCAL["SumPooling"][shape](run.ME, axes)
        reached = of_same_shape(with_features(run, x, torch.ones_like(x.F))).F > 0
        if not reached.all():
            x = with_features(run, x, x.F.detach())
        output = module(x)
        run.say("output", with_features(run, output, torch.where(reached, output.F, 0)))

    agree(program)


@pytest.mark.parametrize("layer", ["MinkowskiConvolution", "MinkowskiChannelwiseConvolution"])
def test_state_dicts_load_both_ways(layer: str) -> None:
    library = minkowski.library()
    for kernel in (1, 2, 3):
        channels = (3, 4) if layer == "MinkowskiConvolution" else (3,)
        theirs, mine = (
            getattr(ME, layer)(*channels, kernel_size=kernel, bias=True, dimension=2) for ME in (library, ours)
        )
        for source, target in ((theirs, mine), (mine, theirs)):
            with torch.no_grad():
                for parameter in source.parameters():
                    parameter.normal_()
            target.load_state_dict(source.state_dict())
            assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())


@ON_PATTERNS
@pytest.mark.parametrize("size", [2, 3], ids="{0}x{0}".format)
def test_down_and_up_again(size: int, pattern: str, axes: int) -> None:
    """A strided convolution, a depthwise one, and a transposed one back to the first sites."""

    def program(run: Run) -> None:
        ME, x = run.ME, run.tensor(sites(pattern, axes))
        down = run.module(ME.MinkowskiConvolution(CHANNELS, 4, size, stride=size, bias=True, dimension=axes), "down")
        wide = run.module(ME.MinkowskiChannelwiseConvolution(4, kernel_size=3, bias=True, dimension=axes), "wide")
        up = run.module(
            ME.MinkowskiConvolutionTranspose(4, CHANNELS, kernel_size=size, stride=size, bias=True, dimension=axes),
            "up",
        )
        y = down(x)
        z = wide(y)
        back = up(z)
        for name, value in {"down": y, "wide": z, "back": back, "sum": back + x, "cat": ME.cat(back, x)}.items():
            run.say(name, value)
        run.say("same coarse sites", y.coordinate_map_key == z.coordinate_map_key)
        run.say("same fine sites", back.coordinate_map_key == x.coordinate_map_key)
        run.say("coarse and fine", y.coordinate_map_key == x.coordinate_map_key)

    assert agree(program)["same fine sites"]


@pytest.mark.parametrize("axes", [2, 3], ids="{}-D".format)
@pytest.mark.parametrize("size", [2, 3])
def test_transposed_convolution_onto_sites_that_are_new(size: int, axes: int) -> None:
    def program(run: Run) -> None:
        where = sites("negative", axes)
        coarse = Sites(torch.cat([where.coordinates[:, :1], where.coordinates[:, 1:] * size], dim=1), size)
        up = run.ME.MinkowskiConvolutionTranspose(CHANNELS, 2, kernel_size=size, stride=size, dimension=axes)
        run.say("output", run.module(up)(run.tensor(coarse)))

    agree(program)


# By default MinkowskiEngine confuses images in sums and means if it lists three in certain orders, and takes no batch
# with an empty image.
IN_ORDER = ("raster", "shuffled", "negative", "patches")


@pytest.mark.parametrize(
    ("mode", "algorithm", "pattern", "axes"),
    [
        *[(mode, None, pattern, axes) for mode in ("Sum", "Avg") for pattern in IN_ORDER for axes in (2, 3)],
        *[(mode, "KERNEL", pattern, 2) for mode in ("Sum", "Avg") for pattern in PATTERNS],
        *[("Max", None, pattern, 2) for pattern in PATTERNS],
    ],
)
def test_global_pooling(mode: str, algorithm: str | None, pattern: str, axes: int) -> None:
    def program(run: Run) -> None:
        ME, layer = run.ME, f"MinkowskiGlobal{mode}Pooling"
        options = [] if algorithm is None else [getattr(ME.PoolingMode, f"GLOBAL_{mode.upper()}_POOLING_{algorithm}")]
        run.say("pooled", getattr(ME, layer)(*options)(run.tensor(sites(pattern, axes))))

    agree(program)


@ON_PATTERNS
def test_broadcast(pattern: str, axes: int) -> None:
    def program(run: Run) -> None:
        ME, x = run.ME, run.tensor(sites(pattern, axes))
        pooled = ME.MinkowskiGlobalMaxPooling()(x)
        run.say("added", ME.MinkowskiBroadcastAddition()(x, pooled))
        run.say("multiplied", ME.MinkowskiBroadcastMultiplication()(x, pooled))

    agree(program)


def test_broadcast_and_concatenation() -> None:
    """Every image has sites, and the first image the first site: otherwise MinkowskiEngine confuses the images."""

    def program(run: Run) -> None:
        ME, x = run.ME, run.tensor(sites("raster", 2))
        pooled = ME.MinkowskiGlobalAvgPooling()(x)
        run.say("broadcast", ME.MinkowskiBroadcast()(x, pooled))
        run.say("concatenated", ME.MinkowskiBroadcastConcatenation()(x, pooled))

    agree(program)


@ON_PATTERNS
def test_pruning(pattern: str, axes: int) -> None:
    def program(run: Run) -> None:
        ME, x = run.ME, run.tensor(sites(pattern, axes))
        kept = weights(x.C) > 1.4
        pruned = ME.MinkowskiPruning()(x, kept)
        run.say("pruned", pruned)
        run.say("same sites", pruned.coordinate_map_key == x.coordinate_map_key)
        layer = run.module(ME.MinkowskiConvolution(CHANNELS, 2, kernel_size=3, stride=2, dimension=axes))
        run.say("convolved", layer(pruned))
        run.say("convolved, all", layer(x))

    agree(program)


# --- layers on single sites

POINTWISE: dict[str, tuple[Any, ...]] = {
    "Linear": (CHANNELS, 4),
    "Sinusoidal": (CHANNELS, 4),
    "Threshold": (0.1, 20.0),
    **dict.fromkeys(("BatchNorm", "SyncBatchNorm"), (CHANNELS,)),
    **dict.fromkeys(("Dropout", "AlphaDropout"), (0.4,)),
    **dict.fromkeys(("Softmin", "Softmax", "LogSoftmax"), (1,)),
    **dict.fromkeys(("ELU", "SELU", "CELU", "GELU", "ReLU", "ReLU6", "RReLU", "PReLU", "LeakyReLU", "SiLU"), ()),
    **dict.fromkeys(("Sigmoid", "LogSigmoid", "Hardsigmoid", "Hardswish", "Hardtanh", "Hardshrink"), ()),
    **dict.fromkeys(("Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink"), ()),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layer", POINTWISE)
def test_pointwise(layer: str, training: bool) -> None:
    def program(run: Run) -> None:
        module = run.module(getattr(run.ME, f"Minkowski{layer}")(*POINTWISE[layer])).train(training)
        torch.manual_seed(1)
        run.say("output", module(run.tensor(sites("shuffled", 2))))
        run.found["statistics"] = [value.clone() for value in module.buffers()]

    agree(program)


def test_conversion_to_synchronised_batch_norm() -> None:
    def program(run: Run) -> None:
        ME = run.ME
        network = torch.nn.Sequential(ME.MinkowskiBatchNorm(CHANNELS), ME.MinkowskiReLU())
        network = ME.MinkowskiSyncBatchNorm.convert_sync_batchnorm(network)
        run.say("kinds", [type(layer).__name__ for layer in network])
        run.say("output", run.module(network)(run.tensor(sites("raster", 2))))

    agree(program)


@ON_PATTERNS
def test_instance_norm(pattern: str, axes: int) -> None:
    """`MinkowskiStableInstanceNorm` cannot be called in MinkowskiEngine 0.5.4: it asks its input for old names."""

    def program(run: Run) -> None:
        run.say("output", run.module(run.ME.MinkowskiInstanceNorm(CHANNELS))(run.tensor(sites(pattern, axes))))
        run.state(run.ME.MinkowskiStableInstanceNorm(CHANNELS), "stable")

    agree(program)


@pytest.mark.parametrize("stack", ["Cat", "Sum", "Mean", "Var"])
def test_stack(stack: str) -> None:
    def program(run: Run) -> None:
        ME = run.ME
        layers = [ME.MinkowskiConvolution(CHANNELS, 4, kernel_size=size, dimension=2) for size in (1, 2, 3)]
        network = run.module(getattr(ME, f"MinkowskiStack{stack}")(*layers))
        run.say("output", network(run.tensor(sites("shuffled", 2))))

    agree(program)


# --- tensors


def dense_images(axes: int) -> Tensor:
    """Return images in which sites are 0, some of them only in one channel."""
    random = generator("images")
    images = torch.randn(2, CHANNELS, *{2: (6, 5), 3: (4, 3, 5)}[axes], dtype=torch.float64, generator=random)
    images = images * (torch.rand(2, 1, *images.shape[2:], generator=random) < 0.6)
    images[:, 1] = images[:, 1] * (torch.rand(2, *images.shape[2:], generator=random) < 0.5)
    return images


@pytest.mark.parametrize("axes", [2, 3], ids="{}-D".format)
@pytest.mark.parametrize("patches", [False, True], ids=["sites", "patches"])
def test_dense_to_sparse_and_back(axes: int, patches: bool) -> None:
    def program(run: Run) -> None:
        ME, images = run.ME, dense_images(axes)
        if patches:
            images = (images + 3) * torch.tensor([0.0, 1.0])[torch.arange(images[0, 0].numel()) // 2 % 2].view(
                images.shape[2:]
            )
            for axis in range(2, 2 + axes):
                images = images.repeat_interleave(2, axis)
        dense = run.leaf("dense", images)
        x = ME.to_sparse(dense)
        run.say("sparse", x)
        run.say("from the module", ME.MinkowskiToSparseTensor()(dense))
        run.say("channels last", ME.to_sparse(dense.movedim(1, -1), format="B" + "X" * axes + "C"))
        run.say("everything", ME.to_sparse_all(dense))
        run.say("all coordinates", ME.dense_coordinates(dense.shape))
        run.say("and back", x.dense(shape=dense.shape)[0])
        run.say("by the module", ME.MinkowskiToDenseTensor(dense.shape)(x))
        layer = run.module(ME.MinkowskiConvolution(CHANNELS, 2, kernel_size=3, stride=2, dimension=axes))
        run.say("convolved", layer(x))
        run.say("rows", ME.MinkowskiToFeature()(x).shape)

    found = agree(program)
    assert 0 < len(found["features of sparse"]) < len(found["features of everything"])


@ON_PATTERNS
def test_dense(pattern: str, axes: int) -> None:
    def program(run: Run) -> None:
        ME, where = run.ME, sites(pattern, axes)
        x = run.tensor(where)
        first = torch.full((axes,), -8, dtype=torch.int32)
        pool = ME.MinkowskiSumPooling(kernel_size=2, stride=2, dimension=axes)
        for name, value in {"fine": x, "coarse": pool(x)}.items():
            for contract in (True, False):
                kind = f"{name}, {'contracted' if contract else 'spread'}"
                run.say(f"{kind}, from -8", value.dense(min_coordinate=first, contract_stride=contract))
                run.say(f"{kind}, of a shape", value.dense(torch.Size([4, 1, *[24] * axes]), first, contract))
                if where.coordinates.min() >= 0:
                    run.say(kind, value.dense(contract_stride=contract))
        run.say("output", x.dense(min_coordinate=first)[0])

    agree(program)


@ON_PATTERNS
def test_by_image(pattern: str, axes: int) -> None:
    """The rows of each image, in any order."""

    def program(run: Run) -> None:
        x = run.tensor(sites(pattern, axes))
        coordinates, features = x.decomposed_coordinates_and_features
        orders = [by_coordinates(places) for places in coordinates]
        run.say("places", [places[order] for places, order in zip(coordinates, orders, strict=True)])
        run.say("features", [rows.detach()[order] for rows, order in zip(features, orders, strict=True)])
        run.say("alike", [torch.equal(a, b) for a, b in zip(x.decomposed_coordinates, coordinates, strict=True)])
        run.say("too", [torch.equal(a, b) for a, b in zip(x.decomposed_features, features, strict=True)])
        rows = x.decomposition_permutations
        run.say("permutations", [torch.equal(x.C[r, 1:], places) for r, places in zip(rows, coordinates, strict=True)])
        run.say("one", x.features_at(0).sum(0))
        run.say("its places", x.coordinates_at(0)[by_coordinates(x.coordinates_at(0))])

    agree(program)


def test_attributes() -> None:
    def program(run: Run) -> None:
        ME, x = run.ME, run.tensor(sites("shuffled", 3))
        y = ME.MinkowskiConvolution(CHANNELS, 4, kernel_size=3, stride=[1, 2, 3], dimension=3).double()(x)
        for name, value in {"x": x, "y": y}.items():
            for attribute in ("shape", "D", "dimension", "tensor_stride", "dtype", "device", "requires_grad"):
                run.say(f"{name}.{attribute}", getattr(value, attribute))
            run.say(f"{name}.size()", value.size())
            run.say(f"len({name})", len(value))
            run.say(f"stride of the key of {name}", list(value.coordinate_map_key.get_tensor_stride()))
            run.say(f"size of the key of {name}", value.coordinate_map_key.get_coordinate_size())
            run.say(
                f"key of {name}", [list(value.coordinate_map_key.get_key()[0]), value.coordinate_map_key.get_key()[1]]
            )
        run.say("manager", y.coordinate_manager is x.coordinate_manager)
        run.say("order", torch.equal(x.C, sites("shuffled", 3).coordinates))  # which is kept

    agree(program)


@ON_PATTERNS
def test_keys_of_the_same_sites_are_equal(pattern: str, axes: int) -> None:
    def program(run: Run) -> None:
        ME, x = run.ME, run.tensor(sites(pattern, axes))
        layers = {
            "strided convolution": ME.MinkowskiConvolution(CHANNELS, 4, kernel_size=3, stride=2, dimension=axes),
            "strided pooling": ME.MinkowskiMaxPooling(kernel_size=2, stride=2, dimension=axes),
            "strided channelwise": ME.MinkowskiChannelwiseConvolution(
                CHANNELS, kernel_size=3, stride=2, dimension=axes
            ),
            "convolution": ME.MinkowskiConvolution(CHANNELS, 4, kernel_size=3, dimension=axes),
            "1x1 convolution": ME.MinkowskiConvolution(CHANNELS, 4, kernel_size=1, dimension=axes),
            "pooling": ME.MinkowskiSumPooling(kernel_size=3, dimension=axes),
            "global pooling": ME.MinkowskiGlobalMaxPooling(),
            "activation": ME.MinkowskiReLU(),
        }
        keys = {name: layer.double()(x).coordinate_map_key for name, layer in layers.items()}
        for name, key in keys.items():
            run.say(f"key of {name}", key == x.coordinate_map_key)
            run.say(f"{name} and pooling", key == keys["strided pooling"])
            run.say(f"{name}, unequal", key != x.coordinate_map_key)

    found = agree(program)
    assert found["strided convolution and pooling"] and not found["key of strided convolution"]


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "/": lambda x, y: x / y,
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_arithmetic(operation: str) -> None:
    def program(run: Run) -> None:
        ME, x = run.ME, run.tensor(sites("shuffled", 2))
        y = with_features(run, x, run.leaf("y", x.F.detach().cos() + 2))
        combine = OPERATIONS[operation]
        run.say("same sites", combine(x, y))
        run.say("with a tensor", combine(x, torch.arange(1.0, 1.0 + CHANNELS).double()))
        kept = weights(x.C) > 1.4
        some, others = ME.MinkowskiPruning()(x, kept), ME.MinkowskiPruning()(y, ~kept | (weights(x.C) > 1.9))
        run.say("some and all", combine(some, y))
        run.say("all and some", combine(x, others))
        run.say("partly the same", combine(some, others))

    agree(program)


def test_arithmetic_in_place() -> None:
    def program(run: Run) -> None:
        x = run.tensor(sites("shuffled", 2))
        y = with_features(run, x, x.F.detach().cos() + 2)
        for combine in ("__iadd__", "__isub__", "__imul__"):
            z = with_features(run, x, x.F * 1)
            run.say(f"same {combine}", getattr(z, combine)(y) is z)
            run.say(combine, z)

    agree(program)


@pytest.mark.parametrize("operation", ["cat", "sum", "mean", "var"])
def test_several_tensors(operation: str) -> None:
    def program(run: Run) -> None:
        x = run.tensor(sites("patches", 2))
        others = [with_features(run, x, run.leaf(name, x.F.detach() * number)) for number, name in enumerate("yz")]
        run.say("three", getattr(run.ME, operation)(x, *others))
        run.say("in a list", getattr(run.ME, operation)([x, others[0]]))

    agree(program)


def test_union() -> None:
    def program(run: Run) -> None:
        ME, x = run.ME, run.tensor(sites("shuffled", 2))
        parts = [ME.MinkowskiPruning()(x, weights(x.C) > bound) for bound in (1.0, 1.5, 2.0)]
        run.say("union", ME.MinkowskiUnion()(*parts))
        run.say("of two", ME.MinkowskiUnion()(parts[2], parts[0]))

    agree(program)


@pytest.mark.parametrize("kind", ["key", "tensor", "coordinates"])
def test_convolution_onto_given_sites(kind: str) -> None:
    def program(run: Run) -> None:
        ME, x = run.ME, run.tensor(sites("shuffled", 2))
        target = ME.MinkowskiPruning()(x, weights(x.C) > 1.7)
        onto = {"key": target.coordinate_map_key, "tensor": target, "coordinates": x.C[:9] + 1}[kind]
        for name, layer in {
            "convolution": ME.MinkowskiConvolution(CHANNELS, 2, kernel_size=3, dimension=2),
            "pooling": ME.MinkowskiSumPooling(kernel_size=3, stride=1, dimension=2),
        }.items():
            output = run.module(layer, name)(x, onto)
            if kind == "coordinates":  # whose map is of stride 0 after a convolution in MinkowskiEngine
                order = by_coordinates(output.C)
                run.say(f"coordinates of {name}", output.C[order])
                run.say(f"features of {name}", output.F[order])
            else:
                run.say(name, output)

    agree(program)


# --- utilities


def test_batches_of_coordinates() -> None:
    def program(run: Run) -> None:
        utils, random = run.ME.utils, generator("batch")
        coordinates = [torch.randint(-5, 5, (count, 2), generator=random).int() for count in (3, 1, 4)]
        fractions = [places + 0.7 for places in coordinates]
        features = [torch.randn(len(places), 2, dtype=torch.float64, generator=random) for places in coordinates]
        labels = [torch.arange(len(places)) for places in coordinates]
        run.say("batched", utils.batched_coordinates(coordinates))
        run.say("rounded down", utils.batched_coordinates(fractions))
        run.say("as float", utils.batched_coordinates(fractions, dtype=torch.float32))
        run.say("of arrays", utils.batched_coordinates([places.numpy() for places in coordinates]))
        run.say("collated", utils.sparse_collate(coordinates, features))
        run.say(
            "of arrays, collated", utils.sparse_collate(*([v.numpy() for v in of] for of in (coordinates, features)))
        )
        run.say("with labels", utils.sparse_collate(coordinates, features, labels))
        run.say("of a data set", utils.batch_sparse_collate(list(zip(coordinates, features, labels, strict=True))))
        collate = utils.SparseCollation()
        run.say("by the class", collate(list(zip(coordinates, features, labels, strict=True))))

    agree(program)


def test_several_rows_at_one_site() -> None:
    def program(run: Run) -> None:
        ME, modes = run.ME, run.ME.SparseTensorQuantizationMode
        # Two or four of them: MinkowskiEngine divides by their number in float32.
        places = torch.tensor(
            [[0, 1, 1], [0, 2, 1], [0, 1, 1], [1, 1, 1], *[[0, 1, 1]] * 2, [0, 2, 1]], dtype=torch.int32
        )
        features = run.leaf("features", torch.arange(14.0).double().view(7, 2))
        for mode in ("RANDOM_SUBSAMPLE", "UNWEIGHTED_AVERAGE", "UNWEIGHTED_SUM"):
            x = ME.SparseTensor(features, places, quantization_mode=getattr(modes, mode))
            run.say(mode, x)
            run.say(f"sites of {mode}", x.C[x.inverse_mapping])
            run.say(f"rows of {mode}", torch.equal(places[x.unique_index], x.C))

    agree(program)


def test_features_at_coordinates() -> None:
    def program(run: Run) -> None:
        x = run.tensor(sites("shuffled", 2))
        run.say("there", x.features_at_coordinates(x.C[:7].double()))
        run.say("elsewhere", x.features_at_coordinates(torch.tensor([[0.0, 50.0, 50.0]]).double()))

    agree(program)


def test_initialisation() -> None:
    def program(run: Run) -> None:
        for name, kernel in {"kernel": torch.zeros(9, 3, 5), "matrix": torch.zeros(3, 5)}.items():
            torch.manual_seed(3)
            run.ME.utils.kaiming_normal_(kernel, mode="fan_out", nonlinearity="relu")
            run.say(name, kernel)

    agree(program)


# --- networks


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_residual_blocks(block: str, stride: int) -> None:
    """MinkowskiEngine 0.5.4 cannot make blocks with squeeze-and-excitation."""

    def program(run: Run) -> None:
        ME = run.ME
        kind = getattr(blocks(ME, "resnet_block"), block)
        shortcut = ME.MinkowskiConvolution(CHANNELS, 4 * kind.expansion, kernel_size=1, stride=stride, dimension=2)
        layer = kind(CHANNELS, 4, stride=stride, downsample=shortcut, dimension=2)
        run.say("output", run.module(layer)(run.tensor(sites("patches", 2))))

    agree(program)


def test_squeeze_and_excitation() -> None:
    def program(run: Run) -> None:
        layer = blocks(run.ME, "senet_block").SELayer(CHANNELS, reduction=2, D=2)
        run.say("output", run.module(layer)(run.tensor(sites("patches", 2))))

    agree(program)


def blocks(ME: Any, module: str) -> Any:
    """Return a module of a library with ready-made blocks; ours has one module for all."""
    return ours.modules if ME is ours else importlib.import_module(f"{ME.__name__}.modules.{module}")


@pytest.mark.parametrize("pattern", ["raster", "patches", "negative"])
def test_a_network(pattern: str) -> None:
    """Down and up with skip connections, normalisation, and a head on whole images."""

    def program(run: Run) -> None:
        ME = run.ME

        class Network(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem = ME.MinkowskiConvolution(CHANNELS, 6, kernel_size=3, dimension=2)
                self.norm = ME.MinkowskiBatchNorm(6)
                self.down = ME.MinkowskiConvolution(6, 8, kernel_size=2, stride=2, bias=True, dimension=2)
                self.wide = ME.MinkowskiChannelwiseConvolution(8, kernel_size=7, bias=True, dimension=2)
                self.instance = ME.MinkowskiInstanceNorm(8)
                self.pool = ME.MinkowskiMaxPooling(kernel_size=3, stride=1, dimension=2)
                self.up = ME.MinkowskiConvolutionTranspose(8, 6, kernel_size=2, stride=2, dimension=2)
                self.head = torch.nn.Sequential(ME.MinkowskiGlobalAvgPooling(), ME.MinkowskiLinear(12, 5))
                self.act = ME.MinkowskiGELU()

            def forward(self, x: Any) -> Any:
                fine = self.act(self.norm(self.stem(x)))
                coarse = self.down(fine)
                coarse = coarse + self.act(self.instance(self.wide(coarse)))
                coarse = self.pool(coarse)
                return self.head(ME.cat(self.up(coarse), fine))

        run.say("output", run.module(Network())(run.tensor(sites(pattern, 2))))

    agree(program)


def with_features(run: Run, x: Any, features: Tensor) -> Any:
    """Return a tensor with other features on the same sites."""
    return run.ME.SparseTensor(
        features, coordinate_map_key=x.coordinate_map_key, coordinate_manager=x.coordinate_manager
    )


def test_every_public_name_is_known() -> None:
    """Every name is offered, or a placeholder that names the nearest alternative."""
    library = minkowski.library()
    beside = ("file_dir", "os", "sys", "torch", "warnings", "diagnostics", "sparse_matrix_functions")
    modules = [name for name, value in vars(library).items() if isinstance(value, types.ModuleType)]
    names = {name for name in vars(library) if not name.startswith("_")} - {*beside, *modules}
    assert len(names) > 100
    assert {name for name in names if not hasattr(ours, name)} == set()
    for name in ("utils", "MinkowskiOps", "MinkowskiFunctional"):
        theirs, here = getattr(library, name), getattr(ours, name)
        own = {key: value for key, value in vars(theirs).items() if "Minkowski" in getattr(value, "__module__", "")}
        functions = [key for key, value in own.items() if callable(value) and not key.startswith("_")]
        assert functions
        assert [key for key in functions if not hasattr(here, key) and not hasattr(ours, key)] == [], name
