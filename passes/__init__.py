"""The compiler passes of fxexpand; import them as ``fxexpand.passes``."""
