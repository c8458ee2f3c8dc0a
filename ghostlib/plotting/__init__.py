"""Figures: one function each, from plain data to the `Axes` it drew on.

In come numbers that a notebook computed; out comes a picture. Nothing here knows a model. An
operator has the same colour in every notebook: take it from `color`.
"""

from ghostlib.plotting.figures import (
    COLORS,
    against_tokens,
    color,
    lattice,
    perplexity_bars,
    plain_numbers,
    published_and_measured,
    short,
    through_depth,
    token_depth_heatmap,
    train_and_held_out,
    use_style,
)
from ghostlib.plotting.layers import against_score, grid, removed_layers, start_by_length
from ghostlib.plotting.repairs import by_start, ratios

__all__ = [
    "COLORS",
    "against_score",
    "against_tokens",
    "by_start",
    "color",
    "grid",
    "lattice",
    "perplexity_bars",
    "plain_numbers",
    "published_and_measured",
    "ratios",
    "removed_layers",
    "short",
    "start_by_length",
    "through_depth",
    "token_depth_heatmap",
    "train_and_held_out",
    "use_style",
]
