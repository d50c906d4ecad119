"""How results are told: the report of a pass, tables, progress bars, HTML pages, figures and files.

``rows`` holds the report of a pass and makes JSON of it, ``table`` prints plain-text tables, ``progress``
shows bars on stderr, ``files`` writes files whole or not at all, ``html`` and ``figures`` make pages and
plots, ``options`` gives fields of dataclasses their help.
"""
