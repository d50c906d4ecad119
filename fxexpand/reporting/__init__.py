"""How results are told: the report of a pass, tables, progress bars, HTML pages, figures and files.

``rows`` holds the report of a pass, ``table`` prints plain-text tables, ``progress`` shows bars on stderr,
``files`` writes files whole or not at all, ``html`` and ``figures`` make pages and plots, ``closest``
suggests a name, ``options`` gives fields of dataclasses their help, ``plain`` makes
JSON of them.
"""
