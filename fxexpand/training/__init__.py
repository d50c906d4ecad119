"""How is a network trained, by the demo and by ``fxexpand train``, and resumed exactly?

``data`` has the images, ``loop`` the short loop of the demo that watches ranks. The run of ``fxexpand train``
is in ``train``: its settings, log and outcome in ``runs``, its processes in ``distributed``, what it goes on
from in ``checkpoint``. These load torch.distributed, and are imported by their own names.
"""

from fxexpand.training.data import Batches, Data, batches, cifar, digits, image_folders
from fxexpand.training.loop import History, Schedule, accuracy, fit, logits

__all__ = [
    "Batches",
    "Data",
    "History",
    "Schedule",
    "accuracy",
    "batches",
    "cifar",
    "digits",
    "fit",
    "image_folders",
    "logits",
]
