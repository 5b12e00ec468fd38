"""Tests of `sparsecnx.models.masked_dense`, the reference of the sparse encoder, and of the sparse one in training."""

from __future__ import annotations

import pytest
import torch
from cases import MODEL_BACKENDS, assert_close, bound, device_of, draw_mask, widest
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from sparsecnx import models, use_backend
from sparsecnx.models import masked_dense

SMALL = {"depths": (1, 2, 1, 1), "dims": (8, 8, 16, 16)}


def small_encoder(**options):
    encoder = models.ConvNeXtV2Encoder(**SMALL, **options)
    for name, parameter in encoder.named_parameters():
        if ".grn." in name:
            torch.nn.init.normal_(parameter)
    return encoder.double()


def images():
    return torch.randn(3, 3, 64, 96, dtype=torch.float64)


def suited(backend, encoder, x, mask):
    """Move an encoder and its input to the device and dtype of a backend."""
    device, dtype = device_of(backend), widest(backend)
    return encoder.to(device, dtype), x.to(device, dtype), mask.to(device)


def test_outputs_are_zero_at_masked_sites_alone():
    mask = draw_mask("random counts", 3, (2, 3), seed=2)
    for stage in masked_dense.forward_features(small_encoder(), images(), mask):
        factor = stage.shape[-1] // 3
        hidden = mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        assert torch.equal((stage == 0).all(dim=1), hidden)


def test_everything_visible_is_the_plain_encoder():
    encoder, x = small_encoder(), images()
    found = masked_dense.forward_features(encoder, x, torch.zeros(3, 2, 3, dtype=torch.bool))
    for out, ref in zip(found, encoder.forward_features(x), strict=True):
        assert_close(out, ref)


def test_masked_pixels_do_not_matter():
    encoder, x, mask = small_encoder(), images(), draw_mask("random counts", 3, (2, 3), seed=2)
    hidden = mask[:, None].repeat_interleave(32, 2).repeat_interleave(32, 3)
    other = torch.where(hidden, 100 * torch.randn_like(x), x)
    for one, two in zip(
        masked_dense.forward_features(encoder, x, mask),
        masked_dense.forward_features(encoder, other, mask),
        strict=True,
    ):
        assert_close(one, two)


@pytest.mark.parametrize("backend", MODEL_BACKENDS)
def test_training_drops_the_same_branches_of_the_same_images(backend):
    """Stochastic depth takes one random number for each image and block, dense or sparse."""
    mask = draw_mask("equal counts", 3, (2, 3), seed=2)
    encoder, x, mask = suited(backend, small_encoder(drop_path_rate=0.8), images(), mask)
    results = []
    for forward in (encoder.forward_features, lambda x, mask: masked_dense.forward_features(encoder, x, mask)):
        torch.manual_seed(4)
        with use_backend(backend):
            results.append(forward(x, mask))
    sparse, dense = results
    for out, ref in zip(sparse, dense, strict=True):
        assert_close(out.dense(), ref, bound(backend))
    evaluated = masked_dense.forward_features(encoder.eval(), x, mask)
    assert not torch.allclose(evaluated[-1], dense[-1])


def on_an_imitated_gpu(run):
    """Run a model on fake tensors of a GPU. Reading a value back raises, and so does a shape that depends on one."""
    mask = draw_mask("equal counts", 2, (2, 3), seed=2)
    model = models.FCMAE(models.ConvNeXtV2Encoder(**SMALL), decoder_dim=16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        return run(model.to("cuda"), torch.randn(2, 3, 64, 96, device="cuda"), mode.from_tensor(mask).to("cuda"))


def test_equal_counts_read_nothing_back_from_a_gpu():
    visible = 6 - int(draw_mask("equal counts", 2, (2, 3), seed=2)[0].sum())
    encoded = on_an_imitated_gpu(lambda model, x, mask: model.encoder(x, mask, visible=visible))
    assert encoded.features.shape == (2 * visible, 16) and encoded.device.type == "cuda"
    loss, prediction, _ = on_an_imitated_gpu(lambda model, x, mask: model(x, mask_ratio=0.6))
    assert loss.shape == () and prediction.shape == (2, 3072, 2, 3)


def test_counting_a_mask_reads_from_a_gpu():
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        on_an_imitated_gpu(lambda model, x, mask: model.encoder(x, mask))


@pytest.mark.parametrize("backend", MODEL_BACKENDS)
def test_known_counts_change_no_bit(backend):
    """`visible` saves a read, and the tiles are the same."""
    encoder, x, mask = suited(backend, small_encoder(), images(), draw_mask("equal counts", 3, (2, 3), seed=2))
    visible = int((~mask[0]).sum())
    model = models.FCMAE(encoder, decoder_dim=16).to(x)
    with use_backend(backend):
        counted, known = encoder.forward_features(x, mask), encoder.forward_features(x, mask, visible)
        assert counted[0].layout.tiles.visible == known[0].layout.tiles.visible == visible
        assert all(torch.equal(one.features, two.features) for one, two in zip(counted, known, strict=True))
        assert all(
            torch.equal(a, b) for a, b in zip(model(x, mask=mask), model(x, mask=mask, visible=visible), strict=True)
        )
        assert all(torch.equal(one.dense(), two.dense()) for one, two in zip(counted, known, strict=True))
