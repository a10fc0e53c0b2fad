import ast
import dataclasses
import inspect
import json
import subprocess
import sys
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samba_megatron.config import RunConfig
from samba_megatron.config.fields import build, flatten, run_fields
from samba_megatron.config.load import from_dict, parse_run_config, to_dict, to_yaml
from samba_megatron.config.recipes import read_yaml
from samba_megatron.platform.errors import UserError


@pytest.fixture
def recipe(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return write


def refusal(*argv):
    with pytest.raises(UserError) as refused:
        parse_run_config(argv)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_nothing_given_is_the_defaults():
    assert parse_run_config([]) == RunConfig()


def test_later_recipes_and_then_options_win(recipe):
    first = recipe("a.yaml", "model: {hidden_size: 64, d_state: 8}\nname: a\n")
    second = recipe("b.yaml", "model: {hidden_size: 128}\n")
    config = parse_run_config(
        ["--model.d_conv", "3", "--config", first, f"--config={second}", "--model.d_conv=2"]
    )
    assert (config.name, config.model.hidden_size, config.model.d_state) == ("a", 128, 8)
    assert config.model.d_conv == 2


def test_bases_are_read_first_relative_to_their_file(recipe):
    recipe("sizes/big.yaml", "model: {hidden_size: 512, d_state: 4}\ndata: {data_path: [a, b]}\n")
    recipe("sizes/wide.yaml", "base: big.yaml\nmodel: {hidden_size: 1024}\n")
    recipe("decay.yaml", "optimizer: {weight_decay: 0}\n")
    top = recipe("top.yaml", "base: [sizes/wide.yaml, decay.yaml]\ndata: {data_path: [c]}\n")
    config = parse_run_config(["--config", top])
    assert (config.model.hidden_size, config.model.d_state) == (1024, 4)
    assert config.optimizer.weight_decay == 0.0
    assert config.data.data_path == ["c"]


def test_one_base_reached_by_two_ways_is_no_ring(recipe):
    recipe("base.yaml", "name: base\n")
    recipe("left.yaml", "base: base.yaml\n")
    recipe("right.yaml", "base: base.yaml\n")
    both = recipe("both.yaml", "base: [left.yaml, right.yaml]\n")
    assert parse_run_config(["--config", both]).name == "base"


def test_a_ring_of_bases_is_refused(recipe):
    recipe("a.yaml", "base: b.yaml\n")
    message = refusal("--config", recipe("b.yaml", "base: a.yaml\n"))
    assert "b.yaml → a.yaml → b.yaml" in message


def test_a_shipped_recipe_goes_by_its_name_also_as_a_base(recipe):
    assert parse_run_config(["--config", "samba_421m"]).model.hidden_size == 1536
    mine = recipe("mine.yaml", "base: samba_421m_nope\nname: mine\n")
    config = parse_run_config(["--config", mine])
    assert (config.name, config.model.position_embedding_type) == ("mine", "none")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "model: {hiden_size: 5}",
            "model.hiden_size in recipe {path} is not a known field: did you "
            "mean model.hidden_size?",
        ),
        ("hidden_size: 5", "did you mean model.hidden_size?"),
        ("training: {lr: 1}", "did you mean optimizer.lr?"),
        ("modle: {hidden_size: 5}", "modle in recipe"),
        ("model: 5", "model in recipe {path} is 5: it must hold fields"),
        (
            "model: {d_conv: null}",
            "model.d_conv in recipe {path} is null: it must be a whole number",
        ),
        ("model: {d_conv: 4.0}", "model.d_conv in recipe {path} is 4.0: it must be a whole number"),
        ("model: {d_conv: true}", "it must be a whole number"),
        ("model: {d_conv: '4'}", "is '4': it must be a whole number"),
        ("model: {window_size: wide}", "is 'wide': it must be a whole number, or null"),
        ("optimizer: {lr: .nan}", "optimizer.lr in recipe {path} is nan: it must be a number"),
        ("training: {deterministic: yes}", "is 'yes': it must be true or false"),
        ("precision: {fp8: e5m2}", "is 'e5m2': it must be one of hybrid, e4m3, or null"),
        ("training: {train_tokens: 2.5}", "must be a whole number of tokens such as"),
        ("name: 421", "name in recipe {path} is 421: it must be text"),
        ("data: {data_path: corpus}", "is 'corpus': it must be a list, as [a, b]"),
        ("data: {data_path: [true]}", "it must be a list"),
        ("validation: {sequence_lengths: [4096, a]}", "must be a list of whole numbers"),
        ("optimizer: {weight_decay_exempt: [norms]}", "must be a list with norm, bias,"),
        ("base: 5", "base in recipe {path} is 5: it must name recipes"),
        ("base: samba_tny", "there is no recipe samba_tny: did you mean samba_tiny"),
        ("- a", "must hold groups of fields"),
        ("model: {a: 1", "recipe {path} is not YAML at line 1"),
        ("name: a\nname: b", "recipe {path} is not YAML at line 1: name is given twice"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_sentence_with_name_and_file(recipe, text, says):
    path = recipe("r.yaml", text)
    assert says.format(path=path) in refusal("--config", path)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ["--model.hiden_size", "5"],
            "model.hiden_size on the command line is not a known field: "
            "did you mean model.hidden_size?",
        ),
        (["--window_size=5"], "did you mean model.window_size?"),
        (["--qqqq", "5"], "qqqq on the command line is not a known field: --help lists all"),
        (
            ["--model.d_conv", "x"],
            "model.d_conv on the command line is 'x': it must be a whole number",
        ),
        (["--model", "x"], "model on the command line is a group of fields: set one of them"),
        (["--name"], "--name needs a value"),
        (["--name", "--print_config"], "--name needs a value"),
        (["--config"], "--config needs a value"),
        (
            ["mine.yaml"],
            "unexpected argument 'mine.yaml': options are written as --config mine.yaml",
        ),
        (["--config", "samba_42m"], "there is no recipe samba_42m: did you mean samba_421m"),
        (["--config", "pretrain/recipes/samba_tinny.yaml"], "did you mean samba_tiny"),
        (["--data.data_path", "[a"], "data.data_path on the command line is not YAML"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(argv, says):
    assert says in refusal(*argv)


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--training.train_tokens", "20B"], "training.train_tokens", 20 * 10**9),
        (["--schedule.lr_warmup_tokens=3.2T"], "schedule.lr_warmup_tokens", 3200 * 10**9),
        (["--optimizer.lr", "4e-4"], "optimizer.lr", 4e-4),
        (["--optimizer.lr", "1"], "optimizer.lr", 1.0),
        (["--model.window_size", "null"], "model.window_size", None),
        (["--run_dir", "null"], "run_dir", None),
        (["--name", "null"], "name", "null"),
        (["--name", "0421"], "name", "0421"),
        (["--run_dir", "a: [b"], "run_dir", "a: [b"),
        (["--training.deterministic", "true"], "training.deterministic", True),
        (["--data.data_path", "a"], "data.data_path", ["a"]),
        (["--data.data_path", "0.3,a,0.7,b"], "data.data_path", ["0.3", "a", "0.7", "b"]),
        (["--data.data_path", "[1, /a b/c]"], "data.data_path", ["1", "/a b/c"]),
        (
            ["--validation.sequence_lengths", "4096,8192"],
            "validation.sequence_lengths",
            [4096, 8192],
        ),
        (["--optimizer.weight_decay_exempt", "[]"], "optimizer.weight_decay_exempt", []),
    ],
)
def test_values_on_the_command_line(argv, name, value):
    found = flatten(parse_run_config(argv))[name]
    assert found == value
    assert type(found) is type(value)


