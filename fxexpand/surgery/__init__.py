"""Changes of whole models: every step is planned before the first edit, and undone on an error.

``expand`` and ``fuse`` are what people call, ``factorize`` replaces layers by pairs of low rank, and ``fold``
gives the state dict of a fused model. Their plans come from ``fxexpand.passes``, and ``transaction`` carries
them out.

``fuse_plan`` plans one round of ``fuse`` over a tree of modules, and ``graph_plan`` the folds of one graph in
it: ``module_tree`` tells which modules make its nodes, ``placement`` which of them a new layer replaces,
``module_graphs`` which become graphs, and ``other_calls`` which folds other arguments or sizes forbid.
"""
