"""What a checkpoint holds, as one sharded state dict: assembled for saving, applied after loading.

Tensors carry keys with global layer numbers and know which part of the whole they are, so a
checkpoint loads at any tensor, pipeline, virtual pipeline and data parallel size. What is no
tensor and the same everywhere is the *common state*; what differs by rank (random generators, the
rerun state machine) returns only to the same layout.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state, rerun_state_machine
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.rerun_state_machine import RerunState

from samba_megatron.checkpoint import ranks
from samba_megatron.checkpoint.rng import capture_rng, restore_rng
from samba_megatron.model import fp8_weights
from samba_megatron.platform import distributed

_PLAIN_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Progress:
    """How far the run has come, and on what; plain values only (JSON)."""

    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Training sequences consumed, those that a rollback went past too: the place in the data."""
    consumed_tokens: int = 0
    """Training tokens of the steps done."""
    data_identity: dict[str, Any] = field(default_factory=dict)
    """What the data are (paths, hashes, seeds), as the data layer says it."""
    data_consumed: dict[str, Any] = field(default_factory=dict)
    """The ledger of samples by source (``BlendedSamples.ledger``)."""
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved configuration of the run (``dataclasses.asdict(run_config)``)."""
    faults: dict[str, Any] = field(default_factory=dict)
    """What the loop remembers of steps that it has not taken."""


@dataclass
class TrainState:
    """The live objects of a run that a checkpoint captures and restores."""

    model: Sequence[Any]
    """This rank's model chunks, in megatron's DDP wrapper or bare."""
    optimizer: Any | None = None
    """What ``get_megatron_optimizer`` returned (mended); None reads and writes weights only."""
    scheduler: Any | None = None
    """megatron's OptimizerParamScheduler; only its count is restored."""
    progress: Progress = field(default_factory=Progress)
    """Kept up to date by the loop; what ``load`` returns is a new one, not this."""
    data_iterator: Any | None = None
    """Only for a save that the rerun state machine has requested: its RerunDataIterator(s)."""

    @property
    def modules(self) -> list[Any]:
        """The model chunks without their DDP wrapper."""
        return [getattr(chunk, "module", chunk) for chunk in self.model]


