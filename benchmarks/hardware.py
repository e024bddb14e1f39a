"""Constants of the machines for which scaling.py predicts.

Shares of a vendor's peak that are called assumed were not measured by us. The constants of a CPU
are fitted on the machine that runs the program (link_fit.py).
"""

import argparse
import dataclasses
import math
import typing
from dataclasses import dataclass

from data_tools.errors import ConfigError

TERA, GIGA, MICRO, GIB = 1e12, 1e9, 1e-6, 2**30


def _constant(help_text: str, default: float = dataclasses.MISSING, *, low: float = 0.0) -> float:
    return dataclasses.field(default=default, metadata={"help": help_text, "low": low})


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Nodes of equal ranks; a rank is a GPU, or a process of a CPU node.

    Every number is also a flag of scaling.py. A link's bandwidth is that of one direction.
    """

    name: str
    source: str
    has_bf16: bool = True
    is_synchronous: bool = False  # the host computes: launching and computing add up
    ranks_per_node: int = _constant("ranks of a node", 8, low=1)
    cores_per_node: float = _constant("ranks of a node that run at full speed", math.inf, low=1)
    bf16_tflops: float = _constant("dense bf16 products, peak, TFLOP/s")
    fp32_tflops: float = _constant("fp32 products, peak, TFLOP/s")
    matmul_share: float = _constant("share of that peak that large products reach", 1.0)
    half_width: float = _constant("width of a model whose products reach half of that share", 0.0)
    memory_gb_per_sec: float = _constant("memory bandwidth of a rank, GB/s")
    node_memory_gb_per_sec: float = _constant("memory bandwidth of a node, GB/s", math.inf)
    pointwise_passes: float = _constant(
        "times that the bytes kept for the backward pass cross the memory bus", 4.0
    )
    block_overhead_us: float = _constant("host time of a block, forward and backward, us", 0.0)
    step_overhead_us: float = _constant("time of an optimizer step beside all else, us", 0.0)
    gather_overhead_us: float = _constant("ZeRO 3: host time per block beside the link's, us", 0.0)
    node_link_gb_per_sec: float = _constant("link of a rank inside its node, GB/s")
    node_latency_us: float = _constant("latency of that link, us")
    net_link_gb_per_sec: float = _constant("link of a rank between nodes, GB/s", math.inf)
    net_latency_us: float = _constant("latency of that link, us", 0.0)
    all_reduce_share: float = _constant("share of a link that an all-reduce reaches", 1.0)
    all_to_all_share: float = _constant("share of a link that an all-to-all reaches", 1.0)
    all_gather_share: float = _constant("share of a link that an all-gather reaches", 1.0)
    overlap: float = _constant("share of ZeRO's traffic that can hide behind computing", 0.0)
    memory_gib: float = _constant("memory of a rank, GiB")
    reserved_gib: float = _constant("memory that the model cannot have, GiB", 0.0)

    def products_per_sec(self, precision: str, width: int) -> float:
        """Return FLOP/s of a model's products.

        Args:
            precision: "bf16", "autocast" or "fp32".
            width: of the model; small products reach less of the peak.
        """
        peak = self.fp32_tflops if precision == "fp32" else self.bf16_tflops
        return TERA * peak * self.matmul_share * width / (width + self.half_width)


ASSUMED = {
    "matmul_share": 0.6,
    "half_width": 150.0,
    "block_overhead_us": 800.0,
    "step_overhead_us": 3000.0,
    "gather_overhead_us": 300.0,
    "all_to_all_share": 0.6,
    "overlap": 0.8,
    "reserved_gib": 6.0,
}
ASSUMPTIONS = (
    "assumed by us: products reach 60 % of that peak less what small widths lose, links 80 % of "
    "their nominal rate, memory 85 %, all-to-all 60 % of what a ring reaches, overlap 0.8"
)
SHARES = ("matmul_share", "overlap", "all_reduce_share", "all_gather_share", "all_to_all_share")
LINK_SHARE, MEMORY_SHARE = 0.8, 0.85


def _nvidia(
    *,
    model: str,
    memory: str,
    bf16_tflops: float,
    fp32_tflops: float,
    memory_gb_per_sec: float,
    memory_gib: float,
    nvlink_gb_per_sec: float,
    network_gbit_per_sec: float,
) -> Machine:
    name = model.split()[0]
    return Machine(
        name=name.lower(),
        source=f"NVIDIA's data sheet of the {model}: dense bf16, fp32, {memory}, NVLink "
        f"{2 * nvlink_gb_per_sec:g} GB/s in both directions; 8 GPUs a node with "
        f"{network_gbit_per_sec:g} Gb/s InfiniBand each, as in a DGX {name}; {ASSUMPTIONS}",
        bf16_tflops=bf16_tflops,
        fp32_tflops=fp32_tflops,
        memory_gb_per_sec=MEMORY_SHARE * memory_gb_per_sec,
        memory_gib=memory_gib,
        node_link_gb_per_sec=LINK_SHARE * nvlink_gb_per_sec,
        node_latency_us=3.0,
        net_link_gb_per_sec=LINK_SHARE * network_gbit_per_sec / 8,
        net_latency_us=8.0,
        **ASSUMED,
    )


MACHINES = {
    machine.name: machine
    for machine in (
        _nvidia(
            model="H100 SXM",
            memory="HBM3",
            bf16_tflops=989.0,
            fp32_tflops=67.0,
            memory_gb_per_sec=3350.0,
            memory_gib=79.0,
            nvlink_gb_per_sec=450.0,
            network_gbit_per_sec=400.0,
        ),
        _nvidia(
            model="H200 SXM",
            memory="HBM3e",
            bf16_tflops=989.0,
            fp32_tflops=67.0,
            memory_gb_per_sec=4800.0,
            memory_gib=140.0,
            nvlink_gb_per_sec=450.0,
            network_gbit_per_sec=400.0,
        ),
        _nvidia(
            model="A100 SXM 80 GB",
            memory="HBM2e",
            bf16_tflops=312.0,
            fp32_tflops=19.5,
            memory_gb_per_sec=2039.0,
            memory_gib=79.0,
            nvlink_gb_per_sec=300.0,
            network_gbit_per_sec=200.0,
        ),
    )
}


def constants() -> list[dataclasses.Field]:
    """List the fields of a machine that are numbers."""
    return [field for field in dataclasses.fields(Machine) if "help" in field.metadata]


def flag_of(field: dataclasses.Field) -> str:
    """Return the flag that overrides a constant."""
    return "--" + field.name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every constant."""
    group = parser.add_argument_group("constants of the machine", "in place of the named ones")
    for field in constants():
        group.add_argument(
            flag_of(field), type=float, metavar="X", default=None, help=field.metadata["help"]
        )


