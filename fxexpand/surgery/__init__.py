"""Changes of whole models: every step is planned before the first edit, and undone on an error.

``expand`` and ``fuse`` are what people call, ``factorize`` replaces layers by pairs of low rank. ``sites``
finds the weights of linear maps and ``uses`` how a forward uses them, ``fold`` makes an expansion one weight
again, ``placement`` and ``module_tree`` put fused layers into a tree of modules, ``transaction`` carries a
plan out.
"""
