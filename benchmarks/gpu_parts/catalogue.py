"""List the parts of the acceptance, the most valuable first."""

from typing import NamedTuple

from benchmarks.gpu_parts.ceilings import compare_expert_ways, measure_ceilings
from benchmarks.gpu_parts.inference import measure_inference
from benchmarks.gpu_parts.layout import count_waits, look_at_layout
from benchmarks.gpu_parts.parity import compare_with_the_cpu
from benchmarks.gpu_parts.programs import run_gpu_tests, run_out_of_memory, run_programs
from benchmarks.gpu_parts.record import Part
from benchmarks.gpu_parts.saving import measure_saving
from benchmarks.gpu_parts.step import measure_step


class Entry(NamedTuple):
    """A part: what it does, and after how many seconds it is ended."""

    run: Part
    limit_sec: int

    @property
    def title(self) -> str:
        """One line."""
        return self.run.__doc__.splitlines()[0]


PARTS = {
    "tests": Entry(run_gpu_tests, 90),
    "layout": Entry(look_at_layout, 60),
    "waits": Entry(count_waits, 60),
    "parity": Entry(compare_with_the_cpu, 90),
    "ceilings": Entry(measure_ceilings, 60),
    "step": Entry(measure_step, 150),
    "programs": Entry(run_programs, 150),
    "saving": Entry(measure_saving, 90),
    "memory": Entry(run_out_of_memory, 60),
    "experts": Entry(compare_expert_ways, 60),
    "inference": Entry(measure_inference, 80),
}
