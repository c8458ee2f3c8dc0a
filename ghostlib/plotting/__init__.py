"""Plotting: one function for every kind of figure.

From numbers that a notebook computed to `Axes`, with an alternative text made of the numbers.
Nothing here knows a model. An operator looks the same in every notebook: see `style`.
"""

from ghostlib.plotting.results import INCLUSIONS as INCLUSIONS
from ghostlib.plotting.results import abilities as abilities
from ghostlib.plotting.results import against_score as against_score
from ghostlib.plotting.results import against_tokens as against_tokens
from ghostlib.plotting.results import by_start as by_start
from ghostlib.plotting.results import differences as differences
from ghostlib.plotting.results import front as front
from ghostlib.plotting.results import grid as grid
from ghostlib.plotting.results import lattice as lattice
from ghostlib.plotting.results import operator_lattice as operator_lattice
from ghostlib.plotting.results import perplexity_bars as perplexity_bars
from ghostlib.plotting.results import published_and_measured as published_and_measured
from ghostlib.plotting.results import ratio_by_start as ratio_by_start
from ghostlib.plotting.results import ratios as ratios
from ghostlib.plotting.results import removed_layers as removed_layers
from ghostlib.plotting.results import start_by_length as start_by_length
from ghostlib.plotting.results import through_depth as through_depth
from ghostlib.plotting.results import token_depth_heatmap as token_depth_heatmap
from ghostlib.plotting.results import train_and_held_out as train_and_held_out
from ghostlib.plotting.schematic import schematic as schematic
from ghostlib.plotting.style import LOOKS as LOOKS
from ghostlib.plotting.style import Look as Look
from ghostlib.plotting.style import alt_text as alt_text
from ghostlib.plotting.style import clip as clip
from ghostlib.plotting.style import color as color
from ghostlib.plotting.style import describe as describe
from ghostlib.plotting.style import label_points as label_points
from ghostlib.plotting.style import look as look
from ghostlib.plotting.style import plain_numbers as plain_numbers
from ghostlib.plotting.style import save as save
from ghostlib.plotting.style import short as short
from ghostlib.plotting.style import style as style
from ghostlib.plotting.style import use_style as use_style
