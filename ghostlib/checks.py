"""What moments must fulfil before an operator is solved from them."""

import warnings
from collections.abc import Mapping

import torch

from ghostlib.boundaries import Boundary
from ghostlib.moments import Moments

_FEW = 0.01  # of all tokens
_NOT_LEAST_SQUARES = ("identity", "magnitude", "linearpatch-d", "linearpatch-r")


class MassiveActivationWarning(UserWarning):
    """A few tokens own the objective: what is best for it may harm all other tokens."""


def warn_of_massive_activations(moments: Mapping[Boundary, Moments], operator: str) -> None:
    """Warn of boundaries whose objective belongs to less than one token in a hundred.

    `Moments.effective_tokens` tells it from the moments alone, before anything is evaluated.
    """
    if operator in _NOT_LEAST_SQUARES:
        return
    for boundary, found in moments.items():
        if found.width != found.out_width and not found.of_change:
            continue  # the solver will refuse them
        share = found.effective_tokens
        if found.tokens > 0 and share < _FEW * found.tokens:
            warnings.warn(
                f"boundary {boundary}: {share:.0f} of {found.tokens} tokens own the squared error "
                f"that {operator} minimises (massive activations born in the removed layers), so "
                "the others may fare worse than without repair: use operator="
                "'two-branch-relative', which weighs each token by 1/|y|, or operator='auto'",
                MassiveActivationWarning,
                stacklevel=3,
            )


def check_moments(moments: Moments) -> None:
    """Refuse moments that no operator can be solved from.

    Raises:
        ValueError: no tokens, another dtype than float64, or a Gram matrix that is not symmetric
            or not finite.
    """
    if moments.tokens < 1 or moments.weight <= 0:
        raise ValueError("these moments hold no tokens: call update(X_pre, X_post) first")
    G, B = moments.G, moments.B
    if G.dtype != torch.float64 or B.dtype != torch.float64:
        raise ValueError(
            f"moments must be float64, got G in {G.dtype} and B in {B.dtype}: "
            f"forming X'X squares the condition number, which float32 cannot hold"
        )
    asymmetry = float((G - G.T).abs_().max())
    if not asymmetry <= 1e-9 * float(G.diagonal().abs().max()) or not torch.isfinite(B).all():
        raise ValueError(
            f"moments must be finite with a symmetric Gram matrix, "
            f"got max|G - G'| = {asymmetry:.2g}: were the sums edited by hand?"
        )


def check_square(moments: Moments, what: str) -> None:
    """Refuse moments of two different widths for ``what``, which needs an identity.

    Raises:
        ValueError: ``p != q``.
    """
    if moments.width != moments.out_width:
        raise ValueError(
            f"{what} needs X and Y of one width, got {moments.width} and {moments.out_width}; "
            f"solve(moments, 'ghost', around='zero') and 'affine' fit any pair of widths"
        )


def check_alike(train: Moments, held_out: Moments) -> None:
    """Refuse to judge a fit on held-out moments of another kind.

    Raises:
        ValueError: another width or another regressor.
    """
    if held_out.B.shape != train.B.shape:
        raise ValueError(
            f"training and held-out moments must have one width, "
            f"got {tuple(train.B.shape)} and {tuple(held_out.B.shape)}"
        )
    if held_out.regressor != train.regressor:
        raise ValueError(
            f"training and held-out moments must have one regressor, "
            f"got {train.regressor} and {held_out.regressor}"
        )
