import dataclasses

import pytest

from samba_megatron.config import RunConfig
from samba_megatron.config.checks import BASIC_RULES, RULES, check_config, violations
from samba_megatron.config.fields import build, flatten, run_fields
from samba_megatron.config.load import parse_run_config
from samba_megatron.config.rules.numbers import BELOW_ONE, NON_NEGATIVE, POSITIVE, UP_TO_ONE
from samba_megatron.platform.errors import UserError

RUNS = {"data.data_path": ["corpus/train"], "training.train_steps": 10, "run_dir": "run"}
"""What the defaults lack to make a run."""


def sentences(changes, world_size=1, device_type="cuda", recipe=None):
    base = flatten(parse_run_config(["--config", recipe])) if recipe else flatten(RunConfig())
    lacking = dict(RUNS)
    if recipe:
        del lacking["training.train_steps"]
    config = build({**base, **lacking, **changes})
    return violations(config, world_size, device_type)


def the_sentence(changes, world_size=1, device_type="cuda", recipe=None):
    (sentence,) = sentences(changes, world_size, device_type, recipe)
    assert "\n" not in sentence
    return sentence


TENSOR = "parallel.tensor_model_parallel_size"
PIPELINE = "parallel.pipeline_model_parallel_size"
VIRTUAL = "parallel.virtual_pipeline_model_parallel_size"
RAMP = {
    "training.rampup_start_batch_size": 16,
    "training.rampup_batch_size_increment": 16,
    "training.rampup_tokens": 10**6,
    "training.global_batch_size": 64,
}
WEIGHTED = "[0.3, a, 0.7, b]"


def test_what_can_run_is_let_through():
    assert sentences({}) == []
    assert sentences({}, device_type="cpu") == []
    check_config(build(RUNS), 1, "cpu")


def test_one_mistake_is_one_sentence_and_several_are_a_list():
    with pytest.raises(UserError) as refused:
        check_config(build({**RUNS, "optimizer.min_lr": 1.0}), 1, "cpu")
    assert str(refused.value) == (
        "optimizer.min_lr 1.0 is over optimizer.lr 0.0004: use 0.0004 or less"
    )
    with pytest.raises(UserError) as refused:
        check_config(build({"optimizer.min_lr": 1.0, TENSOR: 3}), 1, "cpu")
    lines = str(refused.value).splitlines()
    assert lines[0].startswith(f"{len(lines) - 1} settings cannot be used")
    assert len(lines) > 4


def test_every_number_has_bounds_and_every_bound_a_number():
    numbers = {name for name, field in run_fields().items() if field.type in (int, float)}
    bounded = [POSITIVE, NON_NEGATIVE, BELOW_ONE, UP_TO_ONE]
    assert set.union(*map(set, bounded)) == numbers
    assert sum(map(len, bounded)) == len(numbers)


@pytest.mark.parametrize("name", sorted(POSITIVE | NON_NEGATIVE | BELOW_ONE | UP_TO_ONE))
def test_a_number_out_of_its_bounds_is_refused_alone(name):
    below = -1 if name in NON_NEGATIVE | BELOW_ONE else 0
    sentence = the_sentence({name: run_fields()[name].type(below)})
    assert sentence.startswith(f"{name} is ")
    assert "it must be" in sentence
    if name in BELOW_ONE | UP_TO_ONE:
        assert name in the_sentence({name: 1.5})


