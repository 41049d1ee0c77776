"""The settings of a training run: one dataclass a section, checked once, when it is built.

The defaults train a small model on the embedded corpus in a few minutes on two cores. `config_text` has how settings
are read from files and the command line, and written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from mpipar.errors import ConfigError
from mpipar.model import ModelConfig

DeviceName = Literal["auto", "cpu", "cuda"]
PrecisionName = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
DocumentsName = Literal["joined", "separate"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run is kept and what it shows."""

    dir: Path = Path("runs/first")
    """The run folder: settings, metrics, checkpoints, plots. It holds all there is of the run."""
    log_every: int = 10
    """Steps between two lines of the log."""
    tensorboard: bool = True
    """Write TensorBoard events, where tensorboard is installed."""
    memory_history: bool = False
    """On a GPU: record who takes its memory, and leave it in the run folder when there is none left. Slows steps."""
    sample_tokens: int = 160
    """Length of the text that the trained model writes at the end, in tokens; 0 for none."""

    def __post_init__(self) -> None:
        _require(self.log_every >= 1, f"--run.log-every {self.log_every} must be at least 1")
        _require(self.sample_tokens >= 0, f"--run.sample-tokens {self.sample_tokens} must not be negative")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read."""

    dir: tuple[Path, ...] = (Path("data/stdlib"),)
    """A folder of shards, made by `python -m mpipar.data pack`; or several, of one tokenizer, which are then mixed."""
    weights: tuple[float, ...] = ()
    """One for each folder: its part of the tokens that are read. As much as it has tokens if not given."""
    epochs: tuple[int, ...] = ()
    """One for each folder: after how many passes over it the others go on without it; 0, and if not given, for
    never."""
    documents: DocumentsName = "joined"
    """joined: a sequence is a piece of one long text. separate: attention does not look beyond the beginning of a
    document, and positions count from there."""

    def __post_init__(self) -> None:
        _require(len(self.dir) >= 1, "--data.dir names no data set")
        for name in ("weights", "epochs"):
            values = getattr(self, name)
            _require(
                len(values) in (0, len(self.dir)),
                f"{flag('data', name)} has {len(values)} values for the {len(self.dir)} folders of --data.dir: give "
                "one for each",
            )
        for folder in self.dir:
            _require(self.dir.count(folder) == 1, f"--data.dir names {folder} more than once: give it a larger weight")
        for weight in self.weights:
            _require(math.isfinite(weight) and weight > 0, f"--data.weights {weight} must be a positive number")
        for count in self.epochs:
            _require(count >= 0, f"--data.epochs {count} must not be negative")
        _require(
            self.documents in get_args(DocumentsName),
            f"--data.documents {self.documents!r} must be one of {', '.join(get_args(DocumentsName))}",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimization."""

    steps: int = 450
    """Optimizer steps of the whole run."""
    global_batch: int = 16
    """Sequences in a step, over all ranks. The result depends on it, not on the number of ranks."""
    microbatch: int = 2
    """Sequences in one forward and backward. A step has global-batch / microbatch, dealt to the ranks."""
    seq_len: int = 128
    """Tokens in a sequence."""
    seed: int = 1
    """Of the initial weights and of the order of the data."""
    lr: float = 2e-3
    """Peak learning rate, reached after the warm-up."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end of the cosine, as a part of the peak."""
    warmup_steps: int = 30
    """Steps in which the learning rate rises linearly."""
    weight_decay: float = 0.1
    """Of matrices and embeddings; never of norms and biases."""
    beta1: float = 0.9
    """AdamW's decay of the mean of the gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean of its square."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip_norm: float = 1.0
    """Largest L2 norm of the gradient; it is scaled down to this. 0 for no clipping."""
    device: DeviceName = "auto"
    """Where ranks compute. auto takes GPUs where all ranks see some, each one of its own as far as there are as many
    (docs/gpu-training.md)."""
    precision: PrecisionName = "auto"
    """Of matrix products: bf16 is autocast over fp32 weights; auto takes it where all processors have it built in. On
    GPUs also fp16, with dynamic loss scaling, and tf32, for which fp32 is rounded to 11 bits; auto is bf16 there if all
    have it."""
    reproducible: bool = True
    """The same bits on any number of ranks: gradients are summed without rounding (docs/exact.md)."""
    threads: int = 0
    """Of torch, in each rank. 0 is 1 in a reproducible run, since a product cut over two threads need not have the bits
    of one; otherwise a rank's share of the cores."""
    compile: bool = False
    """Run the model through torch.compile. Takes a minute at the start."""
    activation_checkpointing: bool = False
    """Keep only the layers' inputs for backward and compute the rest again: less memory, a third more time."""
    eval_every: int = 100
    """Steps between two evaluations; there is always one at the end."""
    eval_sequences: int = 64
    """Sequences of the validation split in an evaluation, always the same."""
    max_skipped: int = 5
    """Steps in a row whose loss or gradient is not finite, and which are therefore skipped, before the run gives up."""

    def __post_init__(self) -> None:
        for name in ("global_batch", "microbatch", "seq_len", "eval_every", "eval_sequences", "max_skipped"):
            value = getattr(self, name)
            _require(value >= 1, f"{flag('train', name)} {value} must be at least 1")
        for name in ("lr", "min_lr_ratio", "weight_decay", "beta1", "beta2", "eps", "clip_norm"):
            value = getattr(self, name)
            _require(math.isfinite(value), f"{flag('train', name)} {value} must be a finite number")
        for name in ("steps", "warmup_steps", "threads", "weight_decay", "clip_norm", "min_lr_ratio"):
            value = getattr(self, name)
            _require(value >= 0, f"{flag('train', name)} {value} must not be negative")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{flag('train', name)} {value} must be in [0, 1)")
        for name in ("lr", "eps"):
            value = getattr(self, name)
            _require(value > 0, f"{flag('train', name)} {value} must be positive")
        _require(0 <= self.seed < 2**63, f"--train.seed {self.seed} must be in [0, 2^63)")
        _require(
            self.device in get_args(DeviceName),
            f"--train.device {self.device!r} must be one of {', '.join(get_args(DeviceName))}",
        )
        _require(
            self.precision in get_args(PrecisionName),
            f"--train.precision {self.precision!r} must be one of {', '.join(get_args(PrecisionName))}",
        )
        _require(
            self.global_batch % self.microbatch == 0,
            f"--train.global-batch {self.global_batch} is not a multiple of --train.microbatch {self.microbatch}: "
            "a step is a whole number of microbatches",
        )

    @property
    def num_microbatches(self) -> int:
        """Microbatches in a step, over all ranks."""
        return self.global_batch // self.microbatch


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept of the run, and how often."""

    every: int = 100
    """Steps between two checkpoints; there is always one at the end, and one when the run is asked to stop."""
    keep: int = 2
    """How many of the latest checkpoints are kept."""
    keep_every: int = 0
    """Checkpoints of multiples of this step are kept for good, whatever --checkpoint.keep says; 0 for none."""
    asynchronous: bool = True
    """Copy the state, and write it while the run goes on. Takes memory for it: the state's size over all ranks."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, f"--checkpoint.every {self.every} must be at least 1")
        _require(self.keep >= 1, f"--checkpoint.keep {self.keep} must be at least 1")
        _require(self.keep_every >= 0, f"--checkpoint.keep-every {self.keep_every} must not be negative")


