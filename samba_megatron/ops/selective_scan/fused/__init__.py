"""The selective scan in CUDA kernels of this project, compiled on first use.

`scan` is the backend and its autograd function, `layout` divides the work and describes the
kernels' arguments, `compiler` and `device` turn the .cuh files into something that runs:
`primitives.cuh` is what they ask of the processor, `common.cuh` what they share, `forward.cuh` and,
in two parts, `staging.cuh` and `backward.cuh` the kernels.
"""

from samba_megatron.ops.selective_scan.fused.scan import BACKEND, selective_scan_fused

__all__ = ["BACKEND", "selective_scan_fused"]
