"""A checkpoint that is damaged, edited or of another program is refused with the name of the field."""

import copy
import math

import pytest
import torch
from small_runs import train, use_tiny_models

from sparsecnx.common.errors import CheckpointError, InputError
from sparsecnx.common.torch_files import save_torch
from sparsecnx.train import checkpoint, contents
from sparsecnx.train.reconstruct import reconstruct

WEIGHT = "encoder.stages.0.0.dwconv.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the checkpoint of a run of two steps, as torch loads it."""
    place = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_models(patch)
        train(None, place / "run", epochs=1, batch_size=8, epoch_repeats=1)
    return checkpoint.read(place / "run" / "last.pt")


def changed(state, field, value):
    """Return a copy of a checkpoint with another value in one field, given as the keys that lead to it."""
    state = copy.copy(state)
    within = state
    for key in field[:-1]:
        within[key] = copy.copy(within[key])
        within = within[key]
    if callable(value):
        value = value(copy.deepcopy(within[field[-1]]))
    within[field[-1]] = value
    return state


def set_first(number):
    def change(tensor):
        tensor.view(-1)[0] = number
        return tensor

    return change


def test_a_whole_checkpoint_passes(saved):
    loaded = contents.check(saved)
    assert (loaded.step, loaded.data.images, loaded.recipe.batch_size) == (2, 22, 8)
    assert loaded.model.keys() == saved["model"].keys()
    assert len(loaded.optimizer) == len(loaded.model)
    assert "seen" not in saved["data"] and loaded.data.seen is None
    seen = [(0.0, 5.0), (7.0, 7.0), (math.nan, math.nan)]
    assert contents.check(changed(saved, ("data", "seen"), seen)).data.seen == seen
    for earlier in ([], [0.0, 5.0], None):  # one range over all channels, or none
        assert contents.check(changed(saved, ("data", "seen"), earlier)).data.seen is None


OPTIMIZER_STATE = ("optimizer", "state", 3)
WRONG = [
    (("model",), [1, 2], r"model is \[1, 2\]: expected a dict"),
    (
        ("model", WEIGHT),
        lambda t: t.to(torch.int8),
        rf"{WEIGHT} is int8 \(8, 1, 7, 7\): expected float32 \(8, 1, 7, 7\)",
    ),
    (("model", WEIGHT), lambda t: t.double(), rf"{WEIGHT} is float64 .* expected float32"),
    (("model", WEIGHT), lambda t: t[:7], rf"{WEIGHT} is float32 \(7, 1, 7, 7\): expected float32 \(8, .* in atto"),
    (("model", WEIGHT), lambda t: t.to("meta"), rf"{WEIGHT} is float32 .* on meta: expected"),
    (("model", WEIGHT), lambda t: t.to_sparse(), rf"{WEIGHT} is float32 .* as sparse_coo: expected"),
    (("model", WEIGHT), set_first(math.nan), rf"{WEIGHT} holds nan: expected finite numbers"),
    (("model", WEIGHT), set_first(-math.inf), rf"{WEIGHT} holds -inf: expected finite numbers"),
    (("model", "more\x1b[31m"), torch.ones(1), r"model holds 'more\\x1b\[31m': expected no such entry"),
    (("optimizer",), None, "optimizer is None: expected a dict"),
    (("optimizer", "state"), {}, "optimizer.state lacks 0: expected it"),
    ((*OPTIMIZER_STATE, "exp_avg"), lambda t: t[..., :1], r"state\[3\].exp_avg is float32 .*: expected float32"),
    (
        (*OPTIMIZER_STATE, "exp_avg_sq"),
        set_first(-1.0),
        r"minimum of optimizer.state\[3\].exp_avg_sq is -1.0: expected 0",
    ),
    ((*OPTIMIZER_STATE, "exp_avg_sq"), set_first(math.nan), r"state\[3\].exp_avg_sq holds nan"),
    ((*OPTIMIZER_STATE, "step"), torch.tensor(1.0), r"state\[3\].step is 1.0: expected 2.0"),
    (("optimizer", "param_groups"), "no", "optimizer.param_groups is 'no': expected a list of 2 dicts"),
    (("optimizer", "param_groups", 0, "params"), [], r"param_groups\[0\].params is \[\]: expected the numbers 0 to"),
    (
        ("optimizer", "param_groups", 1, "betas"),
        (0.9, "x"),
        r"param_groups\[1\].betas is \(0.9, 'x'\): expected \(0.9, 0.95\)",
    ),
    (("optimizer", "param_groups", 1, "weight_decay"), math.nan, r"weight_decay is nan: expected 0.0"),
    (("step",), "7", "^step is '7': expected a whole number from 1 to 2"),
    (("step",), math.nan, "^step is nan: expected a whole number"),
    (("step",), 1.5, "^step is 1.5: expected a whole number"),
    (("step",), None, "^step is None: expected a whole number"),
    (("step",), True, "^step is True: expected a whole number"),
    (("step",), -5, "^step is -5: expected a whole number"),
    (("step",), 0, "^step is 0: expected a whole number from 1"),
    (("step",), 10**12, "^step is 1000000000000: expected a whole number from 1 to 2"),
    (("step",), 10**5000, "^step is a whole number of 16610 bits: expected"),
    (("epoch",), 7.0, "^epoch is 7.0: expected 1.0 at step 2"),
    (("epoch",), "1", "^epoch is '1': expected 1.0"),
    (("recipe",), [], r"^recipe is \[\]: expected a dict"),
    (("recipe", "epochs"), 2.5, "^recipe.epochs is 2.5: expected a whole number"),
    (("recipe", "model"), "giant", "^recipe.model is giant: expected one of atto"),
    (("recipe", "mask_ratio"), math.nan, "^recipe.mask_ratio is nan: expected 0 <= ratio < 1"),
    (("recipe", "colour"), 1, "^recipe holds 'colour': expected no such entry"),
    (("data",), "photos", "^data is 'photos': expected a dict"),
    (("data", "folder"), 7, "^data.folder is 7: expected the name of a folder, or None"),
    (("data", "folder"), "a\0b", r"^data.folder is 'a\\x00b': expected the name"),
    (("data", "images"), -1, "^data.images is -1: expected a whole number, 1 or more"),
    (("data", "images"), 3, "^data.images is 3: too few"),
    (("data", "fingerprint"), None, "^data.fingerprint is None: expected text"),
    (("data", "sizes"), 5, "^data.sizes is 5: expected text"),
    (("data", "seen"), [(0.0, 5.0)], r"^data.seen is \[\(0.0, 5.0\)\]: expected a range of each of 3 channels"),
    (("data", "seen"), [(False, True)] * 3, "^data.seen is .*False.*: expected a range"),
    (("data", "seen"), [(5.0, 0.0)] * 3, "^data.seen is .*5.0.*: expected a range"),
    (("data", "seen"), [(0.0, math.nan)] * 3, "^data.seen is .*nan.*: expected a range"),
]


