"""One forward pass of a model, and whether two of them agree.

``inputs`` and ``outputs`` read the arguments and the results of a call, ``evaluation`` sets the mode and
restores the model afterwards, ``copying`` copies a model, ``finite`` finds NaN and Inf, ``flops`` counts
operations, ``verify`` compares blocks and outputs.
"""
