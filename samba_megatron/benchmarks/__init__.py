"""How fast this code is on a machine, beside others' code for the same: kernels, layers, steps."""