def test_a_hang_is_found_before_torch_ends_the_run():
    sentence = the_sentence({"faults.hang_timeout_minutes": 10.0})
    assert "faults.hang_timeout_minutes 10 is not under" in sentence
    off = {"faults.watchdog": False, "faults.hang_timeout_minutes": 10.0}
    assert sentences(off) == []
    profile = {"logging.profile_step_end": 4}
    assert "profile from a step to before a later one" in the_sentence(profile)
    window = {"faults.skip_spikes": True, "faults.spike_window": 8}
    assert "faults.spike_window 8 is too short" in the_sentence(window)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.hybrid_layer_pattern": "MXM"}, "has the unknown symbol 'X'"),
        # heads and groups
        (
            {"model.hidden_size": 260, "model.num_attention_heads": 6},
            "model.num_attention_heads 6 does not divide model.hidden_size 260: use 4, 5, 10, 13",
        ),
        (
            {"model.num_query_groups": 3},
            "model.num_query_groups 3 does not divide model.num_attention_heads 4: use 1, 2, 4",
        ),
        ({"model.kv_channels": 65}, "heads have 65 dimensions"),
        ({"model.dt_min": 0.2}, "model.dt_min 0.2 is over model.dt_max 0.1"),
        # documents
        (
            {"data.packing": "best_fit", "data.reset_at_document_boundaries": False},
            "data.reset_at_document_boundaries false lets them see each other: use true, or",
        ),
        (
            {"kernels.selective_scan": "mamba_ssm"},
            "kernels.selective_scan mamba_ssm cannot keep documents apart: use auto, or set",
        ),
        # layout
        ({"parallel.sequence_parallel": True}, f"needs {TENSOR} over 1, and it is 1"),
        (
            {VIRTUAL: 2},
            f"{VIRTUAL} 2 needs {PIPELINE} over 1, and it is 1",
        ),
        (
            {"parallel.overlap_grad_reduce": False},
            "parallel.overlap_param_gather true needs parallel.overlap_grad_reduce true",
        ),
        (
            {"parallel.recompute_granularity": "full", "parallel.recompute_num_layers": 9},
            "parallel.recompute_num_layers 9 is over the 8 layers of the model: use 1 to 8",
        ),
        (
            {"parallel.recompute_granularity": "selective", "parallel.recompute_modules": []},
            "parallel.recompute_modules is empty with recompute_granularity selective: name mamba, "
            "attention, mlp",
        ),
        (
            {"parallel.recompute_granularity": "selective", "model.hybrid_layer_pattern": "*- x2"},
            "parallel.recompute_modules names mamba, and the model has no such layer: it has "
            "attention, mlp, mlp_act, layernorm",
        ),
        (
            {
                "parallel.recompute_granularity": "selective",
                "parallel.recompute_modules": ["scan", "mamba"],
            },
            "parallel.recompute_modules names mamba and scan, and mamba computes that again "
            "already: name one of them",
        ),
        (
            {
                "parallel.recompute_granularity": "selective",
                "parallel.recompute_modules": ["layernorm", "conv1d"],
                "precision.fp8": "hybrid",
            },
            "parallel.recompute_modules names layernorm, and with precision.fp8 the linear that "
            "reads its result keeps a copy of its own, a byte a number: leave it out",
        ),
        (
            {
                "parallel.recompute_granularity": "selective",
                "parallel.recompute_modules": ["layernorm"],
                "precision.fp32_residual_connection": True,
            },
            "precision.fp32_residual_connection that would keep the norms' inputs in fp32",
        ),
        # batch
        (
            {"training.global_batch_size": 100, "training.micro_batch_size": 8},
            "training.global_batch_size 100 is not a multiple of training.micro_batch_size 8 × 1 "
            "data-parallel rank = 8: use 96 or 104",
        ),
        (
            {**RAMP, "training.rampup_tokens": None},
            "a batch-size ramp also needs training.rampup_tokens: set all three of its fields",
        ),
        (
            {**RAMP, "training.rampup_start_batch_size": 128},
            "training.rampup_start_batch_size 128 is over training.global_batch_size 64",
        ),
        (
            {**RAMP, "training.rampup_batch_size_increment": 20},
            "does not lead from rampup_start_batch_size 16 to training.global_batch_size 64: it "
            "reaches 56 and 76",
        ),
        (
            {
                **RAMP,
                "training.micro_batch_size": 16,
                "training.rampup_start_batch_size": 32,
                "training.rampup_batch_size_increment": 8,
                "training.global_batch_size": 64,
            },
            "training.rampup_batch_size_increment 8 is not a multiple of training.micro_batch",
        ),
        (
            {**RAMP, "training.train_steps": None, "training.train_tokens": 500_000},
            "training.rampup_tokens 1000000 is over training.train_tokens 500000",
        ),
        # length and schedule
        ({"training.train_steps": None}, "the run has no length: give training.train_tokens"),
        ({"training.train_tokens": 10**6}, "training.train_steps 10 are both given"),
        (
            {"training.train_steps": None, "training.train_tokens": 1000},
            "training.train_tokens 1000 is less than the first step takes: 32768",
        ),
        ({"optimizer.min_lr": 1.0}, "optimizer.min_lr 1.0 is over optimizer.lr 0.0004"),
        (
            {"schedule.lr_warmup_steps": 10},
            "schedule.lr_warmup_steps 10 is 327680 tokens, and the run 327680: the warm-up must be "
            "shorter",
        ),
        (
            {"schedule.lr_warmup_tokens": 5000, "schedule.lr_decay_tokens": 4000},
            "schedule.lr_warmup_tokens is 5000 tokens, and schedule.lr_decay_tokens 4000",
        ),
        (
            {"schedule.lr_warmup_tokens": 5000, "schedule.lr_warmup_steps": 1},
            "schedule.lr_warmup_tokens 5000 and schedule.lr_warmup_steps 1 are both given",
        ),
        (
            {"schedule.lr_decay_style": "WSD", "schedule.lr_wsd_decay_fraction": 0.995},
            "schedule.lr_wsd_decay_fraction 0.995 starts the decay before the warm-up of 3276",
        ),
        ({"training.exit_signals": ["SIGKILL"]}, "names SIGKILL: allowed are SIGTERM, SIGUSR1"),
        # data
        ({"data.data_path": []}, "data.data_path is empty"),
        ({"data.blend_file": ["P.yaml"]}, "are both given: keep one of them"),
        (
            {"data.data_path": ["0.3", "a", "b"]},
            f"does not alternate weights and prefixes: write {WEIGHTED}",
        ),
        ({"data.data_path": ["0.3", "a", "x", "b"]}, "does not alternate weights and prefixes"),
        ({"data.data_path": ["a", "0.7", "b"]}, "has weights for some datasets only"),
        ({"data.data_path": ["0", "a", "1", "b"]}, "data.data_path has the weight 0"),
        ({"data.data_path": ["corpus.bin"]}, "give the prefix without the ending, corpus"),
        ({"data.valid_data_path": ["v.idx"]}, "data.valid_data_path has v.idx"),
        ({"data.split": "9,1,0,0"}, "data.split is '9,1,0,0': it must be the parts for training"),
        ({"data.split": "0,0,0"}, "it must be the parts for training"),
        ({"data.split": "0,1,0"}, "leaves nothing for training"),
        (
            {"data.split": "1,0,0", "validation.eval_interval": 5},
            "leaves nothing for validation, which validation.eval_interval asks for",
        ),
        # validation
        ({"validation.sequence_lengths": [0, 64]}, "validation.sequence_lengths has 0"),
        ({"validation.sequence_lengths": [64, 64]}, "has 64 more than once"),
        ({"validation.eval_tokens": 1000}, "less than one sequence of 4096: use 4096 or more"),
        # checkpoints
        (
            {"checkpoint.save_interval": 100, "checkpoint.milestone_interval": 250},
            "is not a multiple of checkpoint.save_interval 100: use 200 or 300",
        ),
        ({"checkpoint.milestone_interval": 250}, "needs checkpoint.save_interval"),
        ({"checkpoint.load_weights_only": True}, "needs checkpoint.load"),
        # formats
        (
            {"precision.fp8": "hybrid", "kernels.transformer_impl": "local"},
            "precision.fp8 hybrid needs Transformer Engine, and kernels.transformer_impl is local",
        ),
        (
            {"kernels.rms_norm": "transformer_engine", "kernels.transformer_impl": "local"},
            "kernels.rms_norm transformer_engine needs Transformer Engine's linears",
        ),
        (
            {"kernels.rms_norm": "triton", "precision.fp32_residual_connection": True},
            "kernels.rms_norm triton takes a residual stream in the parameters' dtype",
        ),
        (
            {"precision.fp8": "hybrid", "model.ffn_hidden_size": 760},
            "multiples of 16, and model.ffn_hidden_size is 760: use 752 or 768",
        ),
        (
            {
                "precision.fp8": "hybrid",
                "precision.fp8_recipe": "mxfp8",
                "model.ffn_hidden_size": 784,
            },
            "multiples of 32, and model.ffn_hidden_size is 784: use 768 or 800",
        ),
        (
            {"precision.fp8": "hybrid", "data.sequence_length": 100},
            "data.sequence_length 100 × training.micro_batch_size 1 is not: use 96 or 112",
        ),
    ],
)
def test_a_mistake_is_one_sentence_with_field_value_and_remedy(changes, says):
    assert says in the_sentence(changes)


