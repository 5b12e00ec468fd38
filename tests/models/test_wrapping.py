"""Tests of models under torch's other tools: checkpointing, hooks, export, averaging, quantization."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cases import draw_mask, example_layout, random_sparse, relative_error
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import sparsecnx
from sparsecnx import SparseTensor, models
from sparsecnx.models.convnextv2 import Layers

CHANNELS = 8


def build(model: str = "encoder", **options):
    torch.manual_seed(0)
    encoder = models.ConvNeXtV2Encoder(**{"depths": (1, 2, 1, 1), "dims": (8, 8, 16, 16), **options})
    built = models.FCMAE(encoder, decoder_dim=16) if model == "fcmae" else encoder
    for name, parameter in built.named_parameters():
        if ".grn." in name:
            nn.init.normal_(parameter)
    return built.double()


def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def some_mask(kind: str = "random counts", seed: int = 2):
    return draw_mask(kind, 2, (2, 3), seed)


def sparse() -> SparseTensor:
    x = random_sparse(example_layout(), CHANNELS)
    return x.with_features(x.features.requires_grad_())


def gradients(model, *args, **kwargs):
    """Return the gradients of the mean square of what the model returns, with the same random numbers each time."""
    torch.manual_seed(1)
    out = model(*args, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    out = out.features if isinstance(out, SparseTensor) else out
    return torch.autograd.grad(out.square().mean(), [p for p in model.parameters() if p.requires_grad])


CALLS = pytest.mark.parametrize(
    ("model", "masked"),
    [("encoder", True), ("encoder", False), ("fcmae", True)],
    ids=["encoder, masked", "encoder, dense", "fcmae"],
)


def arguments(masked: bool):
    return {"images": images(), "mask": some_mask() if masked else None}


@CALLS
def test_checkpointing_gives_the_same_gradients(model, masked):
    net = build(model, drop_path_rate=0.5)
    expected = gradients(net, **arguments(masked))
    net.set_grad_checkpointing()
    assert all(map(torch.equal, gradients(net, **arguments(masked)), expected))


class Made(TorchDispatchMode):
    """Remember the storage of all that operators return."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                self.storages[reference.cdata] = reference, tensor.untyped_storage().nbytes()
        return out

    def alive(self) -> int:
        """Return the bytes that are still kept."""
        return sum(size for reference, size in self.storages.values() if not reference.expired())


@CALLS
def test_checkpointing_keeps_less(model, masked):
    net, kept, given = build(model), [], arguments(masked)
    for enable in (False, True):
        net.set_grad_checkpointing(enable)
        with Made() as made:
            out = net(**given)
        kept.append(made.alive())
        del out
    encoder = net.encoder if model == "fcmae" else net
    # Every block keeps at least its output of the depthwise convolution, which is as large as its output.
    outputs = zip(encoder.stages, encoder.forward_features(**given), strict=True)
    least = sum(len(stage) * pytree.tree_leaves(out)[0].nbytes for stage, out in outputs)
    assert kept[0] - kept[1] > least


def test_checkpointing_of_a_replaced_stage_is_refused():
    net = build()
    net.stages[1] = nn.Sequential(*net.stages[1])
    with pytest.raises(TypeError, match="stages holds a Sequential: set_grad_checkpointing needs Layers"):
        net.set_grad_checkpointing()


@pytest.mark.parametrize("fullgraph", [False, True])
def test_checkpointing_compiles(fullgraph, monkeypatch):
    if fullgraph:  # Blocks build tables that later blocks share; docs/wrapping.md names this setting.
        monkeypatch.setattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint", True)
    torch._dynamo.reset()
    stage = Layers(*(sparsecnx.nn.ConvNeXtV2Block(CHANNELS) for _ in range(2))).double()
    x = sparse()
    expected = gradients(stage, x)
    stage.grad_checkpointing = True
    found = gradients(torch.compile(stage, backend="aot_eager", fullgraph=fullgraph), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_reentrant_checkpointing_of_a_sparse_tensor_is_refused():
    block, x = sparsecnx.nn.ConvNeXtV2Block(CHANNELS).double(), sparse()
    with pytest.raises(RuntimeError, match=r"use_reentrant=True.* got a SparseTensor: .* use_reentrant=False"):
        checkpoint(block, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"use_reentrant=True.* got a SparseTensor: .* use_reentrant=False"):
        checkpoint(torch.nn.Conv2d(CHANNELS, 2, 1).double(), x.as_tensor(), use_reentrant=True)
    expected = torch.autograd.grad(block(x).features.sum(), x.features)
    found = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).features.sum(), x.features)
    assert torch.equal(found[0], expected[0])


