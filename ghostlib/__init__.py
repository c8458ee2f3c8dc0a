"""Ghosted Layers (arXiv 2605.15491): recover layer-pruned language models in closed form.

Importing this package registers the recovered model classes with transformers, so that
``AutoModelForCausalLM.from_pretrained`` reads what ``recovered.save_pretrained`` wrote. Everything
else is imported when it is first asked for.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghostlib.surgery.registration import announce

if TYPE_CHECKING:
    from ghostlib.evaluation.abilities import PROBES, Profile, abilities
    from ghostlib.evaluation.cost import cache_bytes, count_parameters, flops, latency, weight_bytes
    from ghostlib.evaluation.generation import generate
    from ghostlib.evaluation.perplexity import (
        corpus_perplexity,
        gap_closed,
        perplexity,
        window_losses,
    )
    from ghostlib.evaluation.tasks import paired, zero_shot
    from ghostlib.experiments.results import Results, read_results
    from ghostlib.experiments.run import run_experiment
    from ghostlib.experiments.spec import Specification
    from ghostlib.linalg.gram import SingularGramWarning
    from ghostlib.models.architectures import decoder_layers, receiver
    from ghostlib.models.boundaries import Boundary, contiguous, runs, spell
    from ghostlib.models.loading import load_model
    from ghostlib.models.streams import record, tap
    from ghostlib.operators.families import FAMILIES as OPERATORS
    from ghostlib.operators.families import Family
    from ghostlib.operators.paths import (
        RankPath,
        choose_rank,
        choose_ridge,
        choose_ridges,
        cross_validate,
        rank_path,
        ridge_path,
    )
    from ghostlib.operators.solve import (
        MassiveActivationWarning,
        Operator,
        antisymmetric_share,
        solve,
    )
    from ghostlib.operators.testing import check_family
    from ghostlib.recovery.recipe import Recipe
    from ghostlib.recovery.recover import recover
    from ghostlib.recovery.sequential import fit_sequential
    from ghostlib.selection.criteria import CRITERIA, Selection, select_layers
    from ghostlib.selection.trials import Trials
    from ghostlib.statistics.calibration import (
        Calibration,
        Similarity,
        calibrate,
        calibration_bytes,
    )
    from ghostlib.statistics.distributed import calibrate_distributed, shard
    from ghostlib.statistics.features import Regressor
    from ghostlib.statistics.moments import Moments
    from ghostlib.surgery.cut import install, prune
    from ghostlib.surgery.inspect import Inspection, inspect
    from ghostlib.surgery.saving import save
    from ghostlib.surgery.testing import check_repaired_model
    from ghostlib.text.corpora import CORPORA, documents, token_windows
    from ghostlib.tutorial.paper import published

__all__ = [
    "CORPORA",
    "CRITERIA",
    "OPERATORS",
    "PROBES",
    "Boundary",
    "Calibration",
    "Family",
    "Inspection",
    "MassiveActivationWarning",
    "Moments",
    "Operator",
    "Profile",
    "RankPath",
    "Recipe",
    "Regressor",
    "Results",
    "Selection",
    "Similarity",
    "SingularGramWarning",
    "Specification",
    "Trials",
    "abilities",
    "antisymmetric_share",
    "cache_bytes",
    "calibrate",
    "calibrate_distributed",
    "calibration_bytes",
    "check_family",
    "check_repaired_model",
    "choose_rank",
    "choose_ridge",
    "choose_ridges",
    "contiguous",
    "corpus_perplexity",
    "count_parameters",
    "cross_validate",
    "decoder_layers",
    "documents",
    "fit_sequential",
    "flops",
    "gap_closed",
    "generate",
    "inspect",
    "install",
    "latency",
    "load_model",
    "paired",
    "perplexity",
    "prune",
    "published",
    "rank_path",
    "read_results",
    "receiver",
    "record",
    "recover",
    "ridge_path",
    "run_experiment",
    "runs",
    "save",
    "select_layers",
    "shard",
    "solve",
    "spell",
    "tap",
    "token_windows",
    "weight_bytes",
    "window_losses",
    "zero_shot",
]


def _origins() -> dict[str, tuple[str, str]]:
    """{public name: (module, its name there)}, as the imports above say to type checkers."""
    source = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    block = next(node for node in source.body if isinstance(node, ast.If))
    return {
        alias.asname or alias.name: (line.module, alias.name)
        for line in block.body
        if isinstance(line, ast.ImportFrom) and line.module
        for alias in line.names
    }


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, attribute = _origins()[name]
        value = globals()[name] = getattr(import_module(module), attribute)
        return value

    def __dir__() -> list[str]:
        return __all__


announce()
