"""Rules for all families of repairs, and a check of one family against all rules.

In the spirit of scikit-learn's ``check_estimator``: one call checks a new family, and the message
names the rule that it breaks. A rule is a function of a `Trial`, the family solved on small random
streams with a large token, a partly linear change and a bias.
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

_MASSIVE = 1e6
_TOLERANCE = 1e-6


class Tokens(NamedTuple):
    """One sequence on both sides of a gap.

    Attributes:
        x: (tokens, C) the stream before the gap.
        y: (tokens, C) the stream after the gap.
        hidden: (tokens, I) input of the down-projection before the gap.
        output: (tokens, C) its output, a part of ``x``.
    """

    x: Tensor
    y: Tensor
    hidden: Tensor
    output: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Tokens":
        """Apply a function to every tensor."""
        return Tokens(*map(function, self))

    def scaled(self, factor: float | Tensor) -> "Tokens":
        """All tensors times ``factor``, or (tokens, 1) factors."""
        return self.map(lambda part: part * factor)

    def transformed(self, R: Tensor) -> "Tokens":
        """The stream in another basis, ``x R``."""
        return self._replace(x=self.x @ R, y=self.y @ R, output=self.output @ R)

    def repaired(self, operator: Operator) -> Tensor:
        """The repaired stream."""
        return operator.apply(self.x, hidden=self.hidden, output=self.output)


@dataclass(frozen=True)
class Trial:
    """A family with its options, to be solved on random streams.

    Attributes:
        family: to be checked.
        options: for its solver.
        contains: families whose sets are subsets of its own.
        seed: of the streams.
        device: of the streams and the moments.
        width: of the streams, C, a multiple of 4 for Hadamard matrices.
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

    def sequences(self, count: int = 3) -> list[Tokens]:
        """Random sequences of 24 tokens, determined by the seed."""
        generator = torch.Generator().manual_seed(self.seed)
        normal = partial(torch.randn, generator=generator, dtype=torch.float64)
        mix, change, normalised = (normal(self.width, self.width) for _ in range(3))
        down, mean, shift = normal(self.hidden, self.width), normal(self.width), normal(self.width)
        sequences = []
        for _ in range(count):
            hidden = normal(24, self.hidden)
            output = hidden @ down / self.hidden
            x = normal(24, self.width) @ mix + mean + output
            x[0] *= 20
            n = x / x.square().mean(1, keepdim=True).sqrt()
            y = x + (x @ change + n @ normalised + shift) / 2 + normal(24, self.width)
            sequences.append(Tokens(x, y, hidden, output).map(lambda part: part.to(self.device)))
        return sequences

    def moments(self, *sequences: Tokens, weight: Tensor | None = None) -> Moments:
        """Moments of the sequences, for the family's regressor."""
        moments = Moments(
            self.width, regressor=self.family.regressor, hidden=self.hidden, device=self.device
        )
        for tokens in sequences:
            moments.update(tokens.x, tokens.y, weight, hidden=tokens.hidden, output=tokens.output)
        return moments

    def solve(self, moments: Moments) -> Operator:
        """The family's best fit."""
        return solve_quietly(moments, self.family, **self.options)

    def fit(self, *sequences: Tokens) -> Operator:
        """`solve` of the `moments` of the sequences."""
        return self.solve(self.moments(*sequences))

    def hard_cases(self) -> dict[str, list[Tokens]]:
        """Degenerate and badly scaled streams."""
        plain = self.sequences()
        first = plain[0]
        factors = torch.ones_like(first.x[:, :1])
        factors[1] = _MASSIVE
        massive = first.y.clone()
        massive[1, 2] = _MASSIVE
        dead = torch.eye(self.width, dtype=torch.float64, device=self.device)
        dead[1] = 0.0
        return {
            "many tokens": plain,
            "one token": [first.map(lambda part: part[:1])],
            "fewer tokens than channels": [first.map(lambda part: part[: self.width - 1])],
            "equal tokens": [first.map(lambda part: part[:1].repeat(9, 1))],
            "a dead channel": [tokens.transformed(dead) for tokens in plain],
            "a dead channel that comes to life": [
                tokens.transformed(dead)._replace(y=tokens.y) for tokens in plain
            ],
            "a massive token": [first.scaled(factors), *plain[1:]],
            "a token that becomes massive": [first._replace(y=massive), *plain[1:]],
        }

    @property
    def divisible(self) -> bool:
        """Whether a sequence may be split or shuffled: unless the previous token is read."""
        return not self.family.regressor.reads_previous


def _assert_close(actual: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=_TOLERANCE, atol=_TOLERANCE * scale)


def _assert_same_repair(one: Operator, other: Operator, sequences: Iterable[Tokens]) -> None:
    for tokens in sequences:
        _assert_close(tokens.repaired(other), tokens.repaired(one))


# ---------------------------------------------------------------- the rules


