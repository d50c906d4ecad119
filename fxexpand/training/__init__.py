"""How is a network trained, by the demo and by ``fxexpand train``, and resumed exactly?

``data`` has the images, ``loop`` the loop over them. The run of ``fxexpand train`` is in ``train``: its log
and outcome in ``runs``, its processes in ``distributed``, the state from which it goes on in ``checkpoint``.
``options`` has the options of the commands; the room loads nothing, so that they are read without torch.
"""
