"""Samba-Megatron: distributed pre-training of Samba (arXiv 2406.07522) on NVIDIA Megatron-Core."""

__version__ = "0.1.0"