def test_heads_name_the_tensor_parallel_sizes_that_they_allow():
    assert the_sentence({TENSOR: 4}, 4, recipe="samba_1.3b") == (
        "parallel.tensor_model_parallel_size 4 does not divide model.num_attention_heads 18: "
        "2, 3, 6, 9, 18 do (the sizes of this model together allow 1, 2)"
    )


def test_a_vocabulary_can_be_padded_to_fit():
    sentence, ffn = sentences({TENSOR: 3, "model.ffn_hidden_size": 6145}, 3, recipe="samba_1.3b")
    assert "model.vocab_size 32000: 2, 4, 5 do, or pad the vocabulary to 32001" in sentence
    assert "model.ffn_hidden_size 6145" in ffn
    assert sentences({TENSOR: 6, "model.vocab_size": 32064}, 6, recipe="samba_1.3b") == []


def test_only_sizes_that_are_there_are_divided():
    pure_mamba = {"model.hybrid_layer_pattern": "M x4", "model.ffn_hidden_size": 7}
    assert sentences({TENSOR: 8, **pure_mamba}, 8) == []


@pytest.mark.parametrize(
    ("heads", "groups", "tensor", "legal"),
    [
        (32, 4, 2, True),
        (32, 4, 4, True),
        (32, 4, 8, True),
        (32, 4, 16, True),
        # 32 × 64 query rows and 2 × 2 × 64 others make 2304 rows: 16 ranks share them evenly,
        # and two ranks' keys come from one group.
        (32, 2, 16, True),
        (12, 3, 2, False),
        (12, 4, 6, False),
        (6, 2, 3, False),
    ],
)
def test_query_groups_are_split_or_shared_as_megatron_core_asks(heads, groups, tensor, legal):
    changes = {
        "model.num_attention_heads": heads,
        "model.num_query_groups": groups,
        "model.kv_channels": 64,
        "model.hidden_size": 768,
        "model.ffn_hidden_size": 768,
        "model.vocab_size": 768,
        TENSOR: tensor,
    }
    found = sentences(changes, tensor)
    assert (found == []) == legal
    if not legal:
        assert f"{TENSOR} {tensor} does not fit model.num_query_groups {groups}" in found[0]


