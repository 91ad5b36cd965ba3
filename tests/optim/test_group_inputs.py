"""parameter_groups of what people have instead of a model: parameters, pairs and groups."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import fastlars

Groups = list[dict[str, Any]]


class Model(nn.Module):
    """Two matrices, one of them shared; a norm; a bias; a number; and what is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.ones(()))
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.last = nn.Linear(4, 2, bias=False)


KEPT = ["first.weight", "last.weight"]
EXCLUDED = ["scale", "norm.weight", "norm.bias", "tied.bias"]

Input = Callable[[nn.Module], Any]
HYPER = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
NAMED: dict[str, Input] = {
    "iterator": lambda model: model.named_parameters(),
    "list": lambda model: list(model.named_parameters()),
    "items": lambda model: dict(model.named_parameters()).items(),
    "tied twice": lambda model: model.named_parameters(remove_duplicate=False),
    "group": lambda model: [{"params": model.named_parameters()}],
    "param_names": lambda model: SGD(model.named_parameters(), **HYPER).param_groups,
}
UNNAMED: dict[str, Input] = {
    "iterator": lambda model: model.parameters(),
    "list": lambda model: list(model.parameters()),
    "group": lambda model: iter([{"params": model.parameters()}]),
}


def names(group: dict[str, Any]) -> list[str]:
    return [name for name, _ in group["params"]]


def rest(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def named(groups: Groups) -> list[tuple[list[str], dict[str, Any]]]:
    return [(names(group), rest(group)) for group in groups]


@pytest.mark.parametrize("kind", NAMED)
def test_named_parameters_give_the_groups_of_their_model(kind: str) -> None:
    model = Model()
    kept, excluded = fastlars.parameter_groups(NAMED[kind](model), 0.1)
    assert (names(kept), names(excluded)) == (KEPT, EXCLUDED)
    of_name = dict(model.named_parameters())
    assert all(p is of_name[name] for group in (kept, excluded) for name, p in group["params"])
    # The optimizer makes them of the pairs.
    assert "param_names" not in kept | excluded
    if kind != "param_names":  # which says more
        assert rest(kept) == {"weight_decay": 0.1}
        assert rest(excluded) == {"weight_decay": 0.0, "adapt": False}


@pytest.mark.parametrize("kind", UNNAMED)
def test_parameters_without_names_give_groups_without_names(kind: str) -> None:
    model = Model()
    kept, excluded = fastlars.parameter_groups(UNNAMED[kind](model), 0.1)
    of_name = dict(model.named_parameters())
    assert [id(p) for p in kept["params"]] == [id(of_name[name]) for name in KEPT]
    assert [id(p) for p in excluded["params"]] == [id(of_name[name]) for name in EXCLUDED]
    assert rest(kept) == {"weight_decay": 0.1}
    assert rest(excluded) == {"weight_decay": 0.0, "adapt": False}


def two_layers() -> tuple[nn.Parameter, nn.Parameter, nn.Parameter, nn.Parameter]:
    first, second = nn.Linear(2, 2), nn.Linear(2, 3)
    return first.weight, first.bias, second.weight, second.bias


def test_groups_keep_what_they_say_and_their_order() -> None:
    w, b, v, c = two_layers()
    given: Groups = [
        {"params": [("b", b), ("w", w)], "lr": 0.5, "lr_scale": 2, "betas": (0.5, 0.9)},
        {"params": [("v", v), ("c", c)], "weight_decay": 0.3, "adapt": True, "mine": "x"},
    ]
    before = [group | {"params": list(group["params"])} for group in given]
    first = {"lr": 0.5, "lr_scale": 2, "betas": (0.5, 0.9)}
    assert named(fastlars.parameter_groups(given, 0.1)) == [
        (["w"], {**first, "weight_decay": 0.1}),
        (["b"], {**first, "weight_decay": 0.0, "adapt": False}),
        # Its own weight decay wins; who is excluded has none.
        (["v"], {"weight_decay": 0.3, "adapt": True, "mine": "x"}),
        (["c"], {"weight_decay": 0.0, "adapt": False, "mine": "x"}),
    ]
    assert named(given) == named(before)


@pytest.mark.parametrize(("which", "decay"), [("none", 0.1), ("norms+biases", 0.0)])
def test_a_group_that_is_excluded_stays_so_whole(which: Any, decay: float) -> None:
    w, b, v, c = two_layers()
    given: Groups = [
        {"params": [w, b], "weight_decay": 0, "adapt": False},
        {"params": [v], "weight_decay": 0},
        {"params": [c], "adapt": False},
    ]
    groups = fastlars.parameter_groups(given, 0.1, no_decay=which, no_ratio=which)
    assert [rest(group) for group in groups] == [
        {"weight_decay": 0.0, "adapt": False},
        {"weight_decay": 0.0},
        {"weight_decay": decay, "adapt": False},
    ]
    found = [[id(p) for p in group["params"]] for group in groups]
    assert found == [[id(w), id(b)], [id(v)], [id(c)]]


def test_groups_of_an_optimizer_keep_names_and_parameters_together() -> None:
    model = Model()
    old = SGD(model.named_parameters(), lr=0.3, weight_decay=0.2)
    new = fastlars.LARS(fastlars.parameter_groups(old.param_groups, 0.1), lr=0.1)
    assert [group["param_names"] for group in new.param_groups] == [KEPT, EXCLUDED]
    of_name = dict(model.named_parameters())
    for group in new.param_groups:
        pairs = zip(group["param_names"], group["params"], strict=True)
        assert all(p is of_name[name] for name, p in pairs)
    found = [(group["lr"], group["weight_decay"]) for group in new.param_groups]
    assert found == [(0.3, 0.2), (0.3, 0.0)]
    assert [len(group["params"]) for group in old.param_groups] == [8]  # as it was


def test_groups_that_were_made_are_made_the_same_again() -> None:
    groups = fastlars.parameter_groups(Model(), 0.1)
    assert named(fastlars.parameter_groups(groups, 0.5)) == named(groups)


def test_shared_parameters_appear_once_over_all_groups() -> None:
    w, b, v, _ = two_layers()
    given: Groups = [
        {"params": [w, w], "lr": 1.0},
        {"params": w},
        {"params": iter([b, v, w]), "lr": 2.0},
    ]
    groups = fastlars.parameter_groups(given, 0.1)
    found = [(group["lr"], [id(p) for p in group["params"]]) for group in groups]
    assert found == [(1.0, [id(w)]), (2.0, [id(v)]), (2.0, [id(b)])]


@pytest.mark.parametrize("kind", NAMED)
def test_rules_of_ones_own_by_name(kind: str) -> None:
    given = NAMED[kind](Model())
    kept, excluded = fastlars.parameter_groups(given, 0.1, exclude=lambda name, _: "norm" in name)
    assert names(kept) == ["scale", "first.weight", "tied.bias", "last.weight"]
    assert names(excluded) == ["norm.weight", "norm.bias"]
    assert (excluded["weight_decay"], excluded["adapt"]) == (0.0, False)


def test_rules_of_ones_own_without_names() -> None:
    w, b, v, c = two_layers()
    called: list[Any] = []

    def rule(name: str, parameter: nn.Parameter) -> bool:
        called.append(name)
        return parameter is b or parameter is v

    kept, excluded = fastlars.parameter_groups([w, b, v, c], 0.1, exclude=rule)
    assert called == [None] * 4  # once for both purposes
    assert [id(p) for p in kept["params"]] == [id(w), id(c)]
    assert [id(p) for p in excluded["params"]] == [id(b), id(v)]
    # A rule about names would find nobody: it fails instead.
    with pytest.raises(AttributeError, match="NoneType"):
        fastlars.parameter_groups([w], 0.1, exclude=lambda name, _: name.endswith("bias"))


@pytest.mark.parametrize("given", [lambda model: model, *NAMED.values()])
def test_rules_for_decay_and_for_ratio_apart(given: Input) -> None:
    groups = fastlars.parameter_groups(
        given(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))),
        0.1,
        no_decay=lambda name, _: name.endswith("bias"),
        no_ratio=lambda name, _: name.startswith("1."),
    )
    found = [(names(group), group["weight_decay"], group.get("adapt")) for group in groups]
    assert found == [
        (["0.weight"], 0.1, None),
        (["1.weight"], 0.1, False),
        (["0.bias"], 0.0, None),
        (["1.bias"], 0.0, False),
    ]


