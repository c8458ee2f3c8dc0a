"""The rules that every family of repairs keeps, and a check of one family against all of them.

In the spirit of scikit-learn's ``check_estimator``: whoever adds a family runs one call, and the
message names the rule that it breaks. A rule is a function of a `Trial`, the family solved on small
random streams in which a token is large, the change is partly linear and a bias is left.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter, methodcaller
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghostlib.common import Registry, checked
from ghostlib.models.placement import check_device
from ghostlib.operators.families import Family
from ghostlib.operators.solve import Operator, solve_quietly
from ghostlib.statistics.moments import Moments

_GIANT = 1e6
_CLOSE = 1e-6


class Tokens(NamedTuple):
    """One sequence on both sides of a gap.

    Attributes:
        x: (tokens, C) the stream before it.
        y: (tokens, C) the stream after it.
        hidden: (tokens, I) what the down-projection before the gap reads.
        output: (tokens, C) what it returns, a part of ``x``.
    """

    x: Tensor
    y: Tensor
    hidden: Tensor
    output: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Tokens":
        """The same function of each."""
        return Tokens(*map(function, self))

    def times(self, factor: float | Tensor) -> "Tokens":
        """All of them so much larger; (tokens, 1) for a factor of each token."""
        return self.map(lambda part: part * factor)

    def turned(self, R: Tensor) -> "Tokens":
        """The stream in another basis, ``x R``."""
        return self._replace(x=self.x @ R, y=self.y @ R, output=self.output @ R)


@dataclass(frozen=True)
class Trial:
    """A family with its options, to be solved on random streams.

    Attributes:
        family: which is on trial.
        options: for its solver.
        contains: families whose sets are parts of its own.
        seed: of the streams.
        device: of the streams and the moments.
        width: of the streams, C, a multiple of 4 for the sake of Hadamard matrices.
    """

    family: Family
    options: Mapping[str, Any] = field(default_factory=dict)
    contains: tuple[Family, ...] = ()
    seed: int = 0
    device: torch.device | str = "cpu"
    width: int = 8

    @property
    def hidden(self) -> int:
        """Width of the MLP."""
        return self.width + 2

    def sequences(self, count: int = 3, tokens: int = 24) -> list[Tokens]:
        """Random sequences; the same ones for one seed."""
        generator = torch.Generator().manual_seed(self.seed)
        normal = partial(torch.randn, generator=generator, dtype=torch.float64)
        mix, change, normalised = (normal(self.width, self.width) for _ in range(3))
        down, mean, shift = normal(self.hidden, self.width), normal(self.width), normal(self.width)
        made = []
        for _ in range(count):
            hidden = normal(tokens, self.hidden)
            output = hidden @ down / self.hidden
            x = normal(tokens, self.width) @ mix + mean + output
            x[0] *= 20
            n = x / x.square().mean(1, keepdim=True).sqrt()
            y = x + (x @ change + n @ normalised + shift) / 2 + normal(tokens, self.width)
            made.append(Tokens(x, y, hidden, output).map(lambda part: part.to(self.device)))
        return made

    def moments(self, *sequences: Tokens, weight: Tensor | None = None) -> Moments:
        """What the family is solved from."""
        made = Moments(
            self.width, regressor=self.family.regressor, hidden=self.hidden, device=self.device
        )
        for tokens in sequences:
            made.update(tokens.x, tokens.y, weight, hidden=tokens.hidden, output=tokens.output)
        return made

    def solve(self, moments: Moments) -> Operator:
        """The family's best."""
        return solve_quietly(moments, self.family, **self.options)

    def fit(self, *sequences: Tokens) -> Operator:
        """`solve` of the `moments` of these sequences."""
        return self.solve(self.moments(*sequences))

    def hard_cases(self) -> dict[str, list[Tokens]]:
        """Streams that leave something undetermined, or out of proportion."""
        plain = self.sequences()
        first = plain[0]
        large = torch.ones_like(first.x[:, :1])
        large[1] = _GIANT
        massive = first.y.clone()
        massive[1, 2] = _GIANT
        dead = torch.ones(self.width, dtype=torch.float64, device=self.device)
        dead[1] = 0.0
        return {
            "many tokens": plain,
            "one token": [first.map(lambda part: part[:1])],
            "fewer tokens than channels": [first.map(lambda part: part[: self.width - 1])],
            "tokens that are all alike": [first.map(lambda part: part[:1].repeat(9, 1))],
            "a dead channel": [tokens.turned(torch.diag(dead)) for tokens in plain],
            "a dead channel that comes to life": [
                tokens.turned(torch.diag(dead))._replace(y=tokens.y) for tokens in plain
            ],
            "a giant": [first.times(large), *plain[1:]],
            "a giant that is born": [first._replace(y=massive), *plain[1:]],
        }

    @property
    def cuts(self) -> bool:
        """Whether a sequence may be cut or shuffled: not where the token before is read."""
        return not self.family.regressor.reads_previous


