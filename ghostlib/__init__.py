"""Ghosted Layers (arXiv 2605.15491): recover layer-pruned language models in closed form.

Importing this package registers the recovered model classes with transformers, so that
``AutoModelForCausalLM.from_pretrained`` reads what ``recovered.save_pretrained`` wrote.
"""

from ghostlib.architectures import ARCHITECTURES
from ghostlib.boundaries import Boundary, contiguous, runs
from ghostlib.calibration import calibrate
from ghostlib.checks import MassiveActivationWarning
from ghostlib.collector import Calibration, Similarity
from ghostlib.corpora import CORPORA, documents, token_windows
from ghostlib.cost import cache_bytes, count_parameters, flops, latency, weight_bytes
from ghostlib.distributed import calibrate_distributed, shard
from ghostlib.evaluation import gap_closed, generate, perplexity, window_losses
from ghostlib.experiment import evaluate
from ghostlib.gram import SingularGramWarning
from ghostlib.loading import load_model
from ghostlib.memory import calibration_bytes
from ghostlib.moments import Moments
from ghostlib.operators import OPERATORS, Operator, antisymmetric_share, solve
from ghostlib.paper import published
from ghostlib.protocol import corpus_perplexity
from ghostlib.rank import RankPath, choose_rank, rank_path
from ghostlib.recipe import Recipe
from ghostlib.recovery import recover
from ghostlib.results import Results
from ghostlib.ridge import choose_ridge, cross_validate, ridge_path
from ghostlib.scores import paired
from ghostlib.selection import CRITERIA, Selection, select_layers
from ghostlib.sequential import fit_sequential
from ghostlib.settings import Settings
from ghostlib.surgery import prune
from ghostlib.tasks import zero_shot

__all__ = [
    "ARCHITECTURES",
    "CORPORA",
    "CRITERIA",
    "OPERATORS",
    "Boundary",
    "Calibration",
    "MassiveActivationWarning",
    "Moments",
    "Operator",
    "RankPath",
    "Recipe",
    "Results",
    "Selection",
    "Settings",
    "Similarity",
    "SingularGramWarning",
    "antisymmetric_share",
    "cache_bytes",
    "calibrate",
    "calibrate_distributed",
    "calibration_bytes",
    "choose_rank",
    "choose_ridge",
    "contiguous",
    "corpus_perplexity",
    "count_parameters",
    "cross_validate",
    "documents",
    "evaluate",
    "fit_sequential",
    "flops",
    "gap_closed",
    "generate",
    "latency",
    "load_model",
    "paired",
    "perplexity",
    "prune",
    "published",
    "rank_path",
    "recover",
    "ridge_path",
    "runs",
    "select_layers",
    "shard",
    "solve",
    "token_windows",
    "weight_bytes",
    "window_losses",
    "zero_shot",
]
