import math

import pytest
import torch
from torch import nn

from conftest import tiny_config
from looplm.errors import ConfigError
from looplm.model.looped import LoopedLM
from looplm.optim.groups import OptimizerConfig, make_optimizers, set_lr_scale
from looplm.optim.lion import Lion
from looplm.optim.schedule import ScheduleConfig


@pytest.mark.parametrize("others", ["adamw", "lion"])
@pytest.mark.parametrize("matrices", ["muon", "normuon", "adamw", "lion"])
def test_every_parameter_is_in_exactly_one_group(matrices: str, others: str) -> None:
    model = LoopedLM(tiny_config("inject.kind=diagonal", "smear={kind: channel, n_back: 2}"))
    optimizers = make_optimizers(model, OptimizerConfig(matrices=matrices, others=others))  # type: ignore[arg-type]
    assert len(optimizers) == (1 if matrices == others else 2)
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_injection_norms_and_smear_are_never_decayed() -> None:
    model = LoopedLM(tiny_config("inject={kind: diagonal, output_map: true}", "smear={kind: channel, n_back: 2}"))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = set()
    for optimizer in make_optimizers(model, OptimizerConfig(weight_decay=0.1)):
        for group in optimizer.param_groups:
            if group["weight_decay"]:
                decayed |= {names[id(p)] for p in group["params"]}
    assert "embed.weight" in decayed
    assert "core.0.ffn.up.weight" in decayed
    assert not [name for name in decayed if "norm" in name or "inject" in name or "smear" in name]


def test_muon_moves_matrices_by_an_orthogonal_update() -> None:
    model = LoopedLM(tiny_config())
    optimizers = make_optimizers(model, OptimizerConfig(muon_lr=0.1))
    weight = model.core[0].attention.q.weight
    before = weight.detach().clone()
    # a full-rank gradient with singular values a factor of ten apart: Muon levels them
    u, _, v = torch.linalg.svd(torch.randn(weight.shape), full_matrices=False)
    weight.grad = u @ torch.diag(torch.linspace(1, 10, v.shape[0])) @ v
    for optimizer in optimizers:
        optimizer.step()
    scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
    singular = torch.linalg.svdvals((weight.detach() - before) / 0.1) / scale
    assert bool((singular > 0.5).all())
    assert bool((singular < 1.5).all())


def test_schedule_warms_up_holds_and_decays() -> None:
    schedule = ScheduleConfig(warmup=0.1, decay=0.5, final=0.2)
    assert schedule.scale(0.05) == pytest.approx(0.5)
    assert schedule.scale(0.1) == schedule.scale(0.5) == 1.0
    assert schedule.scale(0.75) == pytest.approx(0.6)
    assert schedule.scale(1.0) == pytest.approx(0.2)
    assert 0 < schedule.scale(0.0) < 0.01


def test_the_scale_multiplies_every_peak_rate() -> None:
    optimizers = make_optimizers(LoopedLM(tiny_config()), OptimizerConfig(muon_lr=0.02, adamw_lr=0.003))
    for scale in (0.5, 0.1):
        set_lr_scale(optimizers, scale)
        rates = sorted({group["lr"] for optimizer in optimizers for group in optimizer.param_groups})
        assert rates == pytest.approx([0.003 * scale, 0.02 * scale])


def test_groups_change_what_their_pattern_matches_and_the_first_match_counts() -> None:
    model = LoopedLM(tiny_config())
    groups = {"core.*.q.weight": {"lr": 0.5}, "core.*": {"weight_decay": 0.0}, "embed.weight": {"lr": 10}}
    config = OptimizerConfig.model_validate({"weight_decay": 0.1, "muon_lr": 0.02, "adamw_lr": 0.003, "groups": groups})
    told = {
        id(parameter): (group["lr"], group["weight_decay"])
        for optimizer in make_optimizers(model, config)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    core = model.core[0]
    assert told[id(core.attention.q.weight)] == (0.01, 0.1)
    assert told[id(core.attention.k.weight)] == (0.02, 0.0)
    assert told[id(model.embed.weight)] == (pytest.approx(0.03), 0.1)
    with pytest.raises(ConfigError, match=r"\['crore\.\*'\] match no parameter; there is .*core\.0"):
        make_optimizers(model, OptimizerConfig.model_validate({"groups": {"crore.*": {}, "core.*": {}}}))


def test_a_cosine_schedule_is_the_textbook_one() -> None:
    schedule = ScheduleConfig(warmup=0.1, decay=0.9, shape="cosine", final=0.1)
    for progress in (0.1, 0.3, 0.55, 0.9, 1.0):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9)) / 2
        assert schedule.scale(progress) == pytest.approx(expected)


def test_lion_takes_the_published_steps() -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(5, 3))
    p, m = parameter.detach().clone(), torch.zeros(5, 3)
    optimizer = Lion([parameter], lr=0.1, betas=(0.9, 0.99), weight_decay=0.3)
    for _ in range(4):
        parameter.grad = torch.randn(5, 3)
        g = parameter.grad.clone()
        p = p * (1 - 0.1 * 0.3) - 0.1 * torch.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), p)
