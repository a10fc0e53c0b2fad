"""Compiles the kernels on first use with NVRTC, which torch brings along, and keeps the result.

No toolkit and no host compiler is needed. Compiled kernels lie in a cache folder under a name made
from everything they depend on; many processes may start at once: one compiles, the others wait.
"""

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from samba_megatron.platform.files import atomic_write

CACHE_VARIABLE = "SAMBA_MEGATRON_KERNEL_CACHE"
"""Environment variable that names another folder for compiled kernels."""


@cache
def nvrtc() -> ctypes.CDLL:
    """The compiler's library: torch's own, or the system's.

    Raises:
        OSError: there is none.
    """
    names = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
    for path in [*_bundled(names), *names]:
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    raise OSError(f"NVRTC, CUDA's run-time compiler, was not found ({', '.join(names)})")


def _bundled(names: Sequence[str]) -> list[str]:
    """Libraries of those names that came with Python packages."""
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
    folders = ("cu13/lib", "cuda_nvrtc/lib")
    candidates = [root / folder / name for root in roots for folder in folders for name in names]
    return [str(path) for path in candidates if path.exists()]


def nvrtc_version() -> tuple[int, int]:
    """The compiler's version."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def knows_architecture(number: int) -> bool:
    """Whether the compiler can make code for an architecture, such as 90 for sm_90."""
    count = ctypes.c_int()
    _check(nvrtc().nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    known = (ctypes.c_int * count.value)()
    _check(nvrtc().nvrtcGetSupportedArchs(known))
    return number in known


def compiled(source: str, options: Sequence[str], what: str) -> bytes:
    """Machine code of `source`, from the cache if an earlier process left it there.

    Args:
        source: CUDA C++ that includes nothing.
        options: the compiler's, with the architecture.
        what: names the kernels in the message that says they are being compiled.

    Raises:
        OSError: there is no compiler.
        RuntimeError: it refused; its messages are in the error.
    """
    key = repr((source, tuple(options), nvrtc_version()))
    name = hashlib.sha256(key.encode()).hexdigest()[:32] + ".cubin"
    folder = _cache_folder()
    path = folder / name
    if path.exists():
        return path.read_bytes()
    with _only_one(folder / f"{name}.lock"):
        if not path.exists():
            print(f"compiling {what}, once; kept in {folder}", file=sys.stderr, flush=True)
            content = compile_source(source, options)[0]
            with atomic_write(path, "wb") as file:
                file.write(content)
        return path.read_bytes()


def compile_source(source: str, options: Sequence[str]) -> tuple[bytes, str]:
    """Compiles `source`; returns its machine code and the compiler's messages.

    Raises:
        OSError: there is no compiler.
        RuntimeError: it refused; its messages are in the error.
    """
    library, program = nvrtc(), ctypes.c_void_p()
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None
        )
    )
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        result = library.nvrtcCompileProgram(program, len(options), arguments)
        messages = _text(program, "ProgramLog").decode(errors="replace").strip("\0\n ")
        if result:
            raise RuntimeError(f"NVRTC refused the kernels: {messages or _reason(result)}")
        return _text(program, "CUBIN"), messages
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(program: ctypes.c_void_p, what: str) -> bytes:
    library, size = nvrtc(), ctypes.c_size_t()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(result: int) -> None:
    if result:
        raise RuntimeError(f"NVRTC failed: {_reason(result)}")


def _reason(result: int) -> str:
    describe = nvrtc().nvrtcGetErrorString
    describe.restype = ctypes.c_char_p
    return str(describe(result).decode())


def _cache_folder() -> Path:
    """Where compiled kernels lie: the user's cache, or a temporary folder if that is read-only."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    chosen = os.environ.get(CACHE_VARIABLE)
    fallback = Path(tempfile.gettempdir()) / f"samba_megatron_kernels_{os.getuid()}"
    for folder in [Path(chosen)] if chosen else [Path(home) / "samba_megatron/kernels", fallback]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise OSError(f"no folder to keep compiled kernels in: set {CACHE_VARIABLE} to a writable one")


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Holds `lock` against other processes, those of other nodes too where the file system can."""
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