def repaired(operator: Operator, tokens: Tokens) -> Tensor:
    """What the stream before the gap becomes."""
    return operator.apply(tokens.x, hidden=tokens.hidden, output=tokens.output)


def _assert_close(found: Tensor, expected: Tensor, tolerance: float = _CLOSE) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


def _assert_same_repair(one: Operator, other: Operator, tokens: Iterable[Tokens]) -> None:
    for sequence in tokens:
        _assert_close(repaired(other, sequence), repaired(one, sequence))


# ---------------------------------------------------------------- the rules


def zero_change(trial: Trial) -> None:
    """Where the removed layers did nothing, the repair does nothing."""
    still = [tokens._replace(y=tokens.x) for tokens in trial.sequences()]
    operator = trial.fit(*still)
    for tokens in still:
        _assert_close(repaired(operator, tokens), tokens.x)
    assert float(operator.M.abs().max()) < _CLOSE, "M is not zero"


def nesting(trial: Trial) -> None:
    """Its training error is not above that of any set it contains."""
    for case, sequences in trial.hard_cases().items():
        moments = trial.moments(*sequences)
        error = trial.solve(moments).residual
        slack = 1e-9 * (moments.pruned_error + float(moments.G.trace()))
        if trial.family.least_squares:
            assert error <= moments.pruned_error + slack, f"worse than no repair on {case}"
        for inner in trial.contains:
            assert inner.regressor.weight == trial.family.regressor.weight, "weighted otherwise"
            smaller = Trial(inner, seed=trial.seed, device=trial.device).fit(*sequences)
            assert error <= smaller.residual + slack, f"worse than {inner} on {case}"


def error_formula(trial: Trial) -> None:
    """Its error from moments is that on the activations themselves, weight by weight."""
    weigh = trial.family.regressor.weight.of
    for case, sequences in trial.hard_cases().items():
        moments = trial.moments(*sequences)
        operator = trial.solve(moments)
        error = size = 0.0
        for tokens in sequences:
            weight = weigh(tokens.y.norm(dim=1))
            missed = (repaired(operator, tokens) - tokens.y).square().sum(1)
            error += float(weight @ missed)
            size += float(weight @ (tokens.x.square() + tokens.y.square()).sum(1))
        for claimed in (moments.error(operator), operator.residual):
            assert abs(claimed - error) <= 1e-9 * size + _CLOSE * error, f"{claimed} on {case}"


def freedom(trial: Trial) -> None:
    """`dof` is the dimension of its set: the rank of the derivative of (M, b) by ``y``."""
    trial = replace(trial, width=4)  # quicker, and a dimension is a dimension
    (tokens,) = trial.sequences(1)
    operator, step = trial.fit(tokens), 1e-4

    def solution(direction: Tensor) -> Tensor:
        fit = trial.fit(tokens._replace(y=tokens.y + direction))
        return fit.M.flatten() if fit.bias is None else torch.cat([fit.M.flatten(), fit.bias])

    generator = torch.Generator().manual_seed(trial.seed)
    slopes = []
    for _ in range(operator.dof + 4):
        direction = torch.randn(tokens.y.shape, generator=generator, dtype=torch.float64)
        direction = step * direction.to(tokens.y)
        slopes.append((solution(direction) - solution(-direction)) / step)
    singular = torch.linalg.svdvals(torch.stack(slopes))
    rank = int((singular > max(1e-5 * float(singular[0]), 1e-8)).sum())
    assert rank == operator.dof, f"dof says {operator.dof}, its solutions have {rank} dimensions"