def test_recipes_are_plain_yaml(recipe):
    path = recipe(
        "r.yaml",
        "model: {position_embedding_type: none}\nname: no\nrun_dir: 2024-01-01\n"
        "optimizer: {lr: 4e-4, min_lr: 1}\ntraining: {train_tokens: 20B}\n"
        "data:\n  data_path: [0.3, a, 0.7, b]\n  split: 98,2,0\nvalidation:\n",
    )
    config = parse_run_config(["--config", path])
    assert (config.name, config.run_dir) == ("no", "2024-01-01")
    assert (config.optimizer.lr, config.optimizer.min_lr) == (4e-4, 1.0)
    assert config.training.train_tokens == 20 * 10**9
    assert config.data.data_path == ["0.3", "a", "0.7", "b"]


def _values_of(kind, optional) -> st.SearchStrategy[Any]:
    values: st.SearchStrategy[Any]
    if kind is str:
        values = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
        values = values | st.sampled_from(
            ["null", "true", "1e5", "0x10", "1:30", "<<", "a: b", "- x"]
        )
    elif get_origin(kind) is Literal:
        values = st.sampled_from(get_args(kind))
    elif get_origin(kind) is list:
        values = st.lists(_values_of(get_args(kind)[0], False), max_size=3)
    else:
        values = {
            int: st.integers(0, 10**18),
            float: st.floats(allow_nan=False, allow_infinity=False),
            bool: st.booleans(),
        }[kind]
    return st.none() | values if optional else values


