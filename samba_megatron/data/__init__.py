"""Documents to tokens to indexed datasets to blended batches.

The files, in the order data flows: ``corpus`` gathers documents, ``tokenizer`` trains and loads a
vocabulary, ``jsonl`` reads documents in blocks, ``encoding`` turns a block into tokens, ``indexed``
writes and checks Megatron's ``.bin``/``.idx``, ``preprocess`` runs these over a whole corpus and
``manifest`` remembers what was done; ``datasets`` and ``epochs`` blend indexed datasets into
training samples, ``held_out`` cuts fixed evaluation blocks and ``stream`` serves micro-batches.
"""
