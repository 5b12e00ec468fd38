"""Networks after any prefix and beside anything, in files that torch, timm and Lightning write."""

from __future__ import annotations

import argparse
import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import swa_utils

from sparsecnx import models
from sparsecnx.cli import main
from sparsecnx.compat import checkpoints
from sparsecnx.compat.checkpoints import CheckpointError, load_encoder
from sparsecnx.compat.checkpoints.prefixes import find_network, prefixes_of

DEPTHS, DIMS = (1, 2, 1, 1), (8, 16, 24, 32)


def randomised(model):
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def classifier():
    return randomised(models.ConvNeXtV2(5, depths=DEPTHS, dims=DIMS))


def autoencoder():
    return randomised(models.FCMAE(models.ConvNeXtV2Encoder(DEPTHS, DIMS), decoder_dim=12))


def of_timm(**options):
    timm = pytest.importorskip("timm")
    return randomised(timm.create_model("convnextv2_atto", depths=DEPTHS, dims=DIMS, **options))


def of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ConvNextV2Config(depths=list(DEPTHS), hidden_sizes=list(DIMS), num_labels=5)
    return randomised(transformers.ConvNextV2ForImageClassification(config))


class Segmenter(nn.Module):
    """Hold a network, as training code does, and other parts beside it."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.decode_head = nn.Sequential(nn.Conv2d(32, 4, 1), nn.BatchNorm2d(4))
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(4))


class Distillation(nn.Module):
    """Hold two networks."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = classifier(), classifier()


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


NETWORKS = {
    "ours": classifier,
    "fcmae": autoencoder,
    "timm": of_timm,
    "transformers": of_transformers,
    "published": lambda: checkpoints.convert(autoencoder().state_dict(), "fcmae").state_dict,
}


@pytest.mark.parametrize(
    "prefix", ["model.", "backbone.", "module.model.encoder.", "net.stages.0.", "_orig_mod.encoder."]
)
@pytest.mark.parametrize("network", NETWORKS)
def test_any_prefix_is_found_and_what_lies_beside_is_named(network, prefix):
    made = NETWORKS[network]()
    state = made if isinstance(made, dict) else dict(made.state_dict())
    beside = {
        "decode_head.conv.weight": torch.ones(2),
        "n_averaged": torch.tensor(3),
        f"{prefix}neck.bias": torch.ones(1),
    }
    loaded = checkpoints.files.find_state_dict({**beside, **prefixed(prefix, state)})
    assert_same(loaded.state_dict, state)
    assert (loaded.prefix, loaded.beside, loaded.foreign) == (prefix, list(beside), False)


