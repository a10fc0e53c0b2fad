"""What one rank knows about itself when the run hangs: where Python stands, and which collectives
it has entered and finished.

The latter comes from torch's flight recorder, which notes every collective of NCCL and gloo in a
ring of memory (``TORCH_FR_BUFFER_SIZE``); nothing is written before it is asked. It does not know
gloo's sends and receives: who waits in one is told by the line that Python stands at.
"""

import linecache
import os
import pickle
import sys
import threading
from types import FrameType
from typing import Any

from samba_megatron.platform.hardware import node_name

_DEEPEST = 60
_WAITING_PLACES = ("torch/distributed/", "p2p_communication.py")


def collect(rank: int, progress: dict[str, Any]) -> dict[str, Any]:
    """The record of this process; JSON.

    Args:
        rank: this process's.
        progress: phase, step and seconds without progress, as the watchdog knows them.
    """
    frames = sys._current_frames()
    main = threading.main_thread().ident or 0
    stack = stack_of(frames.get(main))
    found = collectives()
    return {
        "rank": rank,
        "host": node_name(),
        "pid": os.getpid(),
        **progress,
        "waits": bool(found["pending"]) or stands_in_communication(stack),
        "stack": stack,
        "threads": {
            thread.name: stack_of(frames.get(thread.ident or 0))[-5:]
            for thread in threading.enumerate()
            if thread.ident not in (main, threading.get_ident())
        },
        **found,
    }


def stands_in_communication(stack: list[dict[str, Any]]) -> bool:
    """Whether the innermost frame is one that waits for other ranks."""
    return bool(stack) and any(place in stack[-1]["file"] for place in _WAITING_PLACES)


def stack_of(frame: FrameType | None) -> list[dict[str, Any]]:
    """``file``, ``line``, ``function`` and ``code`` of the frames, the innermost last."""
    stack: list[dict[str, Any]] = []
    while frame is not None and len(stack) < _DEEPEST:
        code = frame.f_code
        stack.append(
            {
                "file": code.co_filename,
                "line": frame.f_lineno,
                "function": code.co_name,
                "code": linecache.getline(code.co_filename, frame.f_lineno or 0).strip(),
            }
        )
        frame = frame.f_back
    return stack[::-1]


def collectives() -> dict[str, Any]:
    """``entered`` and ``finished``: by process group the number of the last collective;
    ``pending``: what was entered and is not finished. NCCL and gloo count apart in one group."""
    import torch

    bindings = torch._C._distributed_c10d
    found: dict[str, Any] = {"entered": {}, "finished": {}, "pending": []}
    groups = _groups()
    for backend, name in (("gloo", "_dump_fr_trace"), ("nccl", "_dump_nccl_trace")):
        dump = _read(getattr(bindings, name, None))
        entries = dump.get("entries", [])
        named = {str(entry["pg_id"]): str(entry["process_group"][0]) for entry in entries}
        for key, status in dump.get("pg_status", {}).items():
            group = f"{backend} {named.get(str(key), key)}"
            found["entered"][group] = int(status["last_enqueued_collective"])
            found["finished"][group] = int(status["last_completed_collective"])
        found["pending"] += [
            _operation(backend, entry, groups)
            for entry in entries
            if not entry["retired"] and entry["state"] != "completed"
        ]
    return found


def _read(dump: Any) -> dict[str, Any]:
    if dump is None:
        return {}
    try:
        content = pickle.loads(dump())
    except Exception:  # no recorder for this backend, or a collective that cannot be described
        return {}
    return content if isinstance(content, dict) else {}


def _operation(backend: str, entry: dict[str, Any], groups: dict[str, list[int]]) -> dict[str, Any]:
    group = str(entry["process_group"][0])
    name = str(entry["profiling_name"])
    return {
        "group": f"{backend} {group}",
        "ranks": groups.get(group),
        "name": name.partition(":")[2] or name,
        "number": int(entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]),
        "point_to_point": bool(entry["is_p2p"]),
        "sizes": entry["input_sizes"],
    }


def _groups() -> dict[str, list[int]]:
    """The global ranks of this rank's process groups by name; not of the world, which is all."""
    import torch

    if not torch.distributed.is_initialized():
        return {}
    world = torch.distributed.distributed_c10d._world
    found = {}
    for group, ranks in world.pg_group_ranks.items():
        name = world.pg_names.get(group)
        if name and len(ranks) < torch.distributed.get_world_size():
            found[str(name)] = sorted(ranks)
    return found
