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
    "`--loss-weight uncertainty`",
    lambda run: run.config.diffusion.loss_weight == "uncertainty",
)
KNOWN_PEAK = Condition("a GPU whose peak is known", lambda run: run.has_peak)
CUDA = Condition("a GPU", lambda _: True)  # it shares a chart with the memory of the host
RANKS = Condition("several ranks", lambda run: run.num_ranks > 1)
EXPERT_PARALLEL = Condition(
    "expert parallelism", lambda run: run.config.run.expert_parallel_size > 1
)

LEARNING, FAST = Group("Is it learning?"), Group("Is it fast?")
EXPERTS = Group("What do the experts do?", MIXTURES)
SHARES = Group("Share of the samples, block by block", MIXTURES)
SURVIVAL = Group("Did it survive?")
IMAGES = Group("How good are its images?")  # written by evaluation, into folders of their own

LOSS, MEMORY = "loss", "peak memory, GiB"
COMMUNICATION = "communication, and what nothing hides of it, %"
BUSIEST = "busiest rank of a group over the mean"
UNUSED = "idle, starved, dead and never used"
SPIKES = "loss spikes and skipped steps"
DISTANCE = "FID, sFID, or a Frechet distance: lower is better"
KERNEL = "KID, or a kernel distance: lower is better"
SHARED = "precision and recall: higher is better"
HIGHER = "Higher is better."

