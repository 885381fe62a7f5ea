import pytest
import torch

from conftest import tiny_config
from looplm.model.looped import LoopedLM
from looplm.optim.groups import OptimizerConfig, make_optimizers, set_lr_scale
from looplm.optim.schedule import ScheduleConfig


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_every_parameter_is_in_exactly_one_group(matrices: str) -> None:
    model = LoopedLM(tiny_config("inject.kind=diagonal", "smear={kind: channel, n_back: 2}"))
    optimizers = make_optimizers(model, OptimizerConfig(matrices=matrices))  # type: ignore[arg-type]
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
