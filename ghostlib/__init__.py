"""Ghosted Layers (arXiv 2605.15491): recover layer-pruned language models in closed form.

Importing this package registers the recovered model classes with transformers, so that
``AutoModelForCausalLM.from_pretrained`` reads what ``recovered.save_pretrained`` wrote.
"""

from ghostlib.boundaries import Boundary, contiguous, runs
from ghostlib.calibration import Calibration, Similarity, calibrate
from ghostlib.corpora import CORPORA, documents, token_windows
from ghostlib.evaluation import gap_closed, generate, perplexity, window_losses
from ghostlib.gram import SingularGramWarning
from ghostlib.models import ARCHITECTURES, load_model
from ghostlib.moments import Moments
from ghostlib.operators import OPERATORS, Operator, antisymmetric_share, solve
from ghostlib.paper import published
from ghostlib.protocol import corpus_perplexity
from ghostlib.results import Results
from ghostlib.ridge import choose_ridge, cross_validate, ridge_path
from ghostlib.scores import paired
from ghostlib.selection import CRITERIA, Selection, select_layers
from ghostlib.surgery import prune, recover
from ghostlib.tasks import zero_shot

__all__ = [
    "ARCHITECTURES",
    "CORPORA",
    "CRITERIA",
    "OPERATORS",
    "Boundary",
    "Calibration",
    "Moments",
    "Operator",
    "Results",
    "Selection",
    "Similarity",
    "SingularGramWarning",
    "antisymmetric_share",
    "calibrate",
    "choose_ridge",
    "contiguous",
    "corpus_perplexity",
    "cross_validate",
    "documents",
    "gap_closed",
    "generate",
    "load_model",
    "paired",
    "perplexity",
    "prune",
    "published",
    "recover",
    "ridge_path",
    "runs",
    "select_layers",
    "solve",
    "token_windows",
    "window_losses",
    "zero_shot",
]
