"""``fxexpand rank``."""

from __future__ import annotations

from fxexpand.cli.options import Json, Model, Weights, loaded
from fxexpand.cli.output import show, show_json, stdout_kept, working


def rank(model: Model, weights: Weights = None, as_json: Json = False) -> None:
    """Show the effective rank of every weight of a model."""
    with stdout_kept(), working(f"{model}: singular values"):
        from fxexpand.rank import rank_report

        found = rank_report(loaded(model, weights))
    if as_json:
        show_json({"model": model, **found.to_dict()})
    else:
        show(str(found))