METRICS = (
    Metric(
        "loss/mse",
        LEARNING,
        "mean squared error of what the network predicts",
        LOSS,
        LOSS_TERMS,
        Curve("Mean squared error", "Falls; each run's last numbers are in the table."),
    ),
    Metric(
        "loss/total",
        LEARNING,
        "all terms of the loss with their weights",
        LOSS,
        LOSS_TERMS,
        Curve("Loss", "All terms with their weights."),
    ),
    Metric(
        "loss/vlb",
        LEARNING,
        "variational bound",
        "variational bound",
        LOSS_TERMS,
        Curve("Variational bound", "Trains the variances only."),
    ),
    Metric(
        "loss/prior",
        LEARNING,
        "distance of the gates from the diffusion prior",
        "distance from the prior",
        LOSS_TERMS,
        Curve("Distance from the prior", "Falls early, then stays small."),
        PRIOR,
    ),
    Metric(
        "mse_by_timestep/{range}",
        LEARNING,
        "mean squared error in a tenth of the timesteps",
        "mse by timestep (000 is clean)",
        ERRORS,
    ),
    Metric(
        "optim/grad_norm",
        LEARNING,
        "norm of the last step's gradient, before clipping",
        "gradient norm",
        curve=Curve("Gradient norm", "Peaks go with loss spikes.", is_log=True),
    ),
    Metric(
        "optim/lr",
        LEARNING,
        "learning rate of the last step",
        "learning rate",
        curve=Curve("Learning rate", ""),
    ),
    Metric(
        "uncertainty/cluster_{i}",
        LEARNING,
        "learned log variance of the error in a cluster of timesteps",
        "learned weights: log variance",
        only_with=UNCERTAINTY,
    ),
    Metric(
        "speed/samples_per_sec",
        FAST,
        "samples of all ranks per second of training; saving and drawing are no training",
        "samples per second",
        SAMPLES,
        Curve("Samples per second", "Level but for a start's first steps."),
    ),
    Metric(
        "speed/tflops_per_rank",
        FAST,
        "TFLOP/s of the model, without what is recomputed",
        "model TFLOP/s of a rank",
    ),
    Metric(
        "speed/mfu_pct",
        FAST,
        "the same in % of the GPU's bf16 peak",
        "share of the GPU's peak, %",
        only_with=KNOWN_PEAK,
    ),
    Metric(
        "speed/data_wait_pct",
        FAST,
        "time in which ranks waited for data, in % of all ranks' time",
        "waiting for data, %",
        WAITING,
        Curve("Waiting for data, %", "Near 0, or the data is too slow."),
    ),
    Metric(
        "memory/max_rss_gib",
        FAST,
        "peak memory of the main rank's process, GiB",
        MEMORY,
        curve=Curve("Peak memory of the main rank, GiB", "Level."),
    ),
    Metric(
        "memory/max_reserved_gib",
        FAST,
        "peak memory that torch reserved on the main rank's GPU, GiB",
        MEMORY,
        curve=Curve("Peak GPU memory, GiB", "Level."),
        only_with=CUDA,
    ),
    Metric(
        "comm/share_pct",
        FAST,
        "time in which a collective was under way, in % of a step of rank 0; waiting for slower "
        "ranks is part of it. Of about one step per checkpoint; TensorBoard only",
        COMMUNICATION,
        only_with=RANKS,
    ),
    Metric(
        "comm/exposed_pct",
        FAST,
        "the part of it in which nothing was computed; TensorBoard only",
        COMMUNICATION,
        only_with=RANKS,
    ),
    Metric(
        "comm/mib_sent_per_step",
        FAST,
        "MiB that a rank sends to others for its experts, recomputation included",
        "MiB that a rank sends per step, experts only",
        EXCHANGES,
        Curve("MiB that a rank sends per step", "Experts' all-to-alls only."),
        EXPERT_PARALLEL,
    ),
    Metric(
        "comm/copies_per_sample",
        FAST,
        "other ranks that a sample travels to, per block",
        sum=EXCHANGES,
        only_with=EXPERT_PARALLEL,
    ),
    Metric(
        "comm/rank_load_max_over_mean",
        FAST,
        "samples that the busiest place of a group receives, over the mean; mean over blocks",
        BUSIEST,
        EXCHANGES,
        only_with=EXPERT_PARALLEL,
    ),
    Metric(
        "comm/rank_load_max_over_mean_worst_block",
        FAST,
        "the same of the worst block",
        BUSIEST,
        EXCHANGES,
        only_with=EXPERT_PARALLEL,
    ),
    Metric(
        "moe/load_entropy",
        EXPERTS,
        "entropy of the loads relative to the largest possible, mean over blocks; 1 = even",
        "entropy of the loads, 1 = even",
        SERVED,
        Curve("Entropy of the experts' loads", "1 = even, 0 = one takes all."),
    ),
    Metric(
        "moe/load_max_over_mean",
        EXPERTS,
        "largest load over the mean load, mean over blocks; 1 = even",
        "largest load over the mean",
        SERVED,
        Curve("Largest load over the mean", "1 = even."),
    ),
    Metric("moe/idle_experts", EXPERTS, "experts without a sample in the interval", UNUSED, SERVED),
    Metric(
        "moe/starved_experts",
        EXPERTS,
        "experts with less than a tenth of the even share, idle ones included",
        UNUSED,
        SERVED,
    ),
    Metric(
        "moe/dead_experts",
        EXPERTS,
        f"experts without a sample in the last {DEAD_INTERVALS} intervals; `events` names them",
        UNUSED,
        curve=Curve("Dead experts", f"Without a sample in the last {DEAD_INTERVALS} intervals."),
    ),
    Metric("moe/never_used_experts", EXPERTS, "experts without a sample in the whole run", UNUSED),
    Metric(
        "moe/gate_drift",
        EXPERTS,
        "how far the gates moved in the interval: half the sum of absolute differences over "
        "experts, mean over blocks and timesteps; TensorBoard only",
        "how far gates moved in an interval",
    ),
    Metric(
        "moe_entropy_by_timestep/{range}",
        EXPERTS,
        "entropy of the loads of a tenth of the timesteps, mean over blocks",
        "entropy by timestep, 1 = all experts alike",
        SERVED,
    ),
    Metric(
        "moe_entropy/block_{block}",
        EXPERTS,
        "entropy of the loads of a block",
        "entropy by block",
        SERVED,
    ),
    Metric(
        "moe_max_over_mean/block_{block}",
        EXPERTS,
        "largest load of a block over its mean load",
        "largest load over the mean, by block",
        SERVED,
    ),
    Metric(
        "moe_load/block_{block}/expert_{expert}",
        SHARES,
        "fraction of the samples that the expert received; with very many experts TensorBoard has "
        "a histogram for each block instead",
        "block {block}",
        SERVED,
    ),
    Metric(
        "run/starts",
        SURVIVAL,
        "starts so far; TensorBoard only",
        "starts so far; see Images, run/history",
    ),
    Metric(
        "checkpoint/pause_sec",
        SURVIVAL,
        "seconds for which training stood still for a checkpoint; TensorBoard only",
        "training stood still for a checkpoint, seconds",
    ),
    Metric(
        "checkpoint/write_sec",
        SURVIVAL,
        "seconds in which a checkpoint was written beside training; TensorBoard only",
        "a checkpoint was written beside training, seconds",
    ),
    Metric("loss/spikes", SURVIVAL, "steps of the interval whose loss jumped", SPIKES),
    Metric("optim/skipped_steps", SURVIVAL, "steps left out since the last start", SPIKES),
    Metric("eval/fid", IMAGES, "Frechet inception distance", DISTANCE),
    Metric("eval/sfid", IMAGES, "the same of spatial features", DISTANCE),
    Metric("eval/frechet_distance", IMAGES, "the same of another network's features", DISTANCE),
    Metric("eval/kid", IMAGES, "kernel inception distance, the mean over subsets", KERNEL),
    Metric("eval/kid_std", IMAGES, "its standard deviation over subsets"),
    Metric("eval/kernel_distance", IMAGES, "the same of another network's features", KERNEL),
    Metric("eval/kernel_distance_std", IMAGES, "its standard deviation over subsets"),
    Metric(
        "eval/inception_score",
        IMAGES,
        "inception score",
        "inception score: higher is better",
        curve=Curve("inception score", HIGHER),
    ),
    Metric(
        "eval/precision",
        IMAGES,
        "share of the images that look like the reference",
        SHARED,
        curve=Curve("precision", HIGHER),
    ),
    Metric(
        "eval/recall",
        IMAGES,
        "share of the reference that images look like",
        SHARED,
        curve=Curve("recall", HIGHER),
    ),
    Metric("eval/{score}/{network}", IMAGES, "one of these by one of several --features"),
    Metric("eval/loss_{term}", IMAGES, "loss of held-out data", "held-out loss"),
)

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