def test_wrappers_of_torch_around_each_other(tmp_path):
    """The names are those of DistributedDataParallel around a compiled module around training code."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = torch.compile(Segmenter(classifier()))
        state = nn.parallel.DistributedDataParallel(module).state_dict()
    finally:
        torch.distributed.destroy_process_group()
    torch.save(state, tmp_path / "ddp.pt")
    loaded = checkpoints.load(tmp_path / "ddp.pt")
    assert loaded.prefix == "module._orig_mod.backbone."
    assert_same(loaded.state_dict, module._orig_mod.backbone.state_dict())
    assert len(loaded.beside) == len(state) - len(loaded.state_dict) == 8


def test_the_command_lists_what_lies_beside(tmp_path, capsys):
    model = Segmenter(classifier())
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "in.pt")
    assert convert(tmp_path / "in.pt", tmp_path / "out.pt", "--to", "convnextv2") == 0
    first, _, left, *names = capsys.readouterr().out.splitlines()
    assert ", part state_dict (beside epoch), without backbone. before its names: convnextv2, ConvNeXt V2 with" in first
    assert left == "left out, because convnextv2 has no place for them: 8 entries"
    assert [name.strip() for name in names] == [name for name in model.state_dict() if not name.startswith("backbone.")]
    assert_same(torch.load(tmp_path / "out.pt")["model"], model.backbone.state_dict())


def test_two_networks_are_an_error_until_one_is_named(tmp_path, capsys):
    model, source, target = Distillation(), tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save(model.state_dict(), source)
    assert convert(source, target, "--to", "convnextv2") == 2
    encoder = len(models.ConvNeXtV2Encoder(DEPTHS, DIMS).state_dict())
    places = f"'student.' ({encoder} entries), 'teacher.' ({encoder} entries)"
    problem = f"holds 2 networks, after the prefixes {places}: choose one with prefix (--prefix of convert)"
    assert capsys.readouterr().err == f"sparsecnx convert: error: IN is {source}: {problem}\n"
    assert not target.exists()
    for prefix in ("teacher", "teacher."):
        assert convert(source, target, "--to", "convnextv2", "--prefix", prefix) == 0
        assert ", without teacher. before its names: convnextv2" in capsys.readouterr().out
        assert_same(torch.load(target)["model"], model.teacher.state_dict())
    assert convert(source, target, "--to", "convnextv2", "--prefix", "tea") == 2
    problem = "no name begins with 'tea.'; its prefixes are 'student.' (70), 'teacher.' (70)\n"
    assert capsys.readouterr().err.endswith(problem)
    with pytest.raises(CheckpointError, match="checkpoint: holds 2 networks, after the prefixes 'student"):
        load_encoder(classifier(), model.state_dict())
    fresh = classifier()
    load_encoder(fresh, model.state_dict(), prefix="student")
    assert torch.equal(fresh.stages[1][1].grn.gamma, model.student.stages[1][1].grn.gamma)


def test_the_empty_prefix_and_the_first_part_of_one_are_named_too():
    state, copied = classifier().state_dict(), classifier().state_dict()
    names = [*state, *prefixed("ema.module.", copied), *prefixed("ema.old.", copied)]
    with pytest.raises(CheckpointError, match=r"holds 3 networks, after the prefixes '' \(66 entries\), 'ema\.old\.'"):
        find_network(names)
    assert list(find_network(names, "").entries.values()) == list(state)
    with pytest.raises(CheckpointError, match=r"holds 2 networks, after the prefixes 'ema\.old\.'"):
        find_network(names, "ema")
    assert list(find_network(names, "ema.module").entries.values()) == list(prefixed("ema.module.", copied))


def test_the_encoder_alone_is_taken_where_it_is_named():
    state = autoencoder().state_dict()
    network = find_network(list(state), "encoder")
    assert network.prefix == "encoder."
    assert list(network.entries) == list(models.ConvNeXtV2Encoder(DEPTHS, DIMS).state_dict())


def test_no_network_is_an_error_with_at_most_five_prefixes(tmp_path, capsys):
    parts = {f"part{i}": nn.Linear(1, 1) for i in range(7)}
    torch.save({"state_dict": prefixed("net.", nn.ModuleDict(parts).state_dict())}, tmp_path / "in.pt")
    assert convert(tmp_path / "in.pt", tmp_path / "out.pt", "--to", "timm") == 2
    shown = ", ".join(f"'net.part{i}.' (2)" for i in range(5))
    assert capsys.readouterr().err.endswith(f"(1, 1), 11 more; its prefixes are {shown} and 2 more\n")
    assert prefixes_of(["weight", "bias"]) == ""
    assert prefixes_of(["a.b.c", "a.b.d", "n"]) == "; its prefixes are 'a.b.' (2)"


@pytest.mark.parametrize("change", [0, 2], ids=["stem", "bias"])
def test_a_damaged_network_is_refused_after_its_prefix_too(change):
    state = prefixed("model.", classifier().state_dict())
    name = list(state)[change]
    damaged = checkpoints.files.find_state_dict({other: tensor for other, tensor in state.items() if other != name})
    with pytest.raises(CheckpointError, match=rf"lacks {re.escape(name.removeprefix('model.'))}"):
        checkpoints.convert(damaged.state_dict, "timm")
    strange = checkpoints.files.find_state_dict({**state, "model.stages.0.0.scale": torch.ones(8)})
    with pytest.raises(CheckpointError, match=r"convnextv2 has no place for stages\.0\.0\.scale \(8,\)"):
        checkpoints.convert(strange.state_dict, "timm")


def test_averaged_model_of_torch(tmp_path, capsys):
    model = classifier()
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    randomised(model)
    average.update_parameters(model)
    average.update_parameters(randomised(model))
    torch.save({"model": model.state_dict(), "model_ema": average.state_dict()}, tmp_path / "in.pt")
    assert convert(tmp_path / "in.pt", tmp_path / "out.pt", "--to", "convnextv2", "--key", "model_ema") == 0
    printed = capsys.readouterr().out.splitlines()
    assert ", part model_ema (beside model), without module. before its names: convnextv2" in printed[0]
    assert printed[2:] == ["left out, because convnextv2 has no place for them: 1 entries", "    n_averaged"]
    assert_same(torch.load(tmp_path / "out.pt")["model"], average.module.state_dict())
    fresh = models.ConvNeXtV2(5, depths=DEPTHS, dims=DIMS)
    load_encoder(fresh, average.state_dict())
    assert torch.equal(fresh.stages[0][0].pwconv1.weight, average.module.stages[0][0].pwconv1.weight)


def test_checkpoints_that_timm_saves(tmp_path):
    """`CheckpointSaver` writes model and average apart; the state dict of `ModelEmaV3` itself has `module.`."""
    model = of_timm(num_classes=5)
    utils = pytest.importorskip("timm.utils")
    average = utils.ModelEmaV3(model, decay=0.5)
    randomised(model)
    average.update(model)
    args = argparse.Namespace(model="convnextv2_atto", output=Path("out"))
    optimizer = torch.optim.AdamW(model.parameters())
    saver = utils.CheckpointSaver(model, optimizer, args, average, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=3, metric=np.float64(0.5))
    for key, trained in {None: model, "state_dict": model, "state_dict_ema": average.module}.items():
        loaded = checkpoints.load(tmp_path / "last.pth.tar", key)
        assert (loaded.prefix, loaded.beside) == ("", [])
        assert_same(loaded.state_dict, trained.state_dict())
    torch.save({"ema": average.state_dict()}, tmp_path / "ema.pt")
    loaded = checkpoints.load(tmp_path / "ema.pt", "ema")
    assert loaded.prefix == "module."
    assert_same(loaded.state_dict, average.module.state_dict())


class FlatAverage(nn.Module):
    """Keep an average in buffers, whose names take no dots."""

    def __init__(self, model):
        super().__init__()
        for name, value in model.state_dict().items():
            self.register_buffer(name.replace(".", "_"), value.clone())
        self.register_buffer("num_updates", torch.tensor(1))


@pytest.mark.parametrize("network", ["ours", "fcmae", "timm", "transformers"])
def test_averages_with_underscores_for_dots(network):
    model = NETWORKS[network]()
    module = nn.ModuleDict({"model": model, "model_ema": FlatAverage(randomised(copy.deepcopy(model)))})
    with pytest.raises(CheckpointError, match=r"holds 2 networks, after the prefixes 'model\.' .* 'model_ema\.'"):
        checkpoints.files.find_state_dict(module.state_dict())
    loaded = checkpoints.files.find_state_dict(module.state_dict(), prefix="model_ema")
    assert loaded.prefix == "model_ema."
    assert "model_ema.num_updates" in loaded.beside
    expected = {name: module["model_ema"].get_buffer(name.replace(".", "_")) for name in model.state_dict()}
    assert_same(loaded.state_dict, expected)
    flat = {f"ema_{name}": value for name, value in module["model_ema"].state_dict().items()}
    assert_same(checkpoints.files.find_state_dict(flat, prefix="ema_").state_dict, expected)
    assert_same(checkpoints.files.find_state_dict(flat).state_dict, expected)


def test_two_spellings_of_one_entry_are_refused():
    state = dict(of_timm().state_dict())
    with pytest.raises(CheckpointError, match=r"^stem\.0\.bias and stem_0\.bias are the same entry$"):
        checkpoints.files.find_state_dict({**state, "stem_0.bias": state["stem.0.bias"]})


@pytest.mark.parametrize("wrapped", ["", "module.", "model.backbone."])
def test_features_of_timm_as_input_and_target(wrapped, tmp_path, capsys):
    features = of_timm(features_only=True)
    assert "stages_0.blocks.0.norm.weight" in features.state_dict()
    torch.save(prefixed(wrapped, features.state_dict()), tmp_path / "in.pt")
    assert convert(tmp_path / "in.pt", tmp_path / "out.pt", "--to", "convnextv2") == 0
    assert "timm, ConvNeXt V2 with depths 1 2 1 1, dims 8 16 24 32 (encoder), 66 entries" in capsys.readouterr().out
    encoder = models.ConvNeXtV2Encoder(DEPTHS, DIMS)
    encoder.load_state_dict(torch.load(tmp_path / "out.pt")["model"])
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = encoder.forward_features(images)
        for ours, theirs in zip(found, features(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    target = Segmenter(of_timm(features_only=True))
    kept = load_encoder(nn.DataParallel(target), tmp_path / "in.pt")
    assert len(kept) == 8 and all(not name.startswith("module.backbone.") for name in kept)
    assert_same(target.backbone.state_dict(), features.state_dict())


def test_norms_of_a_backbone_of_transformers_are_left_out():
    transformers = pytest.importorskip("transformers")
    config = transformers.ConvNextV2Config(
        depths=list(DEPTHS), hidden_sizes=list(DIMS), out_features=["stage2", "stage4"]
    )
    state = transformers.ConvNextV2Backbone(config).state_dict()
    loaded = checkpoints.files.find_state_dict(state)
    assert loaded.beside == [name for name in state if name.startswith("hidden_states_norms.")] != []
    encoder = models.ConvNeXtV2Encoder(DEPTHS, DIMS)
    encoder.load_state_dict(checkpoints.convert(loaded.state_dict, "convnextv2").state_dict)


def test_a_model_of_two_networks_is_refused_as_target():
    message = r"^holds 2 networks, after the prefixes 'student\.' .*: pass the part of the model that should be loaded$"
    with pytest.raises(CheckpointError, match=message):
        load_encoder(Distillation(), autoencoder().state_dict())


def first_version(library):
    if library == "torchvision":
        return pytest.importorskip("torchvision").models.convnext_tiny()
    transformers = pytest.importorskip("transformers")
    return transformers.ConvNextModel(transformers.ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=list(DIMS)))


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("library", ["torchvision", "transformers"])
def test_the_first_convnext_is_refused_as_such(library, prefix, tmp_path, capsys):
    torch.save(prefixed(prefix, first_version(library).state_dict()), tmp_path / "in.pt")
    assert convert(tmp_path / "in.pt", tmp_path / "out.pt", "--to", "timm") == 2
    error = r"is a ConvNeXt V1, with the layer scale \S+ and no GRN: expected a ConvNeXt V2, or V1 with the names"
    assert re.search(error, capsys.readouterr().err)


def test_a_run_of_spark_inside_a_module_is_found():
    timm = pytest.importorskip("timm")
    run = models.SparK(timm.create_model("test_resnet", num_classes=0), (64, 64))
    loaded = checkpoints.files.find_state_dict(prefixed("model.", run.state_dict()))
    assert (loaded.prefix, loaded.foreign) == ("model.encoder.", True)
    assert_same(loaded.state_dict, run.encoder.state_dict())
    target = Segmenter(timm.create_model("test_resnet", num_classes=3))
    kept = load_encoder(target, prefixed("model.", run.state_dict()))
    assert kept[:2] == ["backbone.fc.weight", "backbone.fc.bias"]
    trained = target.backbone.state_dict()
    assert all(torch.equal(trained[name], tensor) for name, tensor in run.encoder.state_dict().items())
    with pytest.raises(CheckpointError, match=r"with several such networks, \['a\.', 'b\.'\]: pass the part"):
        load_encoder(nn.ModuleDict({"a": target.backbone, "b": target.backbone}), run.state_dict())