@pytest.mark.parametrize(("field", "value", "message"), WRONG, ids=[w[2].strip("^")[:60] for w in WRONG])
def test_a_wrong_field_is_named_with_its_value_and_what_was_expected(field, value, message, saved):
    with pytest.raises(CheckpointError, match=message) as error:
        contents.check(changed(saved, field, value))
    assert str(error.value).isprintable()


def test_a_step_before_the_schedule_is_refused(saved):
    recipe = {**saved["recipe"], "epochs": 3, "first_epoch": 2}
    with pytest.raises(CheckpointError, match=r"^step is 2: expected a whole number from 4 to 6"):
        contents.check(changed(saved, ("recipe",), recipe))


def test_no_value_in_any_field_is_more_than_refused(saved):
    """Every field in turn is left out or gets values of every kind: the checkpoint is refused, or else it is right."""
    first = lambda names: list(names)[:2]  # noqa: E731
    fields = [(part,) for part in saved]
    fields += [(part, name) for part in ("recipe", "data", "optimizer") for name in saved[part]]
    fields += [("model", name) for name in first(saved["model"])] + [("optimizer", "state", 0)]
    fields += [("optimizer", "state", 0, name) for name in saved["optimizer"]["state"][0]]
    fields += [("optimizer", "param_groups", 0)]
    fields += [("optimizer", "param_groups", 0, name) for name in ("params", "betas", "weight_decay")]
    odd = [
        None,
        True,
        "",
        "7",
        b"7",
        -5,
        0,
        2.5,
        math.nan,
        math.inf,
        10**12,
        -(10**400),
        [],
        {},
        {1: {}},
        (0.9, 0.95),
        set(),
    ]
    odd += [torch.ones(2), torch.tensor(True), torch.tensor([]), torch.ones(1, device="meta"), torch.tensor(1j)]
    refused = 0
    for field in fields:
        for value in odd:
            try:
                contents.check(changed(saved, field, value))
            except CheckpointError as error:
                assert str(error).isprintable()
                refused += 1
        always = field[0] == "optimizer" or field[-1] in contents.FIRST_RECIPE_FIELDS
        if len(field) == 2 and field[0] != "data" and always:
            state = changed(saved, field, None)
            del state[field[0]][field[1]]
            with pytest.raises(CheckpointError, match=f"{field[0]} lacks '{field[1]}'"):
                contents.check(state)
    assert refused > 0.9 * len(fields) * len(odd)


def test_the_values_of_every_field_reach_the_command(saved, tmp_path):
    """`--resume` and `reconstruct` read a checkpoint through the same checks."""
    for state in (changed(saved, ("model", WEIGHT), set_first(math.nan)), changed(saved, ("step",), "7")):
        save_torch(tmp_path / "a.pt", state)
        for argument, read in (
            ("resume", lambda: train(None, tmp_path / "run", resume=str(tmp_path / "a.pt"))),
            ("checkpoint", lambda: reconstruct(tmp_path / "a.pt", [], tmp_path / "out.png")),
        ):
            with pytest.raises(InputError, match=rf"^{argument} is .*a.pt: (model.*{WEIGHT} holds nan|step is '7'): "):
                read()
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
