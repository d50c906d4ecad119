"""Recipes: what an expanded layer is made of while it trains.

A recipe builds the training-time block of a kernel and its initial weights; folding it back needs nothing
of its own, the kernel laws do that. ``recipe`` is what all have in common; ``structure``, ``fixed``,
``factors`` and ``parts`` are what they are made of; ``chain``, ``expandnet``, ``branches`` and ``doconv``
have those of the literature. ``selection`` says which layer gets which recipe.
"""

from fxexpand.recipes.branches import DBB, OREPA, ACNet, MobileOne, RepVGG
from fxexpand.recipes.chain import Chain
from fxexpand.recipes.doconv import DOConv
from fxexpand.recipes.expandnet import ExpandNetCK, ExpandNetCL, ExpandNetFC
from fxexpand.recipes.recipe import INITS, Init, Recipe
from fxexpand.recipes.structure import Branches, Scale, Skip, fold, has_norm

__all__ = [
    "DBB",
    "INITS",
    "OREPA",
    "ACNet",
    "Branches",
    "Chain",
    "DOConv",
    "ExpandNetCK",
    "ExpandNetCL",
    "ExpandNetFC",
    "Init",
    "MobileOne",
    "Recipe",
    "RepVGG",
    "Scale",
    "Skip",
    "fold",
    "has_norm",
]
