"""megatron's distributed optimizer, made to survive a checkpoint.

Where neither Transformer Engine's nor Apex's FusedAdam is used, megatron-core 0.19.2 wraps
``torch.optim.AdamW``, and its distributed optimizer handles that badly:

- ``state_dict()`` wants exactly one ``step`` among the parameters' states, so it fails on an
  optimizer that has never stepped (every load into a fresh process) and on a rank that owns no
  part of any parameter;
- ``_set_main_param_and_optimizer_states`` looks for ``step`` among the loaded tensors, where it is
  not: ``KeyError``;
- ``load_state_dict()`` puts one ``step`` tensor into every parameter's state, and AdamW increments
  it once a parameter: the bias correction is silently wrong from then on;
- ``load_parameter_state_from_dp_reshardable`` writes into parameters without ``no_grad`` and
  overwrites ``step`` with the zero of a fresh optimizer.

:class:`TorchAdamDistributedOptimizer` mends these; FusedAdam keeps its step in the parameter
groups and has none of them.

Two more faults are everyone's, whoever's AdamW it is, and :class:`MendedDistributedOptimizer` mends
them:

- In a parameter group with both fp32 and bf16 parameters (a Mamba mixer's A_log beside bf16
  weights) the index from model parameter to optimizer state has the order of the gradient buffers,
  but the optimizer has the fp32 parameters first. A checkpoint then holds one parameter's moments
  as another's, silently where their sizes agree.
- ``sharded_param_state_fully_reshardable`` joins the buckets of a gradient buffer without the
  padding at their ends, then cuts the parameters out at positions that count the padding. After
  the first padded bucket a checkpoint holds every parameter's optimizer state shifted.

:func:`mend` takes any optimizer that ``get_megatron_optimizer`` returns and removes all six.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def force() -> None:
    """Makes megatron build torch's AdamW in this process although FusedAdam is installed.

    Call it before ``get_megatron_optimizer``. megatron chooses once, at import, by what is there.
    """
    from megatron.core import optimizer as factory
    from megatron.core.optimizer import distrib_optimizer

    chosen: Any = factory
    chosen.Adam, chosen.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, True
    consequences: Any = distrib_optimizer
    consequences.Adam, consequences.HAVE_APEX_OR_TE = torch.optim.AdamW, False
    consequences.USING_TE_OPTIMIZER = consequences.USING_APEX_OPTIMIZER = False


def mend(optimizer: MegatronOptimizer) -> MegatronOptimizer:
    """Mends every distributed optimizer inside ``optimizer``, in place; whoever's AdamW it is.

    Args:
        optimizer: what ``get_megatron_optimizer`` returned, chained or not.

    Returns:
        The same object.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not isinstance(part, DistributedOptimizer) or part.is_stub_optimizer:
            continue
        inner = part.optimizer
        by_torch = isinstance(inner, torch.optim.Adam | torch.optim.AdamW)
        if by_torch and not isinstance(inner, HybridDeviceOptimizer):
            part.__class__ = TorchAdamDistributedOptimizer
        else:
            part.__class__ = MendedDistributedOptimizer
        part.align_parameter_order()
    return optimizer


class MendedDistributedOptimizer(DistributedOptimizer):
    """A distributed optimizer whose checkpoints hold each parameter's own state."""

    is_mended_for_checkpoints = True

    def align_parameter_order(self) -> None:
        """Makes the index from model parameters to the optimizer's say what the optimizer has."""
        groups = zip(self.model_fp32_groups, self.model_float16_groups, strict=True)
        for group_index, (fp32, float16) in enumerate(groups):
            for order, parameter in enumerate([*fp32, *float16]):
                self.model_param_group_index_map[parameter] = (group_index, order)

    def sharded_param_state_fully_reshardable(self, *args: Any, **kwargs: Any) -> Any:
        """megatron's, with positions that do not count the padding of buckets."""
        with _positions_without_padding(self.buffers):
            return super().sharded_param_state_fully_reshardable(*args, **kwargs)


@contextmanager
def _positions_without_padding(buffers: Sequence[Any]) -> Iterator[None]:
    """Inside, gradient buffers give the parameters' positions as if buckets had no padding."""
    original = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        skipped, padding = [], 0
        for bucket in buffer.buckets:
            skipped.append(padding)
            padding += bucket.grad_data.numel() - bucket.numel_unpadded
        buffer.param_index_map = {
            parameter: (start - skipped[bucket], end - skipped[bucket], bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, positions in zip(buffers, original, strict=True):
            buffer.param_index_map = positions


class TorchAdamDistributedOptimizer(MendedDistributedOptimizer):
    """A distributed optimizer whose AdamW is torch's; made by :func:`mend`.

    The step count is written to a checkpoint as an integer in each parameter group, as FusedAdam
    has it, so that either implementation resumes from the other's checkpoint.
    """

    _steps_taken = 0

    def step_with_ready_grads(self) -> bool:
        """Steps, and counts: a rank that owns no part of any parameter has no other record."""
        updated: bool = super().step_with_ready_grads()
        self._steps_taken += 1
        return updated

    def state_dict(self) -> dict[str, Any]:
        """Everything but the parameters' own state: groups with their ``step``, gradient scaler."""
        self._prime()
        step = self._common_step()
        groups = [
            {**{name: value for name, value in group.items() if name != "params"}, "step": step}
            for group in self.optimizer.state_dict()["param_groups"]
        ]
        state: dict[str, Any] = {"optimizer": {"param_groups": groups}}
        if self.grad_scaler:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads groups and, where ``param_state`` is among them, the parameters' own state.

        Raises:
            ValueError: if the groups disagree about the step.
        """
        groups = state_dict["optimizer"]["param_groups"]
        steps = {int(group.get("step") or 0) for group in groups}
        if len(steps) != 1:
            raise ValueError(f"the optimizer's parameter groups disagree about the step: {steps}")
        step = steps.pop()
        self._prime()
        super().load_state_dict(
            {
                **state_dict,
                "optimizer": {"param_groups": [{**group, "step": step} for group in groups]},
            }
        )
        self._set_step(step)

    def _set_main_param_and_optimizer_states(
        self, model_param: torch.nn.Parameter, tensors: dict[str, Any]
    ) -> None:
        # A ``step`` that is no tensor is passed over: _set_step writes it after everything else.
        with torch.no_grad():
            super()._set_main_param_and_optimizer_states(model_param, {**tensors, "step": None})

    def _prime(self) -> None:
        """Gives parameters that have never been stepped the state that AdamW would start with."""
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                state = self.optimizer.state[param]
                if "step" in state:
                    continue
                state["step"] = _step_tensor(0, param, group)
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(param, requires_grad=False))

    def _common_step(self) -> int:
        steps = {int(state["step"]) for state in self.optimizer.state.values()}
        if len(steps) > 1:
            raise RuntimeError(f"parameters have been stepped unequally often: {sorted(steps)}")
        return steps.pop() if steps else self._steps_taken

    def _set_step(self, step: int) -> None:
        self._steps_taken = step
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                self.optimizer.state[param]["step"] = _step_tensor(step, param, group)


def _step_tensor(step: int, param: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """A parameter's own step counter, as AdamW itself makes it: on the CPU unless a kernel reads
    it."""
    on_device = bool(group.get("capturable") or group.get("fused"))
    return torch.tensor(
        float(step), dtype=torch.float32, device=param.device if on_device else "cpu"
    )