@dataclass(frozen=True, kw_only=True)
class CommConfig:
    """Communication between ranks."""

    timeout_s: float = 600.0
    """How long a rank may be silent while others wait for it, in seconds. Then the job ends and says who is missing."""
    bucket_mib: float = 16.0
    """Gradients that are reduced as one array, in MiB. Small buckets overlap more, large ones are faster."""

    def __post_init__(self) -> None:
        _require(self.timeout_s > 0, f"--comm.timeout-s {self.timeout_s} must be positive")
        _require(self.bucket_mib > 0, f"--comm.bucket-mib {self.bucket_mib} must be positive")


@dataclass(frozen=True, kw_only=True)
class ElasticConfig:
    """Going on without ranks that die, in a job under `mpirun --with-ft ulfm`."""

    min_ranks: int = 1
    """With fewer the job ends; started again, it goes on from its last checkpoint."""
    hang_s: float = 300.0
    """How long a rank may give no sign of life before it is killed, in seconds: longer than a microbatch takes. 0 for
    no such watch."""
    verify_every: int = 100
    """Steps between two comparisons of the ranks' weights, to find silent corruption; there is also one before every
    checkpoint. 0 for none."""
    balance: bool = True
    """Let ranks claim microbatches, so that slow ones do fewer; in a reproducible run, whose result does not depend on
    it."""
    spares: int = 0
    """Ranks that compute nothing until another dies. They hold the model like all others."""

    def __post_init__(self) -> None:
        _require(self.min_ranks >= 1, f"--elastic.min-ranks {self.min_ranks} must be at least 1")
        _require(self.hang_s >= 0, f"--elastic.hang-s {self.hang_s} must not be negative")
        _require(self.verify_every >= 0, f"--elastic.verify-every {self.verify_every} must not be negative")
        _require(self.spares >= 0, f"--elastic.spares {self.spares} must not be negative")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Trains a language model, data-parallel over the ranks of an MPI job.

    mpirun -n 8 python -m mpipar.train --data.dir data/stdlib --run.dir runs/first

    SIGUSR1 to mpirun, or SIGTERM to a rank: the step is finished, a checkpoint is saved, and the same command goes on
    from there.
    """

    config: Path | None = None
    """A TOML file of settings, [section] key = value; flags on the command line win over it."""
    resume: str = "auto"
    """auto goes on from the run folder's latest checkpoint, if there is one; never starts anew and moves an earlier run
    aside; a folder, of a checkpoint or of a run, is where to go on from."""
    init: Path | None = None
    """A checkpoint, or a run, whose weights a fresh start begins with, on whatever data: fine-tuning. Of the same model
    and tokenizer; its optimizer and steps are left behind."""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    elastic: ElasticConfig = field(default_factory=ElasticConfig)

    def __post_init__(self) -> None:
        limit = self.model.max_seq_len
        _require(
            self.train.seq_len <= limit,
            f"--train.seq-len {self.train.seq_len} is more than --model.max-seq-len {limit}: raise the latter",
        )


def flag(section: str, name: str) -> str:
    """A setting as it is typed: --train.seq-len."""
    return f"--{section}.{name.replace('_', '-')}"


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)