def test_reentrant_checkpointing_of_what_takes_and_returns_tensors():
    net, x, mask = build(), images().requires_grad_(), some_mask()

    def encode(pixels):
        return net(pixels, mask).dense().square().sum()

    encode(x).backward()
    expected = x.grad
    x.grad = None
    checkpoint(encode, x, use_reentrant=True).backward()
    assert torch.equal(x.grad, expected)


LAYERS = {
    "conv": sparsecnx.nn.Conv2d(CHANNELS, CHANNELS, 1),
    "depthwise": sparsecnx.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS),
    "linear": sparsecnx.nn.Linear(CHANNELS, CHANNELS),
    "gelu": sparsecnx.nn.GELU(),
    "norm": sparsecnx.nn.LayerNorm(CHANNELS),
    "norm of images": sparsecnx.nn.LayerNorm2d(CHANNELS),
    "grn": sparsecnx.nn.GRN(CHANNELS),
    "drop path": sparsecnx.nn.StochasticDepth(0.5),
    "block": sparsecnx.nn.ConvNeXtV2Block(CHANNELS),
    "stage": Layers(sparsecnx.nn.ConvNeXtV2Block(CHANNELS)),
}


@pytest.mark.filterwarnings("ignore:For backward hooks to be called")
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook", "global"])
@pytest.mark.parametrize("layer", LAYERS)
def test_backward_hooks_that_torch_would_ignore_are_refused(layer, register):
    module, x = copy.deepcopy(LAYERS[layer]).double(), sparse()
    if register == "global":
        handle = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    else:
        handle = getattr(module, register)(lambda *_: None)
    try:
        with pytest.raises(RuntimeError, match=r" has a backward hook, which torch ignores .* register_hook\(\)"):
            module(x)
        with torch.no_grad():
            module(x)
    finally:
        handle.remove()
    module(x)


def test_backward_hook_of_a_masked_encoder_is_refused():
    net, mask = build(), some_mask()
    net.register_full_backward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="ConvNeXtV2Encoder has a backward hook"):
        net(images(), mask)


def test_forward_hook_that_hooks_the_features():
    block, seen = sparsecnx.nn.ConvNeXtV2Block(CHANNELS).double(), []
    block.register_forward_hook(lambda module, inputs, output: output.features.register_hook(seen.append) and None)
    block(sparse()).features.sum().backward()
    assert len(seen) == 1 and (seen[0] == 1).all()


def test_exported_encoder_takes_another_mask():
    net, x, first = build(depths=(1, 1, 1, 1)).eval(), images(), some_mask("equal counts")
    second, visible = first.flip(1), int((~first[0]).sum())
    assert not torch.equal(first, second)
    file = io.BytesIO()
    torch.export.save(torch.export.export(net, (x, first, visible)), file)
    file.seek(0)
    found = torch.export.load(file).module()(x, second, visible)
    torch.testing.assert_close(found.dense(), net(x, second, visible).dense())


def test_export_of_a_mask_without_its_count_is_refused():
    with pytest.raises(ValueError, match=r"visible and count are None: torch.export needs one of them"):
        torch.export.export(build(), (images(), some_mask("equal counts")))


