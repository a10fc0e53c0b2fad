"""The selective scan in CUDA kernels of this project, compiled on first use.

`scan` is the backend and its autograd function, `layout` divides the work and describes the
kernels' arguments, `compiler` and `device` turn the .cuh files into something that runs:
`primitives.cuh` is what they ask of the processor, `common.cuh` what they share, `forward.cuh` the
forward. The backward is described in `lanes.cuh`, and goes on in `staging.cuh` (forward over a
chunk), `tile.cuh` (back over a few steps of it) and `backward.cuh` (over chunks, and its kernels).
"""

from samba_megatron.ops.selective_scan.fused.scan import BACKEND, selective_scan_fused

__all__ = ["BACKEND", "selective_scan_fused"]