def scale(trial: Trial) -> None:
    """A stream of another scale gives the same repair, however small or large."""
    sequences = trial.sequences()
    operator = trial.fit(*sequences)
    for factor in (1e-20, 1e-3, 1e20):
        scaled = [tokens.times(factor) for tokens in sequences]
        other = trial.fit(*scaled)
        for tokens, same in zip(scaled, sequences, strict=True):
            _assert_close(repaired(other, tokens) / factor, repaired(operator, same))


def token_order(trial: Trial) -> None:
    """Neither the order of sequences nor, where none reads the token before, of tokens counts."""
    sequences = trial.sequences()
    changed = sequences[::-1]
    if trial.cuts:
        changed = [tokens.map(lambda part: part.flip(0)) for tokens in changed]
    _assert_same_repair(trial.fit(*sequences), trial.fit(*changed), sequences)


def repetition(trial: Trial) -> None:
    """All tokens twice, or each with twice the weight, change nothing; nor do whole weights."""
    sequences = trial.sequences()
    operator = trial.fit(*sequences)
    _assert_same_repair(operator, trial.fit(*sequences, *sequences), sequences)
    double = torch.full((len(sequences[0].x),), 2.0, device=trial.device)
    doubled = trial.moments(*sequences, weight=double)
    _assert_same_repair(operator, trial.solve(doubled), sequences)
    if trial.cuts:
        times = torch.arange(len(double), device=trial.device) % 3
        copied = [tokens.map(lambda part: part.repeat_interleave(times, 0)) for tokens in sequences]
        weighted = trial.moments(*sequences, weight=times.double())
        _assert_same_repair(trial.fit(*copied), trial.solve(weighted), sequences)


def splitting(trial: Trial) -> None:
    """Tokens may come in parts, and moments from several places, where none reads the one before.

    Families whose statistic is an average over sequences, as LinearPatch's, are exempt.
    """
    sequences = trial.sequences()
    parts = sequences
    if trial.cuts:
        halves = [slice(None, 9), slice(9, None)]
        parts = [tokens.map(itemgetter(half)) for tokens in sequences for half in halves]
    operator = trial.fit(*sequences)
    _assert_same_repair(operator, trial.fit(*parts), sequences)
    separate = [trial.moments(part) for part in parts]
    together = sum(separate[1:], start=separate[0])
    _assert_same_repair(operator, trial.solve(together), sequences)


def channel_order(trial: Trial) -> None:
    """Channels in another order give the same repair in that order."""
    _in_another_basis(trial, torch.eye(trial.width)[[2, 0, 3, 1, *range(4, trial.width)]])


def rotation(trial: Trial) -> None:
    """A rotated stream gives the rotated repair."""
    generator = torch.Generator().manual_seed(trial.seed)
    square = torch.randn(trial.width, trial.width, generator=generator, dtype=torch.float64)
    _in_another_basis(trial, torch.linalg.qr(square).Q)


def _in_another_basis(trial: Trial, R: Tensor) -> None:
    R = R.to(trial.device, torch.float64)
    sequences = trial.sequences()
    turned = [tokens.turned(R) for tokens in sequences]
    operator, other = trial.fit(*sequences), trial.fit(*turned)
    for tokens, same in zip(turned, sequences, strict=True):
        _assert_close(repaired(other, tokens) @ R.T, repaired(operator, same))


def dead_channel(trial: Trial) -> None:
    """A channel that is zero on both sides stays zero."""
    sequences = trial.hard_cases()["a dead channel"]
    operator = trial.fit(*sequences)
    for tokens in sequences:
        y = repaired(operator, tokens)
        assert float(y[:, 1].abs().max()) <= _CLOSE * float(y.abs().max()), "it comes to life"


def unseen(trial: Trial) -> None:
    """What no token has shown is left alone: a silent stream gives ``M = 0``."""
    silent = [
        tokens.times(0.0)._replace(y=tokens.y - tokens.y.mean(0)) for tokens in trial.sequences()
    ]
    operator = trial.fit(*silent)
    assert not operator.M.any(), "M is not zero"


