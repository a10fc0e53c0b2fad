"""The mathematics: selective scan, causal convolution, windowed attention.

Each operation is a package of the same few files: `reference` is readable plain torch, the faster
kernels lie beside it, and `dispatch` chooses among them and remembers which ran. `registry` is what
the dispatches share, `backends` looks at all operations, `cost` counts what they do (and imports no
torch). Activations are [time, batch, channel]. Only torch and kernel packages are imported here.
"""
