"""Rules of what runs on GPUs only: a step as one graph, weights in FP8."""

from typing import Any

from tests.config.test_checks import sentences, the_sentence


def test_what_a_graph_cannot_record_is_refused():
    graph = {"kernels.cuda_graph_impl": "full_iteration"}
    apart = {"parallel.overlap_grad_reduce": False, "parallel.overlap_param_gather": False}
    assert sentences(graph | apart, device_type="cuda") == []
    assert "needs an NVIDIA GPU" in the_sentence(graph | apart, device_type="cpu")
    for field, value in (
        ("parallel.sequence_pieces", 2),
        ("parallel.context_parallel_size", 2),
        ("parallel.tensor_model_parallel_size", 2),
        ("parallel.pipeline_model_parallel_size", 2),
        ("parallel.recompute_granularity", "full"),
        ("parallel.recompute_granularity", "selective"),  # of mamba, the default
        ("parallel.overlap_grad_reduce", True),
        ("logging.log_layer_norms_interval", 5),
        ("logging.log_fp8_health_interval", 5),
    ):
        ranks = value if field.endswith("parallel_size") else 1
        said = the_sentence(graph | apart | {field: value}, ranks, device_type="cuda")
        assert said.startswith("kernels.cuda_graph_impl full_iteration") and field in said


def test_a_graph_computes_parts_again_and_no_whole_layers():
    graph = {
        "kernels.cuda_graph_impl": "full_iteration",
        "parallel.overlap_grad_reduce": False,
        "parallel.overlap_param_gather": False,
        "parallel.recompute_granularity": "selective",
    }
    again = "parallel.recompute_modules"
    assert sentences({**graph, again: ["mlp_act", "conv1d"]}) == []
    for modules in (["mamba"], ["attention"], ["mlp"], ["attention", "mlp_act"]):
        assert "whole layers or kinds of them" in the_sentence({**graph, again: modules})


def test_delayed_scaling_exchanges_maxima_where_there_are_peers():
    graph = {
        "kernels.cuda_graph_impl": "full_iteration",
        "parallel.overlap_grad_reduce": False,
        "parallel.overlap_param_gather": False,
        "precision.fp8": "hybrid",
        "precision.fp8_recipe": "delayed",
    }
    assert sentences(graph) == []
    assert "precision.fp8_recipe delayed" in the_sentence(graph, world_size=2)
    assert sentences({**graph, "precision.fp8_recipe": "tensorwise"}, world_size=2) == []


def test_weights_in_fp8_need_products_in_fp8():
    kept: dict[str, Any] = {"precision.fp8_param_gather": True}
    assert "precision.fp8 is unset: use hybrid" in the_sentence(kept)
    kept["precision.fp8"] = "hybrid"
    for recipe in ("tensorwise", "delayed", "blockwise"):
        assert sentences({**kept, "precision.fp8_recipe": recipe}) == []
    mxfp8 = the_sentence({**kept, "precision.fp8_recipe": "mxfp8"})
    assert "use tensorwise, delayed or blockwise" in mxfp8
    assert "needs bf16 parameters" in the_sentence({**kept, "precision.params_dtype": "fp32"})
    apart = {"parallel.overlap_grad_reduce": False, "parallel.overlap_param_gather": False}
    graph = {**kept, **apart, "kernels.cuda_graph_impl": "full_iteration"}
    assert "has not been tried with kernels.cuda_graph_impl" in the_sentence(graph)
