"""Documents to tokens to indexed datasets to blended batches.

The files, in the order data flow: ``corpus`` gathers documents, ``tokenizer`` trains and loads a
vocabulary, ``jsonl`` reads lines, ``preprocessing`` turns whole corpora into indexed datasets,
``indexed`` writes and checks Megatron's ``.bin``/``.idx`` and ``manifest`` says what they were made
from; ``inspection`` looks into a dataset. ``blend`` reads which sources a run takes, ``catalogue``
and ``identity`` say what they are, ``made_with`` holds their tokenizer against the run's,
``blend_order`` decides whose turn it is, ``sample_index`` orders the samples inside a source,
``samples`` and ``datasets`` make training samples of it all; ``held_out`` cuts fixed evaluation
blocks and ``stream`` serves micro-batches.
"""
