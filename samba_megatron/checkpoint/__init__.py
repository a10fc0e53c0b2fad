"""Sharded checkpoints: written whole or not at all, checked when read, loadable at any layout.

- :mod:`~samba_megatron.checkpoint.folder`: names, the ``latest`` pointer, publishing, retention
  (standard library only);
- :mod:`~samba_megatron.checkpoint.manifest`: what a published checkpoint says of itself, and
  whether that is still true (standard library only);
- :mod:`~samba_megatron.checkpoint.inspect`: the content of a checkpoint without a model;
- :mod:`~samba_megatron.checkpoint.reshard`: a checkpoint rewritten, likewise;
- :mod:`~samba_megatron.checkpoint.state`: what is saved, as one sharded state dict;
- :mod:`~samba_megatron.checkpoint.match`: whether a checkpoint fits a model;
- :mod:`~samba_megatron.checkpoint.writer`: writing in a forked process;
- :mod:`~samba_megatron.checkpoint.store`: what the training loop calls.
"""
