"""The average of a plain module's weights, against timm's and by hand."""

import io
import math

import pytest
import torch
from torch import nn

from groundwork.pretrain.engine.ema import Ema, EmaConfig, ema_of_module
from groundwork.pretrain.engine.parts import joined_parts


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))


def trained(
    steps: int, config: EmaConfig
) -> tuple[nn.Sequential, Ema, list[dict[str, torch.Tensor]]]:
    """A module after some steps, its average, and its state after each step."""
    module = model()
    module(torch.randn(2, 3, 5, 5))  # materialise
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    ema = ema_of_module(module, config)
    states = [{k: v.clone() for k, v in module.state_dict().items()}]
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(2, 3, 5, 5)).square().mean().backward()
        optimizer.step()
        ema.update()
        states.append({k: v.clone() for k, v in module.state_dict().items()})
    return module, ema, states


def test_the_average_is_timms() -> None:
    from timm.utils import ModelEmaV3

    module = model()
    module(torch.randn(2, 3, 5, 5))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    ema = ema_of_module(module, EmaConfig(decay=0.9, warmup=False))
    timms = ModelEmaV3(module, decay=0.9)
    for _ in range(6):
        optimizer.zero_grad()
        module(torch.randn(2, 3, 5, 5)).square().mean().backward()
        optimizer.step()
        ema.update()
        timms.update(module)
    with ema.applied_to(module):
        for (key, got), expected in zip(
            module.state_dict().items(), timms.module.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(got, expected, msg=key)


def test_the_warm_up_forgets_the_initial_weights() -> None:
    _, ema, states = trained(4, EmaConfig(decay=0.25))
    expected = states[0]["0.weight"]
    for n, state in enumerate(states[1:], start=1):
        decay = min(0.25, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * state["0.weight"]
    got = ema.shadow["0.weight"]
    torch.testing.assert_close(got.values.view(got.shape), expected)
    assert ema.decay() == 0.25
    assert ema_of_module(nn.Linear(1, 1), EmaConfig()).decay() == pytest.approx(2 / 11)


def test_the_exponential_warm_up_is_mmdetections() -> None:
    momentum, steps = 1e-4, 2000  # of ExpMomentumEMAHook; its iterations begin at 0
    ema = ema_of_module(nn.Linear(1, 1), EmaConfig(1 - momentum, warmup_steps=steps))
    for iteration in (0, 1, 500, 2000, 10_000, 65_987):
        ema.updates = iteration
        weight = (1 - momentum) * math.exp(-(1 + iteration) / steps) + momentum
        assert 1 - ema.decay() == pytest.approx(weight, rel=1e-9)
    with pytest.raises(ValueError, match=r"warmup_steps is 0 and ema\.warmup True"):
        EmaConfig(warmup_steps=0)
    with pytest.raises(ValueError, match=r"warmup_steps is 9 and ema\.warmup False"):
        EmaConfig(warmup=False, warmup_steps=9)


def test_applied_within_and_gone_after_even_an_error() -> None:
    module, ema, states = trained(3, EmaConfig(decay=0.9))
    with pytest.raises(RuntimeError, match="within"), ema.applied_to(module):
        assert not torch.equal(module.state_dict()["0.weight"], states[-1]["0.weight"])
        assert not torch.equal(module.state_dict()["1.running_var"], states[-1]["1.running_var"])
        assert torch.equal(module.state_dict()["1.num_batches_tracked"], torch.tensor(4))
        raise RuntimeError("within")
    for key, value in module.state_dict().items():
        assert torch.equal(value, states[-1][key]), key


def test_the_average_of_bf16_weights_is_float32() -> None:
    """Updates a bf16 shadow would swallow: 1 + 1e-3 is 1 in bf16."""
    module = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        module.weight.fill_(1.0)
    ema = ema_of_module(module, EmaConfig(decay=0.999, warmup=False))
    with torch.no_grad():
        module.weight.fill_(2.0)
    for _ in range(10):
        ema.update()
    assert ema.shadow["weight"].values.dtype == torch.float32
    assert float(ema.shadow["weight"].values) == pytest.approx(2 - 0.999**10, rel=1e-5)


def test_memory_formats_and_frozen_parameters() -> None:
    module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    module.bias.requires_grad_(False)
    ema = ema_of_module(module, EmaConfig(decay=0.5, warmup=False))
    before = module.weight.detach().clone()
    with torch.no_grad():
        module.weight += 2.0
    ema.update()
    assert ema.shadow.keys() == {"weight"}
    with ema.applied_to(module):
        torch.testing.assert_close(module.weight.detach(), before + 1.0)
        assert module.weight.is_contiguous(memory_format=torch.channels_last)


def test_state_is_saved_without_code_and_restored_bit_for_bit() -> None:
    module, ema, _ = trained(3, EmaConfig(decay=0.9))
    buffer = io.BytesIO()
    torch.save(ema.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    restored = ema_of_module(module, EmaConfig(decay=0.9))
    restored.load_state_dict(state)
    assert restored.updates == 3
    for other in (ema, restored):
        other.update()
    for key, part in ema.shadow.items():
        assert torch.equal(part.values, restored.shadow[key].values)
    for key, value in ema.shadow_buffers.items():
        assert torch.equal(value, restored.shadow_buffers[key])


def test_states_of_other_modules_are_refused() -> None:
    _, ema, _ = trained(1, EmaConfig())
    other = ema_of_module(nn.Linear(2, 2), EmaConfig())
    with pytest.raises(ValueError, match=r"of other weights: 0\.bias, 0\.weight"):
        other.load_state_dict(ema.state_dict())
    wider = ema_of_module(nn.Linear(3, 2), EmaConfig())
    with pytest.raises(ValueError, match=r"weight is cut into other parts"):
        wider.load_state_dict(other.state_dict())
    with (
        pytest.raises(ValueError, match=r"the module has no 0\.bias"),
        ema.applied_to(nn.Linear(1, 1)),
    ):
        pass
    with pytest.raises(ValueError, match=r"ema\.decay is 1\.0"):
        EmaConfig(decay=1.0)


def test_parts_are_joined_and_gaps_found() -> None:
    """As ZeRO-3 cuts 5 elements for 4 ranks: parts of 2, padded, the last one padding alone."""
    whole = torch.arange(5.0)
    padded = torch.cat([whole, torch.full((3,), torch.nan)])
    ranks = [
        {"w": {"begin": 2 * r, "shape": [5, 1], "values": padded[2 * r : 2 * r + 2]}}
        for r in range(4)
    ]
    assert torch.equal(joined_parts(ranks)["w"], whole.view(5, 1))
    with pytest.raises(ValueError, match="4 of 5 elements of w were saved"):
        joined_parts([ranks[0], ranks[1], ranks[3]])
