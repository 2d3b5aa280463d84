"""
All options of a run: ten frozen sections, each option with its default, its meaning and its unit.

`resolve/resolve.py` fills them from a preset, a recipe and flags. A component takes a section or plain arguments if
they suffice; training, commands, and checks across sections take the whole `Config`.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, cast

from shoal.config.alert_options import Alerts
from shoal.config.data_options import Data
from shoal.config.families import FAMILIES, FamilyName
from shoal.config.option import opt, option_fields, option_name
from shoal.config.run_options import Checkpoint, Fault, Launch, Metrics
from shoal.config.track_options import Track

DTYPE_SPELLINGS: Final = {
    "bf16": "bfloat16", "fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16",
}  # fmt: skip
FLOAT16_ON_CPU: Final = "a CPU multiplies float16 a thousand times slower; set {option} to bfloat16 or float32"


@dataclass(frozen=True, kw_only=True)
class Model:
    """The architecture. `null` means derived, as the option describes."""

    preset: str | None = opt(
        None,
        "named architecture to start from; other model options override its values",
        alias=("name", "model_name"),
        past=True,
    )
    from_: str | None = opt(
        None,
        "weights to start from: a folder in Hugging Face's layout, or the NAME of a fetched model; its "
        "config.json defines the shape",
        alias=("pretrained", "pretrained_model_name_or_path", "init_from", "checkpoint_dir", "hf_model"),
        past=True,
    )
    family: FamilyName = opt(  # noqa: RUF009
        "llama",
        "; ".join(f"{name}: {family.summary}" for name, family in FAMILIES.items()),
        alias=("arch", "architecture", "model_type"),
        past=True,
    )
    vocab_size: int | None = opt(
        None,
        "rows of the embedding; null: the tokenizer's vocabulary size",
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
    num_layers: int = opt(
        6, "number of transformer blocks", alias=("n_layer", "n_layers", "num_hidden_layers", "depth"), past=True, ge=1
    )
    num_heads: int = opt(
        4, "number of query heads per block", alias=("n_head", "n_heads", "num_attention_heads"), past=True, ge=1
    )
    num_kv_heads: int | None = opt(
        None,
        "number of key and value heads per block (grouped-query attention); null: num_heads",
        alias=("n_kv_heads", "num_key_value_heads", "num_query_groups"),
        past=True,
        ge=1,
    )
    head_dim: int | None = opt(
        None, "width of one attention head; null: dim / num_heads", alias=("kv_channels",), past=True, ge=1
    )
    ffn_dim: int | None = opt(
        None,
        "inner width of the feed-forward layers; null: 4 dim (gpt2), or 8/3 dim rounded up to a multiple of 64 (llama)",
        alias=("intermediate_size", "n_inner", "ffn_hidden_size"),
        past=True,
        ge=1,
    )
    max_seq_len: int = opt(
        1024,
        "maximum context length",
        unit="tokens",
        alias=("block_size", "n_positions", "max_position_embeddings", "context_length"),
        past=True,
        ge=1,
    )
    norm_eps: float = opt(
        1e-5, "epsilon inside the norms", alias=("rms_norm_eps", "layer_norm_epsilon"), past=True, gt=0
    )
    rope_theta: float = opt(
        10_000.0, "base of the rotary position frequencies (llama)", alias=("rope_base",), past=True, gt=0
    )
    rope_factor: float | None = opt(
        None,
        "Llama 3 context extension: divisor of the low rotary frequencies; null disables the extension",
        past=True,
        ge=1,
    )
    rope_low_freq_factor: float = opt(
        1.0,
        "Llama 3 context extension: frequencies with fewer turns than this over the original context are divided "
        "by rope_factor",
        past=True,
        gt=0,
    )
    rope_high_freq_factor: float = opt(
        4.0,
        "Llama 3 context extension: frequencies with more turns than this over the original context are unchanged",
        past=True,
        gt=0,
    )
    rope_original_seq_len: int = opt(
        8192, "Llama 3 context extension: context length of the original training", unit="tokens", past=True, ge=1
    )
    qk_norm: bool = opt(False, "apply RMSNorm to each query and key head (Qwen3)", past=True)
    qkv_bias: bool = opt(
        False,
        "add biases to the query, key and value projections (Qwen2; gpt2 always has them)",
        alias=("attention_bias", "add_qkv_bias"),
        past=True,
    )
    tie_embeddings: bool = opt(
        False,
        "use the embedding as the output layer (tied embedding)",
        alias=("tie_word_embeddings", "weight_tying"),
        past=True,
    )
    dropout: float = opt(
        0.0, "fraction of activations dropped in training (gpt2); 0 disables dropout", past=True, ge=0, lt=1
    )
    init_std: float = opt(
        0.02, "standard deviation of the initial weights", alias=("initializer_range",), past=True, gt=0
    )
    kept: Path | None = None  # not an option: the run's copy of the folder model.from, if that folder is gone


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """
    The layout. The product of the five axes is the number of processes; one axis may be -1 and takes the remaining processes.

    `parallel: auto` in place of the section lets `shoal train` choose the layout.
    """

    dp_replicate: int = opt(
        -1,
        "number of data-parallel replicas (DDP; with dp_shard: HSDP); -1: the remaining processes, or 1 if "
        "another axis is -1",
        alias=("ddp", "dp", "data_parallel", "data_parallel_size", "dp_size", "data_parallel_replicate_degree"),
        ge=-1,
    )
    dp_shard: int = opt(
        1,
        "number of processes that shard parameters, gradients and optimizer state (FSDP2); -1: the remaining processes",
        alias=("fsdp", "data_parallel_shard_degree", "fsdp_size", "shard"),
        akin=("zero",),
        ge=-1,
    )
    tp: int = opt(
        1,
        "number of processes that split each matrix (tensor parallel, with sequence and loss parallel); -1: the "
        "remaining processes",
        alias=("tensor_parallel_degree", "tensor_parallel", "tensor_model_parallel_size", "tp_size"),
        ge=-1,
    )
    cp: int = opt(
        1,
        "number of processes that split each sequence (context parallel); -1: the remaining processes",
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
        "number of processes that split the blocks into stages (pipeline parallel); -1: the remaining processes",
        alias=("pipeline_parallel_degree", "pipeline_parallel", "pipeline_model_parallel_size", "pp_size"),
        ge=-1,
    )
    reshard_after_forward: Literal["always", "never"] | int = opt(
        "always",
        "with dp_shard: what happens to each block's gathered parameters between forward and backward. always: freed; "
        "never: kept; a number: kept sharded over groups of this many processes",
        alias=("fsdp_reshard_after_forward",),
        akin=("zero_stage",),
    )
    cpu_offload: bool = opt(
        False,
        "with dp_shard: keep parameters, gradients and optimizer state in CPU memory instead of GPU memory",
        alias=("enable_cpu_offload", "offload"),
    )
    cp_method: Literal["allgather", "ulysses", "ring"] = opt(
        "allgather",
        "attention with cp. allgather: each process gathers all keys and values; ulysses: an all-to-all exchanges "
        "sequence parts for heads; ring: keys and values pass from process to process",
        alias=("context_parallel_method", "cp_comm_type", "context_parallel_rotate_method"),
    )
    pp_schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "zbv", "dualpipev"] = opt(
        "1f1b",
        "order of forward and backward over the pipeline stages; the last three hold several stages per process",
        alias=("pipeline_parallel_schedule", "pipeline_schedule"),
    )
    pp_stages: int | None = opt(
        None,
        "pipeline stages per process; null: 1 for gpipe and 1f1b, 2 for the others",
        unit="stages",
        alias=("virtual_stages", "num_virtual_stages", "virtual_pipeline_model_parallel_size"),
        ge=1,
    )


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimizer and its learning rate schedule."""

    name: Literal["adamw", "muon"] = opt(
        "adamw",
        "adamw: AdamW for all parameters; muon: Muon for the matrices of the blocks, AdamW for everything else",
        alias=("optimizer", "optimizer_name", "optim_type"),
        past=True,
    )
    lr: float = opt(1e-3, "peak learning rate", alias=("learning_rate", "max_lr", "peak_lr"), gt=0)
    beta1: float = opt(0.9, "AdamW's decay of the gradient average", alias=("adam_beta1",), ge=0, lt=1)
    beta2: float = opt(0.95, "AdamW's decay of the squared gradient average", alias=("adam_beta2",), ge=0, lt=1)
    eps: float = opt(1e-8, "AdamW's epsilon", alias=("adam_eps", "adam_epsilon", "epsilon"), gt=0)
    muon_momentum: float = opt(0.95, "Muon's Nesterov momentum", ge=0, lt=1)
    weight_decay: float = opt(0.1, "decoupled weight decay, on matrices only; 0 disables it", alias=("wd",), ge=0)
    clip_norm: float = opt(
        1.0,
        "maximum gradient norm; 0 disables clipping",
        alias=("grad_clip", "max_grad_norm", "clip_grad", "gradient_clipping", "max_norm", "clip"),
        ge=0,
    )
    schedule: Literal["cosine", "linear", "wsd", "constant"] = opt(
        "cosine",
        "learning rate after warmup; wsd: constant, then linear decay over the last decay_fraction of the run",
        alias=("lr_scheduler_type", "scheduler", "lr_scheduler", "lr_decay_style", "decay_type"),
    )
    warmup_steps: int = opt(
        0,
        "length of the linear warmup; 0 disables it",
        unit="steps",
        alias=("warmup", "num_warmup_steps", "warmup_iters", "lr_warmup_iters"),
        ge=0,
    )
    decay_fraction: float = opt(0.2, "wsd: fraction of the run spent decaying", alias=("decay_ratio",), gt=0, le=1)
    final_lr_fraction: float = opt(
        0.0,
        "learning rate at the end of the run, as a fraction of the peak",
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
        "run length in optimizer steps",
        unit="steps",
        alias=("max_steps", "max_iters", "num_steps", "train_iters", "iterations", "total_steps"),
        ge=1,
    )
    tokens: int | None = opt(
        None,
        "run length in tokens, rounded up to whole steps",
        unit="tokens",
        alias=("max_tokens", "train_tokens", "total_tokens"),
        ge=1,
    )
    epochs: float | None = opt(
        None,
        "run length in passes over the corpus, rounded up to whole steps",
        alias=("num_epochs", "num_train_epochs", "max_epochs"),
        gt=0,
    )
    global_batch: int = opt(
        64,
        "sequences per optimizer step, over all processes",
        unit="sequences",
        alias=("batch_size", "global_batch_size", "train_batch_size", "total_batch_size"),
        ge=1,
    )
    micro_batch: int = opt(
        8,
        "sequences per forward pass of one process; gradient accumulation makes up the global batch; auto: shoal train "
        "tries sizes and keeps the fastest that fits",
        unit="sequences",
        alias=("micro_batch_size", "local_batch_size", "per_device_train_batch_size", "device_batch_size"),
        auto=True,
        ge=1,
    )
    seed: int = opt(
        0,
        "seed of the initial weights, the data order and dropout",
        alias=("random_seed", "manual_seed"),
        past=True,
        ge=0,
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = opt(
        "auto",
        "dtype of activations and matrix products; weights, optimizer state and sums of gradients are always float32. auto: "
        "bfloat16 on a GPU that supports it; on a CPU float32, or bfloat16 if its instructions are faster "
        "(measured). float16 uses loss scaling and needs CUDA",
        alias=("precision", "mixed_precision", "torch_dtype", "param_dtype"),
        akin=("bf16", "fp16"),
        spellings=DTYPE_SPELLINGS,
    )
    device: Literal["auto", "cpu", "cuda"] = opt(
        "auto", "auto: CUDA if available, else the CPU", alias=("accelerator",)
    )
    compile: bool = opt(False, "compile each block with torch.compile", alias=("torch_compile",))
    compile_check: bool = opt(
        True,
        "with train.compile: compare loss and gradients of one micro-batch with eager code before the first step, "
        "and stop the run if they differ by more than rounding",
    )
    repro: Literal["fast", "bitwise"] = opt(
        "fast",
        "bitwise: bitwise identical results at any data-parallel degree, with one CPU thread per process; fast: "
        "no such guarantee",
        alias=("deterministic", "reproducibility", "deterministic_mode"),
    )
    activation_checkpointing: Literal["none", "full", "selective", "budget"] = opt(
        "none",
        "what backward recomputes. none: nothing; full: each block; selective: all but matrix products and "
        "attention; budget: what exceeds train.activation_budget",
        alias=("gradient_checkpointing", "checkpointing", "ac", "recompute", "activation_checkpoint"),
    )
    activation_budget: float = opt(
        0.5,
        "with train.activation_checkpointing budget: fraction of activation memory to keep; the compiler chooses what "
        "to recompute. 0: as with full; 1: as with none",
        alias=("memory_budget", "activation_memory_budget"),
        ge=0,
        le=1,
    )
    eval_every: int = opt(
        0,
        "interval between evaluations on held-out documents; 0: only at the end",
        unit="steps",
        alias=("eval_interval", "eval_steps", "eval_freq", "val_check_interval"),
        ge=0,
    )
    eval_tokens: int = opt(
        100_000,
        "maximum held-out tokens per evaluation; a run's last evaluation reads all of them",
        unit="tokens",
        akin=("eval_iters", "eval_batches"),
        ge=1,
    )
    sample_prompt: str = opt("", "prompt that the model continues at the end of the run; empty disables it")
    sample_tokens: int = opt(100, "length of the continuation of train.sample_prompt", unit="tokens", ge=1)


@dataclass(frozen=True, kw_only=True)
class Config:
    """All options of a run."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    parallel: Parallel = field(default_factory=Parallel)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    fault: Fault = field(default_factory=Fault)
    metrics: Metrics = field(default_factory=Metrics)
    track: Track = field(default_factory=Track)
    alerts: Alerts = field(default_factory=Alerts)
    launch: Launch = field(default_factory=Launch)

    def replace(self, section: str, **values: Any) -> Config:
        """Return a copy with `values` changed in one section."""
        changed = dataclasses.replace(getattr(self, section), **values)
        return dataclasses.replace(self, **{section: changed})


SECTIONS: dict[str, type[Any]] = {f.name: cast(type[Any], f.default_factory) for f in dataclasses.fields(Config)}


@functools.cache
def options() -> dict[str, dataclasses.Field[Any]]:
    """Return every option by its dotted key, in the order of declaration."""
    return {f"{name}.{option_name(f)}": f for name, section in SECTIONS.items() for f in option_fields(section)}
