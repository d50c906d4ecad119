"""The tests of fxexpand; they mirror ``fxexpand/`` and ``passes/``."""