configs = st.fixed_dictionaries(
    {name: _values_of(field.type, field.optional) for name, field in run_fields().items()}
).map(build)


@given(configs)
@settings(max_examples=60)
def test_dictionaries_json_and_yaml_give_the_same_configuration_back(config):
    assert from_dict(to_dict(config)) == config
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert from_dict(read_yaml(to_yaml(config), "it")) == config


def test_a_dictionary_shares_nothing_with_its_configuration():
    config = RunConfig()
    to_dict(config)["data"]["data_path"].append("x")
    assert config.data.data_path == []
    assert RunConfig() == config


def test_a_printed_configuration_is_a_recipe_for_the_same_run(capsys, recipe):
    argv = ["--config", "samba_1.3b", "--data.data_path", "0.5,a,0.5,b"]
    with pytest.raises(SystemExit) as ended:
        parse_run_config([*argv, "--print_config"])
    assert ended.value.code == 0
    printed = recipe("printed.yaml", capsys.readouterr().out)
    assert parse_run_config(["--config", printed]) == parse_run_config(argv)


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_run_config(["--config", "nonsense", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in run_fields():
        assert f"--{name} " in text
    words = " ".join(text.split())
    assert "Keys that a query of a * layer sees, itself included" in words
    assert "Folder for logs, metrics and, unless named elsewhere, checkpoints" in words
    assert "AdamW with the states sharded over data-parallel ranks" in words
    assert "--model CONFIG" not in text


def test_every_field_and_group_has_a_docstring():
    for field in dataclasses.fields(RunConfig):
        owner = type(getattr(RunConfig(), field.name))
        if not dataclasses.is_dataclass(owner):
            continue
        assert owner.__doc__
        (definition,) = ast.parse(inspect.getsource(owner)).body
        assert isinstance(definition, ast.ClassDef)
        body = definition.body
        for statement, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign):
                documented = isinstance(getattr(following, "value", None), ast.Constant)
                assert documented, (
                    f"{owner.__name__}.{ast.unparse(statement.target)} has no docstring"
                )


@pytest.mark.parametrize("argv", [["--config", "samba_3.8b"], ["--help"]])
def test_parsing_imports_little_and_nothing_heavy(argv):
    """It is counted, not timed: a busy machine takes three times as long as an idle one."""
    code = (
        "import sys\n"
        "from samba_megatron.config.load import parse_run_config\n"
        "try: parse_run_config(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "from samba_megatron.config import checks, compare\n"
        "heavy = {'torch', 'megatron', 'numpy', 'transformers', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert len(sys.modules) < 400, len(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, *argv]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
