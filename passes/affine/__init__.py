"""Affine interpretation of a graph: which values are one kernel of an earlier value, and which to fuse.

``reader`` reads each node as one of the ``steps``, layers by their ``module_maps``, with the ``constants``,
the ``shapes`` and the ``aliasing`` of the graph; ``maps`` compose and add; ``candidates`` are the ways in
which a value is a map of an earlier one, ``interpretation`` finds them, past changes of layout
(``layouts``) and in-place operators (``writes``), and ``extraction`` chooses those to fuse.
"""
