"""How is a network trained, by the demo and by ``fxexpand train``, and resumed exactly?

``data`` has the images, ``loop`` the steps over them. A run of ``fxexpand train`` is in ``train``: its
``state``, with the ``average`` of the weights, its processes (``distributed``), the files of the state
(``checkpoint``), its log and outcome (``runs``). ``options`` has the options of the commands; the room loads
nothing, so that they are read without torch.
"""
