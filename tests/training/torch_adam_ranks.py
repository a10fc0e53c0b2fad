"""What test_torch_adam runs on two ranks: resuming with the mended optimizer and with the wheel's.

Writes what it found to ``results.json``.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from samba_megatron.checkpoint import state, writer
from samba_megatron.config import RunConfig
from samba_megatron.platform import distributed
from samba_megatron.training import torch_adam
from tests.checkpoint.tiny_run import TinyRun, start, tiny_config

UNTIL = 5


def main(folder: Path) -> None:
    config = tiny_config()
    start(config)
    writer.install_results(writer.WriteResults())
    results: dict[str, Any] = {"idle rank": steps_on_an_idle_rank()}
    for dtype in ("fp32", "bf16"):
        for sharding in ("fully_reshardable", "dp_reshardable"):
            outcome = resume(tiny_config(dtype), folder / f"{dtype}-{sharding}", sharding)
            results[f"{dtype} {sharding}"] = outcome
    results["shared step"] = resume(config, folder / "shared", "fully_reshardable", SharedStep)
    results["wheel"] = wheel(config)
    results["wheel order"] = wrong_positions(tiny_config("bf16"))
    results["mended order"] = wrong_positions(tiny_config("bf16"), mended=True)
    results["wheel positions"] = shifted(config)
    results["mended positions"] = shifted(config, mended=True)
    if torch.distributed.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    distributed.shutdown()


def resume(
    config: RunConfig, folder: Path, sharding: str, kind: type | None = None
) -> dict[str, Any]:
    """Trains, saving at step 2; loads that into a fresh run and trains it on."""
    from megatron.core import dist_checkpointing

    run, fresh = TinyRun(config), TinyRun(config)
    run.train(2)
    if distributed.Rank.from_environment().rank == 0:
        folder.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(content(run, sharding), str(folder))
    if kind is not None:
        part(fresh).__class__ = kind
    loaded = dist_checkpointing.load(content(fresh, sharding, loading=True), str(folder))
    state.apply_weights(fresh.state, loaded)
    fresh.state.optimizer.load_state_dict(loaded["optimizer"])  # type: ignore[union-attr]
    fresh.state.scheduler.step(run.state.scheduler.num_steps)  # type: ignore[union-attr]
    fresh.state.progress = dataclasses.replace(run.state.progress)
    losses = [run.train(UNTIL), fresh.train(UNTIL)]
    steps = {int(values["step"]) for values in part(fresh).optimizer.state.values()}
    return {
        "losses": losses,
        "same": run.fingerprint() == fresh.fingerprint(),
        "steps": sorted(steps),
    }


def content(run: TinyRun, sharding: str, loading: bool = False) -> dict[str, Any]:
    metadata = {**state.content_metadata(), "distrib_optim_sharding_type": sharding}
    weights = state.assemble_weights(run.state)
    optimizer: Any = run.state.optimizer
    weights["optimizer"] = optimizer.sharded_state_dict(
        weights, is_loading=loading, metadata=metadata
    )
    return weights


class SharedStep(torch_adam.TorchAdamDistributedOptimizer):
    """Mended but for one fault: all parameters have one step tensor, as the wheel loads it."""

    def _set_step(self, step: int) -> None:
        shared = torch.tensor(float(step))
        for values in self.optimizer.state.values():
            values["step"] = shared


def wheel(config: RunConfig) -> dict[str, str]:
    """The errors that megatron's own class raises where the mended one works."""
    with unmended():
        run = TinyRun(config)
    errors = {"fresh state_dict": error_of(part(run).state_dict)}
    run.train(1)
    model_param = next(iter(part(run).model_param_group_index_map))
    tensors = part(run)._get_main_param_and_optimizer_states(model_param)
    loaded = {name: value for name, value in tensors.items() if name != "step"}

    def load() -> None:
        part(run)._set_main_param_and_optimizer_states(model_param, loaded)

    errors["load"] = error_of(torch.no_grad()(load))
    errors["load with gradients"] = error_of(load)
    return errors


def wrong_positions(config: RunConfig, mended: bool = False) -> int:
    """Parameters of this rank whose optimizer state is looked up under another's."""
    run = TinyRun(config) if mended else unmended_run(config)
    optimizer, wrong = part(run), 0
    for param, (group, order) in optimizer.model_param_group_index_map.items():
        found = optimizer.optimizer.param_groups[group]["params"][order]
        piece = optimizer._get_model_param_range_map(param)["param"]
        own = param.detach().view(-1)[piece.start : piece.end].float()
        wrong += found.shape != own.shape or not torch.equal(found.detach().float(), own)
    return wrong


def shifted(config: RunConfig, mended: bool = False) -> int:
    """fp32 parameters whose main copy in the sharded state dict is not the parameter."""
    run = TinyRun(config) if mended else unmended_run(config)
    run.train(1)
    weights = content(run, "fully_reshardable")
    optimizer, wrong = part(run), 0
    params = [param for buffer in optimizer.buffers for param in buffer.param_index_map]
    for index, param in enumerate(params):
        saved = weights["optimizer"]["param_state"][index]["param"].data
        wrong += not torch.equal(saved.reshape(-1), param.detach().cpu().reshape(-1))
    return wrong


def steps_on_an_idle_rank() -> list[int]:
    """The step that an optimizer knows of whose rank holds nothing but a bucket's padding."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import MegatronModule, TransformerConfig

    class OneParameter(MegatronModule):
        def __init__(self) -> None:
            super().__init__(TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1))
            self.weight = torch.nn.Parameter(torch.ones(64))

    model = DistributedDataParallel(
        TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1),
        DistributedDataParallelConfig(use_distributed_optimizer=True),
        OneParameter(),
    )
    optimizer = torch_adam.mend(
        get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=0.1, clip_grad=0.0, use_distributed_optimizer=True
            ),
            [model],
            use_gloo_process_groups=False,
        )
    )
    known = []
    for _ in range(3):
        known.append(optimizer.state_dict()["optimizer"]["param_groups"][0]["step"])
        model.zero_grad_buffer()
        next(model.module.parameters()).main_grad.fill_(1.0)
        optimizer.step()
    everyone: list[Any] = [None, None]
    torch.distributed.all_gather_object(everyone, known)
    assert everyone[0] == everyone[1]
    return known


@contextmanager
def unmended() -> Iterator[None]:
    """Inside, runs are built with megatron's optimizer as it is."""
    module: Any = torch_adam
    mend, module.mend = module.mend, lambda optimizer: optimizer
    try:
        yield
    finally:
        module.mend = mend


def unmended_run(config: RunConfig) -> TinyRun:
    with unmended():
        return TinyRun(config)


def part(run: TinyRun) -> Any:
    return run.state.optimizer.chained_optimizers[0]  # type: ignore[union-attr]


def error_of(action: Any) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
