"""The operator table: modules, functions, methods and ATen overloads by one name, with their arguments.

``table`` has the names and arguments, ``layers`` the maps of modules.
"""

from fxexpand.passes.operators.table import ARGUMENTS, SYNONYMS, Call, call_of

__all__ = [
    "ARGUMENTS",
    "SYNONYMS",
    "Call",
    "call_of",
]
