"""What TensorBoard opens on: charts in the order in which a person looks at a run."""

from typing import Any

from training.config.tree import Config

Chart = list[Any]  # as SummaryWriter.add_custom_scalars wants it: a kind, and regular expressions
Layout = dict[str, dict[str, Chart]]


def dashboard(
    config: Config, depth: int, num_experts: int, num_ranks: int, has_peak: bool
) -> Layout:
    """Return the layout of TensorBoard's page "custom scalars".

    Args:
        config: of the run; charts of what it does not have are left out.
        depth: blocks.
        num_experts: of a block; 0 = a model without experts.
        num_ranks: that train.
        has_peak: whether the peak of the device, which speeds are compared with, is known.
    """
    layout = {
        "Is it learning?": _learning(config),
        "Is it fast?": _speed(config, num_ranks, has_peak),
    }
    if num_experts:
        layout["What do the experts do?"] = _experts()
        layout["Share of the samples, block by block"] = {
            f"block {block:02d}": _lines(f"moe_load/block_{block:02d}/") for block in range(depth)
        }
    layout["Did it survive?"] = {
        "starts so far; see Images, run/history": _lines("run/starts"),
        "training stood still for a checkpoint, seconds": _lines("checkpoint/pause_sec"),
        "a checkpoint was written beside training, seconds": _lines("checkpoint/write_sec"),
        "loss spikes and skipped steps": _lines("loss/spikes", "optim/skipped_steps"),
    }
    return layout


def evaluation_charts() -> Layout:
    """Return the charts of a run's scores, which come with them: TensorBoard merges layouts."""
    return {
        "How good are its images?": {
            "FID, sFID, or a Frechet distance: lower is better": _lines(
                *("eval/fid", "eval/sfid", "eval/frechet_distance")
            ),
            "inception score: higher is better": _lines("eval/inception_score"),
            "precision and recall: higher is better": _lines("eval/precision", "eval/recall"),
            "held-out loss": _lines("eval/loss_"),
        }
    }


def _learning(config: Config) -> dict[str, Chart]:
    charts = {
        "loss": _lines("loss/total", "loss/mse$"),
        "variational bound": _lines("loss/vlb"),
    }
    if config.model.routing == "switch":
        charts["distance from the prior"] = _lines("loss/prior")
    charts |= {
        "mse by timestep (000 is clean)": _lines("mse_by_timestep/"),
        "gradient norm": _lines("optim/grad_norm"),
        "learning rate": _lines("optim/lr"),
    }
    if config.diffusion.loss_weight == "uncertainty":
        charts["learned weights: log variance"] = _lines("uncertainty/")
    return charts


def _speed(config: Config, num_ranks: int, has_peak: bool) -> dict[str, Chart]:
    charts = {
        "samples per second": _lines("speed/samples_per_sec"),
        "model TFLOP/s of a rank": _lines("speed/tflops_per_rank"),
    }
    if has_peak:
        charts["share of the GPU's peak, %"] = _lines("speed/mfu_pct")
    charts |= {
        "waiting for data, %": _lines("speed/data_wait_pct"),
        "peak memory, GiB": _lines("memory/"),
    }
    if num_ranks > 1:
        charts["communication, and what nothing hides of it, %"] = _lines(
            "comm/share_pct", "comm/exposed_pct"
        )
    if config.run.expert_parallel_size > 1:
        charts["MiB that a rank sends per step, experts only"] = _lines("comm/mib_sent_per_step")
        charts["busiest rank of a group over the mean"] = _lines("comm/rank_load_max_over_mean")
    return charts


def _experts() -> dict[str, Chart]:
    return {
        "entropy of the loads, 1 = even": _lines("moe/load_entropy"),
        "largest load over the mean": _lines("moe/load_max_over_mean"),
        "idle, starved, dead and never used": _lines("moe/.*_experts"),
        "how far gates moved in an interval": _lines("moe/gate_drift"),
        "entropy by timestep, 1 = all experts alike": _lines("moe_entropy_by_timestep/"),
        "entropy by block": _lines("moe_entropy/"),
        "largest load over the mean, by block": _lines("moe_max_over_mean/"),
    }


def _lines(*patterns: str) -> Chart:
    return ["Multiline", list(patterns)]
