"""Recipes: the blocks that replace layers in training.

A recipe builds the training-time block of a kernel with its initial weights; the kernel laws fold it back.
``recipe`` has the interface; ``structure``, ``fixed``, ``factors`` and ``parts`` have the parts of blocks;
``chain``, ``expandnet``, ``branches`` and ``doconv`` have the recipes of the literature. ``selection`` says
which layer gets which recipe.
"""

from fxexpand.recipes.branches import DBB, OREPA, ACNet, MobileOne, RepVGG
from fxexpand.recipes.chain import Chain
from fxexpand.recipes.doconv import DOConv
from fxexpand.recipes.expandnet import ExpandNetCK, ExpandNetCL, ExpandNetFC
from fxexpand.recipes.recipe import INITS, Init, Recipe
from fxexpand.recipes.structure import Branches, Scale, Skip, fold, has_norm

__all__ = ["DBB", "INITS", "OREPA", "ACNet", "Branches", "Chain", "DOConv", "ExpandNetCK", "ExpandNetCL"]
__all__ += ["ExpandNetFC", "Init", "MobileOne", "Recipe", "RepVGG", "Scale", "Skip", "fold", "has_norm"]