def layout() -> dict[str, int | None]:
    """The parallel sizes of this world."""
    return {
        "world_size": torch.distributed.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline": parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }


def content_metadata() -> dict[str, Any]:
    """How megatron's objects are to lay themselves out. ``fully_reshardable`` must be said: the
    optimizer's default of megatron-core 0.19.2 does not work."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def assemble_weights(state: TrainState) -> dict[str, Any]:
    """The weights alone: one entry a model chunk, as megatron's optimizer expects them."""
    modules = state.modules
    names = ["model"] if len(modules) == 1 else [f"model{i}" for i in range(len(modules))]
    return {
        name: module.sharded_state_dict(metadata=content_metadata())
        for name, module in zip(names, modules, strict=True)
    }


def assemble(
    state: TrainState, loading: bool = False, same_layout: bool = True, rerun_pending: bool = False
) -> dict[str, Any]:
    """The whole sharded state dict.

    Args:
        state: the live objects. Their tensors are referred to, not copied, except the optimizer's,
            which are gathered over the data-parallel ranks into host memory: 12 bytes a parameter
            of this rank's part of the model.
        loading: make a template to load into.
        same_layout: when loading, ask for what belongs to one rank, too.
        rerun_pending: when loading, ask for the rerun state machine's state.
    """
    weights = assemble_weights(state)
    content: dict[str, Any] = dict(weights)
    if state.optimizer is not None and not state.optimizer.is_stub_optimizer:
        _demand_mended(state.optimizer)
        content["optimizer"] = state.optimizer.sharded_state_dict(
            content, is_loading=loading, metadata=content_metadata()
        )
    # Only now: the optimizer finds its parameters by the tensors in the weights.
    if loading:
        fp8_weights.make_room(weights)
    else:
        fp8_weights.put_main_values(weights, content.get("optimizer", {}))
    if state.scheduler is not None:
        content["opt_param_scheduler"] = state.scheduler.state_dict()
    if same_layout or not loading:
        content["rng"] = ShardedObject(
            "rng", capture_rng(), (torch.distributed.get_world_size(),), (ranks.rank(),)
        )
    machine = _rerun_machine()
    if machine is not None and (rerun_pending or not loading):
        rerun = machine.state_dict(state.data_iterator, "torch_dist", force=loading)
        if rerun is not None:
            content["rerun_state_machine"] = rerun
    content["progress"] = asdict(state.progress)
    return content


def rerun_is_pending() -> bool:
    """Whether the rerun state machine wants its state back when the run starts again."""
    machine = _rerun_machine()
    return machine is not None and machine.state != RerunState.NOT_RUNNING_YET


def apply_weights(state: TrainState, loaded: dict[str, Any]) -> None:
    """Puts loaded weights into the model; the optimizer's fp32 copies, if any, stay as they are.

    Raises:
        RuntimeError: if a weight is missing; state that Transformer Engine's modules keep beside
            their weights may be.
    """
    modules = state.modules
    for i, module in enumerate(modules):
        part = loaded["model" if len(modules) == 1 else f"model{i}"]
        result = module.load_state_dict(part, strict=False)
        missing = [name for name in result.missing_keys if not name.endswith("_extra_state")]
        if missing or result.unexpected_keys:
            raise RuntimeError(f"weights do not fit: {missing=}, {result.unexpected_keys=}")


def apply_weights_alone(state: TrainState, loaded: dict[str, Any]) -> None:
    """Puts loaded weights into the model, and the optimizer's fp32 copies, if any, are made of
    them.

    Raises:
        RuntimeError: as :func:`apply_weights`.
    """
    apply_weights(state, loaded)
    if state.optimizer is None:
        return
    quantized = fp8_weights.any_quantized(state.modules)
    state.optimizer.reload_model_params(loaded if quantized else None)
    _refresh_quantized(state)


def _refresh_quantized(state: TrainState) -> None:
    """Weights in FP8 are those that the update before the save has cast, to the last bit."""
    if fp8_weights.any_quantized(state.modules):
        fp8_weights.cast_from_main(state.optimizer, state.model)


def apply(state: TrainState, loaded: dict[str, Any]) -> Progress:
    """Puts everything loaded into the live objects.

    The configuration is the truth: rates, decay and the like stay as the run has built them, and
    only counts return to the schedule and the optimizer.

    Returns:
        The progress at the time of saving.
    """
    apply_weights(state, loaded)
    if "optimizer" in loaded and state.optimizer is not None:
        _keep_own_groups(state.optimizer, loaded["optimizer"])
        state.optimizer.load_state_dict(loaded["optimizer"])
        _refresh_quantized(state)
    if "opt_param_scheduler" in loaded and state.scheduler is not None:
        state.scheduler.num_steps = 0
        state.scheduler.step(increment=loaded["opt_param_scheduler"]["num_steps"])
    machine = _rerun_machine()
    if machine is not None and isinstance(
        loaded.get("rerun_state_machine", {}).get("sharded"), dict
    ):
        machine.load_state_dict(loaded["rerun_state_machine"])
    if "rng" in loaded:
        restore_rng(loaded["rng"])
    return Progress(**loaded["progress"])


def count_parameters(weights: dict[str, Any]) -> int:
    """Numbers in the whole model, over all ranks, each counted once.

    Args:
        weights: what :func:`assemble_weights` returned.
    """
    count = sum(
        value.data.numel()
        for value in nested_values(weights)
        if isinstance(value, ShardedTensor | ShardedTensorFactory)
        and is_main_replica(value.replica_id)
    )
    return int(ranks.total(count))


def estimate_bytes(state: TrainState) -> int:
    """Size of a checkpoint, a little high: what tensor-parallel ranks share counts repeatedly."""
    groups = distributed.process_groups()
    weights = [p for module in state.modules for p in module.parameters()]
    local = sum(p.numel() * p.element_size() for p in weights) / groups.dp_cp.size()
    if state.optimizer is not None and not state.optimizer.is_stub_optimizer:
        local += 12 * sum(p.numel() for p in weights) / groups.dp_cp.size()
    return int(ranks.total(local))


def is_finite(state: TrainState) -> bool:
    """Whether every weight and every number of the optimizer is finite, on every rank."""
    # An optimizer may count its steps on the CPU beside moments on the device.
    alike: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in _numbers(state):
        # Quantised tensors are subclasses; their fp32 copies are among the optimizer's.
        if tensor.dtype in _PLAIN_FLOATS and tensor.numel() and _is_plain(tensor):
            alike.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach())
    here = all(
        torch.stack(torch._foreach_norm(tensors, ord=float("inf"))).isfinite().all().item()
        for tensors in alike.values()
    )
    return not distributed.any_rank(not here)


def _numbers(state: TrainState) -> Iterator[torch.Tensor]:
    for module in state.modules:
        yield from module.parameters()
    for part in _parts(state.optimizer):
        if part.optimizer is None:
            continue
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for values in part.optimizer.state.values():
            yield from (value for value in values.values() if isinstance(value, torch.Tensor))


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _parts(optimizer: Any | None) -> list[Any]:
    if optimizer is None:
        return []
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _demand_mended(optimizer: Any) -> None:
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer) and not hasattr(
            part, "is_mended_for_checkpoints"
        ):
            raise RuntimeError(
                "megatron's distributed optimizer would save one parameter's state as another's: "
                "pass it through samba_megatron.training.torch_adam.mend"
            )


def _keep_own_groups(optimizer: Any, loaded: dict[Any, Any]) -> None:
    """Replaces the loaded parameter groups by the optimizer's own, with the loaded step.

    The groups hold what the configuration decides and what one implementation of AdamW needs and
    another does not know; and the common state has only those of the first pipeline stage.
    """
    parts = _parts(optimizer)
    for i, part in enumerate(parts):
        content = loaded if len(parts) == 1 else loaded[i]
        groups = content["optimizer"]["param_groups"]
        step = max(int(group.get("step") or 0) for group in groups)
        own = [
            {name: value for name, value in group.items() if name != "params"}
            for group in part.optimizer.param_groups
        ]
        content["optimizer"] = {"param_groups": [{**group, "step": step} for group in own]}


def _rerun_machine() -> Any | None:
    """The rerun state machine, if the run has made one (megatron's getter would make it)."""
    return getattr(rerun_state_machine, "_GLOBAL_RERUN_STATE_MACHINE", None)