def test_a_single_shared_key_needs_rows_that_all_ranks_can_split():
    # 13 × 256 rows over 11 ranks: every other size would allow it.
    changes = {TENSOR: 11, "model.vocab_size": 11 * 3000, "model.ffn_hidden_size": 11 * 912}
    (sentence,) = sentences(changes, 11, recipe="samba_3.8b")
    assert "does not fit model.num_query_groups 1" in sentence
    assert sentence.endswith("projection: use 1")


def test_short_convolutions_follow_whole_heads():
    changes = {TENSOR: 2, "model.num_query_groups": 1}
    assert sentences(changes, 2) == []
    assert the_sentence({**changes, "model.short_convolution": True}, 2).endswith(
        "does not divide model.num_query_groups 1, as model.short_convolution needs: use 1"
    )


def test_processes_make_whole_replicas_on_gpus_that_exist():
    assert the_sentence({TENSOR: 2, PIPELINE: 2}, 6).endswith(
        "2 × parallel.pipeline_model_parallel_size 2 = 4 does not divide the 6 processes of this "
        "run: start 4 or 8"
    )
    assert "the 1 process of this run: start 2" in the_sentence({TENSOR: 2}, 1)
    config = build(RUNS)
    (sentence,) = violations(config, 8, "cuda", available_devices=1, local_world_size=2)
    assert sentence == "2 processes were started on a machine with 1 GPU: start one for each GPU"
    assert violations(config, 8, "cuda", available_devices=2, local_world_size=2) == []
    assert violations(config, 4, "cpu", local_world_size=4) == []


def test_global_batch_counts_data_parallel_ranks():
    sentence = the_sentence({"training.global_batch_size": 100, TENSOR: 2}, 6)
    assert sentence.endswith("micro_batch_size 1 × 3 data-parallel ranks = 3: use 99 or 102")


def test_sequence_parallelism_divides_every_length():
    changes: dict[str, object] = {TENSOR: 2, "parallel.sequence_parallel": True}
    changes |= {"data.sequence_length": 65}
    assert "data.sequence_length 65 is not a multiple of" in the_sentence(changes, 2)
    changes |= {"data.sequence_length": 64, "validation.sequence_lengths": [64, 127]}
    assert "validation.sequence_lengths: 127 is not" in the_sentence(changes, 2)


def test_context_parallelism_cuts_every_sequence_into_equal_pieces():
    context = "parallel.context_parallel_size"
    assert sentences({context: 2}, 4) == []
    says = the_sentence({context: 2, TENSOR: 2}, 6)
    assert f" × {context} 2 = 4 does not divide the 6 processes of this run: start 4 or 8" in says
    says = the_sentence({context: 2, "data.sequence_length": 65}, 2)
    assert says.endswith(f"is not a multiple of {context} 2: use 64 or 66")
    says = the_sentence({context: 4, "validation.sequence_lengths": [64, 126]}, 4)
    assert says.startswith("validation.sequence_lengths: 126 is not")
    both = {context: 2, TENSOR: 2, "parallel.sequence_parallel": True}
    says = the_sentence({**both, "data.sequence_length": 66}, 4)
    assert says.endswith("2 = 4 (with sequence_parallel): use 64 or 68")


