"""torch's `AveragedModel` around masked autoencoders, as an exponential moving average of parameters and buffers."""

from __future__ import annotations

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparsecnx import load_encoder, models

DECAY = 0.9


def encoder():
    return models.ConvNeXtV2Encoder((1, 1, 1, 1), (4, 4, 8, 8))


def multi_target():
    return models.MPMAE(encoder(), {"image": models.ImageTarget(3)}, decoder_dim=8, uncertainty=True)


MODELS = {
    "FCMAE": lambda: models.FCMAE(encoder(), decoder_dim=8),
    "SparK": lambda: models.SparK(encoder(), decoder_dim=32),
    "MPMAE": multi_target,
}


def call(model, images, mask):
    if isinstance(getattr(model, "module", model), models.MPMAE):
        return model(images, {"image": images}, mask=mask)[0]
    return model(images, mask=mask)[0]


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_average_is_that_of_every_parameter_and_buffer(make, tmp_path):
    model, mask = make(), torch.tensor([[True, False, True, False]] * 2)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    expected: dict[str, torch.Tensor] = {}
    for _ in range(3):
        optimizer.zero_grad()
        call(model, torch.randn(2, 3, 64, 64), mask).backward()
        optimizer.step()
        average.update_parameters(model)
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                before = expected.get(name, value)
                expected[name] = DECAY * before + (1 - DECAY) * value
    found = average.module.state_dict()
    assert any("running_var" in name for name in found) == isinstance(model, models.SparK)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, found[name])]
    assert len(changed) > len(found) / 2

    images = torch.randn(2, 3, 64, 64)
    teacher = make().eval()
    teacher.load_state_dict(found)
    with torch.no_grad():
        assert torch.equal(call(average.eval(), images, mask), call(teacher, images, mask))
    torch.save({"model": found}, tmp_path / "teacher.pt")
    network = encoder()
    assert load_encoder(network, tmp_path / "teacher.pt") == []
    assert all(torch.equal(value, found[f"encoder.{name}"]) for name, value in network.state_dict().items())
