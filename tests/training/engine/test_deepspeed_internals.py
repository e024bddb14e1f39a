"""What we use of DeepSpeed beyond its documented interface, one test for each piece.

Of training/, only engine/deepspeed_internals.py looks into the engine, its optimizers and its
parameters. When the pin in requirements.txt changes, the failing ids say which piece moved, and the
comment at the piece says what of ours rests on it. What a piece does is tested where it is used.
"""

import ast
import importlib
import importlib.metadata
import inspect
import re

import pytest

from tests.support.launch import REPOSITORY

# Places that hold a name: a module, or a class in it.
ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
GROUPS = "deepspeed.utils.groups"
ZERO_12 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
ZERO_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
BF16 = "deepspeed.runtime.bf16_optimizer:BF16_Optimizer"
PARTITION = "deepspeed.runtime.zero.partition_parameters:Init"
MOE = "deepspeed.moe.layer:MoE"

TORCH_WRITER = "deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine:TorchCheckpointEngine"

# Functions and methods, with the parameters that we pass.
CALLED = [
    (ENGINE, "zero_optimization_stage", ""),
    (ENGINE, "get_global_grad_norm", ""),
    (ENGINE, "gradient_accumulation_steps", ""),
    (ENGINE, "train_micro_batch_size_per_gpu", ""),
    (ENGINE, "save_checkpoint", "save_dir tag client_state save_latest"),
    (ENGINE, "load_checkpoint", "load_dir tag"),
    (ENGINE, "_copy_recovery_script", "save_path"),  # replaced by nothing
    (TORCH_WRITER, "save", "state_dict path"),
    (TORCH_WRITER, "load", "path map_location"),
    (TORCH_WRITER, "makedirs", "path exist_ok"),
    (TORCH_WRITER, "preserves_storage_sharing", ""),
    ("deepspeed", "initialize", "model optimizer config dist_init_required"),
    ("deepspeed", "init_distributed", "dist_backend timeout distributed_port verbose"),
    ("deepspeed.comm", "all_to_all_single", "output tensor output_split_sizes input_split_sizes"),
    ("torch.distributed.distributed_c10d", "_set_pg_timeout", "timeout group"),
    ("torch.distributed.distributed_c10d", "_get_default_store", ""),
    (GROUPS, "_get_expert_parallel_group_dict", ""),
    (GROUPS, "_get_expert_parallel_group", "group_name"),
    (GROUPS, "_get_expert_data_parallel_group", "group_name"),
    (
        *(GROUPS, "_create_expert_and_data_parallel"),
        "expert_parallel_size_ use_data_before_expert_parallel_",
    ),
    ("deepspeed.moe.utils", "is_moe_param", "param"),
    (
        *("deepspeed.moe.utils", "split_params_into_different_moe_groups_for_optimizer"),
        "param_groups",
    ),
    ("deepspeed.utils", "safe_get_full_grad", "param"),
    (ZERO_12, "update_lp_params", ""),
    (ZERO_12, "check_overflow", "partition_gradients"),  # replaced, as the next four
    (ZERO_12, "get_grad_norm_direct", "gradients params norm_type"),
    (ZERO_12, "unscale_and_clip_grads", "grad_groups_flat total_norm"),
    (
        *(ZERO_12, "allreduce_and_copy_with_multiple_ranks"),
        "small_bucket communication_data_type bucket_ranks output_bucket process_group",
    ),
    (ZERO_12, "allreduce_bucket", "bucket communication_data_type log divide process_group"),
    (BF16, "update_lp_params", ""),
    ("deepspeed.runtime.compiler", "compile", ""),
    (ZERO_3, "checkpoint_event_prologue", ""),
    (ZERO_3, "checkpoint_event_epilogue", ""),
    (ZERO_3, "_reassign_or_swap_out_partitioned_parameters", "sub_group_id"),
]

# Attributes that are set in the source of a class and read by us.
ATTRIBUTES = [
    (ENGINE, "skipped_steps"),
    (ENGINE, "global_steps"),
    (ENGINE, "global_samples"),
    (ENGINE, "checkpoint_engine"),
    (ZERO_12, "single_partition_of_fp32_groups"),
    (ZERO_12, "bit16_groups"),
    (ZERO_12, "averaged_gradients"),
    (ZERO_12, "accumulated_grads_in_cpu"),
    (ZERO_12, "cpu_offload"),
    (ZERO_12, "clip_grad"),
    (ZERO_12, "dp_process_group"),
    (ZERO_12, "unflatten"),
    (BF16, "fp32_groups_flat_partition"),
    (BF16, "bf16_groups"),
    (ZERO_3, "fp16_groups"),
    (ZERO_3, "fp32_partitioned_groups_flat"),
    ("deepspeed.utils.tensor_fragment:tensor_fragment", "lp_fragment_address"),
    ("deepspeed.utils.tensor_fragment:tensor_fragment", "hp_fragment_address"),
    ("deepspeed.utils.tensor_fragment:fragment_address", "start"),
    ("deepspeed.utils.tensor_fragment:fragment_address", "numel"),
    (ZERO_3, "optimizer"),
]