def overridden(machine: Machine, args: argparse.Namespace) -> Machine:
    """Return the machine with the constants that flags give.

    Raises:
        ConfigError: a number is out of range.
    """
    hints = typing.get_type_hints(Machine)
    changes = {}
    for field in constants():
        value = getattr(args, field.name)
        if value is None:
            continue
        low = field.metadata["low"]
        if not value >= low:
            raise ConfigError(f"{flag_of(field)} must be at least {low:g}, not {value:g}.")
        if hints[field.name] is int and value != int(value):
            raise ConfigError(f"{flag_of(field)} must be a whole number, not {value:g}.")
        changes[field.name] = hints[field.name](value)
    for name in ("memory_gb_per_sec", "node_link_gb_per_sec", "net_link_gb_per_sec"):
        if changes.get(name) == 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be more than 0.")
    for name in SHARES:
        if not changes.get(name, 1.0) <= 1.0:
            raise ConfigError(f"--{name.replace('_', '-')} is a share; use 0 to 1.")
    return dataclasses.replace(machine, **changes)


def describe(machine: Machine) -> str:
    """Return the constants as the flags that would set them."""
    pairs = (f"{flag_of(f)} {getattr(machine, f.name):.4g}" for f in constants())
    return f"{machine.name}: {machine.source}\n" + "\n".join(f"  {pair}" for pair in pairs)


def shared_machine(machine: Machine, world_size: int) -> Machine:
    """Return the machine with its ranks slowed down as they share a node's cores and memory bus."""
    ranks = min(world_size, machine.ranks_per_node)
    slower = max(1.0, ranks / machine.cores_per_node)
    bandwidth = min(machine.memory_gb_per_sec / slower, machine.node_memory_gb_per_sec / ranks)
    return dataclasses.replace(
        machine,
        matmul_share=machine.matmul_share / slower,
        memory_gb_per_sec=bandwidth,
        block_overhead_us=machine.block_overhead_us * slower,
        step_overhead_us=machine.step_overhead_us * slower,
        gather_overhead_us=machine.gather_overhead_us * slower,
        node_link_gb_per_sec=machine.node_link_gb_per_sec / slower,
        node_latency_us=machine.node_latency_us * slower,
    )
