"""The network: layer kinds, the pattern that orders them, and the model assembled from both.

Importing this package costs nothing; its modules import torch and megatron where they need them.
"""