@pytest.mark.filterwarnings("ignore")
def test_trace_of_a_mask_is_refused():
    with pytest.raises(RuntimeError, match=r"torch.jit.trace would record this mask for all: use torch.export"):
        torch.jit.trace(build(), (images(), some_mask("equal counts")))


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.optim.swa_utils.AveragedModel(model),
    ],
    ids=["deepcopy", "pickle", "AveragedModel"],
)
def test_copies_compute_the_same(copied):
    net, mask = build(), some_mask()
    assert torch.equal(copied(net)(images(), mask).features, net(images(), mask).features)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dynamic_quantization_by_the_documented_steps():
    net, mask = build().float().eval(), some_mask()
    expected = net(images().float(), mask).dense()
    for module in net.modules():
        if type(module) is sparsecnx.nn.Linear:
            module.__class__ = nn.Linear
    quantized = torch.ao.quantization.quantize_dynamic(net, {nn.Linear})
    kinds = [type(module) for module in quantized.modules()]
    assert kinds.count(torch.ao.nn.quantized.dynamic.Linear) == 10 and nn.Linear not in kinds
    found = quantized(images().float(), mask).dense()
    assert not torch.equal(found, expected)
    assert relative_error(found, expected) < 0.02


def each(net, **options):
    """Return the loss of one image and its mask, as a function of parameters."""

    def loss(parameters, image, mask):
        return functional_call(net, parameters, (image[None],), {"mask": mask[None], **options})[0]

    return loss


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented")
def test_a_mask_of_its_own_for_each_sample():
    net, masks = build("fcmae"), some_mask("equal counts", seed=1)
    parameters = {name: value.detach() for name, value in net.named_parameters()}
    visible = int((~masks[0]).sum())
    assert not torch.equal(*masks)
    per_sample = grad(each(net, visible=visible))
    found = vmap(per_sample, in_dims=(None, 0, 0))(parameters, images(), masks)
    for i, (image, mask) in enumerate(zip(images(), masks, strict=True)):
        for name, expected in per_sample(parameters, image, mask).items():
            assert relative_error(found[name][i], expected) < 1e-12
    with pytest.raises(ValueError, match=f"^mask does not keep visible={visible + 1} tiles in every image"):
        vmap(each(net, visible=visible + 1), in_dims=(None, 0, 0))(parameters, images(), masks)
    with pytest.raises(ValueError, match=r"^mask differs between the samples of torch.vmap.*pass visible="):
        vmap(each(net), in_dims=(None, 0, 0))(parameters, images(), masks)


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented")
def test_a_random_mask_for_each_sample():
    net = build("fcmae")
    losses, _, masks = vmap(lambda image: net(image[None]), randomness="different")(images())
    expected = [net(image[None], mask=mask)[0] for image, mask in zip(images(), masks, strict=True)]
    torch.testing.assert_close(losses, torch.stack(expected))


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented")
def test_vmap_over_a_sparse_tensor_names_the_remedy():
    x, factors = sparse(), torch.tensor([2.0, 3.0])
    for in_dims, args in ((0, (x,)), ((0, None), (x, factors))):
        with pytest.raises(TypeError, match=r"^torch.vmap got a SparseTensor to map over.* visible=; or .* in_dims"):
            vmap(lambda x, *_: x.features, in_dims=in_dims)(*args)
    found = vmap(lambda x, factor: (x * factor).features, in_dims=(None, 0))(x, factors)
    assert torch.equal(found, torch.stack([x.features * 2, x.features * 3]))
    with pytest.raises(TypeError, match=r"^torch.vmap got a SparseTensor to return.* return x\.features, or x\.dense"):
        vmap(lambda x, factor: [x * factor], in_dims=(None, 0))(x, factors)
    with pytest.raises(TypeError, match=r"^torch.vmap got a SparseTensor to return"):
        vmap(lambda x, factor: x * factor, in_dims=(None, 0))(x, factors)
    stacked = pytree.tree_map(lambda *leaves: torch.stack(leaves), x, x * 2)
    assert torch.equal(vmap(lambda x: (x * 3).features)(stacked), torch.stack([x.features * 3, x.features * 6]))


def test_changing_the_dtype_of_all_leaves_is_refused():
    x = sparse()
    with pytest.raises(TypeError, match=r"^the layout of a SparseTensor became torch.float32.* x\.to\(dtype\)"):
        pytree.tree_map(lambda value: value.float(), x)
    assert sparsecnx.nn.LayerNorm(CHANNELS)(pytree.tree_map(torch.detach, x).to(torch.float32)).dtype == torch.float32


def test_a_file_with_a_sparse_tensor_loads_with_weights_only():
    """torch.export.load does so with the example inputs of a program."""
    x, file = sparse(), io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True).dense(), x.dense())
