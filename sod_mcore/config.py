"""Every setting of a run: one tree of typed sections, from YAML, overridden by ``key=value``.

The docstring under a field is its documentation: ``--help`` and ``docs/config_reference.yaml`` are
generated from it. Sections named ``student.megatron``, ``optimizer.megatron`` and ``ddp`` carry
Megatron-Core's own field names through; ``student/`` checks those names before anything is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)
"""Unknown keys are refused; attribute docstrings become the fields' documentation."""

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]


class ConfigError(Exception):
    """A setting that cannot work; the message names the field, the value and the mend."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class RunConfig:
    """Length, place and bookkeeping of the run."""

    directory: str
    """Folder for everything the run writes: checkpoints, weights, logs, metrics."""
    steps: Positive = 100
    """Training steps; one step is one rollout batch."""
    seed: int = 1
    """Seeds data order, mini-batch assignment and Megatron's random state."""
    save_every: NonNegative = 10
    """Steps between checkpoints; 0 saves only at the end or when stopped."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints kept; older ones are deleted after a new one is complete."""
    resume: Literal["auto", "never"] = "auto"
    """"auto" continues from the newest complete checkpoint in ``directory``."""
    export: str | None = None
    """Hugging Face folder that receives the final weights; null exports none."""
    record: str | None = None
    """Folder that receives each step's trajectories as a recorded batch."""
    replay: str | None = None
    """Recorded batch (or folder of them) to train on, without any engine."""
    stop_file: str | None = None
    """When this file appears the run saves a checkpoint and ends; default: directory/stop."""
    stop_grace_seconds: Seconds = 20.0
    """Time from SIGINT or SIGTERM until a rank that has not ended is ended by force. torchrun kills
    after 30 s; for steps longer than this raise both (torchrun --shutdown-timeout), or use the
    stop file, which has no limit."""
    collective_timeout_seconds: Seconds = 600.0
    """Longest time that ranks wait for each other in training; rollouts have their own deadline."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class StudentConfig:
    """The model that is trained."""

    model_path: str
    """Hugging Face folder: weights to start from, architecture, tokenizer, chat template."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Compute precision; bf16 keeps float32 main parameters in the optimizer."""
    packing: Literal["packed", "padded"] = "packed"
    """How trajectories share a micro-batch: end to end in one row, or one row each with padding."""
    micro_batch_tokens: Positive = 16384
    """Upper bound of tokens a micro-batch (padding included); a longer trajectory gets its own."""
    lm_head: Literal["full", "chunked"] = "full"
    """Output layer and loss: "full" has the logits of a micro-batch's loss tokens at once and
    overwrites them by their gradient; "chunked" has those of lm_head_chunk_rows tokens at a time,
    which saves memory from some thousand tokens on (docs/fused_op.md)."""
    lm_head_chunk_rows: Positive = 1024
    """Tokens whose logits "chunked" holds at a time."""
    lm_head_dtype: Literal["bf16", "fp32"] | None = None
    """Precision of the logits; null takes the model's. fp32 logits of a bf16 model need lm_head:
    chunked; on both sides they brought the mean gap of trainer and engine from 0.036 to 0.024 nats
    a token (135M parameters, docs/fused_op.md)."""
    transformer_implementation: Literal["auto", "transformer_engine", "local"] = "auto"
    """Whose transformer layers: "auto" takes Transformer Engine's where they can be used (it is
    installed, CUDA is there, precision is bf16), else Megatron's own with torch's attention."""
    megatron: dict[str, Any] = Field(default_factory=dict)
    """Fields of Megatron-Core's TransformerConfig / ModelParallelConfig, by their own names, for
    example tensor_model_parallel_size, pipeline_model_parallel_size, sequence_parallel."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class OptimizerConfig:
    """Learning rate schedule, and Megatron-Core's optimizer."""

    lr: Annotated[float, Field(ge=0)] = 1e-6
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the end of the decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay after warm-up; the horizon is all optimizer updates of the run."""
    warmup_updates: NonNegative = 0
    """Optimizer updates of linear warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    distributed: bool = False
    """Shard the optimizer state over data-parallel ranks (Megatron's distributed optimizer)."""
    megatron: dict[str, Any] = Field(default_factory=dict)
    """Further fields of Megatron-Core's OptimizerConfig, by their own names."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class TopKConfig:
    """Distillation on the teacher's K likeliest tokens plus one bucket for all others."""

    k: NonNegative = 0
    """Teacher candidates a token; 0 turns the term off and asks the teacher for none."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "reverse_kl"
    """Divergence between the bucketed distributions; always a differentiable loss."""
    coefficient: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the term; each token is further weighted by its step weight."""
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Mixture weight of the teacher for "jsd"."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class AlgorithmConfig:
    """What is optimised (sections of the SOD paper in brackets)."""

    prompts_per_step: Positive = 64
    """Prompts sampled in a training step."""
    group_size: Positive = 16
    """Samples of each prompt; their rewards are compared with each other."""
    prompts_per_mini_batch: Positive = 16
    """Whole groups in one optimizer update; must divide prompts_per_step."""
    epochs: Positive = 1
    """Passes over the batch of a step."""
    grpo_coefficient: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the group-relative advantage (Eq. 2)."""
    normalize_by_std: bool = True
    """Divide group advantages by the group's standard deviation."""
    distillation: Literal["advantage", "k2_loss", "k3_loss", "none"] = "advantage"
    """What becomes of the teacher's log-prob of the sampled token: an advantage (k1, as the paper),
    a k2 loss (expected gradient of the reverse KL), a k3 loss (of the forward KL), or nothing."""
    distillation_coefficient: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the sampled-token distillation term (Eq. 10)."""
    topk: TopKConfig = Field(default_factory=TopKConfig)
    """Distillation on the teacher's top-K candidates."""
    weighting: str = "sod"
    """Rule of the step weights: "sod": min((d_1 + epsilon) / (d_k + epsilon), 1 + delta) (Eq. 7);
    "uniform": 1; "failure_decay": decay^(k - k_err) after the first failed tool call;
    "failure_mask": 0 after it; "reward_gate": gate_max * sigmoid(-group advantage) for all steps;
    or package.module:function, a function of yours (sod_mcore/algorithm/weighting.py)."""
    weight_epsilon: Annotated[float, Field(gt=0)] = 1e-6
    """epsilon of Eq. 7."""
    weight_delta: Annotated[float, Field(ge=0)] = 0.2
    """delta of Eq. 7; .inf for no clip."""
    weight_first_divergence_floor: Annotated[float, Field(ge=0)] = 0.0
    """Beyond the paper: d_1 counts as at least this many nats, so that a first step which all but
    agrees with the teacher does not mute every later one. 0 is off."""
    weight_prior_tokens: Annotated[float, Field(ge=0)] = 0.0
    """Beyond the paper: d_k of short steps is drawn towards the sample's mean d over all its
    tokens, (n_k d_k + prior d) / (n_k + prior) for a step of n_k tokens. 0 is off."""
    weight_failure_decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Factor a step after the first failed tool call, for "failure_decay"."""
    weight_gate_max: Annotated[float, Field(gt=0)] = 0.1
    """Largest share of the teacher, for "reward_gate"."""
    log_ratio_cap: Annotated[float, Field(gt=0)] | None = None
    """Beyond the paper: teacher minus student counts as at most this many nats either way in the
    distillation advantage. null is off."""
    clip_low: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Lower clip of the probability ratio."""
    clip_high: Annotated[float, Field(ge=0)] = 0.28
    """Upper clip of the probability ratio."""
    dual_clip: Annotated[float, Field(gt=1)] = 3.0
    """Bound on the loss of negative advantages, as a multiple of the advantage."""
    old_logprobs: Literal["recompute", "rollout"] = "recompute"
    """Where the old log-probs come from: a forward pass of the trainer, or the rollout engine."""
    tis_cap: Annotated[float, Field(gt=0)] | None = None
    """Cap of truncated importance sampling against the rollout's log-probs; null turns it off."""
    entropy_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Entropy bonus."""
    teacher_logprob_floor: Annotated[float, Field(lt=0)] = -50.0
    """Non-finite or smaller teacher log-probs are raised to this value and counted."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class RolloutConfig:
    """Multi-turn sampling."""

    max_turns: Positive = 16
    """Assistant turns, the final answer included; so max_turns - 1 tool calls at most."""
    max_response_tokens: Positive = 20480
    """Tokens after the prompt, observations included."""
    max_turn_tokens: Positive | None = None
    """Sampled tokens in one turn; null leaves only the response budget."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature in training. Only 1.0 is accepted: engines score inputs at temperature
    1, and the trainer takes its probability ratio there."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling in training."""
    malformed_call: Literal["observe", "end"] = "observe"
    """A tool call that does not parse: show the model an error, or end the trajectory."""
    concurrency: Positive = 256
    """Trajectories generated at the same time."""
    attempts: Positive = 3
    """Tries of a trajectory before it is dropped."""
    deadline_seconds: Seconds = 1800.0
    """Longest wait for a batch; ranks that wait for rollouts give up after it."""
    max_dropped_fraction: Fraction = 0.05
    """The run stops when more than this share of a batch is dropped."""
    max_unscored_fraction: Fraction = 0.05
    """The run stops when the teacher could not score more than this share of a batch."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class ToolsConfig:
    """The code interpreter and its sandbox."""

    enabled: bool = True
    """Whether tool calls are executed; if not, the model is told that the tool is unavailable."""
    max_output_characters: Positive = 256
    """Longest tool output shown to the model."""
    truncation: Literal["middle", "left", "right", "last_line"] = "middle"
    """What is kept of a longer output: both ends, the beginning, the end, or the last line."""
    traceback: Literal["full", "last_line"] = "full"
    """How much of a traceback is shown."""
    wall_seconds: Seconds = 10.0
    """Wall-clock limit of one call."""
    cpu_seconds: Positive = 5
    """CPU-time limit of one call."""
    memory_mb: Positive = 512
    """Address-space limit of each process, MiB."""
    processes: Positive = 8
    """Processes and threads one call may have."""
    workers: Positive = 8
    """Calls executed at the same time."""
    run_code_without_isolation: bool = False
    """Run model-written programs as plain subprocesses. Only for a throw-away machine."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class RewardConfig:
    """Outcome reward."""

    correct: float = 1.0
    """Reward of a right answer."""
    wrong: float = -1.0
    """Reward of a wrong or missing answer."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class DataConfig:
    """Prompts."""

    train: str
    """Parquet file of training prompts (RL schema: data_source, prompt, ability, reward_model,
    extra_info)."""
    max_prompt_tokens: Positive = 2560
    """Longest rendered prompt, tool schemas included; longer ones are refused at start."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class ChatConfig:
    """How a conversation becomes tokens; holds in SFT, rollout, teacher and evaluation alike."""

    enable_thinking: bool | None = None
    """Passed to the chat template; null leaves the template's default."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class EngineConfig:
    """One served model."""

    model_path: str
    """Hugging Face folder that the engine loads."""
    engines: Positive = 1
    """Engine processes (replicas)."""
    addresses: tuple[str, ...] = ()
    """Engines that somebody else runs, as http://host:port; then none is started."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Precision of weights and activations in the engine."""
    context_length: Positive | None = None
    """Longest sequence; null takes the model's."""
    max_total_tokens: Positive | None = None
    """Size of the key-value cache in tokens; null lets the engine choose."""
    max_running_requests: Positive | None = None
    """Requests decoded at the same time; null lets the engine choose."""
    threads: Positive = 1
    """CPU threads of an engine without a GPU."""
    gpus: tuple[NonNegative, ...] = ()
    """CUDA indices of the GPUs of this model's engines, shared evenly in order; an engine's share
    is its tensor-parallel size. Empty leaves each engine one GPU of SGLang's choice."""
    extra_args: tuple[str, ...] = ()
    """Further command-line arguments of sglang.launch_server, as they stand."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class ServingConfig:
    """The SGLang fleet: one router a model, one front door."""

    student: EngineConfig
    """The model that generates rollouts; the only one that receives new weights."""
    teacher: EngineConfig | None = None
    """The model that scores; may be left out when nothing is distilled."""
    python: str = ".venv-sglang/bin/python"
    """Interpreter of the environment in which SGLang is installed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where engines run."""
    host: str = "127.0.0.1"
    """Interface that every server of ours binds to."""
    port: NonNegative = 0
    """Port of the front door; 0 picks a free one."""
    directory: str | None = None
    """Folder of the addresses and the engines' logs; null takes run.directory. Runs that name the
    same folder share the engines, one after the other."""
    start_timeout_seconds: Seconds = 600.0
    """Longest wait until every engine answers."""
    request_timeout_seconds: Seconds = 300.0
    """Longest wait for one answer of an engine."""
    max_connections: Positive = 256
    """Open requests to one router."""
    weight_sync: Literal["disk", "tensor"] = "disk"
    """How new weights reach the student's engines: as a folder in run.directory that every engine
    reads, or by value over HTTP, without a disk."""
    weight_bucket_mb: Positive = 256
    """Weights gathered and sent at a time, MiB; bounds what weight_sync adds to rank 0's memory. A
    tensor that is larger, as the embedding may be, goes alone."""
    probe_tolerance: Annotated[float, Field(gt=0)] | None = None
    """Largest difference between trainer's and engine's log-prob of the fixed probe, in nats; null
    takes 0.001 for a float32 student and 0.2 for a bfloat16 one."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class EvaluationConfig:
    """Evaluation before, during and after training."""

    data: str | None = None
    """Parquet file of evaluation prompts; null turns evaluation off."""
    every: NonNegative = 10
    """Steps between evaluations; 0 evaluates only before and after."""
    samples: Positive = 1
    """Samples of each prompt at temperature > 0."""
    temperatures: tuple[float, ...] = (1.0, 0.0)
    """Sampling temperatures evaluated; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling in evaluation."""
    max_prompts: Positive | None = None
    """Prompts used during training; before and after, all of them are."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class ReportConfig:
    """Metrics, logs and tables."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Weights & Biases mode."""
    project: str = "sod_mcore"
    """Weights & Biases project."""
    name: str | None = None
    """Weights & Biases run name; null takes the run folder's."""
    trajectory_rows: NonNegative = 8
    """Sampled trajectories shown each step with d_k, w_k and token counts."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class SodConfig:
    """A whole run of ``pretrain_sod.py``."""

    run: RunConfig
    student: StudentConfig
    data: DataConfig
    serving: ServingConfig | None = None
    """The engines; may be left out with run.replay."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    ddp: dict[str, Any] = Field(default_factory=dict)
    """Fields of Megatron-Core's DistributedDataParallelConfig, by their own names."""
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    tools: ToolsConfig = Field(default_factory=ToolsConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    chat: ChatConfig = Field(default_factory=ChatConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)

    @property
    def serving_directory(self) -> Path:
        """Folder of the engines' addresses."""
        shared = self.serving.directory if self.serving is not None else None
        return Path(shared or self.run.directory)

    @property
    def probe_tolerance(self) -> float:
        """Allowed difference between trainer and engine on the probe, nats."""
        given = self.serving.probe_tolerance if self.serving is not None else None
        return given or (1e-3 if self.student.precision == "fp32" else 0.2)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term of the loss reads the teacher's scores."""
        return self.algorithm.distillation != "none" or self.algorithm.topk.k > 0


@dataclass(config=STRICT, kw_only=True, frozen=True)
class SftDataConfig:
    """Conversations for supervised fine-tuning."""

    train: str
    """Parquet file of conversations (columns messages, tools, optional enable_thinking)."""
    max_tokens: Positive = 32768
    """Longest conversation; longer ones are refused at start."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class SftTrainingConfig:
    """Length of supervised fine-tuning."""

    directory: str
    """Folder for checkpoints and metrics."""
    export: str
    """Hugging Face folder that receives the result."""
    updates: Positive
    """Optimizer updates."""
    batch_size: Positive = 128
    """Conversations an update."""
    seed: int = 1
    """Seeds data order and Megatron's random state."""
    save_every: NonNegative = 0
    """Updates between checkpoints; 0 saves none before the end."""
    max_seconds: Seconds | None = None
    """End after this wall time even if updates remain; null for no limit."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class SftConfig:
    """A whole run of ``scripts/train_sft.py``."""

    sft: SftTrainingConfig
    student: StudentConfig
    data: SftDataConfig
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    ddp: dict[str, Any] = Field(default_factory=dict)
    """Fields of Megatron-Core's DistributedDataParallelConfig, by their own names."""
    chat: ChatConfig = Field(default_factory=ChatConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)
