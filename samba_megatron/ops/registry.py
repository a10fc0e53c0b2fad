"""Which kernels an operation has, which of them can run here, and which one ran.

Every operation is an :class:`Operation` holding its :class:`Backend` objects,
fastest first. A call describes itself in a :class:`Request`; "auto" takes the first backend that
can serve it, and a backend named by the user is taken or refused by name, never replaced. A new
kernel is one file that defines a `Backend` and one line that lists it in its operation.
"""

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch

from samba_megatron.platform.errors import UserError

AUTO = "auto"

CPU_AND_CUDA = frozenset({"cpu", "cuda"})
CUDA_ONLY = frozenset({"cuda"})
HALF_DTYPES = frozenset({torch.float16, torch.bfloat16})
FLOAT_DTYPES = HALF_DTYPES | {torch.float32}
ALL_DTYPES = FLOAT_DTYPES | {torch.float64}


@dataclass(frozen=True)
class Request:
    """What one call asks of a kernel."""

    device: str
    """Device type: "cpu" or "cuda"."""
    dtype: torch.dtype
    """Of the activations."""
    features: frozenset[str] = frozenset()
    """Names of the optional arguments used, such as "reset"."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Dimensions that a kernel may be particular about, such as "head_dim"."""


def span(x: torch.Tensor) -> int:
    """Numbers in memory from the first of ``x`` to the last: a view's may be far apart."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


COUNTED_IN_32_BITS = 1 << 32
"""Kernels of causal-conv1d and mamba-ssm compute a number's place in 32 bits: past that many they
read and write elsewhere, without a word."""


def beyond_32_bits(request: Request) -> str | None:
    """The reason why such a kernel cannot serve a request, or None."""
    numbers = request.sizes.get("span", 0)
    if numbers < COUNTED_IN_32_BITS:
        return None
    return f"it counts in 32 bits, and {numbers:,} numbers are more"


def _refuses_nothing(request: Request) -> str | None:
    return None


_BACKENDS: dict[int, "Backend"] = {}
_REASONS: dict[int, str | None] = {}
"""By the backend's number: torch.compile can ask for a number's kernel while it traces a call."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation."""

    name: str
    """What a user writes to force it."""
    load: Callable[[], Callable[..., Any]]
    """Imports the kernel and returns the function that runs it; called once, when first needed."""
    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    features: frozenset[str]
    """The optional arguments it takes."""
    package: str | None = None
    """The importable package it needs besides torch."""
    refuses: Callable[[Request], str | None] = _refuses_nothing
    """Further limits: the reason why it cannot serve a request, or None."""
    number: int = field(default_factory=count().__next__, init=False, compare=False)
    """Counts all backends."""
    kernel: list[Callable[..., Any] | None] = field(
        default_factory=list, init=False, compare=False, repr=False
    )
    """Once loaded, the function that runs it, or None. A list of its own: torch.compile would look
    into one that all share as it was before this kernel was loaded."""

    def __post_init__(self) -> None:
        _BACKENDS[self.number] = self

    def unavailable(self) -> str | None:
        """Why this machine cannot run it at all, or None if it can."""
        return _load(self.number)

    def cannot_serve(self, request: Request) -> str | None:
        """Why it cannot serve `request`, or None if it can."""
        if request.device not in self.devices:
            return f"it runs on {_join(self.devices)}, not on {request.device}"
        if reason := self.unavailable():
            return reason
        if request.dtype not in self.dtypes:
            return f"it does not take {_dtype_name(request.dtype)}"
        if missing := request.features - self.features:
            return f"it does not support {_join(missing)}"
        return self.refuses(request)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the kernel."""
        reason, function = self.unavailable(), self.kernel[0]
        if function is None:
            raise RuntimeError(f"backend {self.name} is not available: {reason}")
        return function(*args, **kwargs)


def _load(number: int) -> str | None:
    """Makes the kernel of a backend ready, or says why there is none."""
    if number not in _REASONS:
        kernel, _REASONS[number] = _loaded(_BACKENDS[number])
        _BACKENDS[number].kernel.append(kernel)
    return _REASONS[number]


# What torch.compiler.assume_constant_result does, which would import the compiler.
_load._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _loaded(backend: Backend) -> tuple[Callable[..., Any] | None, str | None]:
    """The kernel of `backend`, or the reason why there is none."""
    if "cpu" not in backend.devices and not torch.cuda.is_available():
        return None, "there is no CUDA device"
    if backend.package is not None and importlib.util.find_spec(backend.package) is None:
        return None, f"the package {backend.package} is not installed"
    try:
        return backend.load(), None
    except (ImportError, OSError, RuntimeError) as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        return None, f"importing it failed: {first_line}"


class Operation:
    """A named operation and its backends, fastest first."""

    def __init__(self, name: str, backends: Iterable[Backend]) -> None:
        self.name = name
        self.backends = {backend.name: backend for backend in backends}
        self.last_backend: str | None = None
        """Name of the backend that the latest call ran on; None before the first call."""

    def choose(self, backend: str, request: Request) -> Backend:
        """The backend to serve `request`, recorded in :attr:`last_backend`.

        Args:
            backend: a backend's name, or "auto" for the first that can serve the request.

        Raises:
            UserError: the named backend is unknown or cannot serve the request, or none can.
        """
        chosen = self._first(request) if backend == AUTO else self._forced(backend, request)
        self.last_backend = chosen.name
        return chosen

    def _first(self, request: Request) -> Backend:
        for candidate in self.backends.values():
            if candidate.cannot_serve(request) is None:
                return candidate
        reasons = "; ".join(f"{b.name}: {b.cannot_serve(request)}" for b in self.backends.values())
        raise UserError(f"no {self.name} backend can run this call ({reasons})")

    def _forced(self, name: str, request: Request) -> Backend:
        if name not in self.backends:
            known = _join([AUTO, *self.backends])
            raise UserError(f"{self.name} backend {name!r} is unknown: choose one of {known}")
        if reason := self.backends[name].cannot_serve(request):
            able = [b.name for b in self.backends.values() if b.cannot_serve(request) is None]
            remedy = f"use {_join([AUTO, *able], 'or')}" if able else "no other backend can either"
            raise UserError(f"{self.name} backend {name!r} cannot run here: {reason}; {remedy}")
        return self.backends[name]


def _join(names: Iterable[str], last: str = "and") -> str:
    """Joins words as in: a, b and c. Sets are sorted, sequences keep their order."""
    words = sorted(names) if isinstance(names, set | frozenset) else list(names)
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