# Facts: where, in whose source, which text, and what rests on it.
FACTS = {
    "the engine finds native MoE layers by type": (
        *(ENGINE, "_configure_distributed_model", "isinstance(module, MoE)"),
        "ExpertParallelMixture is a MoE for ZeRO 0 to 2",
    ),
    "the engine lets modules create their groups": (
        *(ENGINE, "_configure_distributed_model", "module.set_deepspeed_parallelism("),
        "ShardedExpertParallelMixture sets its groups there",
    ),
    "groups exist before weights are broadcast": (
        *(ENGINE, "_configure_distributed_model"),
        r"set_deepspeed_parallelism\([\s\S]*self\._broadcast_model\(\)",
        "experts are broadcast among the ranks that hold the same ones",
    ),
    "native MoE layers are refused under ZeRO 3": (
        *(ENGINE, "_validate_zero3_moe_compatibility", "Native DeepSpeed MoE is not supported"),
        "there is a second kind of mixture",
    ),
    "the engine counts skipped steps by overflow": (
        *(ENGINE, "_take_model_step", "self.optimizer.overflow"),
        "AgreeingEMAAdamW sets it",
    ),
    "a native MoE hands the group to its body": (
        *(MOE, "_create_process_groups", "self.deepspeed_moe._set_ep_group("),
        "MixtureBody takes it",
    ),
    "a native MoE reads these two switches": (
        *(MOE, "_create_process_groups", "self.enable_expert_tensor_parallelism"),
        "ExpertParallelMixture has them",
    ),
    "experts are parameters with allreduce off": (
        *("deepspeed.moe.utils", "is_moe_param", "allreduce"),
        "marks of shared-out experts",
    ),
    "expert files of a checkpoint go by these names": (
        *(ENGINE, "_save_moe_checkpoint", r"deepspeed_moe\.experts\.deepspeed_experts"),
        "StackedExperts unstacks itself into them",
    ),
    "ZeRO 3 shards a parameter over the group it is marked with": (
        *(PARTITION, "_convert_to_deepspeed_param", "ds_zero_partition_process_group"),
        "ShardedExpertParallelMixture marks experts",
    ),
    "ZeRO 3 gathers parameters of different groups apart": (
        *(PARTITION, "_convert_to_deepspeed_param", "params_by_group"),
        "experts and dense parameters are fetched together",
    ),
    "ZeRO 3 knows shared-out experts by their family": (
        *(ZERO_3, "_autoep_expert_parallel_group", '"autoep_expert"'),
        "ShardedExpertParallelMixture marks experts",
    ),
    "ZeRO 3 names their group by a mark": (
        *(ZERO_3, "_autoep_expert_parallel_group", '"ds_zero_partition_group_name"'),
        "ShardedExpertParallelMixture marks experts",
    ),
    "ZeRO 3 averages experts over all ranks": (
        *(ZERO_3, "_gradient_averaging_world_size"),
        r"_autoep_expert_parallel_group[\s\S]*self\.dp_process_group",
        "gradients mean the same on any layout",
    ),
    "ZeRO 3 adds the norms of all experts": (
        *(ZERO_3, "get_grad_norm_direct", r"group=autoep_ep_group"),
        "clipping means the same on any layout",
    ),
    "ZeRO 3 never mixes sharding groups in a bucket": (
        *(ZERO_3, "_get_trainable_parameter_groups", '"ds_process_group"'),
        "experts are reduced apart",
    ),
    "ZeRO 1 and 2 leave a step out whose norm is not finite": (
        *(ZERO_12, "step"),
        r"is_invalid_grad_norm\(scaled_global_grad_norm\):\s+self\.overflow = True",
        "make_steps_lean drops the check of every gradient",
    ),
    "an invalid norm of a group stays invalid": (
        *("deepspeed.runtime.utils", "combine_grad_norm_groups", "(stacked < 0)).any()"),
        "_norm_of_all returns -1",
    ),
    "gradients in bf16 are views of one flat tensor": (
        *(ZERO_12, "_build_compact_grad_partition_buffer", "GradPartitionBufferGroup("),
        "_norm_of_all looks for it",
    ),
    "a reduced gradient is added to its sum where this rank has one": (
        *(ZERO_12, "allreduce_and_copy_with_multiple_ranks"),
        r"_add_to_grad_partition_buffer\(output, synced\)",
        "_average_and_add does so for all at once",
    ),
    "the timer of throughput waits for the device unless it is off": (
        *("deepspeed.utils.timer:ThroughputTimer", "start", "if not self.config.enabled"),
        "merge_deepspeed turns it off",
    ),
    "a client optimizer of another type is allowed by a key": (
        *(ENGINE, "_do_optimizer_sanity_check", "zero_allow_untested_optimizer"),
        "EMAAdamW is one",
    ),
    "new groups take torch's default timeout": (
        *("deepspeed.comm.torch:TorchBackend", "new_group"),
        r"torch\.distributed\.new_group\(ranks\)",
        "watchdog.py gives them ours",
    ),
}


