"""The network of a job: exchanges between pairs of nodes, then an all-reduce over all ranks.

Each node exchanges data with several partners in turn, all pairs at once: a node that is slow with
every one of them is named; its partners were fast with others. The all-reduce says what the whole
reaches. Results and turns go through the store of the rendezvous, not through collectives, so that
a rank that never answers, or gets stuck, can be named too.
"""

import json
import os
import statistics
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samba_megatron.platform.distributed import Rank
from samba_megatron.platform.errors import ExitWith
from samba_megatron.platform.exits import ExitCode
from samba_megatron.platform.hardware import node_name

if TYPE_CHECKING:
    import torch

FILE_NAME = "across.json"
_ROUNDS = 3
_SLOW = 0.5
"""A unit whose best rate is under this share of the median is an outlier."""


def check_across(output: Path, seconds: float) -> ExitCode:
    """Measures, as one rank of a job that torchrun or srun has started.

    Args:
        output: folder for rank 0's ``across.json``.
        seconds: when ranks that have not answered are named, and all end.

    Returns:
        DONE or, on every rank, BAD_NODE where any node is named.
    """
    rank = Rank.from_environment()
    # torchrun's agent has the store already.
    theirs = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = _connect(seconds, is_master=rank.rank == 0 and not theirs)
    store.set(f"node/{rank.rank}", node_name())
    store.set(f"stage/{rank.rank}", "0")
    alarm = threading.Timer(seconds, _give_up, (rank, output, seconds))
    alarm.daemon = True
    alarm.start()
    try:
        verdict = _take_part(store, rank, output)
    except RuntimeError as error:
        time.sleep(seconds / 10)  # the alarm, where the time is over, has the better words
        raise ExitWith(ExitCode.BAD_NODE, f"the check broke off: {error}") from error
    alarm.cancel()
    return ExitCode.DONE if verdict["ok"] else ExitCode.BAD_NODE


def _take_part(store: Any, rank: Rank, output: Path) -> dict[str, Any]:
    """Measures with the others; what rank 0 concluded."""
    store.wait([f"node/{peer}" for peer in range(rank.world_size)])
    nodes = [store.get(f"node/{peer}").decode() for peer in range(rank.world_size)]
    figures = _measure(store, rank, nodes)
    store.set(f"figures/{rank.rank}", json.dumps(figures))
    if rank.rank == 0:
        report = judge(nodes, [_figures(store, peer) for peer in range(rank.world_size)])
        _conclude(store, output, report)
    verdict: dict[str, Any] = json.loads(store.get("verdict"))
    _meet(store, "left", rank.world_size)  # rank 0 has the store
    return verdict


def _connect(seconds: float, is_master: bool) -> Any:
    from torch.distributed import PrefixStore, TCPStore

    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = int(os.environ.get("MASTER_PORT", "0"))
    try:
        store = TCPStore(
            address,
            port,
            world_size=None,
            is_master=is_master,
            timeout=timedelta(seconds=2 * seconds),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ExitWith(
            ExitCode.BAD_NODE, f"rank 0 at {address}:{port} does not answer: {reason}"
        ) from None
    return PrefixStore("across", store)


def _measure(store: Any, rank: Rank, nodes: list[str]) -> dict[str, Any]:
    """This rank's figures: ``all_reduce`` and ``pairs``, in 10^9 bytes/s."""
    import torch

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=rank.rank, world_size=rank.world_size
    )
    numbers = torch.ones((256 if on_gpu else 4) * 2**18, device=device)
    figures: dict[str, Any] = {"pairs": []}
    units = units_of(nodes)
    turns = min(_ROUNDS, len(units) - 1)
    for turn in range(turns):
        partner = partner_of(rank.rank, units, turn)
        _meet(store, f"turn/{turn}", rank.world_size)
        if partner is not None:
            figures["pairs"].append(_pair_rate(numbers, partner, rank.rank))
        store.set(f"stage/{rank.rank}", str(turn + 1))
    _meet(store, "all", rank.world_size)
    figures["all_reduce"] = _all_reduce_rate(numbers)
    store.set(f"stage/{rank.rank}", str(turns + 1))
    _meet(store, "done", rank.world_size)
    torch.distributed.destroy_process_group()
    return figures


def _meet(store: Any, name: str, ranks: int) -> None:
    """Waits until every rank is here."""
    if store.add(name, 1) == ranks:
        store.set(f"{name}/all", "1")
    store.wait([f"{name}/all"])


def _all_reduce_rate(numbers: "torch.Tensor") -> float:
    """Bus bandwidth, 10^9 bytes/s: what every link must carry for a ring, NCCL's usual figure."""
    import torch

    ranks = torch.distributed.get_world_size()
    torch.distributed.all_reduce(numbers)
    _wait()
    start, repeats = time.perf_counter(), 5
    for _ in range(repeats):
        torch.distributed.all_reduce(numbers)
    _wait()
    seconds = (time.perf_counter() - start) / repeats
    size = numbers.numel() * numbers.element_size()
    return size * 2 * (ranks - 1) / ranks / seconds / 1e9


