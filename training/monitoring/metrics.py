"""The registry of metrics: an entry is all it takes to sum, name, chart and document a number.

A metric with a sum is computed by interval_sums.py. The others are recorded where they are known,
most of them in reporter.py. dashboard.py, the report and the table in docs/tensorboard.md
(metrics_table.py) show what the entries say, in their order.
"""

from training.monitoring.expert_load import DEAD_INTERVALS
from training.monitoring.metric import Condition, Curve, Group, Metric
from training.monitoring.sums import ERRORS, EXCHANGES, LOSS_TERMS, SAMPLES, SERVED, WAITING

MIXTURES = Condition("experts", lambda run: run.num_experts > 0)
PRIOR = Condition("a timestep gate", lambda run: run.config.model.routing == "switch")
UNCERTAINTY = Condition(
    "`--loss-weight uncertainty`", lambda run: run.config.diffusion.loss_weight == "uncertainty"
)
KNOWN_PEAK = Condition("a GPU whose peak is known", lambda run: run.has_peak)
CUDA = Condition("a GPU", lambda _: True)  # it shares a chart with the memory of the host
RANKS = Condition("several ranks", lambda run: run.num_ranks > 1)
EXPERT_PARALLEL = Condition(
    "expert parallelism", lambda run: run.config.run.expert_parallel_size > 1
)

LOSS, MEMORY = "loss", "peak memory, GiB"
COMMUNICATION = "communication, and what nothing hides of it, %"
BUSIEST = "busiest rank of a group over the mean"
UNUSED = "idle, starved, dead and never used"
SPIKES = "loss spikes and skipped steps"
DISTANCE = "FID, sFID, or a Frechet distance: lower is better"
KERNEL = "KID, or a kernel distance: lower is better"
SHARED = "precision and recall: higher is better"
HIGHER = "Higher is better."

