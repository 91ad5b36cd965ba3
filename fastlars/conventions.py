"""Keyword sets with which LARS, LAMB and LANS compute what other libraries compute.

Libraries disagree about what LARS, LAMB and LANS are: what stands in the denominator of the ratio,
what the momentum buffer holds, where the weight decay and the bias correction enter, which
parameters are excluded. A convention is a mapping of keywords that settles all of it, and has the
other library's defaults for the rest. Call it to change some of them.

Example:
    >>> import torch, fastlars
    >>> from fastlars import conventions
    >>> model = torch.nn.Linear(3, 2)
    >>> groups = fastlars.parameter_groups(model, weight_decay=1e-4)
    >>> optimizer = fastlars.LARS(groups, lr=1.0, **conventions.timm_lars(momentum=0.9))
    >>> dict(conventions.vicreg_lars)
    {'ratio': 'combined', 'buffer': 'scaled', 'momentum': 0.9}

The symbols in ``Convention.equation`` are those of docs/numerics.md, "Notation". In all equations a
ratio is 1 where one of its norms is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

# The two axes on which implementations of LARS differ: the ratio, and what the buffer holds.
_PAPER_RATIO = "q = eta |w| / (|g| + wd |w| + eps)"
_RATE_INSIDE = "b = mu b + lr q (g + wd w);  w -= b"
_RATE_OUTSIDE = "b = mu b + q (g + wd w);  w -= lr b"
_PORT = {"ratio": "separate", "buffer": "scaled", "momentum": 0.0, "eps": 1e-8}
_ADAM = "r = Adam's direction, bias-corrected;"
_PAPER_UPDATE = "u = r + wd w;  q = |w| / |u|;  w -= lr q u"

_NOTHING = "Nothing: pass model.parameters()."
_NO_DECAY = (
    "Groups with weight_decay=0 are not adapted, unless always_adapt=True: "
    "parameter_groups(model, weight_decay)."
)
_VECTORS = "Biases and norms: no ratio, no decay. parameter_groups(model, weight_decay)."
_SHARED_STEP = (
    "It counts the steps of a group, fastlars those of each parameter: the counts differ once a "
    "parameter has no gradient in some step."
)


@dataclass(frozen=True, eq=False)
class Convention(Mapping[str, Any]):
    """Keywords for an optimizer of fastlars; ``**`` unpacks them.

    Attributes:
        name: its name in this module, a str; ``fastlars.migrate.load`` takes it as ``source``.
        optimizer: ``"LARS"``, ``"LAMB"`` or ``"LANS"``, the class that the keywords are for.
        keywords: keywords of that class, by name: those that make it compute the equation, and the
            other library's defaults where fastlars has others. The learning rate is never among
            them: pass it yourself.
        equation: what one step computes, a str in the symbols of this module's description.
        excluded: the parameters that the other library leaves out of weight decay or adaptation,
            and how to make such groups here.
        source: the library, class or file whose steps are reproduced, with its release where
            releases differ.
        differences: quirks of that code that are not copied, and keywords that have another name
            here, a sentence each. Default none. Read them before you compare two runs.

    Example:
        >>> optax_lamb["weight_decay"], optax_lamb(weight_decay=0.1)["weight_decay"]
        (0.0, 0.1)
        >>> print(barlow_twins_lars)  # doctest: +ELLIPSIS
        barlow_twins_lars: LARS(ratio='combined', buffer='scaled', momentum=0.9)
          Computes: q = eta |w| / |g + wd w|;  b = mu b + q (g + wd w);  w -= lr b
          Excluded: Biases and norms: no ratio, no decay. parameter_groups(model, weight_decay)...
    """

    name: str
    optimizer: Literal["LARS", "LAMB", "LANS"]
    keywords: Mapping[str, Any]
    equation: str
    excluded: str
    source: str
    differences: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> Any:
        return self.keywords[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keywords)

    def __len__(self) -> int:
        return len(self.keywords)

    def __call__(self, **changes: Any) -> Convention:
        """The same convention with some keywords added or changed.

        Args:
            **changes: keywords of the optimizer, which win over those of the convention; pass here
                what the optimizer's call would otherwise get twice.
        """
        return replace(self, keywords={**self.keywords, **changes})

    def __str__(self) -> str:
        keywords = ", ".join(f"{key}={value!r}" for key, value in self.items())
        lines = [f"{self.name}: {self.optimizer}({keywords})", f"Computes: {self.equation}"]
        lines += [f"Excluded: {self.excluded}", f"Source: {self.source}"]
        return "\n  ".join(lines + [f"Differs: {text}" for text in self.differences])


timm_lars = Convention(
    name="timm_lars",
    optimizer="LARS",
    keywords={**_PORT, "always_adapt": False},
    equation=f"{_PAPER_RATIO};  {_RATE_OUTSIDE}",
    excluded=_NO_DECAY,
    differences=("trust_coeff is trust_coefficient here.",),
    source="timm.optim.Lars",
)

lightly_lars = replace(
    timm_lars,
    name="lightly_lars",
    differences=(
        "Where g = 0 it does not decay. Here such a tensor decays at the whole learning rate.",
    ),
    source="lightly.utils.lars.LARS; also pl_bolts.optimizers.LARS and torch_optimizer.LARS",
)

pytorch_optimizer_lars = Convention(
    name="pytorch_optimizer_lars",
    optimizer="LARS",
    keywords={"ratio": "separate", "buffer": "scaled", "momentum": 0.9},
    equation=f"{_PAPER_RATIO}, eps = 0;  {_RATE_OUTSIDE}",
    excluded=(
        "Parameters of at most one dimension: no ratio, no decay. "
        "parameter_groups(model, weight_decay)."
    ),
    differences=(
        "It dampens the first gradient too; fastlars does not, like torch.optim.SGD.",
        "Where g = 0 but wd > 0, its q is eta / wd; here it is 1, as where w = 0.",
        "It overwrites p.grad.",
        "Releases before 4.0 compute something else: the ratio lacks wd, and the first "
        "gradient enters the buffer without the ratio.",
    ),
    source="pytorch_optimizer.LARS, release 4",
)

optax_lars = Convention(
    name="optax_lars",
    optimizer="LARS",
    keywords={"ratio": "combined", "buffer": "step", "momentum": 0.9},
    equation=f"q = eta |w| / (|g + wd w| + eps);  {_RATE_INSIDE}",
    excluded=_NOTHING + " Both masks on vectors: parameter_groups(model, weight_decay).",
    source="optax.lars",
)

simclr_lars = replace(
    optax_lars,
    name="simclr_lars",
    equation=f"q = eta |w| / |g + wd w|;  {_RATE_INSIDE}",
    excluded=(
        "Release 1.0.2: nothing, whatever its lists say. Copies that take param_names: names with "
        "'bn' or 'bias', by parameter_groups with exclude=."
    ),
    differences=(
        "eeta is trust_coefficient here, use_nesterov nesterov. classic_momentum=False, which "
        "fails there, has no equal.",
        "Weights that are all zero never move in release 1.0.2: its q is 0. Here q is 1.",
        "It decays by the weight_decay of its constructor, fastlars by that of each group.",
        "It overwrites p.grad.",
    ),
    source="LARS in Spijkervet/SimCLR, simclr/modules/lars.py, a port of Google's",
)

apex_larc = Convention(
    name="apex_larc",
    optimizer="LARS",
    keywords={**_PORT, "trust_coefficient": 0.02, "trust_clip": True},
    equation=f"{_PAPER_RATIO}, then q = min(q / lr, 1);  {_RATE_OUTSIDE}",
    excluded=_NOTHING,
    differences=(
        "LARC(clip=False), which is LARS, is trust_clip=False here.",
        "Where g = 0 or w = 0 it neither decays nor clips. Here such a tensor decays, and with "
        "lr > 1 its step is clipped like any other.",
    ),
    source="apex.parallel.LARC around torch.optim.SGD; removed from apex in 2025",
)

torchlars = Convention(
    name="torchlars",
    optimizer="LARS",
    keywords=_PORT,
    equation=f"{_PAPER_RATIO};  {_RATE_OUTSIDE}",
    excluded=_NOTHING,
    differences=("trust_coef is trust_coefficient here.",),
    source="torchlars.LARS around torch.optim.SGD",
)

solo_lars = replace(
    torchlars,
    name="solo_lars",
    excluded=(
        "With exclude_bias_n_norm=True, vectors: no ratio, no decay. "
        "parameter_groups(model, weight_decay)."
    ),
    differences=(
        "eta is trust_coefficient here, clip_lars_lr trust_clip.",
        "Where g = 0 or w = 0 it neither decays nor clips. Here such a tensor decays, and with "
        "lr > 1 its step is clipped like any other.",
    ),
    source="solo-learn, solo/utils/lars.py",
)

mlperf_lars = Convention(
    name="mlperf_lars",
    optimizer="LARS",
    keywords={"ratio": "separate", "buffer": "step", "momentum": 0.9, "weight_decay": 1e-4},
    equation=f"{_PAPER_RATIO}, eps = 0;  {_RATE_INSIDE}",
    excluded=(
        "Names with 'batch_normalization', 'bn' or 'bias': no ratio, no decay. "
        "parameter_groups(model, weight_decay), or with exclude= for the names."
    ),
    differences=("The Keras version silently turns its eps of 0 into 1e-7: eps=1e-7 for that.",),
    source="MLPerf ResNet-50, mlcommons/training, lars_optimizer.py",
)

mlperf_mxnet_lars = replace(
    mlperf_lars(momentum_correction=True),
    name="mlperf_mxnet_lars",
    equation=f"{_PAPER_RATIO}, eps = 0;  {_RATE_INSIDE}, mu times lr / previous lr",
    excluded="Names that end in 'gamma', 'beta' or 'bias': parameter_groups(model, weight_decay).",
    differences=("A previous lr of 0, as after a warm-up from 0, corrects nothing here.",),
    source="NVIDIA's MLPerf ResNet-50 in MXNet, SGDwFASTLARS",
)

vicreg_lars = Convention(
    name="vicreg_lars",
    optimizer="LARS",
    keywords={"ratio": "combined", "buffer": "scaled", "momentum": 0.9},
    equation=f"q = eta |w| / |g + wd w|;  {_RATE_OUTSIDE}",
    excluded=_VECTORS,
    differences=("eta is trust_coefficient here.",),
    source="LARS in facebookresearch/vicreg, main_vicreg.py; MAE's and MoCo v3's are the same",
)

barlow_twins_lars = replace(
    vicreg_lars,
    name="barlow_twins_lars",
    source="LARS in facebookresearch/barlowtwins, main.py",
)

nus_lars = Convention(
    name="nus_lars",
    optimizer="LARS",
    keywords={"ratio": "separate", "buffer": "gradient", "momentum": 0.0},
    equation=f"{_PAPER_RATIO}, eps = 0;  b = mu b + (g + wd w);  w -= lr q b",
    excluded=(
        "Groups with lars=False: no ratio. They have adapt=False here, as "
        "parameter_groups(model, weight_decay) sets it."
    ),
    differences=("eeta is trust_coefficient here.",),
    source="NUS-HPC-AI-Lab/LARS-ImageNet-PyTorch; also Intel's extension for PyTorch",
)

torch_sgd = Convention(
    name="torch_sgd",
    optimizer="LARS",
    keywords={"adapt": False, "buffer": "scaled", "momentum": 0.0},
    equation="b = mu b + (g + wd w);  w -= lr b",
    excluded=_NOTHING,
    source="torch.optim.SGD",
)

timm_lamb = Convention(
    name="timm_lamb",
    optimizer="LAMB",
    keywords={"decay": "update", "weight_decay": 0.01, "max_grad_norm": 1.0, "always_adapt": False},
    equation=f"g clipped to global norm 1;  {_ADAM}  {_PAPER_UPDATE}",
    excluded=_NO_DECAY,
    differences=(
        'decoupled_decay=True is decay="decoupled" here. There is no caution and no '
        "corrected_weight_decay.",
        "It ignores max_grad_norm in a parameter group; fastlars does not.",
        _SHARED_STEP,
    ),
    source="timm.optim.Lamb",
)

apex_lamb = replace(
    timm_lamb,
    name="apex_lamb",
    differences=(
        'use_nvlamb is always_adapt here, adam_w_mode=False is decay="gradient".',
        "max_grad_norm=0 makes its gradients 0. Here that is an error, and None is off.",
        "It overwrites p.grad, and rounds u to the type of p.grad before taking its norm.",
        _SHARED_STEP,
    ),
    source="apex.optimizers.FusedLAMB",
)

deepspeed_lamb = Convention(
    name="deepspeed_lamb",
    optimizer="LAMB",
    keywords={"decay": "update", "eps": 1e-8, "ratio_bounds": (0.01, 10.0)},
    equation=f"{_ADAM}  u = r + wd w;  q = min(max(|w| / |u|, 0.01), 10);  w -= lr q u",
    excluded=_NOTHING,
    differences=(
        "min_coeff and max_coeff are ratio_bounds here. There is no eps_inside_sqrt.",
        "Earlier releases correct the rate instead, lr sqrt(1 - beta2^t) / (1 - beta1^t), which "
        "also scales the decay: bias_correction=False here, and that factor in the schedule.",
        "max_grad_norm=0 is None here. It clips by a norm that is passed to it, plus 1e-6.",
    ),
    source="deepspeed.ops.lamb.FusedLamb",
)

pytorch_optimizer_lamb = Convention(
    name="pytorch_optimizer_lamb",
    optimizer="LAMB",
    keywords={
        "decay": "decoupled",
        "bias_correction": "rate",
        "phi": (0.0, 10.0),
        "eps": 1e-6,
        "ratio_eps": 1e-6,
    },
    equation=(
        "w -= lr wd w;  u = m / (sqrt(v) + eps);  q = min(|w|, 10) / (|u| + eps);  "
        "w -= lr / (1 - beta1^t) q u"
    ),
    excluded=_NOTHING,
    differences=(
        "Its eps is both eps and ratio_eps here.",
        'weight_decouple=False is decay="update" here, adam=True adapt=False, adam_debias=True '
        "bias_correction=False. There is no fixed_decay, rectify or adanorm.",
        "pre_norm=True is max_grad_norm=1.0 here, except that it adds 1e-6 to the global norm.",
        "It overwrites p.grad.",
        _SHARED_STEP,
    ),
    source="pytorch_optimizer.Lamb, release 4",
)

cybertronai_lamb = Convention(
    name="cybertronai_lamb",
    optimizer="LAMB",
    keywords={"decay": "update", "bias_correction": False, "phi": (0.0, 10.0)},
    equation="u = m / (sqrt(v) + eps) + wd w;  q = min(|w|, 10) / |u|;  w -= lr q u",
    excluded=_NOTHING,
    differences=(
        "clamp_value=c is phi=(0.0, c) here, adam=True adapt=False. debias=True, which also "
        "scales the decay, has no equal.",
        "Weights that are all zero never move in pytorch_lamb: its q is 0. Here q is 1.",
    ),
    source="cybertronai/pytorch-lamb, and its copies, as torch_optimizer.Lamb",
)

optax_lamb = Convention(
    name="optax_lamb",
    optimizer="LAMB",
    keywords={"decay": "update", "weight_decay": 0.0},
    equation=f"{_ADAM}  {_PAPER_UPDATE}",
    excluded=(
        f"{_NOTHING} Mask on vectors: parameter_groups(model, weight_decay, adapt_excluded=True)."
    ),
    differences=("b1 and b2 are betas here. There is no eps_root.",),
    source="optax.lamb",
)

torch_adamw = Convention(
    name="torch_adamw",
    optimizer="LAMB",
    keywords={"adapt": False, "decay": "decoupled", "eps": 1e-8, "weight_decay": 0.01},
    equation=f"w -= lr wd w;  {_ADAM}  w -= lr r",
    excluded=_NOTHING,
    differences=("There is no amsgrad.",),
    source="torch.optim.AdamW",
)

gluonnlp_lans = Convention(
    name="gluonnlp_lans",
    optimizer="LANS",
    keywords={"weight_decay": 0.01, "norm_eps": 1e-6},
    equation=(
        "g = g / (|g| + eps);  r = Adam's direction, bias-corrected, + wd w;  c = the same with g "
        "for the corrected m;  w -= lr (beta1 |w| / |r| r + (1 - beta1) |w| / |c| c)"
    ),
    excluded=(
        f"{_NOTHING} No decay for biases and norms, as in its BERT script: "
        "parameter_groups(model, weight_decay, adapt_excluded=True)."
    ),
    differences=(
        "Its eps is both eps and norm_eps here: change both.",
        'adam_w_mode=False is decay="gradient" here. szhengac/apex has normalize_grad=False.',
        "It overwrites p.grad, rounds r and c to the type of p.grad before taking their norms, and "
        "keeps a third state, scaled_grad.",
        _SHARED_STEP,
    ),
    source="gluonnlp.torch.optimizers.FusedLANS; also FusedLANS in szhengac/apex, branch lans",
)

by_name = {each.name: each for each in [*globals().values()] if isinstance(each, Convention)}

__all__ = ["Convention", "by_name", *by_name]
