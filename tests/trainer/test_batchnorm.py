"""Ghost batches, and statistics of the last step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from distributed import processes
from fastlars.trainer.model import batchnorm
from trainer.helpers import tiny_net


def net(seed: int = 0) -> nn.Module:
    """Two batch norms, one of them nested, with gains and biases of their own."""
    model = tiny_net("", 10, "", seed)
    block = nn.Sequential(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8))
    model = nn.Sequential(*model[:3], block, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(float(name.endswith("weight")), 0.3, generator=draw)
    return model.to(memory_format=torch.channels_last)


def images(count: int, seed: int = 1) -> torch.Tensor:
    random = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    return (3 * random + 1).contiguous(memory_format=torch.channels_last)


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize(
    ("count", "size", "parts"),
    [
        (64, 16, [16] * 4),
        (64, 64, [64]),
        (16, 32, [16]),  # a share smaller than n takes itself
        (63, 32, [32, 31]),  # an image could not be read
        (40, 32, [40]),
        (100, 32, [34, 33, 33]),
        (3, 2, [3]),  # never a single image
        (5, 2, [3, 2]),
    ],
)
def test_ghost_batches_are_forward_passes_of_their_own(
    count: int, size: int, parts: list[int]
) -> None:
    """Outputs and statistics to the bit; gradients of the weights are sums in another order."""
    apart = net()
    ghosts = copy.deepcopy(apart)
    batchnorm.replace_norms(ghosts, size, "running")
    together, separate = images(count).requires_grad_(), images(count).requires_grad_()

    expected = torch.cat([apart(part) for part in separate.split(parts)])
    found = ghosts(together)
    assert torch.equal(found, expected)
    for name, value in apart.state_dict().items():
        assert torch.equal(ghosts.state_dict()[name], value), name

    expected.square().mean().backward()
    found.square().mean().backward()
    torch.testing.assert_close(together.grad, separate.grad)
    for one, other in zip(ghosts.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)

    whole = net()
    whole(images(count))
    assert (len(parts) == 1) == torch.equal(whole[1].running_mean, ghosts[1].running_mean)


def test_the_format_of_the_images_is_kept() -> None:
    model = net()
    batchnorm.replace_norms(model, 8, "running")
    assert model[:3](images(32)).is_contiguous(memory_format=torch.channels_last)
    assert model[:3](images(32).contiguous()).shape == (32, 16, 6, 6)


def test_nothing_is_exchanged_that_need_not_be() -> None:
    """Parameters, their names and their order are the model's own."""
    plain, prepared = net(), net()
    before = dict(prepared.named_parameters())
    batchnorm.replace_norms(prepared, 8, "last")
    assert list(prepared.state_dict()) == list(plain.state_dict())
    assert all(p is before[name] for name, p in prepared.named_parameters())
    assert all(isinstance(norm, batchnorm.GhostBatchNorm2d) for norm in norms(prepared))
    prepared.load_state_dict(plain.state_dict())
    batchnorm.replace_norms(plain, 0, "running")
    assert all(type(norm) is nn.BatchNorm2d for norm in norms(plain))


def test_evaluation_takes_all_images_at_once() -> None:
    plain = net()
    ghosts = copy.deepcopy(plain)
    batchnorm.replace_norms(ghosts, 4, "last")
    assert torch.equal(ghosts.eval()(images(32)), plain.eval()(images(32)))


def test_the_last_step_alone_counts() -> None:
    """The mean over ghost batches and micro-batches, of means and of unbiased variances."""
    model = net()
    batchnorm.replace_norms(model, 8, "last")
    for seed in (5, 6):  # the first of two steps leaves nothing behind
        batchnorm.reset_step_statistics(model)
        for micro in images(48, seed).split(24):
            model(micro)
    first = norms(model)[0]
    inputs = model[0](images(48, 6)).detach().unflatten(0, (6, 8))
    assert first.num_batches_tracked == 6
    torch.testing.assert_close(first.running_mean, inputs.mean((1, 3, 4)).mean(0))
    torch.testing.assert_close(first.running_var, inputs.var((1, 3, 4)).mean(0))

    tested = model.eval()[:2](images(8, 7))
    wanted = functional.batch_norm(
        model[0](images(8, 7)),
        inputs.mean((1, 3, 4)).mean(0),
        inputs.var((1, 3, 4)).mean(0),
        first.weight,
        first.bias,
    )
    torch.testing.assert_close(tested, wanted)


def test_one_ghost_batch_is_kept_to_the_bit() -> None:
    once = net()
    model = copy.deepcopy(once)
    for norm in norms(once):
        norm.momentum = 1.0
    batchnorm.replace_norms(model, 0, "last")
    for seed in (5, 6):
        batchnorm.reset_step_statistics(model)
        assert torch.equal(model(images(16, seed)), once(images(16, seed)))
    for one, other in zip(norms(model), norms(once), strict=True):
        assert torch.equal(one.running_mean, other.running_mean)
        assert torch.equal(one.running_var, other.running_var)


def test_what_is_no_number_is_forgotten() -> None:
    model = net()
    batchnorm.replace_norms(model, 8, "last")
    model(images(16) * float("nan"))
    batchnorm.reset_step_statistics(model)
    model(images(16))
    assert all(torch.isfinite(norm.running_var).all() for norm in norms(model))


def test_running_averages_are_never_forgotten() -> None:
    model = net()
    batchnorm.replace_norms(model, 8, "running")
    model(images(16))
    kept = copy.deepcopy(model.state_dict())
    batchnorm.reset_step_statistics(model)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_torch_compile_takes_it_in_one_graph() -> None:
    model = net()
    batchnorm.replace_norms(model, 8, "last")
    compiled = copy.deepcopy(model)
    run = torch.compile(compiled, backend="eager", fullgraph=True)
    for seed in (1, 2, 3):
        for one in (model, compiled):
            batchnorm.reset_step_statistics(one)
        assert torch.equal(run(images(24, seed)), model(images(24, seed)))
    for name, value in model.state_dict().items():
        assert torch.equal(compiled.state_dict()[name], value), name


def statistics(bn_statistics: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """In one of two processes: of its own images, and after sharing."""
    rank = torch.distributed.get_rank()
    model = net()
    batchnorm.replace_norms(model, 8, bn_statistics)
    batchnorm.reset_step_statistics(model)
    model(images(16, seed=rank))
    own = [buffer.clone() for buffer in model.buffers()]
    batchnorm.share(model, 2, bn_statistics)
    return own, [buffer.clone() for buffer in model.buffers()]


@pytest.mark.parametrize("bn_statistics", ["running", "last"])
def test_two_processes_share_their_statistics(bn_statistics: str) -> None:
    (own, shared), (others, shared_there) = processes.run(2, statistics, bn_statistics)
    assert not any(torch.equal(a, b) for a, b in zip(own, others, strict=True) if a.ndim)
    for mine, theirs, here, there in zip(own, others, shared, shared_there, strict=True):
        assert torch.equal(here, there)
        if bn_statistics == "running":
            assert torch.equal(here, mine)
        else:
            torch.testing.assert_close(here.double(), (mine.double() + theirs.double()) / 2)


def test_alone_nothing_is_shared() -> None:
    model = net()
    kept = copy.deepcopy(model.state_dict())
    batchnorm.share(model, 1, "last")
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
