"""What a trained model can do: perplexity by length, passkey, phonebook, lm-eval's tasks.

- ``subject``: the model under test, from a checkpoint of any layout or a Hugging Face folder;
- ``reading``: long texts in pieces, with memory that does not grow; greedy continuation;
- ``prompts``: the sentences that the retrieval tests are made of, and names for a phonebook;
- ``passkey``, ``phonebook``, ``perplexity``: the suites: their cases, and what comes of them;
- ``runs``: cases over ranks, one JSON line a result, going on after an interruption;
- ``charts``: pictures and tables;
- ``harness``: lm-eval, where it is installed.

The model is the code that is shipped with exports: megatron is not imported.
"""