def finite(trial: Trial) -> None:
    """Numbers are finite whatever the tokens leave undetermined, and of moderate size."""
    for case, sequences in trial.hard_cases().items():
        operator = trial.fit(*sequences)
        bias = torch.zeros(1) if operator.bias is None else operator.bias
        for values in (operator.M, bias, torch.tensor(operator.residual)):
            assert torch.isfinite(values).all(), f"not finite on {case}"
        seen = torch.cat([tokens.y for tokens in sequences]).abs().max()
        for tokens in sequences:
            assert repaired(operator, tokens).abs().max() < 1e3 * seen, f"exploded on {case}"


def precision(trial: Trial) -> None:
    """Activations of any precision are summed in float64, and repaired in their own."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        short = [tokens.map(methodcaller("to", dtype)) for tokens in trial.sequences()]
        exact = [tokens.map(Tensor.double) for tokens in short]
        operator = trial.fit(*short)
        assert operator.M.dtype == torch.float64, f"M is {operator.M.dtype}"
        _assert_same_repair(operator, trial.fit(*exact), exact)
        for tokens, same in zip(short, exact, strict=True):
            y = repaired(operator, tokens)
            assert y.dtype == dtype, f"{dtype} became {y.dtype}"
            expected = repaired(operator, same)
            rounding = (
                64 * torch.finfo(dtype).eps * float(same.x.abs().max() + expected.abs().max())
            )
            assert float((y.double() - expected).abs().max()) <= rounding, f"not exact in {dtype}"


def moments_kept(trial: Trial) -> None:
    """Solving leaves the moments as they are, on their device, and is the same every time."""
    moments = trial.moments(*trial.sequences())
    before = {name: values.clone() for name, values in moments.tensors().items()}
    first, second = trial.solve(moments), trial.solve(moments)
    for name, values in moments.tensors().items():
        assert torch.equal(values, before[name]), f"{name} was changed"
    assert torch.equal(first.M, second.M), "solved twice, it differs"
    assert first.M.device == moments.G.device, f"M is on {first.M.device}"


Rule = Callable[[Trial], None]
RULES: Registry[Rule] = Registry("rule")
"""Every rule by name."""
for _rule in (
    zero_change,
    nesting,
    error_formula,
    freedom,
    scale,
    token_order,
    repetition,
    splitting,
    channel_order,
    rotation,
    dead_channel,
    unseen,
    finite,
    precision,
    moments_kept,
):
    RULES[_rule.__name__] = _rule


@checked
def check_family(
    family: Family | str,
    *,
    contains: Iterable[Family | str] = (),
    exempt: Mapping[str, str] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    **options: Any,
) -> None:
    """Check a family against every rule in `RULES`; in a second, without a model.

    Args:
        family: the record, or its name.
        contains: families whose sets are parts of its own (the identity is in every set of a
            least-squares family and need not be named); of the same weight of tokens.
        exempt: rules that it cannot keep, each with the reason. An exemption that is not needed is
            an error too.
        seed: of the random streams.
        device: where they are.
        options: passed on to the solver.

    Raises:
        AssertionError: a rule is broken; the message names it. Or an exempt one is kept.
        ValueError: an unknown family or rule, or a device that is not there.

    >>> check_family("ghost", contains=["scalar", "symmetric", "scaled-orthogonal"])
    >>> check_family("diagonal", exempt={"rotation": "it repairs channel by channel"})
    """
    check_device(device)
    excused = dict(exempt or {})
    for name in excused:
        RULES[name]  # unknown names are refused, with the nearest
    inner = tuple(map(Family.of, contains))
    trial = Trial(Family.of(family), options, inner, seed, device)
    for name, rule in RULES.items():
        try:
            rule(trial)
        except Exception as error:
            if name not in excused:
                meaning = (rule.__doc__ or "").splitlines()[0]
                raise AssertionError(
                    f"{trial.family} breaks the rule {name!r} ({meaning}) {error}"
                ) from error
        else:
            if name in excused:
                raise AssertionError(
                    f"{trial.family} keeps the rule {name!r}, from which it is exempt "
                    f"({excused[name]}): take the exemption away"
                )
