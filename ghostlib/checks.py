"""What moments must fulfil before an operator is solved from them."""

import torch

from ghostlib.moments import Moments


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
