"""Rules of number formats and implementations: what needs a GPU, and the shapes FP8 needs."""

from collections.abc import Iterator

from samba_megatron.config.rules.situation import Situation, nearest_multiples


def needs_gpu(situation: Situation) -> Iterator[str]:
    """Implementations that run on a GPU only are not forced elsewhere."""
    if situation.device_type == "cuda":
        return
    config = situation.config
    chosen = {
        "kernels.transformer_impl": config.kernels.transformer_impl,
        "kernels.cross_entropy": config.kernels.cross_entropy,
        "kernels.rms_norm": config.kernels.rms_norm,
        "optimizer.adam_impl": config.optimizer.adam_impl,
    }
    for name, value in chosen.items():
        if value in ("transformer_engine", "apex"):
            yield f"{name} {value} needs an NVIDIA GPU, and there is none: use auto"
    if config.precision.fp8 is not None:
        yield (
            f"precision.fp8 {config.precision.fp8} needs an NVIDIA GPU with FP8 units, and there "
            "is none: unset it (null)"
        )


def fp8_implementation(situation: Situation) -> Iterator[str]:
    """FP8 exists in the Transformer Engine linears only."""
    config = situation.config
    if config.precision.fp8 is not None and config.kernels.transformer_impl == "local":
        yield (
            f"precision.fp8 {config.precision.fp8} needs Transformer Engine, and "
            "kernels.transformer_impl is local: use auto or transformer_engine"
        )


def norms(situation: Situation) -> Iterator[str]:
    """Transformer Engine's norms are in its linears; ours know one dtype."""
    kernels, chosen = situation.config.kernels, situation.config.kernels.rms_norm
    if chosen == "transformer_engine" and kernels.transformer_impl == "local":
        yield (
            "kernels.rms_norm transformer_engine needs Transformer Engine's linears, and "
            "kernels.transformer_impl is local: use auto, triton or torch"
        )
    if chosen in ("triton", "torch") and situation.config.precision.fp32_residual_connection:
        yield (
            f"kernels.rms_norm {chosen} takes a residual stream in the parameters' dtype, and "
            "precision.fp32_residual_connection keeps it in fp32: use auto"
        )


def _matrix_sizes(situation: Situation) -> dict[str, int]:
    """Rows and columns, a tensor-parallel rank's part, of the matrices that FP8 multiplies."""
    model = situation.config.model
    tensor = situation.config.parallel.tensor_model_parallel_size
    sizes = {"model.hidden_size": model.hidden_size}
    if "M" in situation.layers:
        sizes["the Mamba width (model.expand × model.hidden_size)"] = model.d_inner // tensor
    if "-" in situation.layers:
        sizes["model.ffn_hidden_size"] = model.ffn_hidden_size // tensor
    if situation.has_attention:
        queries = model.num_attention_heads * model.head_dim
        rows = queries + 2 * model.kv_heads * model.head_dim
        sizes["query width (model.num_attention_heads × kv_channels)"] = queries // tensor
        sizes["query, key and value width"] = rows // tensor
    return sizes


def fp8_shapes(situation: Situation) -> Iterator[str]:
    """Both sides of every FP8 matrix, and the tokens of a micro-batch, fill whole blocks."""
    config = situation.config
    if config.precision.fp8 is None:
        return
    # MXFP8 scales blocks of 32 values along either side; the others need cuBLAS's alignment.
    block = 32 if config.precision.fp8_recipe == "mxfp8" else 16
    tensor = config.parallel.tensor_model_parallel_size
    part = f" a rank of tensor_model_parallel_size {tensor}" if tensor > 1 else ""
    for name, size in _matrix_sizes(situation).items():
        if size % block:
            yield (
                f"precision.fp8 needs matrix sizes in multiples of {block}, and {name} is "
                f"{size}{part}: use {nearest_multiples(size, block)}"
            )
    lengths = {"data.sequence_length": [config.data.sequence_length]}
    lengths["validation.sequence_lengths"] = config.validation.sequence_lengths
    split = tensor if config.parallel.sequence_parallel else 1
    split *= config.parallel.context_parallel_size * config.parallel.sequence_pieces
    for name, values in lengths.items():
        for length in values:
            step = block * split
            if length * config.training.micro_batch_size % step:
                yield (
                    f"precision.fp8 needs the tokens of a micro-batch in multiples of {step}, and "
                    f"{name} {length} × training.micro_batch_size "
                    f"{config.training.micro_batch_size} is not: use "
                    f"{nearest_multiples(length, step)}"
                )


def fp8_parameters(situation: Situation) -> Iterator[str]:
    """Weights are kept in FP8 where linears compute in it, with bf16 around them."""
    precision = situation.config.precision
    if not precision.fp8_param_gather:
        return
    if precision.fp8 is None:
        yield (
            "precision.fp8_param_gather keeps the weights of FP8 products, and precision.fp8 is "
            "unset: use hybrid, or set fp8_param_gather to false"
        )
    if precision.fp8_recipe == "mxfp8":
        yield (
            "precision.fp8_param_gather with precision.fp8_recipe mxfp8 would gather through the "
            "gradients' memory, which is not supported: use tensorwise, delayed or blockwise, or "
            "set fp8_param_gather to false"
        )
    if precision.params_dtype == "fp32":
        yield (
            "precision.fp8_param_gather needs bf16 parameters, and precision.params_dtype is fp32: "
            "use auto or bf16"
        )
    if situation.config.kernels.uses_graph:
        yield (
            "precision.fp8_param_gather has not been tried with kernels.cuda_graph_impl "
            "full_iteration: use none, or set fp8_param_gather to false"
        )


RULES = (needs_gpu, fp8_implementation, norms, fp8_shapes, fp8_parameters)