def test_errors_of_rules_are_passed_on() -> None:
    def rule(name: str, parameter: nn.Parameter) -> bool:
        raise RuntimeError(f"not {name}")

    with pytest.raises(RuntimeError, match=r"^not scale$"):
        fastlars.parameter_groups(Model(), 0.1, exclude=rule)


@pytest.mark.parametrize("keyword", ["no_decay", "no_ratio"])
@pytest.mark.parametrize("given", [*NAMED.values(), *UNNAMED.values()])
def test_norms_need_a_model(given: Input, keyword: Any) -> None:
    with pytest.raises(ValueError, match=f'^{keyword}="norms" needs a model: '):
        fastlars.parameter_groups(given(Model()), 0.1, **{keyword: "norms"})


SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    "norms": {"no_decay": "norms", "no_ratio": "none"},
    "ndim": {"exclude": lambda name, p: p.ndim == 1},
    "shape": {"no_ratio": lambda name, p: len(p.shape) == 1, "no_decay": "none"},
    "size": {"exclude": lambda name, p: len(p.size()) == 1},
    "dim": {"exclude": lambda name, p: p.dim() == 1},
}


@pytest.mark.parametrize("asks", SHAPES)
def test_lazy_modules_have_no_shape(asks: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    message = r"^parameter 2 \(1\.weight\) has no shape yet, .* run a forward pass first$"
    with pytest.raises(ValueError, match=message):
        fastlars.parameter_groups(model, 0.1, **SHAPES[asks])
    model(torch.ones(1, 2))
    assert "1.weight" in names(fastlars.parameter_groups(model, 0.1, **SHAPES[asks])[0])


def test_steps_of_another_optimizer_are_not_carried_over() -> None:
    params = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]
    old = fastlars.LAMB(params)
    for p in params:
        p.grad = torch.ones_like(p)
    old.step()
    new = fastlars.LAMB(fastlars.parameter_groups(old.param_groups, 0.1))
    assert [group["step"] for group in new.param_groups] == [0, 0]


