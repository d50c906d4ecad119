"""Recipes: what an expanded layer is made of while it trains.

A recipe builds the training-time block of a kernel and its initial weights; folding it back needs nothing of
its own, the kernel laws do that.
"""

from fxexpand.recipes.chain import Chain
from fxexpand.recipes.recipe import INITS, Init, Recipe
from fxexpand.recipes.structure import Skip, fold, has_norm

__all__ = ["INITS", "Chain", "Init", "Recipe", "Skip", "fold", "has_norm"]
