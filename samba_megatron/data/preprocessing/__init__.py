"""Documents to indexed datasets, at the size of corpora.

``run`` is the whole; in the order data flow: ``inputs`` finds files, ``shards`` cuts them,
``readers`` reads a piece in batches, ``account`` counts what was unusable, ``encoding`` tokenizes,
``shard_writer`` publishes a shard's datasets, ``finalise`` ends with manifest and blend file.
``steps`` and ``executors`` hang this into datatrove, ``stages`` puts its filters in between;
``workspace`` lets an interrupted run go on, ``existing`` protects what lies there.
"""
