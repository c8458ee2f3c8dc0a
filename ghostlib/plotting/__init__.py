"""Plotting: one function for every kind of figure.

In come numbers that a notebook computed; out comes the `Axes`, with an alternative text made of the
numbers. Nothing here knows a model. An operator looks the same in every notebook: see `style`.
"""

from ghostlib.plotting.results import (
    abilities,
    against_score,
    against_tokens,
    by_start,
    front,
    grid,
    lattice,
    perplexity_bars,
    published_and_measured,
    ratios,
    removed_layers,
    start_by_length,
    through_depth,
    token_depth_heatmap,
    train_and_held_out,
)
from ghostlib.plotting.schematic import schematic
from ghostlib.plotting.style import (
    LOOKS,
    Look,
    alt_text,
    clip,
    color,
    describe,
    label_points,
    look,
    plain_numbers,
    save,
    short,
    style,
    use_style,
)

__all__ = [
    "LOOKS",
    "Look",
    "abilities",
    "against_score",
    "against_tokens",
    "alt_text",
    "by_start",
    "clip",
    "color",
    "describe",
    "front",
    "grid",
    "label_points",
    "lattice",
    "look",
    "perplexity_bars",
    "plain_numbers",
    "published_and_measured",
    "ratios",
    "removed_layers",
    "save",
    "schematic",
    "short",
    "start_by_length",
    "style",
    "through_depth",
    "token_depth_heatmap",
    "train_and_held_out",
    "use_style",
]
