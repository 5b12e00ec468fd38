"""Models are saved with the arguments that make them, to a folder or the hub, and come back as they were."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from sparsecnx.common.errors import MissingExtra
from sparsecnx.models import (
    FCMAE,
    MPMAE,
    ClassificationTarget,
    ClassMapTarget,
    ConvNeXtV2,
    ConvNeXtV2Encoder,
    ImageTarget,
    SparK,
    create_fcmae,
)
from sparsecnx.models.masked_autoencoder import MaskedAutoencoder
from sparsecnx.models.pretrained import CLASSES, Pretrained
from sparsecnx.nn import LayerNorm

hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("safetensors")

SMALL: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16)}
VOLUMES: dict[str, Any] = {"ndim": 3, "kernel_size": (1, 5, 5), "stem": (1, 4, 4), "strides": ((1, 2, 2), 2, 2)}
# In an order that is not that of the alphabet, which JSON could bring them to.
TARGETS: dict[str, Any] = {
    "optical": ImageTarget(3, patch_size=(64, 32), loss_on="all"),
    "cover": ClassMapTarget(4, patch_size=8),
    "biome": ClassificationTarget(5),
}
MODELS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "ConvNeXtV2Encoder": (lambda: ConvNeXtV2Encoder(**SMALL), (2, 3, 64, 64)),
    "ConvNeXtV2Encoder, positional": (lambda: ConvNeXtV2Encoder((1, 1), (8, 8), 2, 0.1, "batch"), (2, 2, 8, 8)),
    "ConvNeXtV2": (lambda: ConvNeXtV2(7, 0.5, global_pool="", in_chans=1, ndim=1, **SMALL), (2, 1, 64)),
    "FCMAE": (lambda: FCMAE(ConvNeXtV2Encoder(**SMALL)), (2, 3, 64, 96)),
    "FCMAE, not default": (
        lambda: FCMAE(ConvNeXtV2Encoder(**SMALL, in_chans=5, grn_scope="batch", kernel_size=3), 64, 2, 24, False),
        (2, 5, 128, 128),
    ),
    "FCMAE of volumes": (
        lambda: FCMAE(ConvNeXtV2Encoder(**SMALL, **VOLUMES, in_chans=2), decoder_dim=16, patch_size=(8, 32, 64)),
        (1, 2, 16, 64, 64),
    ),
    "FCMAE of blocks v1": (
        lambda: FCMAE(ConvNeXtV2Encoder(**SMALL, block="v1", norm_eps=1e-5, dwconv_bias=False), loss_on="all"),
        (2, 3, 64, 64),
    ),
    "FCMAE with another stem": (
        lambda: FCMAE(ConvNeXtV2Encoder(**SMALL, stem_type="conv3x3", stem=2, grn_eps=1e-3), decoder_dim=16),
        (2, 3, 64, 64),
    ),
    "MPMAE": (
        lambda: MPMAE(ConvNeXtV2Encoder(**SMALL), TARGETS, decoder_dim=16, uncertainty=True),
        (2, 3, 64, 64),
    ),
    "SparK": (lambda: SparK(ConvNeXtV2Encoder(**SMALL), levels=3, decoder_dim=32, densify_norm="none"), (2, 3, 64, 64)),
    "SparK of volumes": (
        lambda: SparK(ConvNeXtV2Encoder(**SMALL, ndim=3, stem=(2, 2, 4)), (16, 32, 64), decoder_dim=32),
        (1, 3, 32, 64, 128),
    ),
}


def outputs(model: Any, shape: tuple[int, ...]) -> list[Tensor]:
    """Return what a model computes of random images, in evaluation mode, and the gradients of all parameters."""
    model = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(shape, generator=generator).to(next(model.parameters()).dtype)
    if isinstance(model, MPMAE):
        biome, cover = torch.randint(5, (2,), generator=generator), torch.randint(4, (2, 16, 16), generator=generator)
        targets = {"optical": torch.randn(2, 3, 128, 64, generator=generator), "cover": cover, "biome": biome}
        output = model(images, targets, mask_ratio=0.5, generator=generator)
        found = [output.loss, *output.predictions.values(), output.mask]
    elif isinstance(model, MaskedAutoencoder):
        loss, pred, mask = model(images, mask_ratio=0.5, generator=generator)
        found = [loss, pred, mask]
    else:
        found = [model(images)]
    found[0].square().sum().backward()
    return [*found, *(p.grad for p in model.parameters() if p.grad is not None)]


def randomize(model: Any) -> Any:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    make, shape = MODELS[name]
    model = randomize(make())
    model.save_pretrained(tmp_path / "saved")
    state = torch.get_rng_state()
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert torch.equal(torch.get_rng_state(), state)
    assert type(loaded) is type(model) and not loaded.training
    for got, expected in zip(outputs(loaded, shape), outputs(model, shape), strict=True):
        assert torch.equal(got, expected)
    trained = [[(name, p.requires_grad) for name, p in one.named_parameters()] for one in (loaded, model)]
    assert trained[0] == trained[1]
    assert list(getattr(loaded, "targets", {}).items()) == list(getattr(model, "targets", {}).items())
    assert json.loads(json.dumps(loaded.config())) == json.loads(json.dumps(model.config()))
    loaded.save_pretrained(tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()


def test_every_argument_of_a_constructor_is_kept() -> None:
    model = FCMAE(ConvNeXtV2Encoder(**SMALL, drop_path_rate=0.2), decoder_dim=16)
    config = model.config()
    expected = {"class": "FCMAE", "patch_size": None, "decoder_depth": 1, "decoder_dim": 16, "norm_pix_loss": True}
    assert expected.items() <= config.items()
    expected = {"class": "ConvNeXtV2Encoder", **SMALL, "drop_path_rate": 0.2, "stem": 4, "kernel_size": 7, "ndim": 2}
    assert expected.items() <= config["encoder"].items()


class Later(ConvNeXtV2Encoder):
    """An encoder with an argument that this package does not know, and an attribute of its name."""

    def __init__(self, *args: Any, later: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.later = nn.Linear(later, later)


def test_subclasses_with_other_arguments_come_back(tmp_path: Path) -> None:
    model = FCMAE(Later(later=3, **SMALL), decoder_dim=16)
    model.save_pretrained(tmp_path)
    assert FCMAE.from_pretrained(tmp_path).encoder.later.in_features == 3
    assert CLASSES["Later"] is Later


def test_arguments_without_a_name_are_refused() -> None:
    assert Later(SMALL["depths"], SMALL["dims"])._arguments["later"] == 1
    with pytest.raises(ValueError, match=r"model is a Later that was made with \*args .*: expected arguments by their"):
        Later(SMALL["depths"], SMALL["dims"]).config()


def test_a_name_means_the_class_that_has_it_first_or_is_called(tmp_path: Path) -> None:
    ConvNeXtV2Encoder(**SMALL).save_pretrained(tmp_path)
    other = type("ConvNeXtV2Encoder", (ConvNeXtV2Encoder,), {"__module__": "elsewhere"})
    assert CLASSES["ConvNeXtV2Encoder"] is ConvNeXtV2Encoder
    assert type(ConvNeXtV2Encoder.from_pretrained(tmp_path)) is ConvNeXtV2Encoder
    assert type(other.from_pretrained(tmp_path)) is other
    message = "model is a elsewhere.ConvNeXtV2Encoder, and config.json would mean sparsecnx.models.convnextv2.ConvNeXt"
    with pytest.raises(ValueError, match=re.escape(message)):
        other(**SMALL).config()


def change_activation(model: Any) -> None:
    model.encoder.stages[0][0].act = nn.ReLU()


def change_norm(model: Any) -> None:
    model.encoder.stages[0][0].norm = LayerNorm(8, eps=1e-2)


def change_scope(model: Any) -> None:
    model.encoder.stages[0][0].grn.scope = "batch"


def change_normalisation(model: Any) -> None:
    model.norm_pix_loss = False


def change_counted(model: Any) -> None:
    model.loss_on = "all"


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (change_activation, r"stages\.0\.0\.act"),
        (change_norm, r"stages\.0\.0\.norm\.eps"),
        (change_scope, r"stages\.0\.0\.grn\.scope"),
        (change_normalisation, "norm_pix_loss"),
        (change_counted, "loss_on"),
    ],
)
def test_changes_without_another_parameter_are_refused(change: Callable[[Any], None], where: str) -> None:
    model = FCMAE(ConvNeXtV2Encoder(**SMALL), decoder_dim=16)
    model.set_grad_checkpointing()
    model.eval().config()
    change(model)
    with pytest.raises(ValueError, match=rf"was changed after it was made, at \S*{where}: expected"):
        model.config()


def test_a_model_that_cannot_be_saved_leaves_the_one_in_the_folder(tmp_path: Path) -> None:
    Later(**SMALL).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    class Noted(Later):
        def __init__(self, note: Any = None, **kwargs: Any) -> None:
            super().__init__(**kwargs)

    with pytest.raises(ValueError, match=r"note is \{1\}: expected what JSON can hold"):
        Noted({1}, **SMALL).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_copies_and_pickles_know_their_arguments() -> None:
    model = FCMAE(ConvNeXtV2Encoder(**SMALL), decoder_dim=16)
    assert copy.deepcopy(model).config() == model.config()


def test_dtype_is_kept(tmp_path: Path) -> None:
    model = ConvNeXtV2Encoder(**SMALL).double()
    model.save_pretrained(tmp_path)
    assert {p.dtype for p in ConvNeXtV2Encoder.from_pretrained(tmp_path).parameters()} == {torch.float64}


def test_arguments_can_be_replaced(tmp_path: Path) -> None:
    ConvNeXtV2(num_classes=4, **SMALL).save_pretrained(tmp_path)
    model = ConvNeXtV2.from_pretrained(str(tmp_path), drop_path_rate=0.5, device="cpu")
    assert model.stages[3][0].drop_path.p == 0.5
    assert ConvNeXtV2Encoder.from_pretrained(tmp_path).num_classes == 4


def test_a_replaced_head_is_saved(tmp_path: Path) -> None:
    model = ConvNeXtV2(num_classes=4, **SMALL)
    model.reset_classifier(9, "")
    model.save_pretrained(tmp_path)
    loaded = ConvNeXtV2.from_pretrained(tmp_path)
    assert (loaded.num_classes, loaded.global_pool, loaded.head.out_features) == (9, "", 9)


def test_models_that_their_arguments_do_not_make_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    pruned = ConvNeXtV2Encoder(**SMALL)
    pruned.prune_intermediate_layers([1])
    foreign = FCMAE(nn.Sequential(nn.Conv2d(3, 8, 8, 8)), decoder_dim=16)
    for model, problem in (
        (pruned, r"model is a ConvNeXtV2Encoder that was changed .* at downsample_layers\.2\.0\.weight"),
        (foreign, "encoder is a Sequential: expected a network of sparsecnx.models"),
    ):
        with pytest.raises(ValueError, match=problem):
            model.save_pretrained(tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_sharded_models_are_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="model is sharded: expected a whole one"):
            fully_shard(ConvNeXtV2Encoder(**SMALL)).save_pretrained(tmp_path / "refused")
    finally:
        torch.distributed.destroy_process_group()


def test_folders_that_hold_no_such_model(tmp_path: Path) -> None:
    def complaint(folder: Path, kind: type[Pretrained] = FCMAE, **options: Any) -> str:
        with pytest.raises((FileNotFoundError, ValueError), match=str(folder)) as caught:
            kind.from_pretrained(folder, **options)
        return str(caught.value)

    folder = tmp_path / "saved"
    assert "there is no such folder, and the hub has names such as 'user/model'" in complaint(folder)
    folder.mkdir()
    assert "the folder has no config.json" in complaint(folder)
    FCMAE(ConvNeXtV2Encoder(**SMALL), decoder_dim=16).save_pretrained(folder)
    assert "it holds a FCMAE, expected a SparK" in complaint(folder, SparK)
    assert "size mismatch for mask_token" in complaint(folder, decoder_dim=8)
    assert "unexpected keyword argument 'decoder'" in complaint(folder, decoder=8)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "deserializing" in complaint(folder)
    weights.unlink()
    assert "model.safetensors" in complaint(folder)
    config = folder / "config.json"
    for text, problem in (
        ('{"class": "os.system"}', "class is 'os.system': expected one of "),
        ("{}", "class is None: expected one of "),
        ("{", "Expecting property name"),
        ("[]", "config.json holds no object"),
        ('{"class": ["FCMAE"]}', "class is ['FCMAE']: expected one of "),
        ('{"class": "MaskedAutoencoder"}', "class is 'MaskedAutoencoder': expected one of "),
        ('{"class": "FCMAE", "encoder": 3}', "FCMAE cannot be made of its arguments: "),
        ('{"class": "FCMAE", "encoder": {"depths": [1]}}', "an argument has the names depths: expected class or pairs"),
        ('{"class": "ConvNeXtV2Encoder", "depths": {"pairs": 3}}', "ConvNeXtV2Encoder cannot be made of its arguments"),
    ):
        config.write_text(text)
        assert problem in complaint(folder)


def test_card_names_the_package_and_the_paper(tmp_path: Path) -> None:
    for kind, paper in ((FCMAE, "2301.00808"), (SparK, "2301.03580")):
        folder = tmp_path / kind.__name__
        kind(ConvNeXtV2Encoder(**SMALL), decoder_dim=32).save_pretrained(folder)
        card = hub.ModelCard.load(folder / "README.md")
        assert card.data.library_name == "sparsecnx"
        assert f"https://arxiv.org/abs/{paper}" in card.text
        assert f'sparsecnx.models.{kind.__name__}.from_pretrained("{kind.__name__}")' in card.text
        (folder / "README.md").write_text("mine")
        kind.from_pretrained(folder).save_pretrained(folder)
        assert (folder / "README.md").read_text() == "mine"


def test_push_uploads_what_save_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, uploaded = create_fcmae("atto", decoder_dim=16), tmp_path / "uploaded"

    class Hub:
        def __init__(self, token: str | None = None) -> None:
            assert token == "secret"

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            assert options["private"] is True
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id: str, folder_path: Path, revision: str, **options: Any) -> str:
            folder_path.rename(uploaded)
            return f"{repo_id} at {revision}"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    assert model.push_to_hub("user/atto", private=True, token="secret", branch="new") == "user/atto at new"
    assert 'sparsecnx.models.FCMAE.from_pretrained("user/atto")' in (uploaded / "README.md").read_text()
    monkeypatch.setattr("sparsecnx.models.hub.hf_hub_download", download := lambda name, file, **_: uploaded / file)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", lambda repo_id, filename, **_: uploaded / filename)
    assert download("user/atto", "config.json").is_file()
    loaded = FCMAE.from_pretrained("user/atto", revision="new")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("missing", ["huggingface_hub", "safetensors"])
def test_without_the_libraries_the_error_names_the_command(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "sparsecnx.models.hub", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    for call in (
        lambda: ConvNeXtV2Encoder.from_pretrained(tmp_path),
        lambda: ConvNeXtV2Encoder(**SMALL).save_pretrained(tmp_path),
        lambda: ConvNeXtV2Encoder(**SMALL).push_to_hub("user/model"),
    ):
        with pytest.raises(MissingExtra, match=rf"{missing}.*pip install 'sparsecnx\[hub\]'"):
            call()