LEARNING = Group(
    "Is it learning?",
    Metric(
        "loss/mse",
        "mean squared error of what the network predicts",
        LOSS,
        LOSS_TERMS,
        Curve("Mean squared error", "Falls; each run's last numbers are in the table."),
    ),
    Metric(
        "loss/total",
        "all terms of the loss with their weights",
        LOSS,
        LOSS_TERMS,
        Curve("Loss", "All terms with their weights."),
    ),
    Metric(
        "loss/vlb",
        "variational bound",
        "variational bound",
        LOSS_TERMS,
        Curve("Variational bound", "Trains the variances only."),
    ),
    Metric(
        "loss/prior",
        "distance of the gates from the diffusion prior",
        "distance from the prior",
        LOSS_TERMS,
        Curve("Distance from the prior", "Falls early, then stays small."),
        PRIOR,
    ),
    Metric(
        "mse_by_timestep/{range}",
        "mean squared error in a tenth of the timesteps",
        "mse by timestep (000 is clean)",
        ERRORS,
    ),
    Metric(
        "optim/grad_norm",
        "norm of the last step's gradient, before clipping",
        "gradient norm",
        curve=Curve("Gradient norm", "Peaks go with loss spikes.", is_log=True),
    ),
    Metric(
        "optim/lr",
        "learning rate of the last step",
        "learning rate",
        curve=Curve("Learning rate", ""),
    ),
    Metric(
        "uncertainty/cluster_{i}",
        "learned log variance of the error in a cluster of timesteps",
        "learned weights: log variance",
        only_with=UNCERTAINTY,
    ),
)
FAST = Group(
    "Is it fast?",
    Metric(
        "speed/samples_per_sec",
        "samples of all ranks per second of training; saving and drawing are no training",
        "samples per second",
        SAMPLES,
        Curve("Samples per second", "Level but for a start's first steps."),
    ),
    Metric(
        "speed/tflops_per_rank",
        "TFLOP/s of the model, without what is recomputed",
        "model TFLOP/s of a rank",
    ),
    Metric(
        "speed/mfu_pct",
        "the same in % of the GPU's bf16 peak",
        "share of the GPU's peak, %",
        only_with=KNOWN_PEAK,
    ),
    Metric(
        "speed/data_wait_pct",
        "time in which ranks waited for data, in % of all ranks' time",
        "waiting for data, %",
        WAITING,
        Curve("Waiting for data, %", "Near 0, or the data is too slow."),
    ),
    Metric(
        "memory/max_rss_gib",
        "peak memory of the main rank's process, GiB",
        MEMORY,
        curve=Curve("Peak memory of the main rank, GiB", "Level."),
    ),
    Metric(
        "memory/max_reserved_gib",
        "peak memory that torch reserved on the main rank's GPU, GiB",
        MEMORY,
        curve=Curve("Peak GPU memory, GiB", "Level."),
        only_with=CUDA,
    ),
    Metric(
        "comm/share_pct",
        "time in which a collective was under way, in % of a step of rank 0; waiting for slower "
        "ranks is part of it. Of about one step per checkpoint; TensorBoard only",
        COMMUNICATION,
        only_with=RANKS,
    ),
    Metric(
        "comm/exposed_pct",
        "the part of it in which nothing was computed; TensorBoard only",
        COMMUNICATION,
        only_with=RANKS,
    ),
    Metric(
        "comm/mib_sent_per_step",
        "MiB that a rank sends to others for its experts, recomputation included",
        "MiB that a rank sends per step, experts only",
        EXCHANGES,
        Curve("MiB that a rank sends per step", "Experts' all-to-alls only."),
        EXPERT_PARALLEL,
    ),
    Metric(
        "comm/copies_per_sample",
        "other ranks that a sample travels to, per block",
        sum=EXCHANGES,
        only_with=EXPERT_PARALLEL,
    ),
    Metric(
        "comm/rank_load_max_over_mean",
        "samples that the busiest place of a group receives, over the mean; mean over blocks",
        BUSIEST,
        EXCHANGES,
        only_with=EXPERT_PARALLEL,
    ),
    Metric(
        "comm/rank_load_max_over_mean_worst_block",
        "the same of the worst block",
        BUSIEST,
        EXCHANGES,
        only_with=EXPERT_PARALLEL,
    ),
)
EXPERTS = Group(
    "What do the experts do?",
    Metric(
        "moe/load_entropy",
        "entropy of the loads relative to the largest possible, mean over blocks; 1 = even",
        "entropy of the loads, 1 = even",
        SERVED,
        Curve("Entropy of the experts' loads", "1 = even, 0 = one takes all."),
    ),
    Metric(
        "moe/load_max_over_mean",
        "largest load over the mean load, mean over blocks; 1 = even",
        "largest load over the mean",
        SERVED,
        Curve("Largest load over the mean", "1 = even."),
    ),
    Metric("moe/idle_experts", "experts without a sample in the interval", UNUSED, SERVED),
    Metric(
        "moe/starved_experts",
        "experts with less than a tenth of the even share, idle ones included",
        UNUSED,
        SERVED,
    ),
    Metric(
        "moe/dead_experts",
        f"experts without a sample in the last {DEAD_INTERVALS} intervals; `events` names them",
        UNUSED,
        curve=Curve("Dead experts", f"Without a sample in the last {DEAD_INTERVALS} intervals."),
    ),
    Metric("moe/never_used_experts", "experts without a sample in the whole run", UNUSED),
    Metric(
        "moe/gate_drift",
        "how far the gates moved in the interval: half the sum of absolute differences over "
        "experts, mean over blocks and timesteps; TensorBoard only",
        "how far gates moved in an interval",
    ),
    Metric(
        "moe_entropy_by_timestep/{range}",
        "entropy of the loads of a tenth of the timesteps, mean over blocks",
        "entropy by timestep, 1 = all experts alike",
        SERVED,
    ),
    Metric(
        "moe_entropy/block_{block}", "entropy of the loads of a block", "entropy by block", SERVED
    ),
    Metric(
        "moe_max_over_mean/block_{block}",
        "largest load of a block over its mean load",
        "largest load over the mean, by block",
        SERVED,
    ),
    only_with=MIXTURES,
)
SHARES = Group(
    "Share of the samples, block by block",
    Metric(
        "moe_load/block_{block}/expert_{expert}",
        "fraction of the samples that the expert received; with very many experts TensorBoard has "
        "a histogram for each block instead",
        "block {block}",
        SERVED,
    ),
    only_with=MIXTURES,
)
SURVIVAL = Group(
    "Did it survive?",
    Metric(
        "run/starts", "starts so far; TensorBoard only", "starts so far; see Images, run/history"
    ),
    Metric(
        "checkpoint/pause_sec",
        "seconds for which training stood still for a checkpoint; TensorBoard only",
        "training stood still for a checkpoint, seconds",
    ),
    Metric(
        "checkpoint/write_sec",
        "seconds in which a checkpoint was written beside training; TensorBoard only",
        "a checkpoint was written beside training, seconds",
    ),
    Metric("loss/spikes", "steps of the interval whose loss jumped", SPIKES),
    Metric("optim/skipped_steps", "steps left out since the last start", SPIKES),
)
IMAGES = Group(  # written by evaluation, into folders of their own
    "How good are its images?",
    Metric("eval/fid", "Frechet inception distance", DISTANCE),
    Metric("eval/sfid", "the same of spatial features", DISTANCE),
    Metric("eval/frechet_distance", "the same of another network's features", DISTANCE),
    Metric("eval/kid", "kernel inception distance, the mean over subsets", KERNEL),
    Metric("eval/kid_std", "its standard deviation over subsets"),
    Metric("eval/kernel_distance", "the same of another network's features", KERNEL),
    Metric("eval/kernel_distance_std", "its standard deviation over subsets"),
    Metric(
        "eval/inception_score",
        "inception score",
        "inception score: higher is better",
        curve=Curve("inception score", HIGHER),
    ),
    Metric(
        "eval/precision",
        "share of the images that look like the reference",
        SHARED,
        curve=Curve("precision", HIGHER),
    ),
    Metric(
        "eval/recall",
        "share of the reference that images look like",
        SHARED,
        curve=Curve("recall", HIGHER),
    ),
    Metric("eval/{score}/{network}", "one of these by one of several --features"),
    Metric("eval/loss_{term}", "loss of held-out data", "held-out loss"),
)
GROUPS = (LEARNING, FAST, EXPERTS, SHARES, SURVIVAL, IMAGES)
METRICS = tuple(metric for group in GROUPS for metric in group.metrics)


PICTURES = {
    "run/history": "the error over the steps, and below it where the run started, saved, had loss "
    "spikes and left steps out; red: a checkpoint failed or was damaged",
    "samples/ema": "a grid of samples of the averaged weights",
    "moe/timestep_to_expert": "which expert serves which timestep: a row per block and expert, "
    "timestep 0 on the left; brighter is a larger gate",
    "moe/timesteps_that_share_experts": "timesteps against timesteps: white = the same experts in "
    "every block, black = none in common",
    "moe/load_by_timestep": "whom the samples since the last picture met: a row per block and "
    "expert, a column per range of timesteps",
    "moe/load_over_time": "a band per block, time to the right: the experts' shares of the samples "
    "on one another",
}
