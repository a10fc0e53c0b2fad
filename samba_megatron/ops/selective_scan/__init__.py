"""The selective scan of Mamba-1 (arXiv 2312.00752): reference, kernels and dispatch."""

from samba_megatron.ops.selective_scan.dispatch import selective_scan
from samba_megatron.ops.selective_scan.reference import selective_scan_reference

__all__ = ["selective_scan", "selective_scan_reference"]