def zero_change(trial: Trial) -> None:
    """If the removed layers change nothing, neither does the repair."""
    unchanged = [tokens._replace(y=tokens.x) for tokens in trial.sequences()]
    operator = trial.fit(*unchanged)
    for tokens in unchanged:
        _assert_close(tokens.repaired(operator), tokens.x)
    assert float(operator.M.abs().max()) < _TOLERANCE, "M is not zero"


def nesting(trial: Trial) -> None:
    """The training error is at most that of any set it contains."""
    for case, sequences in trial.hard_cases().items():
        moments = trial.moments(*sequences)
        error = trial.solve(moments).residual
        slack = 1e-9 * (moments.pruned_error + float(moments.G.trace()))
        if trial.family.least_squares:
            assert error <= moments.pruned_error + slack, f"worse than no repair on {case}"
        for inner in trial.contains:
            assert inner.regressor.weight == trial.family.regressor.weight, "weighted otherwise"
            subset = Trial(inner, seed=trial.seed, device=trial.device).fit(*sequences)
            assert error <= subset.residual + slack, f"worse than {inner} on {case}"


def error_formula(trial: Trial) -> None:
    """The error from moments is the weighted error on the activations."""
    for case, sequences in trial.hard_cases().items():
        moments = trial.moments(*sequences)
        operator = trial.solve(moments)
        error = size = 0.0
        for tokens in sequences:
            weight = trial.family.regressor.weight.of(tokens.y.norm(dim=1))
            error += float(weight @ (tokens.repaired(operator) - tokens.y).square().sum(1))
            size += float(weight @ (tokens.x.square() + tokens.y.square()).sum(1))
        for value in (moments.error(operator), operator.residual):
            assert abs(value - error) <= 1e-9 * size + _TOLERANCE * error, f"{value} on {case}"


def freedom(trial: Trial) -> None:
    """`dof` is the dimension of the set: the rank of ``d(M, b)/dy``."""
    trial = replace(trial, width=4)  # for speed
    (tokens,) = trial.sequences(1)
    operator, step = trial.fit(tokens), 1e-4

    def solution(direction: Tensor) -> Tensor:
        fit = trial.fit(tokens._replace(y=tokens.y + direction))
        return fit.M.flatten() if fit.bias is None else torch.cat([fit.M.flatten(), fit.bias])

    generator = torch.Generator().manual_seed(trial.seed)
    derivatives = []
    for _ in range(operator.dof + 4):
        direction = torch.randn(tokens.y.shape, generator=generator, dtype=torch.float64)
        direction = step * direction.to(tokens.y)
        derivatives.append((solution(direction) - solution(-direction)) / step)
    singular = torch.linalg.svdvals(torch.stack(derivatives))
    rank = int((singular > max(1e-5 * float(singular[0]), 1e-8)).sum())
    assert rank == operator.dof, f"dof says {operator.dof}, its solutions have {rank} dimensions"


def scale(trial: Trial) -> None:
    """A stream of another scale gives the same repair, however small or large."""
    sequences = trial.sequences()
    operator = trial.fit(*sequences)
    for factor in (1e-20, 1e-3, 1e20):
        scaled = [tokens.scaled(factor) for tokens in sequences]
        other = trial.fit(*scaled)
        for tokens, same in zip(scaled, sequences, strict=True):
            _assert_close(tokens.repaired(other) / factor, same.repaired(operator))


def token_order(trial: Trial) -> None:
    """The order of sequences does not matter, nor that of tokens, unless the previous is read."""
    sequences = trial.sequences()
    reordered = sequences[::-1]
    if trial.divisible:
        reordered = [tokens.map(lambda part: part.flip(0)) for tokens in reordered]
    _assert_same_repair(trial.fit(*sequences), trial.fit(*reordered), sequences)


def repetition(trial: Trial) -> None:
    """Duplicating all tokens or weights changes nothing; integer weights repeat tokens."""
    sequences = trial.sequences()
    operator = trial.fit(*sequences)
    _assert_same_repair(operator, trial.fit(*sequences, *sequences), sequences)
    double = torch.full((len(sequences[0].x),), 2.0, device=trial.device)
    doubled = trial.moments(*sequences, weight=double)
    _assert_same_repair(operator, trial.solve(doubled), sequences)
    if trial.divisible:
        counts = torch.arange(len(double), device=trial.device) % 3
        copies = [tokens.map(lambda t: t.repeat_interleave(counts, 0)) for tokens in sequences]
        weighted = trial.moments(*sequences, weight=counts.double())
        _assert_same_repair(trial.fit(*copies), trial.solve(weighted), sequences)


def splitting(trial: Trial) -> None:
    """Sequences may be split, unless the previous token is read, and moments may be added.

    Families whose statistic is an average over sequences, such as LinearPatch, are exempt.
    """
    sequences = parts = trial.sequences()
    if trial.divisible:
        halves = [slice(None, 9), slice(9, None)]
        parts = [tokens.map(itemgetter(half)) for tokens in sequences for half in halves]
    operator = trial.fit(*sequences)
    _assert_same_repair(operator, trial.fit(*parts), sequences)
    separate = [trial.moments(part) for part in parts]
    total = sum(separate[1:], start=separate[0])
    _assert_same_repair(operator, trial.solve(total), sequences)


