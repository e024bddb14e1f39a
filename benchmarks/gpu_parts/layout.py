"""Look at addresses, strides and waits of the host: they cost speed and no CPU shows it."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from benchmarks.gpu_parts.engines import Trainer, narrow_network
from benchmarks.gpu_parts.record import Record, Setting
from benchmarks.measure import HostReads, cuda_waits
from models.network_options import NetworkOptions
from models.switch_dit import SwitchDiT

ALIGNMENT = 16  # bytes, for Hopper's fast products and for grouped ones
STAGES = ("zero2", "zero1", "zero3", "zero0")
# Of a step under ZeRO 2: the gates', the norm's, the end of the backward pass's; one to spare.
MAX_WAITS = 4
SMALL = NetworkOptions(
    input_size=(16, 16),
    patch_size=2,
    in_channels=4,
    hidden_size=64,
    depth=2,
    num_heads=4,
    num_classes=10,
    num_experts=3,
    top_k=2,
)


def look_at_layout(setting: Setting, record: Record) -> None:
    """Strides of the residual stream in every block; addresses of the weights on every stage."""
    model = SwitchDiT(SMALL).to(setting.device)
    strides: list[bool] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: strides.append(args[0].is_contiguous()))
    x, t, y = small_batch(setting.device, 4)
    model(x, t, y)
    record.check(all(strides), f"the residual stream is contiguous in every block: {strides}")
    for stage in STAGES:
        with narrow_network("XL"):
            trainer = Trainer(setting, "xl", stage, 2)
        record.check(*_are_aligned(trainer, stage))
        trainer.close()


def _are_aligned(trainer: Trainer, stage: str) -> tuple[bool, str]:
    parameters = dict(trainer.engine.module.named_parameters())
    off = [
        name
        for name, parameter in parameters.items()
        if getattr(parameter, "ds_tensor", parameter).data_ptr() % ALIGNMENT
        and len(getattr(parameter, "ds_shape", parameter.shape)) > 1
    ]
    matrices = sum(len(getattr(p, "ds_shape", p.shape)) > 1 for p in parameters.values())
    shown = f", such as {off[0]}" if off else ""
    text = f"{stage}: bf16 matrices lie at multiples of {ALIGNMENT} bytes; "
    return not off, f"{text}{len(off)} of {matrices} do not{shown}"


def count_waits(setting: Setting, record: Record) -> None:
    """Where the host waits for the device in a step of the real engine."""
    trainer = Trainer(setting, "demo", "zero2", 8)
    for i in range(3):
        trainer.step(i)
    with _whole_device_waits() as whole:
        waits = waits_of(lambda: trainer.step(3), setting)
    trainer.close()
    for place, count in (waits + whole).items():
        record.remark(f"{count} x {place}")
    record.number("waits of the host, a step", waits.total())
    record.number("waits for the whole device, a step", whole.total())
    if setting.is_gpu:
        own = [place for place in waits if "stop_signal" in place]
        record.check(not own, "posting and reading the stop signal waits for nothing")
        record.check(
            whole.total() <= 1, f"DeepSpeed waits for the whole device {whole.total()} times, <= 1"
        )
        total = (waits + whole).total()
        record.check(total <= MAX_WAITS, f"the host waits {total} times a step, <= {MAX_WAITS}")


def waits_of(fn: Callable[[], object], setting: Setting) -> Counter[str]:
    """Count the waits of fn by place; on a CPU the calls that would wait on a GPU."""
    if setting.is_gpu:
        return cuda_waits(fn)
    with HostReads() as reads:
        fn()
    return reads.counts


@contextmanager
def _whole_device_waits() -> Iterator[Counter[str]]:
    """Count DeepSpeed's waits for the whole device, which torch's debug mode does not see."""
    from deepspeed.accelerator import get_accelerator

    kind, counts = type(get_accelerator()), Counter()
    synchronize = kind.synchronize

    def counting(self: object, *args: object) -> object:
        counts["DeepSpeed's synchronize"] += 1
        return synchronize(self, *args)

    with mock.patch.object(kind, "synchronize", counting):
        yield counts


def small_batch(device: torch.device, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw noisy latents, timesteps and labels for a network of SMALL's options."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, SMALL.in_channels, *SMALL.input_size, generator=generator)
    t = torch.randint(SMALL.num_timesteps, (size,), generator=generator)
    y = torch.randint(SMALL.num_classes, (size,), generator=generator)
    return x.to(device), t.to(device), y.to(device)
