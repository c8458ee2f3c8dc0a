"""Every family keeps the rules, and every rule detects a family that breaks it."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ghostlib.linalg.gram import Regularised
from ghostlib.models.boundaries import Boundary
from ghostlib.operators.families import FAMILIES, Family, Fit, Shape
from ghostlib.operators.solve import Operator, solve
from ghostlib.operators.testing import RULES, Trial, check_family
from ghostlib.statistics.features import Feature, Regressor
from ghostlib.statistics.moments import Moments
from ghostlib.surgery.installers import INSTALLERS

pytestmark = pytest.mark.filterwarnings("error")

CHANNELS = {"rotation": "it repairs channel by channel"}
SEQUENCES = {"splitting": "its ratios are averaged over sequences"}
HADAMARD = CHANNELS | {
    "channel_order": "the Hadamard matrix mixes channels by their number",
    "dead_channel": "the Hadamard matrix mixes all channels",
}
EXEMPT = {
    "magnitude": CHANNELS | SEQUENCES,
    "diagonal": CHANNELS,
    "linearpatch-d": CHANNELS | SEQUENCES,
    "linearpatch-r": HADAMARD | SEQUENCES,
    "hadamard-diagonal": HADAMARD,
}
CONTAINS = {
    "diagonal": ["scalar", "magnitude", "linearpatch-d"],
    "hadamard-diagonal": ["scalar", "linearpatch-r"],
    "scaled-orthogonal": ["scalar", "orthogonal"],
    "symmetric": ["diagonal", "hadamard-diagonal"],
    "ghost": ["symmetric", "scaled-orthogonal"],
    "affine": ["ghost"],
    "two-branch": ["ghost"],
    "three-branch": ["two-branch"],
    "two-branch-relative": ["ghost-relative"],
    "three-branch-relative": ["two-branch-relative"],
    "branches": ["ghost-relative"],
    "refit": ["replaceme"],
    "ghost-refit": ["ghost", "refit"],
    "ghost-refit-relative": ["ghost-relative"],
}
SEEDS = st.integers(0, 10_000)


def options(name: str) -> dict[str, Any]:
    return {"rank": 3} if name == "low-rank" else {}


@pytest.mark.thorough
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_keeps_the_rules(name: str) -> None:
    contains, exempt = CONTAINS.get(name, ()), EXEMPT.get(name)
    if FAMILIES[name].default:  # a ridge, with which the sets are not nested
        check_family(name, exempt=exempt)
        check_family(name, contains=contains, exempt=exempt, rcond=1e-6)
    else:
        check_family(name, contains=contains, exempt=exempt, **options(name))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_keeps_the_rules_on_a_gpu(name: str) -> None:
    check_family(name, exempt=EXEMPT.get(name), device="cuda", **options(name))


@pytest.mark.thorough
@settings(max_examples=25)
@given(SEEDS, st.sampled_from(sorted(CONTAINS)))
def test_nested_sets_have_ordered_errors_on_any_tokens(seed: int, name: str) -> None:
    inner = tuple(map(Family.of, CONTAINS[name]))
    plain = {"rcond": 1e-6} if FAMILIES[name].default else {}
    RULES["nesting"](Trial(FAMILIES[name], plain, inner, seed=seed))


INVARIANCES = ["scale", "token_order", "repetition", "splitting", "channel_order", "rotation"]
REGULARISED = [name for name, family in FAMILIES.items() if "relative_ridge" in family.options]
REGRESSORS = ["x, n(x), n(prev)", "n(x); 1/|y|^2", "n(prev), x; 1/|y|^0.5"]


@pytest.mark.thorough
@settings(max_examples=25)
@given(
    SEEDS,
    st.sampled_from([*REGULARISED, *REGRESSORS]),
    st.sampled_from([{}, {"relative_ridge": 1e-2}, {"rcond": 0.03}]),
    st.sampled_from([{}, {"rank": 2}, {"bias": True}]),
)
def test_no_option_depends_on_scale_basis_or_order(
    seed: int, name: str, inverse: dict[str, float], more: dict[str, Any]
) -> None:
    """A ridge, a truncation, a rank and a bias mean the same in every unit and every basis."""
    family = Family.of(name)
    kept = {key: value for key, value in more.items() if key in family.options}
    trial = Trial(family, options(name) | inverse | kept, seed=seed)
    for rule in INVARIANCES:
        RULES[rule](trial)


# --- the rules detect ---------------------------------------------------------------------------


def changed_fit(base: str, change: Callable[[Moments, Fit], Fit]) -> Family:
    """A family whose solver returns another fit."""
    family = FAMILIES[base]
    return replace(
        family, name=f"changed {base}", solve=lambda m, **more: change(m, family.solve(m, **more))
    )


def changed_matrix(base: str, change: Callable[[Moments, Tensor], Tensor]) -> Family:
    return changed_fit(base, lambda moments, fit: fit._replace(M=change(moments, fit.M)))


def position(X: Tensor) -> Tensor:
    """A feature that depends on the position of a token."""
    return X * torch.arange(1.0, len(X) + 1).to(X)[:, None]


def change_moments(moments: Moments, fit: Fit) -> Fit:
    moments.d2.mul_(1.01)
    return fit


def inverted(moments: Moments) -> Fit:
    """The normal equations without regard to their rank."""
    return Fit(torch.linalg.inv(moments.G) @ moments.cross)


BROKEN: dict[str, list[Family]] = {
    "zero_change": [changed_matrix("ghost", lambda m, M: M + 0.01 * torch.eye(m.width))],
    "nesting": [
        changed_matrix("diagonal", lambda m, M: 2.5 * M),
        replace(FAMILIES["linearpatch-d"], least_squares=True),
    ],
    "freedom": [
        replace(FAMILIES["diagonal"], dof=lambda s: 1),
        replace(FAMILIES["diagonal"], dof=lambda s: s.C + 1),
        replace(FAMILIES["symmetric"], dof=lambda s: s.C**2),
        replace(FAMILIES["identity"], dof=lambda s: 1),
    ],
    "scale": [changed_fit("ghost", lambda m, fit: FAMILIES["ghost"].solve(m, ridge=0.1))],
    "token_order": [
        replace(FAMILIES["branches"], regressor=Regressor((Feature("position", position),)))
    ],
    "repetition": [changed_matrix("ghost", lambda m, M: M * (1 - 1 / m.tokens))],
    "splitting": [FAMILIES["linearpatch-d"], FAMILIES["linearpatch-r"], FAMILIES["magnitude"]],
    "channel_order": [
        FAMILIES["hadamard-diagonal"],
        changed_matrix("diagonal", lambda m, M: torch.diag(M.diagonal().cumsum(0))),
    ],
    "rotation": [FAMILIES["diagonal"], Family.of("x, z(x)")],
    "dead_channel": [FAMILIES["hadamard-diagonal"]],
    "unseen": [
        changed_fit("ghost", lambda m, fit: FAMILIES["ghost"].solve(m, around="zero")),
        changed_matrix("orthogonal", lambda m, M: -2 * torch.eye(m.width) - M),
    ],
    "finite": [replace(FAMILIES["ghost"], solve=inverted, options=())],
    "precision": [changed_matrix("ghost", lambda m, M: M.float())],
    "moments_kept": [
        changed_matrix("ghost", lambda m, M: M + 1e-9 * torch.rand_like(M)),
        changed_fit("ghost", change_moments),
    ],
}


@pytest.mark.thorough
@pytest.mark.parametrize("rule", BROKEN)
def test_a_rule_detects_a_family_that_breaks_it(rule: str) -> None:
    for family in BROKEN[rule]:
        with pytest.raises((AssertionError, RuntimeError)):
            RULES[rule](Trial(family))


def test_an_error_of_another_repair_is_detected(monkeypatch: Any) -> None:
    """No solver can break this rule, but an operator that ignores its bias."""
    apply = Operator.apply
    monkeypatch.setattr(
        Operator, "apply", lambda op, X, **more: apply(replace(op, bias=None), X, **more)
    )
    with pytest.raises(AssertionError, match=r"\d on many tokens"):
        RULES["error_formula"](Trial(FAMILIES["affine"]))
    assert {*BROKEN, "error_formula"} == set(RULES)


def test_a_repair_that_is_inexact_in_float32_is_detected(monkeypatch: Any) -> None:
    apply = Operator.apply

    def inexact(op: Operator, X: Tensor, **more: Any) -> Tensor:
        return apply(op, X, **more) * (1.01 if X.dtype == torch.float32 else 1.0)

    monkeypatch.setattr(Operator, "apply", inexact)
    with pytest.raises(AssertionError, match=r"not exact in torch\.float32"):
        RULES["precision"](Trial(FAMILIES["ghost"]))


@pytest.mark.thorough
def test_the_message_names_family_rule_and_reason() -> None:
    wrong = replace(FAMILIES["diagonal"], dof=lambda s: 1)
    message = (
        "diagonal breaks the rule 'freedom' (`dof` is the dimension of the set: the rank of "
        "``d(M, b)/dy``.) dof says 1, its solutions have 4 dimensions"
    )
    with pytest.raises(AssertionError, match=re.escape(message)):
        check_family(wrong, exempt=CHANNELS)
    with pytest.raises(AssertionError, match="ghost keeps the rule 'rotation', from which it is"):
        check_family("ghost", exempt=CHANNELS)
    with pytest.raises(AssertionError, match=r"breaks the rule 'nesting'.* worse than ghost on ma"):
        check_family("symmetric", contains=["ghost"])
    with pytest.raises(AssertionError, match="weighted otherwise"):
        check_family("two-branch", contains=["ghost-relative"])
    with pytest.raises(ValueError, match="unknown rule 'rotations'; did you mean 'rotation'"):
        check_family("ghost", exempt={"rotations": ""})
    with pytest.raises(ValueError, match="unknown operator 'gost'"):
        check_family("gost")
    with pytest.raises(AssertionError, match=r"low-rank breaks .* low-rank needs rank="):
        check_family("low-rank")


# --- the record ---------------------------------------------------------------------------------


def test_a_record_has_its_name_and_an_installer() -> None:
    for name, family in FAMILIES.items():
        assert str(family) == family.name == name and Family.of(name) is family
        assert family.searches and family.install in INSTALLERS
        assert family.free == (family.install not in ("module", "module and down-projection"))
    assert len({family.color for family in FAMILIES.values()}) == len(FAMILIES)


def test_degrees_of_freedom_are_integers() -> None:
    for family in FAMILIES.values():
        assert type(family.dof(Shape(8, 8, 2))) is int, family.name


def test_hard_cases_have_the_right_names() -> None:
    cases = Trial(FAMILIES["ghost"]).hard_cases()
    assert [len(t.x) for t in cases["one token"]] == [1]
    assert [len(t.x) for t in cases["fewer tokens than channels"]] == [7]
    assert not any(tokens.x[:, 1].any() for tokens in cases["a dead channel"])


@pytest.mark.parametrize("spelling", ["x", "n(x)", "x; 1/|y|", "x, n(x)", "n(prev), x; 1/|y|^2"])
def test_a_regressor_is_a_family_too(spelling: str) -> None:
    family = Family.of(spelling)
    assert family.name == "branches" and str(family.regressor) == spelling
    assert Family.of(family) is family


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("gost", "unknown operator 'gost'; did you mean 'ghost'"),
        ("", "unknown operator ''. Known: identity"),
        (None, "unknown operator 'None'"),
        (7, "unknown operator '7'"),
        ("x, n(y)", r"unknown feature 'n\(y\)'; did you mean 'n\(x\)'"),
        ("x; 1/|z|", r"unknown weight '1/\|z\|'"),
        ("x, x", "names a feature twice"),
        ("h", "no module at the gap can read h: use a family that is folded"),
        ("x, f; 1/|y|", r"no module at the gap can read x, f; 1/\|y\|"),
    ],
)
def test_bad_spellings_are_named(spelling: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Family.of(spelling)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_repair_of_the_mlp_needs_a_layer_before_the_gap(name: str) -> None:
    family = FAMILIES[name]
    gaps = [Boundary(2, 4), Boundary(0, 1)]
    family.check_place(gaps[:1])
    message = rf"{name} repairs the MLP before the gap, and boundary \(0, 1\) has no layer bef"
    refused = pytest.raises(ValueError, match=message)
    with refused if family.regressor.reads_mlp else nullcontext():
        family.check_place(gaps)


def test_defaults_apply_without_a_choice_of_regularisation() -> None:
    trials = [Trial(family) for family in FAMILIES.values() if family.default]
    assert {trial.family.name for trial in trials} >= {"refit", "ghost-refit"}
    for trial in trials:
        moments, default = trial.moments(*trial.sequences()), dict(trial.family.default)
        plain, explicit = solve(moments, trial.family), solve(moments, trial.family, **default)
        assert torch.equal(plain.M, explicit.M)
        for other in ({"rcond": 1e-6}, {"ridge": 1e-6}, {"relative_ridge": 1.0}):
            assert not torch.allclose(solve(moments, trial.family, **other).M, plain.M)


def test_a_fit_keeps_its_inverse() -> None:
    X = torch.randn(30, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = Moments(8).update(X, 2 * X)
    assert isinstance(FAMILIES["ghost"].solve(moments).inverse, Regularised)
    assert FAMILIES["orthogonal"].solve(moments)[1:] == (None,) * 4
    seen = FAMILIES["diagonal"].solve(moments).seen
    assert seen is not None
    torch.testing.assert_close(seen, X.square().sum(0))