def channel_order(trial: Trial) -> None:
    """Permuted channels give the permuted repair."""
    _check_equivariance(trial, torch.eye(trial.width)[[2, 0, 3, 1, *range(4, trial.width)]])


def rotation(trial: Trial) -> None:
    """A rotated stream gives the rotated repair."""
    generator = torch.Generator().manual_seed(trial.seed)
    square = torch.randn(trial.width, trial.width, generator=generator, dtype=torch.float64)
    _check_equivariance(trial, torch.linalg.qr(square).Q)


def _check_equivariance(trial: Trial, R: Tensor) -> None:
    R = R.to(trial.device, torch.float64)
    sequences = trial.sequences()
    transformed = [tokens.transformed(R) for tokens in sequences]
    operator, other = trial.fit(*sequences), trial.fit(*transformed)
    for tokens, same in zip(transformed, sequences, strict=True):
        _assert_close(tokens.repaired(other) @ R.T, same.repaired(operator))


def dead_channel(trial: Trial) -> None:
    """A channel that is zero on both sides stays zero."""
    sequences = trial.hard_cases()["a dead channel"]
    operator = trial.fit(*sequences)
    for tokens in sequences:
        y = tokens.repaired(operator)
        assert float(y[:, 1].abs().max()) <= _TOLERANCE * float(y.abs().max()), "it is not zero"


def unseen(trial: Trial) -> None:
    """Directions without data stay unchanged: a zero stream gives ``M = 0``."""
    zero = [t.scaled(0.0)._replace(y=t.y - t.y.mean(0)) for t in trial.sequences()]
    assert not trial.fit(*zero).M.any(), "M is not zero"


def finite(trial: Trial) -> None:
    """Numbers are finite and of moderate size, even if the fit is not unique."""
    for case, sequences in trial.hard_cases().items():
        operator = trial.fit(*sequences)
        bias = torch.zeros(1) if operator.bias is None else operator.bias
        for values in (operator.M, bias, torch.tensor(operator.residual)):
            assert torch.isfinite(values).all(), f"not finite on {case}"
        largest = torch.cat([tokens.y for tokens in sequences]).abs().max()
        for tokens in sequences:
            assert tokens.repaired(operator).abs().max() < 1e3 * largest, f"exploded on {case}"


def precision(trial: Trial) -> None:
    """Activations of any dtype are summed in float64, and repaired in their own dtype."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        rounded = [tokens.map(methodcaller("to", dtype)) for tokens in trial.sequences()]
        exact = [tokens.map(Tensor.double) for tokens in rounded]
        operator = trial.fit(*rounded)
        assert operator.M.dtype == torch.float64, f"M is {operator.M.dtype}"
        _assert_same_repair(operator, trial.fit(*exact), exact)
        for tokens, same in zip(rounded, exact, strict=True):
            y, expected = tokens.repaired(operator), same.repaired(operator)
            assert y.dtype == dtype, f"{dtype} became {y.dtype}"
            size = float(same.x.abs().max() + expected.abs().max())
            error = float((y.double() - expected).abs().max())
            assert error <= 64 * torch.finfo(dtype).eps * size, f"not exact in {dtype}"


def moments_kept(trial: Trial) -> None:
    """Solving is deterministic and leaves the moments unchanged, on their device."""
    moments = trial.moments(*trial.sequences())
    before = {name: values.clone() for name, values in moments.tensors().items()}
    first, second = trial.solve(moments), trial.solve(moments)
    for name, values in moments.tensors().items():
        assert torch.equal(values, before[name]), f"{name} was changed"
    assert torch.equal(first.M, second.M), "a second solution differs"
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
        contains: families whose sets are subsets of its own, with the same token weight. (Every
            least-squares family contains the identity, which need not be named.)
        exempt: rules that it cannot keep, each with the reason.
        seed: of the random streams.
        device: of the random streams.
        options: for the solver.

    Raises:
        AssertionError: a rule is broken (the message names it), or an exempt one is kept.
        ValueError: an unknown family or rule, or an unavailable device.

    >>> check_family("ghost", contains=["scalar", "symmetric", "scaled-orthogonal"])
    >>> check_family("diagonal", exempt={"rotation": "it repairs channel by channel"})
    """
    check_device(device)
    exempt = exempt or {}
    for name in exempt:
        RULES[name]  # unknown names raise, with the nearest name
    inner = tuple(map(Family.of, contains))
    trial = Trial(Family.of(family), options, inner, seed, device)
    for name, rule in RULES.items():
        try:
            rule(trial)
        except Exception as error:
            if name not in exempt:
                meaning = (rule.__doc__ or "").splitlines()[0]
                raise AssertionError(
                    f"{trial.family} breaks the rule {name!r} ({meaning}) {error}"
                ) from error
        else:
            if name in exempt:
                raise AssertionError(
                    f"{trial.family} keeps the rule {name!r}, from which it is exempt "
                    f"({exempt[name]}): remove the exemption"
                )
