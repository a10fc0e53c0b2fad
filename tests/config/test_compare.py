import pytest

from samba_megatron.config import RunConfig
from samba_megatron.config.compare import CHANGES, Change, compare_for_resume
from samba_megatron.config.fields import build, run_fields
from samba_megatron.config.load import to_dict
from samba_megatron.platform.errors import UserError


def compare(before, after, weights_only=False):
    return compare_for_resume(to_dict(build(before)), build(after), weights_only)


def other_value(field):
    """A valid value that is not the default."""
    special = {
        "model.hybrid_layer_pattern": "M-*- x3",
        "data.data_path": ["b"],
        "data.split": "90,10,0",
        "model.num_query_groups": 2,
        "model.kv_channels": 32,
        "model.dt_rank": 5,
    }
    if field.name in special:
        return special[field.name]
    if field.type is bool:
        return not field.default
    if field.type in (int, float):
        return (field.default or 0) + 1
    if field.is_list:
        return ["embedding"] if "exempt" in field.name else []
    if field.type is str:
        return "other"
    return next(value for value in field.type.__args__ if value != field.default)


def test_every_field_is_decided():
    assert set(CHANGES) == set(run_fields())


@pytest.mark.parametrize("name", CHANGES)
def test_each_field_changes_as_the_table_says(name):
    field = run_fields()[name]
    value = other_value(field)
    if value == field.default:
        value = [4096] if field.type == list[int] else ["x"]
    if CHANGES[name] in (Change.SHAPE, Change.FIXED):
        with pytest.raises(UserError, match=f"{name} was .* and is .*give the saved values"):
            compare({}, {name: value})
        return
    # Without held-out data the split decides what is trained on.
    before = {"data.valid_data_path": ["v"]} if name == "data.valid_data_path" else {}
    # Exact gradients do not depend on the pieces.
    both = {"parallel.sequence_piece_gradients": "truncated"} if name.endswith("_pieces") else {}
    notices = compare({**before, **both}, {**both, name: value})
    assert [name in notice for notice in notices] == [True] * (CHANGES[name] is Change.NOTICE)


def test_the_same_run_is_silent():
    assert compare({}, {}) == []
    assert compare({}, {"parallel.sequence_pieces": 4}) == []


def test_a_refusal_names_every_field_and_the_remedy():
    with pytest.raises(UserError) as refused:
        compare({}, {"data.sequence_length": 8192, "training.seed": 1, "optimizer.lr": 1.0})
    message = str(refused.value)
    assert "data.sequence_length was 4096 and is 8192" in message
    assert "training.seed was 1234 and is 1" in message
    assert "--checkpoint.load_weights_only true" in message
    assert "optimizer.lr" not in message
    assert "\n" not in message


def test_weights_that_do_not_fit_have_no_such_remedy():
    for weights_only in (False, True):
        with pytest.raises(UserError, match="weights do not fit") as refused:
            compare({}, {"model.hidden_size": 512}, weights_only)
        assert "load_weights_only" not in str(refused.value)


def test_weights_alone_need_only_fit():
    changes = {
        "training.seed": 1,
        "data.data_path": ["new"],
        "data.sequence_length": 8192,
        "optimizer.adam_beta2": 0.99,
        "model.window_size": 4096,
        "model.hybrid_layer_pattern": "M-F- x2",
    }
    notices = compare({}, changes, weights_only=True)
    assert [notice.split()[0] for notice in notices] == [
        "model.hybrid_layer_pattern",
        "model.window_size",
    ]


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("model.hybrid_layer_pattern", "M-*- x2", "M-*-|M-*-"),
        ("model.num_query_groups", None, 4),
        ("model.kv_channels", None, 64),
        ("model.dt_rank", None, 16),
        ("optimizer.weight_decay_exempt", ["norm", "bias"], ["bias", "norm"]),
    ],
)
def test_the_same_thing_written_otherwise_is_the_same(name, before, after):
    assert compare({name: before}, {name: after}) == []


def test_the_blend_may_change():
    """The datasets are compared by their content (data.identity), not by their names."""
    before = {"data.data_path": ["0.3", "/old/a", "0.7", "/old/b"]}
    for changed in (["3", "/new/a", "7", "/new/b"], ["0.4", "/old/a", "0.6", "/old/b"], ["/c"]):
        assert compare(before, {"data.data_path": changed}) == []
    assert compare(before, {"data.blend_file": ["P.blend.yaml"]}) == []


def test_the_split_matters_where_it_is_used():
    held_out = {"data.valid_data_path": ["v"]}
    assert compare(held_out, {**held_out, "data.split": "90,10,0"}) == []
    with pytest.raises(UserError, match=r"data.split was 98,2,0 and is unused"):
        compare({}, held_out)


def test_token_counts_are_readable():
    (notice,) = compare({"training.train_tokens": 20 * 10**9}, {"training.train_tokens": 10**11})
    assert notice == "training.train_tokens was 20B and is 100B from here on"


def test_other_versions_of_the_code():
    saved = to_dict(RunConfig())
    del saved["logging"]
    del saved["model"]["d_conv"]
    saved["model"]["gone"] = 1
    saved["lost"] = {"a": 1}
    assert compare_for_resume(saved, RunConfig()) == [
        "model.gone in the checkpoint is not known here: ignored",
        "lost in the checkpoint is not known here: ignored",
    ]


def test_a_checkpoint_from_before_documents_stayed_apart():
    saved = to_dict(RunConfig())
    del saved["data"]["reset_at_document_boundaries"]
    with pytest.raises(UserError, match="reset_at_document_boundaries was false and is true"):
        compare_for_resume(saved, RunConfig())
    before = build({"data.reset_at_document_boundaries": False})
    assert compare_for_resume(saved, before) == []
