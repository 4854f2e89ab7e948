"""Settings of the student's play: prompts, turns, tools, rewards."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from sod_mcore.config.base import STRICT, Fraction, NonNegative, Positive, Seconds


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
    pool: Literal["process", "ray"] = "process"
    """What plays the conversations: a process beside rank 0, or Ray actors, which may be on several
    machines (docs/ray.md)."""
    ray_address: str | None = None
    """Ray cluster to join, as host:port, or auto for the one that this machine belongs to; null
    starts a Ray of its own on this machine, for this run alone."""
    ray_actors: Positive = 1
    """Ray actors, spread over the cluster's nodes; each plays a share of every batch's prompts."""
    ray_actor_cpus: Annotated[float, Field(ge=0)] = 1.0
    """CPUs that each actor reserves in Ray; its sandbox runs there as well."""
    max_staleness: NonNegative = 0
    """Steps of training that may pass between the weights that sample a batch and those that are
    trained on it. 0 samples a batch when the one before it has been trained on; n samples n batches
    ahead, while the trainer works (docs/asynchronous.md)."""
    spare_prompts: NonNegative = 0
    """Prompts sampled in a step beyond algorithm.prompts_per_step. When that many are done the rest
    are aborted, so that the longest conversations hold up nobody; the batch then leans towards
    prompts with short answers."""
    deadline_seconds: Seconds = 1800.0
    """Longest wait for a batch; ranks that wait for rollouts give up after it."""
    max_dropped_fraction: Fraction = 0.05
    """The run stops when more than this share of a batch is dropped."""
    max_unscored_fraction: Fraction = 0.05
    """The run stops when the teacher could not score more than this share of a batch."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class ToolsConfig:
    """The tools that the model may call, and the sandbox that runs its programs."""

    enabled: bool = True
    """Whether tool calls are executed; if not, the model is told that the tool is unavailable."""
    names: tuple[str, ...] = ("code_interpreter",)
    """Tools shown to the model: code_interpreter, calculator, search, or package.module:function, a
    function of yours that makes one (sod_mcore/tools/interface.py). Empty offers none."""
    search_documents: str | None = None
    """JSONL file of {"title", "text"} that the search tool looks into."""
    sandbox_url: str | None = None
    """Address of a SandboxFusion endpoint (http://host:port/run_code) that runs every program,
    those of verifiers too; null takes the environment variable SOD_SANDBOX_URL, and where that is
    not set the local sandbox."""
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
    packages: tuple[str, ...] = ()
    """Folders of Python packages that programs may import, as pip install --target makes them; for
    tools and verifiers alike. Without any there is the standard library."""
    total_memory_mb: Positive | None = None
    """Memory of all programs of the local sandbox together, MiB, by a control group; refused where
    none can be made. null leaves processes times memory_mb for each program."""
    run_code_without_isolation: bool = False
    """Run model-written programs as plain subprocesses. Only for a throw-away machine."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class RewardConfig:
    """Outcome reward."""

    correct: float = 1.0
    """Reward of a right answer."""
    wrong: float = -1.0
    """Reward of a wrong or missing answer."""
    verifiers: dict[str, str] = Field(default_factory=dict)
    """Verifier by prefix of data_source, before the built-in table (docs/rewards.md): math, choice,
    code, reasoning_gym, or package.module:function, a function of yours."""
    math: Literal["math_verify", "strict_box", "minerva"] = "math_verify"
    """How mathematical answers are compared: by value (math-verify), by the reference's exact text
    in the last box, or by its normalised text after "Answer:"."""
    code: Literal["share", "all"] = "share"
    """Reward of a program: the share of tests that it passes, or correct only if it passes all."""
    code_wall_seconds: Seconds = 30.0
    """Wall-clock limit of one test of a program."""
    code_memory_mb: Positive = 1024
    """Address-space limit of each process of a program under test, MiB."""
    code_workers: Positive = 8
    """Tests executed at the same time, over all programs."""
    workers: Positive = 2
    """Processes in which verifiers run that need no sandbox."""
    timeout_seconds: Seconds = 10.0
    """CPU time that such a verifier may take for one answer, and six times that by the clock; the
    answer then counts as wrong and as reward/category/timeout."""
    tool_use: Literal["none", "intended", "released"] = "none"
    """Shaping of negative rewards by tool calls: none; +0.1 a call up to -0.6, as the reference
    means it; or -0.1 for all, as it was released."""
    overlong_buffer: NonNegative = 0
    """Tokens before rollout.max_response_tokens over which a penalty grows (DAPO); 0 is off."""
    overlong_factor: Annotated[float, Field(ge=0)] = 1.0
    """That penalty at the limit."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class DataConfig:
    """Prompts."""

    train: str
    """Training prompts: a Parquet or JSONL file, or hf:NAME[:SPLIT] of a Hugging Face data set."""
    max_prompt_tokens: Positive = 2560
    """Longest rendered prompt, tool schemas included."""
    overlong_prompts: Literal["refuse", "drop"] = "refuse"
    """What becomes of longer ones at start."""
    instructions: Literal["published", "none"] = "published"
    """Instructions added to the prompts of the published data sets, by each row's own data_source
    (docs/data.md); rows of other sources stay as they are."""


@dataclass(config=STRICT, kw_only=True, frozen=True)
class ChatConfig:
    """How a conversation becomes tokens; holds in SFT, rollout, teacher and evaluation alike."""

    enable_thinking: bool | None = None
    """Passed to the chat template; null leaves the template's default."""