# Marks that DeepSpeed leaves on parameters.
MARKS = {
    *("_dp_group", "_hp_mapping", "ds_numel", "ds_process_group", "ds_shape", "ds_tensor"),
    "group_name",
}
PRIVATE = MARKS | {
    name
    for where, name, *_ in (*CALLED, *ATTRIBUTES)
    if (where in (GROUPS, ZERO_12, ZERO_3, BF16) and name != "optimizer")
    or (where == ENGINE and name.startswith("_"))
}
INTERNALS = "training/engine/deepspeed_internals.py"
# What other files may import.
DOCUMENTED = {
    "deepspeed",
    "deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer",
    "deepspeed.runtime.precision_config.DeepSpeedBF16Config",
    "deepspeed.runtime.zero.config.DeepSpeedZeroConfig",
    "deepspeed.utils.logger",
}


def found(where):
    module, _, name = where.partition(":")
    place = importlib.import_module(module)
    return getattr(place, name) if name else place


def undecorated(function):
    """The function behind DeepSpeed's decorators, which do not tell what they wrap."""
    while function.__closure__ and {"args", "kwargs"} <= set(function.__code__.co_varnames):
        inner = [
            c.cell_contents for c in function.__closure__ if inspect.isfunction(c.cell_contents)
        ]
        if not inner:
            break
        function = inner[0]
    return function


def ids(pieces):
    return [f"{where.rsplit('.', 1)[-1].split(':')[-1]}.{name}" for where, name, *_ in pieces]


@pytest.mark.parametrize(("where", "name", "parameters"), CALLED, ids=ids(CALLED))
def test_a_function_takes_what_we_pass(where, name, parameters):
    assert hasattr(found(where), name), f"DeepSpeed has no {where}.{name} any more"
    function = undecorated(getattr(found(where), name))

    known = inspect.signature(function).parameters

    missing = [parameter for parameter in parameters.split() if parameter not in known]
    assert not missing, f"{where}.{name} takes no {missing}, only {list(known)}"


@pytest.mark.parametrize(("where", "name"), ATTRIBUTES, ids=ids(ATTRIBUTES))
def test_an_attribute_is_there(where, name):
    source = inspect.getsource(found(where))

    is_set = re.search(rf"self\.{name}\b.* = |^    {name}: ", source, re.MULTILINE)  # or a field
    assert is_set, f"{where} sets no {name} any more"


@pytest.mark.parametrize("fact", FACTS)
def test_a_fact_holds(fact):
    where, name, text, reason = FACTS[fact]

    assert hasattr(found(where), name), f"DeepSpeed has no {where}.{name} any more: {reason}"
    source = inspect.getsource(undecorated(getattr(found(where), name)))
    is_there = text in source or re.search(text, source)
    assert is_there, f"{where}.{name} has moved ({text!r} is not in it): {reason}"


@pytest.mark.processes
def test_the_compiled_extension_that_we_leave_out_is_known_by_its_name():
    import deepspeed

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__


@pytest.mark.parametrize("package", ["deepspeed", "torch"])
def test_the_installed_version_is_the_pinned_one(package):
    pins = (REPOSITORY / "requirements.txt").read_text()
    version = importlib.metadata.version(package).split("+")[0]

    assert f"{package}=={version}\n" in pins, (
        f"{package} {version} is installed, requirements.txt pins another; what fails above says "
        "what has moved"
    )


def names_of_deepspeed(tree):
    """What a file imports of DeepSpeed, and the private names that it uses, also as texts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name.startswith("deepspeed"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deepspeed"):
            yield from (f"{node.module}.{each.name}" for each in node.names)
        elif isinstance(node, ast.Attribute) and node.attr in PRIVATE:
            yield node.attr
        elif isinstance(node, ast.Constant) and node.value in PRIVATE:
            yield node.value


def test_one_file_of_training_knows_the_insides_of_deepspeed():
    knowing = {}
    for path in (REPOSITORY / "training").rglob("*.py"):
        found = set(names_of_deepspeed(ast.parse(path.read_text()))) - DOCUMENTED
        if found:
            knowing[str(path.relative_to(REPOSITORY))] = found

    assert list(knowing) == [INTERNALS], knowing
    assert knowing[INTERNALS] >= MARKS
