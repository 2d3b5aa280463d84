"""
What a run is: eight frozen sections, each option with its default, its meaning and its unit.

`resolve/resolve.py` fills them from a preset, a file and flags. Components take the section they need, or plain
arguments; nothing below `train/` sees the whole `Config`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal

PAST = "past"  # a resumed run may not change it: it says what the steps already taken meant
DTYPE_SPELLINGS: Final = {
    "bf16": "bfloat16", "fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16",
}  # fmt: skip


def opt(
    default: Any,
    help: str,
    *,
    unit: str = "",
    alias: tuple[str, ...] = (),
    akin: tuple[str, ...] = (),
    spellings: Mapping[str, str] = MappingProxyType({}),
    past: bool = False,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """
    An option: `help` and `unit` for people, `past` if a resume must keep it, and inclusive or exclusive bounds.

    alias: names of the same thing in other projects, which the command line takes too.
    akin: names of something close to it, in another unit or of another meaning; they are suggested and not taken.
    spellings: other words for its values.
    """
    bounds = {k: v for k, v in {"ge": ge, "gt": gt, "le": le, "lt": lt}.items() if v is not None}
    return field(
        default=default,
        metadata={
            "help": help, "unit": unit, "alias": alias, "akin": akin, "spellings": spellings, PAST: past, "bounds": bounds,
        },
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Model:
    """The architecture. `null` means: derived, as the help says."""

    preset: str | None = opt(None, "start from a named shape, then change it", alias=("name", "model_name"), past=True)
    from_: str | None = opt(
        None,
        "start from these weights: a folder as Hugging Face lays it out, or the NAME of one that was fetched; "
        "its config.json says the shape",
        alias=("pretrained", "pretrained_model_name_or_path", "init_from", "checkpoint_dir", "hf_model"),
        past=True,
    )
    family: Literal["llama", "gpt2", "hf"] = opt(
        "llama",
        "llama: RMSNorm, RoPE, SwiGLU; gpt2: LayerNorm, learned positions, GELU; hf: what model.from is, through transformers",
        alias=("arch", "architecture", "model_type"),
        past=True,
    )
    vocab_size: int | None = opt(
        None,
        "rows of the embedding; null: the tokenizer's",
        unit="tokens",
        alias=("padded_vocab_size",),
        past=True,
        ge=1,
    )
    dim: int = opt(
        256,
        "width of the residual stream",
        alias=("n_embd", "hidden_size", "d_model"),
        akin=("hidden_dim",),
        past=True,
        ge=1,
    )
    num_layers: int = opt(6, "blocks", alias=("n_layer", "n_layers", "num_hidden_layers", "depth"), past=True, ge=1)
    num_heads: int = opt(4, "query heads", alias=("n_head", "n_heads", "num_attention_heads"), past=True, ge=1)
    num_kv_heads: int | None = opt(
        None,
        "key and value heads (GQA); null: num_heads",
        alias=("n_kv_heads", "num_key_value_heads", "num_query_groups"),
        past=True,
        ge=1,
    )
    head_dim: int | None = opt(None, "width of a head; null: dim / num_heads", alias=("kv_channels",), past=True, ge=1)
    ffn_dim: int | None = opt(
        None,
        "width inside the feed-forward; null: 4 dim (gpt2), 8/3 dim up to a multiple of 64 (llama)",
        alias=("intermediate_size", "n_inner", "ffn_hidden_size"),
        past=True,
        ge=1,
    )
    max_seq_len: int = opt(
        1024,
        "longest context",
        unit="tokens",
        alias=("block_size", "n_positions", "max_position_embeddings", "context_length"),
        past=True,
        ge=1,
    )
    norm_eps: float = opt(
        1e-5, "epsilon inside the norms", alias=("rms_norm_eps", "layer_norm_epsilon"), past=True, gt=0
    )
    rope_theta: float = opt(10_000.0, "base of the rotary frequencies (llama)", alias=("rope_base",), past=True, gt=0)
    rope_factor: float | None = opt(None, "Llama 3 context scaling; null: none", past=True, ge=1)
    rope_low_freq_factor: float = opt(
        1.0, "Llama 3 scaling: below this many turns, frequencies are divided by rope_factor", past=True, gt=0
    )
    rope_high_freq_factor: float = opt(4.0, "Llama 3 scaling: above this many turns, frequencies stay", past=True, gt=0)
    rope_original_seq_len: int = opt(
        8192, "Llama 3 scaling: the context it was first trained at", unit="tokens", past=True, ge=1
    )
    qk_norm: bool = opt(False, "RMSNorm on each query and key head (Qwen3)", past=True)
    qkv_bias: bool = opt(
        False,
        "biases on the query, key and value projections (Qwen2; gpt2 always has them)",
        alias=("attention_bias", "add_qkv_bias"),
        past=True,
    )
    tie_embeddings: bool = opt(
        False, "the output layer is the embedding", alias=("tie_word_embeddings", "weight_tying"), past=True
    )
    dropout: float = opt(0.0, "share of activations dropped while training (gpt2)", past=True, ge=0, lt=1)
    init_std: float = opt(
        0.02, "standard deviation of the initial weights", alias=("initializer_range",), past=True, gt=0
    )


@dataclass(frozen=True, kw_only=True)
class Data:
    """Corpus -> tokenizer -> token shards -> rows."""

    corpus: Literal["stdlib", "text", "jsonl", "dummy"] = opt(
        "stdlib",
        "stdlib: Python's own source; text: files and folders; jsonl: .jsonl and .jsonl.gz; dummy: generated",
        alias=("dataset", "source"),
        past=True,
    )
    paths: tuple[str, ...] = opt(
        (), "files or folders of a text or jsonl corpus", alias=("path", "files", "data_path"), past=True
    )
    text_key: str = opt(
        "text", "the field of a jsonl line that holds its text", alias=("text_field", "text_column"), past=True
    )
    dummy_documents: int = opt(2_000, "documents of a dummy corpus", unit="documents", past=True, ge=2)
    tokenizer: str = opt(
        "bpe",
        "bpe: train one on the corpus; bytes; tiktoken:NAME; a tokenizer.json or tokenizer.model; a model's folder or name",
        alias=("tokenizer_path", "tokenizer_name"),
        past=True,
    )
    tokenizer_vocab_size: int = opt(4096, "size of a BPE trained here", unit="tokens", past=True, ge=257)
    tokenizer_sample_bytes: int = opt(
        64_000_000, "text that a BPE is trained on, at most", unit="bytes", past=True, ge=1
    )
    seq_len: int = opt(
        512,
        "length of a row",
        unit="tokens",
        alias=("sequence_length", "seq_length", "block_size", "context_length", "max_length"),
        past=True,
        ge=1,
    )
    document_mask: bool = opt(
        False, "attention stays inside a document", alias=("intra_document_masking", "reset_attention_mask"), past=True
    )
    val_fraction: float = opt(
        0.05,
        "share of documents held out, chosen by their content",
        alias=("validation_split", "val_split", "test_size"),
        past=True,
        gt=0,
        lt=1,
    )
    folder: str = opt("data", "where prepared tokens are kept", alias=("cache_dir", "cache", "out_dir"))
    shard_tokens: int = opt(16_777_216, "tokens of a shard, about", unit="tokens", past=True, ge=1024)
    rebuild: bool = opt(False, "prepare anew, though the folder holds tokens of an earlier state of the corpus")
    prefetch: int = opt(2, "steps read ahead", unit="steps", alias=("prefetch_factor",), akin=("num_workers",), ge=1)


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """The layout: the product of its five axes is the number of processes; one of them may be -1, what remains."""

    dp_replicate: int = opt(
        -1,
        "replicas (DDP; with dp_shard, HSDP); -1: what remains, or 1 where another axis is -1",
        alias=("ddp", "dp", "data_parallel", "data_parallel_size", "dp_size", "data_parallel_replicate_degree"),
        ge=-1,
    )
    dp_shard: int = opt(
        1,
        "processes that parameters, gradients and optimizer state are cut over (FSDP2)",
        alias=("fsdp", "data_parallel_shard_degree", "fsdp_size", "shard"),
        akin=("zero",),
        ge=-1,
    )
    tp: int = opt(
        1,
        "processes that each matrix is cut over (tensor parallel, with sequence and loss parallel)",
        alias=("tensor_parallel_degree", "tensor_parallel", "tensor_model_parallel_size", "tp_size"),
        ge=-1,
    )
    cp: int = opt(
        1,
        "processes that each sequence is cut over (context parallel)",
        alias=(
            "context_parallel_degree",
            "context_parallel",
            "context_parallel_size",
            "cp_size",
            "sequence_parallel_size",
        ),
        ge=-1,
    )
    pp: int = opt(
        1,
        "processes that the blocks are cut over (pipeline parallel)",
        alias=("pipeline_parallel_degree", "pipeline_parallel", "pipeline_model_parallel_size", "pp_size"),
        ge=-1,
    )
    reshard_after_forward: Literal["always", "never"] | int = opt(
        "always",
        "dp_shard: free a block's parameters between forward and backward; a number: keep them over so many processes",
        alias=("fsdp_reshard_after_forward",),
        akin=("zero_stage",),
    )
    cpu_offload: bool = opt(
        False,
        "dp_shard: keep parameters, gradients and optimizer state in the machine's memory, not the GPU's",
        alias=("enable_cpu_offload", "offload"),
    )
    cp_method: Literal["allgather", "ulysses", "ring"] = opt(
        "allgather",
        "allgather: every key comes to each process; ulysses: heads are exchanged for places; ring: keys go round",
        alias=("context_parallel_method", "cp_comm_type", "context_parallel_rotate_method"),
    )
    pp_schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "zbv", "dualpipev"] = opt(
        "1f1b",
        "order of forward and backward over the stages; the last three hold several stages a process",
        alias=("pipeline_parallel_schedule", "pipeline_schedule"),
    )
    pp_stages: int | None = opt(
        None,
        "stages a process holds; null: 1 for gpipe and 1f1b, 2 for the others",
        unit="stages",
        alias=("virtual_stages", "num_virtual_stages", "virtual_pipeline_model_parallel_size"),
        ge=1,
    )


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon"] = opt(
        "adamw",
        "muon: the blocks' matrices by Muon, everything else by AdamW",
        alias=("optimizer", "optimizer_name", "optim_type"),
        past=True,
    )
    lr: float = opt(1e-3, "peak learning rate", alias=("learning_rate", "max_lr", "peak_lr"), gt=0)
    beta1: float = opt(0.9, "decay of the gradient's average", alias=("adam_beta1",), ge=0, lt=1)
    beta2: float = opt(0.95, "decay of the squared gradient's average", alias=("adam_beta2",), ge=0, lt=1)
    eps: float = opt(1e-8, "AdamW's epsilon", alias=("adam_eps", "adam_epsilon", "epsilon"), gt=0)
    muon_momentum: float = opt(0.95, "Muon's decay of the gradient's sum (Nesterov)", ge=0, lt=1)
    weight_decay: float = opt(0.1, "decoupled decay, on matrices only", alias=("wd",), ge=0)
    clip_norm: float = opt(
        1.0,
        "the gradient's norm is clipped to this; 0: not",
        alias=("grad_clip", "max_grad_norm", "clip_grad", "gradient_clipping", "max_norm", "clip"),
        ge=0,
    )
    schedule: Literal["cosine", "linear", "wsd", "constant"] = opt(
        "cosine",
        "after the warm-up; wsd: constant, then linear over the last decay_fraction",
        alias=("lr_scheduler_type", "scheduler", "lr_scheduler", "lr_decay_style", "decay_type"),
    )
    warmup_steps: int = opt(
        0, "linear warm-up", unit="steps", alias=("warmup", "num_warmup_steps", "warmup_iters", "lr_warmup_iters"), ge=0
    )
    decay_fraction: float = opt(0.2, "wsd: share of the run spent decaying", alias=("decay_ratio",), gt=0, le=1)
    final_lr_fraction: float = opt(
        0.0,
        "learning rate at the end, as a share of the peak",
        alias=("min_lr_ratio", "min_lr_factor"),
        akin=("min_lr",),
        ge=0,
        le=1,
    )


@dataclass(frozen=True, kw_only=True)
class Train:
    """The run's length, its batches and its arithmetic."""

    steps: int | None = opt(
        None,
        "length in optimizer steps",
        unit="steps",
        alias=("max_steps", "max_iters", "num_steps", "train_iters", "iterations", "total_steps"),
        ge=1,
    )
    tokens: int | None = opt(
        None,
        "length in tokens, rounded up to a step",
        unit="tokens",
        alias=("max_tokens", "train_tokens", "total_tokens"),
        ge=1,
    )
    epochs: float | None = opt(
        None,
        "length in passes over the corpus, rounded up to a step",
        alias=("num_epochs", "num_train_epochs", "max_epochs"),
        gt=0,
    )
    global_batch: int = opt(
        64,
        "sequences in one optimizer step, over all processes",
        unit="sequences",
        alias=("batch_size", "global_batch_size", "train_batch_size", "total_batch_size"),
        ge=1,
    )
    micro_batch: int = opt(
        8,
        "sequences in one forward of one process",
        unit="sequences",
        alias=("micro_batch_size", "local_batch_size", "per_device_train_batch_size", "device_batch_size"),
        ge=1,
    )
    seed: int = opt(
        0, "of initial weights, order of data and dropout", alias=("random_seed", "manual_seed"), past=True, ge=0
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = opt(
        "auto",
        "of activations and matrix products; weights, optimizer and sums are float32; auto: bfloat16 on a GPU that has it, on a CPU float32, or bfloat16 where its instructions make products faster (measured); float16 scales the loss, and is for CUDA",
        alias=("precision", "mixed_precision", "torch_dtype", "param_dtype"),
        akin=("bf16", "fp16"),
        spellings=DTYPE_SPELLINGS,
    )
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "auto: CUDA where there is one", alias=("accelerator",))
    compile: bool = opt(False, "torch.compile each block", alias=("torch_compile",))
    compile_check: bool = opt(
        True,
        "with train.compile, compare the loss and gradients of one micro-batch with eager code before the first step, and stop the run where they differ by more than rounding",
    )
    repro: Literal["fast", "bitwise"] = opt(
        "fast",
        "bitwise: the same bits at any data-parallel degree; one CPU thread a process",
        alias=("deterministic", "reproducibility", "deterministic_mode"),
    )
    activation_checkpointing: Literal["none", "full", "selective", "budget"] = opt(
        "none",
        "what is computed again in backward; full: each block; selective: all but products and attention; budget: what train.activation_budget leaves no room for",
        alias=("gradient_checkpointing", "checkpointing", "ac", "recompute", "activation_checkpoint"),
    )
    activation_budget: float = opt(
        0.5,
        "budget: activations kept, 0: as with full, 1: as with none; the compiler chooses which",
        alias=("memory_budget", "activation_memory_budget"),
        ge=0,
        le=1,
    )
    eval_every: int = opt(
        0,
        "evaluate on held-out documents; 0: only at the end",
        unit="steps",
        alias=("eval_interval", "eval_steps", "eval_freq", "val_check_interval"),
        ge=0,
    )
    eval_tokens: int = opt(
        100_000,
        "held-out tokens an evaluation reads, at most; at the end of a run it reads all",
        unit="tokens",
        akin=("eval_iters", "eval_batches"),
        ge=1,
    )
    sample_prompt: str = opt("", "at the end, print what the model makes of this; empty: print none")
    sample_tokens: int = opt(100, "length of that sample", unit="tokens", ge=1)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When the state is saved, and how much is kept."""

    every: int = opt(
        100,
        "save; 0: only at the end",
        unit="steps",
        alias=("save_steps", "save_interval", "ckpt_interval", "save_every"),
        ge=0,
    )
    keep: int = opt(
        2,
        "checkpoints kept: the last so many, beside the best",
        unit="checkpoints",
        alias=("save_total_limit", "keep_last", "keep_latest_k"),
        ge=1,
    )
    keep_every: int = opt(0, "keep those of each so many steps too, for ever; 0: none", unit="steps", ge=0)
    keep_best: bool = opt(True, "keep the one with the lowest validation loss too")
    background: bool = opt(
        True,
        "train on while a checkpoint is written; it takes memory for a copy of what each process writes",
        alias=("async_save", "async", "async_mode"),
    )
    fast: str | None = opt(
        None, "a folder in memory or on a local disk (/dev/shm/x) for checkpoints that need not outlive the machine"
    )
    fast_every: int = opt(1, "save there too", unit="steps", ge=1)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is done where numbers go wrong."""

    max_skipped: int = opt(
        3,
        "steps in a row that may be left out for a loss or gradient that is no number, or for a spike; one more, and the "
        "run goes back to the last checkpoint and passes over these samples",
        unit="steps",
        ge=0,
    )
    spike_zscore: float | None = opt(
        None,
        "leave a step out whose loss is so many robust deviations above the recent ones; 6 to 10 are usual; null: none",
        gt=0,
    )
    straggler_factor: float | None = opt(
        1.3,
        "name a rank that is busy so many times as long as the others in a phase of a step, for several steps in a row; null: "
        "nobody looks",
        gt=1,
    )
    max_rollbacks: int = opt(3, "how often a run goes back without coming further, before it ends", ge=0)
    check_replicas_every: int = opt(
        100, "compare what replicas hold, to the bit, and before each checkpoint; 0: never", unit="steps", ge=0
    )


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What a run says of itself."""

    every: int = opt(
        1,
        "a line in metrics.jsonl",
        unit="steps",
        alias=("log_interval", "logging_steps", "log_every", "log_freq", "log_every_n_steps"),
        ge=1,
    )
    console_every: int | None = opt(
        None,
        "a step's line on the console, of those that metrics.every records; null: the first 3, the last, and so many in "
        "between that a run has at most about 40 (1, 2, 5, 10, ... apart)",
        unit="steps",
        ge=1,
    )
    split_every: int = opt(
        10, "measure the time split (data, forward, backward, reduce, optimizer)", unit="steps", ge=1
    )
    mfu_attention: Literal["causal", "full"] = opt(
        "causal", "what MFU counts for attention: the half that a causal mask needs, or all (the field's older habit)"
    )
    peak_tflops: float | None = opt(
        None,
        "the device's peak, for MFU; null: from the data sheet of a known GPU; a CPU and any other GPU then have no MFU",
        unit="TFLOP/s",
        gt=0,
    )


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Processes, and where a run is kept."""

    name: str | None = opt(None, "the run; null: the recipe's file name", alias=("run_name", "experiment_name"))
    runs: str = opt("runs", "folder of all runs", alias=("output_dir", "save_dir", "dump_folder", "out_dir"))
    processes: int | None = opt(
        None,
        "on this machine; null: every GPU, or 2 on a CPU",
        alias=("nproc_per_node", "num_processes", "devices", "gpus", "nproc"),
        akin=("world_size",),
        ge=1,
    )
    threads: int | None = opt(
        None,
        "CPU threads of a process; null: cores / processes, fewer where other programs use the cores; a run keeps what it began with",
        alias=("num_threads", "omp_num_threads"),
        ge=1,
    )
    nodes: int = opt(
        1,
        "machines, each of which runs the same command; with launch.min_nodes at most so many",
        alias=("nnodes", "num_nodes"),
        unit="machines",
        ge=1,
    )
    min_nodes: int | None = opt(
        None,
        "the run goes on with so few machines when others die, and with more when they come; null: launch.nodes",
        unit="machines",
        ge=1,
    )
    rendezvous: str | None = opt(
        None,
        "HOST:PORT where the machines meet: one of them, or any that runs shoal rendezvous HOST:PORT",
        alias=("rdzv_endpoint",),
        akin=("master_addr",),
    )
    join_seconds: float = opt(
        5.0, "when launch.min_nodes machines have come, others have so long to come too", unit="seconds", gt=0
    )
    port: int = opt(
        0,
        "TCP port at which the processes of one machine meet; 0: any that is free",
        alias=("master_port", "rdzv_port"),
        ge=0,
        le=65535,
    )
    max_restarts: int | None = opt(
        None,
        "a worker that dies or hangs is restarted at most so often; null: as long as steps are taken",
        unit="restarts",
        ge=0,
    )
    max_crashes: int = opt(
        3, "so many crashes without a step further, whatever their cause, end the run", unit="crashes", ge=1
    )
    timeout_seconds: float = opt(
        600.0,
        "a collective that takes longer ends the process; so does the start, a few batches of an evaluation, or a save of a worker",
        unit="seconds",
        gt=0,
    )
    hang_seconds: float | None = opt(
        None,
        "a step that takes longer is a hang, and the workers are started anew; null: learned from the run's own steps, ten times "
        "the slowest recent one and at least 20 seconds, and no hang on a CPU while the process works",
        unit="seconds",
        gt=0,
    )
    time_limit_minutes: float | None = opt(
        None,
        "the run saves and ends in time, with code 85; null: what is left of a Slurm job, if it is one",
        unit="minutes",
        akin=("max_time", "time_limit", "max_run_duration"),
        gt=0,
    )

    @property
    def fewest_nodes(self) -> int:
        """Machines without which the run waits."""
        return self.min_nodes or self.nodes


@dataclass(frozen=True, kw_only=True)
class Config:
    """All of it."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    parallel: Parallel = field(default_factory=Parallel)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    fault: Fault = field(default_factory=Fault)
    metrics: Metrics = field(default_factory=Metrics)
    launch: Launch = field(default_factory=Launch)

    def replace(self, section: str, **values: Any) -> Config:
        """A copy with `values` changed in one section."""
        changed = dataclasses.replace(getattr(self, section), **values)
        return dataclasses.replace(self, **{section: changed})


SECTIONS: dict[str, type[Any]] = {
    "model": Model,
    "data": Data,
    "parallel": Parallel,
    "optim": Optim,
    "train": Train,
    "checkpoint": Checkpoint,
    "fault": Fault,
    "metrics": Metrics,
    "launch": Launch,
}


def option_name(field: dataclasses.Field[Any]) -> str:
    """A field's name as people write it: `from` is a word of Python's, so that the field is `from_`."""
    return field.name.removesuffix("_")


@functools.cache
def options() -> dict[str, dataclasses.Field[Any]]:
    """Every option by its dotted key, in the order of this file."""
    return {f"{name}.{option_name(f)}": f for name, section in SECTIONS.items() for f in dataclasses.fields(section)}
