"""Ghosted Layers (arXiv 2605.15491): recover layer-pruned language models in closed form.

Importing this package registers the recovered model classes with transformers, so that
``AutoModelForCausalLM.from_pretrained`` reads what ``recovered.save_pretrained`` wrote. Everything
else is imported on first use.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghostlib.surgery.registration import register_lazily

if TYPE_CHECKING:  # each name once; "as" makes it public for type checkers
    from ghostlib.evaluation.abilities import PROBES as PROBES
    from ghostlib.evaluation.abilities import Profile as Profile
    from ghostlib.evaluation.abilities import abilities as abilities
    from ghostlib.evaluation.cost import cache_bytes as cache_bytes
    from ghostlib.evaluation.cost import count_parameters as count_parameters
    from ghostlib.evaluation.cost import flops as flops
    from ghostlib.evaluation.cost import latency as latency
    from ghostlib.evaluation.generation import generate as generate
    from ghostlib.evaluation.perplexity import corpus_perplexity as corpus_perplexity
    from ghostlib.evaluation.perplexity import gap_closed as gap_closed
    from ghostlib.evaluation.perplexity import perplexity as perplexity
    from ghostlib.evaluation.perplexity import window_losses as window_losses
    from ghostlib.evaluation.tasks import paired as paired
    from ghostlib.evaluation.tasks import zero_shot as zero_shot
    from ghostlib.experiments.results import Results as Results
    from ghostlib.experiments.results import read_results as read_results
    from ghostlib.experiments.run import run_experiment as run_experiment
    from ghostlib.experiments.spec import Specification as Specification
    from ghostlib.linalg.gram import SingularGramWarning as SingularGramWarning
    from ghostlib.models.architectures import decoder_layers as decoder_layers
    from ghostlib.models.architectures import receiver as receiver
    from ghostlib.models.architectures import weight_bytes as weight_bytes
    from ghostlib.models.boundaries import Boundary as Boundary
    from ghostlib.models.boundaries import contiguous as contiguous
    from ghostlib.models.boundaries import runs as runs
    from ghostlib.models.boundaries import spell as spell
    from ghostlib.models.loading import load_model as load_model
    from ghostlib.models.streams import record as record
    from ghostlib.models.streams import tap as tap
    from ghostlib.operators.families import OPERATORS as OPERATORS
    from ghostlib.operators.families import Family as Family
    from ghostlib.operators.paths import RankPath as RankPath
    from ghostlib.operators.paths import choose_rank as choose_rank
    from ghostlib.operators.paths import choose_ridge as choose_ridge
    from ghostlib.operators.paths import choose_ridges as choose_ridges
    from ghostlib.operators.paths import cross_validate as cross_validate
    from ghostlib.operators.paths import rank_path as rank_path
    from ghostlib.operators.paths import ridge_path as ridge_path
    from ghostlib.operators.solve import MassiveActivationWarning as MassiveActivationWarning
    from ghostlib.operators.solve import Operator as Operator
    from ghostlib.operators.solve import antisymmetric_share as antisymmetric_share
    from ghostlib.operators.solve import solve as solve
    from ghostlib.operators.testing import check_family as check_family
    from ghostlib.recovery.recipe import Recipe as Recipe
    from ghostlib.recovery.recover import recover as recover
    from ghostlib.recovery.sequential import fit_sequential as fit_sequential
    from ghostlib.selection.criteria import CRITERIA as CRITERIA
    from ghostlib.selection.criteria import Selection as Selection
    from ghostlib.selection.criteria import select_layers as select_layers
    from ghostlib.selection.trials import Trials as Trials
    from ghostlib.statistics.calibration import Calibration as Calibration
    from ghostlib.statistics.calibration import Similarity as Similarity
    from ghostlib.statistics.calibration import calibrate as calibrate
    from ghostlib.statistics.calibration import calibration_bytes as calibration_bytes
    from ghostlib.statistics.distributed import calibrate_distributed as calibrate_distributed
    from ghostlib.statistics.distributed import shard as shard
    from ghostlib.statistics.features import Regressor as Regressor
    from ghostlib.statistics.moments import Moments as Moments
    from ghostlib.surgery.cut import install as install
    from ghostlib.surgery.cut import prune as prune
    from ghostlib.surgery.inspect import Inspection as Inspection
    from ghostlib.surgery.inspect import inspect as inspect
    from ghostlib.surgery.saving import save as save
    from ghostlib.surgery.testing import check_repaired_model as check_repaired_model
    from ghostlib.text.corpora import CORPORA as CORPORA
    from ghostlib.text.corpora import documents as documents
    from ghostlib.text.corpora import token_windows as token_windows
    from ghostlib.tutorial.paper import published as published


def _origins() -> dict[str, str]:
    """``{public name: its module}``, from the imports above."""
    source = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    block = next(node for node in source.body if isinstance(node, ast.If))
    imports = [line for line in block.body if isinstance(line, ast.ImportFrom)]
    return {line.names[0].name: str(line.module) for line in imports}


if not TYPE_CHECKING:
    _ORIGINS = _origins()
    __all__ = list(_ORIGINS)

    def __getattr__(name: str) -> Any:
        if name not in _ORIGINS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_ORIGINS[name]), name)
        return value

    def __dir__() -> list[str]:
        return __all__


register_lazily()