def _pair_rate(numbers: "torch.Tensor", partner: int, rank: int) -> float:
    """10^9 bytes/s each way, both at once; the first exchange, which connects, is not counted."""
    import torch

    received, repeats, start = torch.empty_like(numbers), 5, 0.0
    for repeat in range(repeats + 1):
        if repeat == 1:
            _wait()
            start = time.perf_counter()
        sends = torch.distributed.P2POp(torch.distributed.isend, numbers, partner)
        receives = torch.distributed.P2POp(torch.distributed.irecv, received, partner)
        # Both sides must queue alike where a backend takes turns.
        order = [sends, receives] if rank < partner else [receives, sends]
        for work in torch.distributed.batch_isend_irecv(order):
            work.wait()
    _wait()
    seconds = (time.perf_counter() - start) / repeats
    return numbers.numel() * numbers.element_size() / seconds / 1e9


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def units_of(nodes: list[str]) -> list[list[int]]:
    """The ranks of each node; of a single node each rank by itself.

    Args:
        nodes: each rank's node, by rank.
    """
    ranks: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks.setdefault(node, []).append(rank)
    return list(ranks.values()) if len(ranks) > 1 else [[rank] for rank in range(len(nodes))]


def partner_of(rank: int, units: list[list[int]], turn: int) -> int | None:
    """Whom ``rank`` exchanges data with: each turn pairs every unit with another one (the circle
    method of a tournament), so that any two meet at most once; None for who sits out."""
    mine = next(index for index, ranks in enumerate(units) if rank in ranks)
    count = len(units) + len(units) % 2  # an odd one out meets nobody
    last = count - 1
    if mine == last:
        other = turn % last
    elif mine == turn % last:
        other = last
    else:
        other = (2 * turn - mine) % last
    position = units[mine].index(rank)
    if other >= len(units) or position >= len(units[other]):
        return None
    return units[other][position]


def judge(nodes: list[str], figures: list[dict[str, Any]]) -> dict[str, Any]:
    """The report: the rate over all, each unit's best rate with a partner, and who is an outlier.

    Args:
        nodes: each rank's node.
        figures: each rank's measurements.
    """
    best: dict[str, float] = {}
    units = units_of(nodes)
    alone = len(units) == len(nodes) and len(set(nodes)) == 1
    for ranks in units:
        name = f"rank {ranks[0]} on {nodes[0]}" if alone else nodes[ranks[0]]
        # The slowest link of a unit counts, of each the fastest exchange.
        rates = [max(figures[rank]["pairs"]) for rank in ranks if figures[rank]["pairs"]]
        if rates:
            best[name] = round(min(rates), 3)
    middle = statistics.median(best.values()) if best else 0.0
    slow = [name for name, rate in best.items() if len(best) > 2 and rate < _SLOW * middle]
    return {
        "ok": not slow,
        "problems": [
            f"{name} exchanges {best[name]:g} GB/s with the fastest of its partners, half of all "
            f"reach {middle:g}"
            for name in slow
        ],
        "nodes": sorted({name.rpartition(" on ")[2] for name in slow}),
        "all_reduce_gb_per_s": round(figures[0]["all_reduce"], 3),
        "exchange_gb_per_s": best,
        "ranks": len(nodes),
        "time": round(time.time(), 3),
    }


def _figures(store: Any, rank: int) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(store.get(f"figures/{rank}"))
    return figures


def _conclude(store: Any, output: Path, report: dict[str, Any]) -> None:
    from samba_megatron.platform.preflight import write_report

    write_report(output / FILE_NAME, report)
    for problem in report["problems"]:
        print(problem, flush=True)
    store.set("verdict", json.dumps({"ok": report["ok"]}))


def _give_up(rank: Rank, output: Path, seconds: float) -> None:
    """The time is over: rank 0 names who has not answered, and every rank ends."""
    store = _connect(seconds, is_master=False)  # the main thread waits on its own connection
    store.set(f"alive/{rank.rank}", "1")
    time.sleep(2.0)  # for the others to say the same
    if rank.rank == 0:
        problems, nodes = _stuck(store, rank.world_size, seconds)
        _conclude(store, output, {"ok": False, "problems": problems, "nodes": nodes})
    else:
        time.sleep(2.0)
    os._exit(ExitCode.BAD_NODE)


def _stuck(store: Any, world_size: int, seconds: float) -> tuple[list[str], list[str]]:
    """(sentences, nodes) about the ranks that kept the others waiting."""
    ranks = range(world_size)
    absent = [peer for peer in ranks if not store.check([f"node/{peer}"])]
    if absent:
        return [f"rank {peer} did not start within {seconds:g} s" for peer in absent], []
    silent = [peer for peer in ranks if not store.check([f"alive/{peer}"])]
    stages = [int(store.get(f"stage/{peer}")) for peer in ranks]
    behind = silent or [peer for peer in ranks if stages[peer] == min(stages)]
    what = "does not answer" if silent else "did not finish an exchange of data"
    names = [store.get(f"node/{peer}").decode() for peer in behind]
    sentences = [f"rank {peer} on {name} {what}" for peer, name in zip(behind, names, strict=True)]
    return sentences, sorted(set(names))
