"""Launch configurations of accelerate, DeepSpeed and this package, and whether a machine can run them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import str_to_bool

from hf_extrap.recipes.configuration import read_mapping, resolve

from .machine import Machine

ENGINES = {"NO": "one process", "MULTI_GPU": "DDP", "FSDP": "FSDP", "DEEPSPEED": "DeepSpeed"}


@dataclass
class Verdict:
    """What the configuration in the file `name` starts, why this machine cannot, in sentences, and what to know."""

    name: str
    starts: str = "unknown"
    obstacles: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def shipped() -> list[Path]:
    """The launch configurations of the checkout; none if the package is installed without it."""
    folder = Path(__file__).parents[3] / "configs"
    return sorted([*folder.glob("accelerate/*.yaml"), *folder.glob("deepspeed/*.json")])


def judge(path: str | Path, machine: Machine) -> Verdict:
    """Whether this machine can run the configuration in a file; the fields tell whose it is.

    Accelerate's loader and this package's argument classes check their own fields. Checked here: what the machine
    lacks, what starts something else without an error, and what DeepSpeed refuses after the start. FileNotFoundError
    if there is no such file, ValueError if it does not hold a mapping.
    """
    path = Path(path)
    verdict, fields = Verdict(path.name), read_mapping(path)
    try:
        if "distributed_type" in fields or "compute_environment" in fields:
            config = load_config_from_file(str(path))
            if not isinstance(config, ClusterConfig):
                raise ValueError("compute_environment is not LOCAL_MACHINE.")
            _judge_accelerate(config, machine, verdict)
        elif "task" in fields:
            verdict.starts = f"training, {fields['task']}"
            deepspeed = resolve(path).training_arguments.deepspeed
            if isinstance(deepspeed, str):
                _judge_deepspeed(Path(deepspeed), machine, verdict)
        elif path.suffix == ".json":
            verdict.starts = "DeepSpeed"
            _judge_deepspeed(path, machine, verdict)
        else:
            raise ValueError("it is not a configuration of accelerate, DeepSpeed or this package.")
    except ValueError as error:
        verdict.obstacles.append(str(error))
    return verdict


def _judge_accelerate(config: ClusterConfig, machine: Machine, verdict: Verdict) -> None:
    engine, processes, machines = config.distributed_type.value, config.num_processes, config.num_machines
    if engine not in ENGINES:
        instead = "starts one process: use MULTI_GPU, use_cpu: true" if engine == "MULTI_CPU" else "is not supported"
        raise ValueError(f"distributed_type {engine} {instead}; allowed: {', '.join(ENGINES)}.")
    if processes < 1 or processes % machines:
        raise ValueError(f"num_processes is {processes}; allowed: a multiple of num_machines, which is {machines}.")
    name, here = ENGINES[engine], processes // machines
    if engine == "FSDP":
        name = "HSDP" if config.parallelism_config else f"FSDP{config.fsdp_config.get('fsdp_version', 1)}"
    group = "" if engine == "NO" else f", {processes} processes" + (f" on {machines} machines" if machines > 1 else "")
    verdict.starts = name + (" on the CPU" if config.use_cpu else "") + group
    on_cpu = machine.deepspeed_on_cpu if engine == "DEEPSPEED" else config.use_cpu
    on_gpus = not on_cpu and engine != "NO"
    for holds, sentence in (
        (engine == "NO" and processes > 1, f"NO starts one process of the {processes}: use MULTI_GPU."),
        (engine == "FSDP" and on_cpu, "FSDP with use_cpu runs DDP instead: it needs GPUs."),
        (on_gpus and machine.gpus < here, f"it needs {here} GPUs, and there are {machine.gpus} here."),
        (on_gpus and machine.gpus and "nccl" not in machine.backends, "PyTorch was built without nccl."),
        (on_cpu and processes > 1 and "gloo" not in machine.backends, "gloo does not start."),
        (
            str_to_bool(machine.environment.get("ACCELERATE_USE_CPU", "0")) and (on_gpus or engine == "DEEPSPEED"),
            "ACCELERATE_USE_CPU is set, and the Trainer then runs DDP on the CPU instead: unset it.",
        ),
    ):
        verdict.obstacles += [sentence] * bool(holds)
    if on_cpu and engine == "DEEPSPEED":
        verdict.notes.append("on this CPU give the Trainer use_cpu: true.")
    if on_cpu and engine == "MULTI_GPU" and processes > 1:
        verdict.notes.append("a loop without the Trainer needs Accelerator(cpu=True), or its processes form no group.")
    if engine == "DEEPSPEED":
        inner = config.deepspeed_config.get("deepspeed_config_file")
        _judge_deepspeed(Path(inner) if inner else None, machine, verdict)


def _judge_deepspeed(path: Path | None, machine: Machine, verdict: Verdict) -> None:
    """Judge a JSON file of DeepSpeed; None for a configuration that accelerate makes itself."""
    if machine.no_deepspeed is not None:
        verdict.obstacles.append(machine.no_deepspeed)
    if path is None:
        return
    if not path.is_file():
        raise ValueError(f"{path} does not exist; the path is relative to the current folder.")
    fields = read_mapping(path)
    zero = fields.get("zero_optimization", {})
    verdict.starts = verdict.starts.replace("DeepSpeed", f"ZeRO stage {zero.get('stage', 0)}")
    if zero.get("stage", 0) and "optimizer" not in fields and fields.get("zero_allow_untested_optimizer") is not True:
        verdict.obstacles.append(f"{path.name} lacks zero_allow_untested_optimizer: true, which Extrapolated needs.")
    offloads = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    if offloads and fields.get("zero_force_ds_cpu_optimizer") is not False:
        verdict.obstacles.append(f"{path.name} offloads the optimizer: set zero_force_ds_cpu_optimizer: false.")
    if "optimizer" in fields:
        verdict.notes.append(f"{path.name} has its own optimizer: extrapolation needs a file without it.")
    if "gradient_clipping" not in fields:
        verdict.notes.append(f"{path.name} sets no gradient_clipping; DeepSpeed then clips at 1.0.")
