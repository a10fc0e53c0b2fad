"""The selective scan in CUDA kernels of this project, compiled on first use.

`scan` is the backend and its autograd function, `layout` divides the work and describes the
kernels' arguments, `compiler` and `device` turn the .cuh files into something that runs:
`primitives.cuh` is what they ask of the processor, `common.cuh` what they share, `forward.cuh` the
forward. The backward is there in two algorithms (`layout.Backward`) over `lanes.cuh`: `staging.cuh`
and `backward.cuh`, which are used, and `pairs_staging.cuh`, `pairs_tile.cuh` and
`pairs_backward.cuh`, which issue fewer instructions and have yet to be measured beside them.
"""

from samba_megatron.ops.selective_scan.fused.scan import BACKEND, selective_scan_fused

__all__ = ["BACKEND", "selective_scan_fused"]