def test_lazy_modules_by_name() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    kept, excluded = fastlars.parameter_groups(model, 0.1, exclude=lambda name, _: "1." in name)
    assert names(kept) == ["0.weight", "0.bias"]
    assert names(excluded) == ["1.weight", "1.bias"]
    (every,) = fastlars.parameter_groups(model, 0.1, no_decay="none", no_ratio="none")
    assert len(names(every)) == 4


FROZEN = nn.Linear(2, 2).requires_grad_(False)


@pytest.mark.parametrize(
    "given",
    [
        [],
        iter([]),
        FROZEN.parameters(),
        list(FROZEN.named_parameters()),
        [{"params": []}, {"params": FROZEN.weight}],
    ],
)
def test_nothing_to_train(given: Any) -> None:
    with pytest.raises(ValueError, match=f"^{type(given).__name__} has no trainable parameters$"):
        fastlars.parameter_groups(given, 0.1)


P = nn.Parameter(torch.ones(2))
PARAMS = "params must be a model, parameters, pairs of name and parameter, or a list of parameter"
GROUP = "params must be parameters, or pairs of name and parameter, got "
ITEM = "must be a parameter, or a pair of name and parameter, got "


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, f"{PARAMS} groups, got NoneType"),
        ("weight", f"{PARAMS} groups, got str"),
        (P, f"{PARAMS} groups, got Parameter"),
        ({P}, f"{PARAMS} groups, got set"),
        (nn.Linear(2, 2).state_dict(), f"{PARAMS} groups, got OrderedDict"),
        ({"params": [P]}, f"{PARAMS} groups, got dict"),
        (["a"], f"parameter 0 {ITEM}str"),
        ([P, None], f"parameter 1 {ITEM}NoneType"),
        ([P, {"params": P}], f"parameter 1 {ITEM}dict"),
        ([("a", P), ("b", 3)], f"parameter 1 (b) {ITEM}str, int"),
        ([(3, P)], f"parameter 0 {ITEM}int, Parameter"),
        ([("a", P, 3)], f"parameter 0 {ITEM}str, Parameter, int"),
        (
            nn.Linear(2, 2).state_dict().items(),
            "parameter 0 (weight) is a tensor without requires_grad, as in a state_dict",
        ),
        ([{"params": P}, P], "group 1 must be a dict as those before it, got Parameter"),
        ([{"params": {P}}], f"group 0: {GROUP}set"),
        ([{"params": None}], f"group 0: {GROUP}NoneType"),
        ([{"params": P}, {"params": [P, 1]}], f"group 1, parameter 1 {ITEM}int"),
    ],
)
def test_what_cannot_be_grouped(given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        fastlars.parameter_groups(given, 0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"params": P}, {"lr": 0.1}], 'group 1 has no "params"'),
        ([{"params": [P], "param_names": ["a", "b"]}], "group 0 has 2 param_names for 1 params"),
        ([("a", P), P], "parameter 1: either all parameters have names, or none"),
        (
            [{"params": P}, {"params": [("a", P)]}],
            "group 1, parameter 0 (a): either all parameters have names, or none",
        ),
    ],
)
def test_what_does_not_go_together(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fastlars.parameter_groups(given, 0.1)


def test_exclude_must_be_a_callable() -> None:
    with pytest.raises(TypeError, match=r"^exclude must be a callable or None, got 'bias'$"):
        fastlars.parameter_groups(Model(), 0.1, exclude="bias")  # type: ignore[arg-type]


def trained(given: Input) -> tuple[list[torch.Tensor], list[float]]:
    """Parameters and trust ratios after three steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    groups = fastlars.parameter_groups(given(model), HYPER["weight_decay"])
    optimizer = fastlars.LARS(groups, lr=HYPER["lr"], momentum=HYPER["momentum"])
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    ratios = optimizer.trust_ratios()
    return list(model.parameters()), [float(ratios[p]) for p in model.parameters()]


@pytest.mark.parametrize("given", [*NAMED.values(), *UNNAMED.values()])
def test_optimizers_step_the_groups_as_those_of_the_model(given: Input) -> None:
    expected, expected_ratios = trained(lambda model: model)
    found, ratios = trained(given)
    assert all(torch.equal(p, q) for p, q in zip(found, expected, strict=True))
    assert ratios == expected_ratios
    assert [ratio == 1.0 for ratio in ratios] == [False, True, True, True]
