"""The collector: turns streams, as they pass, into moments and similarities."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ghostlib.boundaries import Boundary
from ghostlib.features import Regressor, observe
from ghostlib.models import fingerprint, hidden_size, stream_norm
from ghostlib.moments import Moments
from ghostlib.nested import contains, part
from ghostlib.placement import input_device
from ghostlib.streams import Stream


class Similarity(NamedTuple):
    """How alike the stream is at both ends of a boundary, averaged over tokens.

    ``cosine`` is the mean over tokens of ``cos(x_start, x_stop)``, taken over channels;
    ``angular`` the mean of ``arccos(cos) / pi``, from 0 (same direction) to 1 (opposite).
    """

    cosine: float
    angular: float


class Calibration(dict[Boundary, Moments]):
    """What one pass collected: ``{Boundary: Moments}``, and the similarities of each boundary.

    Moments of the stream of boundaries with the same start share one Gram matrix in memory.

    Attributes:
        similarities: ``{Boundary: Similarity}``.
        mlp: ``{Boundary: Moments}`` for `replaceme`, with the output of the last MLP before the
            boundary in place of ``X``; filled by ``calibrate(…, mlp=True)``.
        features: ``{(regressor, Boundary): Moments}`` of features of the stream, those that were
            collected and those that `of` has cut out of them.
        model: fingerprint of the model the activations come from.
        tokens: number of tokens used.
    """

    def __init__(self, model: str) -> None:
        super().__init__()
        self.similarities: dict[Boundary, Similarity] = {}
        self.mlp: dict[Boundary, Moments] = {}
        self.features: dict[tuple[str, Boundary], Moments] = {}
        self.model = model
        self.tokens = 0

    def of(self, regressor: str) -> dict[Boundary, Moments]:
        """The moments of one regressor: ``"stream"``, ``"mlp"``, or features of the stream.

        Those of some of the features that were collected with the same weight are part of what was.

        Raises:
            ValueError: the pass did not collect them.
        """
        if regressor in ("stream", "mlp"):
            return self if regressor == "stream" else self.mlp
        asked = Regressor.parse(regressor)
        for (name, boundary), moments in list(self.features.items()):
            known = Regressor.parse(name)
            if (regressor, boundary) not in self.features and contains(known, asked):
                places = [known.features.index(feature) for feature in asked.features]
                self.features[regressor, boundary] = part(moments, places)
        found = {b: moments for (name, b), moments in self.features.items() if name == regressor}
        if not found:
            raise ValueError(
                f"no moments of {regressor} were collected: "
                f"calibrate(…, regressors=[{regressor!r}])"
            )
        return found


class _Open(NamedTuple):
    """A stream waiting for the boundaries that start there, one entry a sequence of the batch."""

    sequences: list[Stream] | None
    directions: Tensor
    mlp: list[Stream] | None
    hidden: Tensor | None  # all tokens, for features that look back


def _add_grams(grams: dict[int, Tensor], index: int, sequences: list[Stream] | None) -> None:
    if sequences:
        gram = torch.stack([x.gram() for x in sequences]).sum(0)
        grams[index] = grams[index] + gram if index in grams else gram


def _without_gram(moments: Moments) -> Moments:
    """Boundaries with the same start share a Gram matrix; one of their own would stay zero."""
    moments.G = torch.empty(0)
    return moments


class Collector:
    """Turns streams, as they pass, into moments and similarities."""

    def __init__(
        self,
        model: PreTrainedModel,
        asked: Iterable[Boundary],
        moments: bool,
        mlp: bool,
        regressors: Iterable[Regressor] = (),
    ) -> None:
        self.boundaries = list(asked)
        self.moments = moments
        self.mlps = {b.start for b in self.boundaries if b.start > 0 and moments and mlp}
        self.indices = {index for boundary in self.boundaries for index in boundary}
        self.last_stop: dict[int, int] = {}  # where the stream of each start is no longer needed
        for start, stop in self.boundaries:
            self.last_stop[start] = max(stop, self.last_stop.get(start, stop))
        self.calibration = Calibration(fingerprint(model))
        width = hidden_size(model)
        # A stream may pass several devices; all that is made of it is made in one place.
        self.home = input_device(model)
        if self.home.type == "mps":  # which has no float64
            self.home = torch.device("cpu")
        for boundary in self.boundaries if moments else ():
            about: dict[str, Any] = {
                "boundary": boundary,
                "model": self.calibration.model,
                "device": self.home,
            }
            self.calibration[boundary] = _without_gram(Moments(width, **about))
            if boundary.start in self.mlps:
                mlp_moments = Moments(width, regressor="mlp", **about)
                self.calibration.mlp[boundary] = _without_gram(mlp_moments)
            for regressor in regressors:
                # Known by the name it was asked for under, whatever this model's norm is.
                self.calibration.features[str(regressor), boundary] = Moments(
                    len(regressor.features) * width,
                    width,
                    regressor=str(suited(model, regressor)),
                    **about,
                )
        self.grams: dict[int, Tensor] = {}
        self.mlp_grams: dict[int, Tensor] = {}
        self.cosines = dict.fromkeys(self.boundaries, 0.0)
        self.angles = dict.fromkeys(self.boundaries, 0.0)

    def begin(self, first: int, used: Tensor, real: Tensor | None = None) -> None:
        """Prepare for the batch whose first window has number ``first``.

        Args:
            used: (windows, length) tokens to learn from. real: all that are no padding.
        """
        self.first, self.used = first, used
        self.real = used if real is None else real
        self.open: dict[int, _Open] = {}
        self.heard: dict[int, list[Stream]] = {}
        self.calibration.tokens += int(used.sum())

    def on_stream(self, index: int, hidden: Tensor) -> None:
        """Close the boundaries that stop at ``index``, then open those that start there."""
        if not torch.isfinite(hidden).all():
            bad = (~torch.isfinite(hidden)).flatten(1).any(1).nonzero()[0].item()
            raise ValueError(
                f"the input of layer {index} has NaN or infinite activations in window "
                f"{self.first + bad}: use a wider dtype (bfloat16 or float32) or another window"
            )
        hidden = hidden.to(self.home)
        stream = _Open(
            self._sequences(hidden) if self.moments else None,
            nn.functional.normalize(hidden[self.used.to(self.home)].float(), dim=-1),
            self.heard.pop(index, None),
            hidden if self.calibration.features else None,
        )
        for boundary in self.boundaries:
            if boundary.stop == index:
                self._close(boundary, self.open[boundary.start], stream)
        if index in self.last_stop:
            self.open[index] = stream
            _add_grams(self.grams, index, stream.sequences)
            _add_grams(self.mlp_grams, index, stream.mlp)
        self.open = {s: waiting for s, waiting in self.open.items() if self.last_stop[s] > index}

    def on_mlp(self, start: int, output: Tensor) -> None:
        """Keep what the MLP before layer ``start`` returned until the stream gets there."""
        # OPT flattens the batch before its MLP.
        self.heard[start] = self._sequences(output.view(*self.used.shape, -1).to(self.home))

    def _sequences(self, hidden: Tensor) -> list[Stream]:
        used = self.used.to(self.home)
        return [Stream.of(h[u]) for h, u in zip(hidden, used, strict=True) if u.any()]

    def _close(self, boundary: Boundary, before: _Open, after: _Open) -> None:
        cosine = torch.linalg.vecdot(before.directions, after.directions).clamp(-1, 1)
        self.cosines[boundary] += float(cosine.double().sum())
        self.angles[boundary] += float(cosine.double().arccos().sum() / torch.pi)
        for x, y in zip(before.sequences or (), after.sequences or (), strict=True):
            self.calibration[boundary].add_sequence(x, y)
        if before.mlp is not None and boundary in self.calibration.mlp:
            for F, x, y in zip(
                before.mlp, before.sequences or (), after.sequences or (), strict=True
            ):
                target = Stream.of(F.values + (y.values - x.values))
                self.calibration.mlp[boundary].add_sequence(F, target)
        for (_, known), moments in self.calibration.features.items():
            if known == boundary and before.hidden is not None and after.hidden is not None:
                used, real = self.used.to(self.home), self.real.to(self.home)
                for x, y, r, u in zip(before.hidden, after.hidden, real, used, strict=True):
                    if u.any():
                        observe(moments, x, y, r, u)

    def result(self) -> Calibration:
        """The finished `Calibration`, its moments on the CPU."""
        calibration = self.calibration
        if calibration.tokens == 0:
            raise ValueError("the attention mask and skip_leading leave no token to calibrate with")
        for collected, grams in ((calibration, self.grams), (calibration.mlp, self.mlp_grams)):
            shared = {start: gram.cpu() for start, gram in grams.items()}
            for boundary, moments in collected.items():
                moments = collected[boundary] = moments.to("cpu")
                moments.G = shared[boundary.start]  # by all boundaries with the same start
        for key, moments in calibration.features.items():
            calibration.features[key] = moments.to("cpu")
        for boundary in self.boundaries:
            calibration.similarities[boundary] = Similarity(
                self.cosines[boundary] / calibration.tokens,
                self.angles[boundary] / calibration.tokens,
            )
        return calibration


def suited(model: PreTrainedModel, regressor: Regressor) -> Regressor:
    """``regressor`` with the normalised features that the layers of ``model`` read.

    Raises:
        ValueError: it asks for a normalised stream, and they read the stream itself.
    """
    return regressor.resolve(stream_norm(model)) if regressor.normalised else regressor
