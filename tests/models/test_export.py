"""Programs of `torch.export` and ONNX of the dense classifier: plain operators, any batch, any sides."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from cases import assert_close
from torch.export import Dim

from sparsecnx import models

SIDES = {0: Dim("batch"), 2: Dim("height", min=16), 3: Dim("width", min=16)}  # twice the stride
OPTIONS = [{}, {"block": "v1"}, {"stem_type": "conv3x3"}]
OTHERS = [(1, 3, 16, 16), (3, 3, 25, 38), (2, 3, 64, 40)]


def small(**options):
    """Return a classifier of stride 8 with random parameters, in evaluation."""
    torch.manual_seed(0)
    model = models.ConvNeXtV2(5, depths=(1, 1), dims=(8, 16), drop_path_rate=0.2, drop_rate=0.2, **options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def exported(model):
    return torch.export.export(model, (torch.randn(2, 3, 24, 32),), dynamic_shapes=(SIDES,))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_program_takes_any_batch_and_sides(options):
    model = small(**options)
    program = exported(model)
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert operators and all(name.startswith("aten.") for name in operators)
    for shape in OTHERS:
        x = torch.randn(shape)
        found, expected = program.module()(x), model(x)
        assert expected.std() > 0.1
        assert_close(found, expected, 1e-6)


def test_a_saved_program_runs_without_sparsecnx(tmp_path):
    model, x = small(), torch.randn(3, 3, 25, 38)
    torch.export.save(exported(model), tmp_path / "model.pt2")
    torch.save((x, model(x).detach()), tmp_path / "expected.pt")
    script = """
import sys
sys.modules["sparsecnx"] = None  # An import of it raises.
import torch
x, expected = torch.load("expected.pt")
torch.testing.assert_close(torch.export.load("model.pt2").module()(x), expected)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_onnx_is_the_model(options, tmp_path):
    for library in ("onnx", "onnxscript"):  # torch writes ONNX through them.
        pytest.importorskip(library)
    onnxruntime = pytest.importorskip("onnxruntime")
    model, file = small(**options), tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from the libraries
        torch.onnx.export(
            model,
            (torch.randn(2, 3, 24, 32),),
            file,
            dynamo=True,
            dynamic_shapes=(SIDES,),
            input_names=["images"],
            output_names=["logits"],
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [axis.shape for axis in session.get_inputs()] == [["batch", 3, "height", "width"]]
    for shape in OTHERS:
        x = torch.randn(shape)
        (found,) = session.run(["logits"], {"images": x.numpy()})
        assert_close(torch.from_numpy(found), model(x).detach(), 1e-5)
