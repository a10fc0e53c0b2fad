"""Hugging Face format: export, import, parity, and the code that is shipped with an export.

- ``tensors``: which tensor goes where, and how rows are rearranged;
- ``fields``: ``config.json`` from a model's sizes, and back;
- ``source``: a checkpoint's tensors, one at a time;
- ``shards``: safetensors files, one tensor at a time;
- ``companions``: tokenizer, generation config, model card, code;
- ``export``, ``importing``: the two directions;
- ``parity``, ``parity_sides``: whether an export is the same model;
- ``folders``, ``progress``: what both directions need;
- ``quantizing``, ``quantized``: a quantised export, made and read back;
- ``shipped/``: configuration and model for transformers. Of the package only the evaluation
  imports it.

No process group is started and megatron is not imported, but by parity, in a process of its own.
"""
