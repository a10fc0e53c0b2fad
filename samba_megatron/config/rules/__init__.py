"""The rules that a configuration must keep, a file a concern; ``config/checks.py`` applies them.

A rule is a function that takes a :class:`~samba_megatron.config.rules.situation.Situation` and
yields a sentence for each violation: the dotted field, its value, and the nearest legal values.
"""