@pytest.mark.parametrize("scan", ["mamba_ssm", "reference"])
def test_context_parallelism_needs_a_scan_that_goes_on(scan):
    changes = {
        "parallel.context_parallel_size": 2,
        "kernels.selective_scan": scan,
        "data.reset_at_document_boundaries": False,
    }
    assert the_sentence(changes, 2).endswith("does not: use auto, fused or torch")


def test_context_parallel_ranks_take_the_same_sequences():
    changes = {"parallel.context_parallel_size": 2, "training.global_batch_size": 100}
    assert "× 3 data-parallel ranks = 3: use 99 or 102" in the_sentence(changes, 6)


def test_pipeline_cuts_fit_the_layout():
    assert sentences({PIPELINE: 2, VIRTUAL: 2}, 2) == []
    cuts = {"model.hybrid_layer_pattern": "M-|*-|M-"}
    assert "cuts of model.hybrid_layer_pattern" in the_sentence({PIPELINE: 2, **cuts}, 2)
    assert "has 4 blocks: use at most 4" in the_sentence({PIPELINE: 8}, 8)


def test_interleaving_takes_groups_of_micro_batches():
    layout = {PIPELINE: 2, VIRTUAL: 2}
    assert sentences({**layout, "training.global_batch_size": 6}, 2) == []
    assert the_sentence({**layout, "training.global_batch_size": 5}, 2).endswith(
        "needs a multiple of pipeline_model_parallel_size 2: use 4 or 6"
    )
    assert f"{VIRTUAL} is 1" in the_sentence({PIPELINE: 2, VIRTUAL: 1}, 2)
    ramp = {
        **RAMP,
        "training.rampup_start_batch_size": 7,
        "training.rampup_batch_size_increment": 19,
    }
    starts, increments = sentences({**layout, **ramp}, 2)
    assert starts.startswith("training.rampup_start_batch_size 7 makes 7 micro-batches")
    assert increments.startswith("training.rampup_batch_size_increment 19 makes")


def test_fp8_counts_a_ranks_part_and_its_tokens():
    fp8 = {"precision.fp8": "hybrid", TENSOR: 4, "model.num_query_groups": None}
    assert "model.ffn_hidden_size is 12 a rank of tensor_model_parallel_size 4" in the_sentence(
        {**fp8, "model.ffn_hidden_size": 48}, 4
    )
    split = {**fp8, "parallel.sequence_parallel": True, "data.sequence_length": 96}
    assert "in multiples of 64" in the_sentence(split, 4)


@pytest.mark.parametrize(
    "forced",
    [
        {"kernels.transformer_impl": "transformer_engine"},
        {"kernels.cross_entropy": "transformer_engine"},
        {"optimizer.adam_impl": "apex"},
        {"precision.fp8": "hybrid"},
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(forced):
    (name,) = forced
    assert the_sentence(forced, device_type="cpu").startswith(name)
    assert sentences(forced, device_type="cuda") == []


def test_weights_of_data_may_be_given_or_not():
    for entries in (["a"], ["a", "b"], ["0.3", "a", "0.7", "b"], ["1", "/x y/a"]):
        assert sentences({"data.data_path": entries}) == []


def test_rules_survive_any_mixture_of_bad_values():
    """No rule stumbles over what another one is there to refuse."""
    config = build(RUNS)
    for group in ("model", "parallel", "training", "validation", "data"):
        owner = getattr(config, group)
        for field in dataclasses.fields(owner):
            value = getattr(owner, field.name)
            if isinstance(value, int) and not isinstance(value, bool):
                setattr(owner, field.name, 7)
    assert violations(config, 5, "cpu") != []


def test_rules_are_listed_once_and_named():
    names = [f"{rule.__module__}.{rule.__name__}" for rule in (*BASIC_RULES, *RULES)]
    assert len(set(names)) == len(names)
    assert all(rule.__doc__ for rule in (*BASIC_RULES, *RULES))


def test_pieces_of_a_sequence():
    pieces = {"parallel.sequence_pieces": 8}
    assert "transformer_engine takes no keys of earlier pieces" in the_sentence(
        {**pieces, "kernels.windowed_attention": "transformer_engine"}
    )
    odd = {**pieces, "validation.sequence_lengths": [256, 700]}
    assert "700 is neither one piece of 512 tokens" in the_sentence(odd)
    again = {**pieces, "parallel.recompute_granularity": "full"}
    assert "exact computes every piece again anyway" in the_sentence(again)
    selective = {**pieces, "parallel.recompute_granularity": "selective"}
    assert "exact computes every piece again anyway" in the_sentence(selective)
    assert sentences({**selective, "parallel.recompute_modules": ["conv1d", "mlp_act"]}) == []
