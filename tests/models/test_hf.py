"""Any causal language model of transformers: its logits, training and names; and the models that are rejected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from shoal.checkpoint.convert import to_hugging_face
from shoal.config.options import Model
from shoal.errors import ConfigError, ModelError
from shoal.models.build import build_model, materialize
from shoal.models.generate import generate
from shoal.models.hf import HuggingFaceModel
from shoal.models.hf_check import check_sight
from shoal.models.hf_open import attention_of, faster_attention_of
from shoal.models.loss import linear_cross_entropy_sum
from shoal.optim.schedule import learning_rate
from shoal.parallel.recompute import checkpointed, compile_forward
from shoal.plan.estimate import flops_per_token, parameter_count, why_no_flops
from shoal.resolve.resolve import resolve
from shoal.training.assemble import folder_weights
from shoal.training.run import Run
from shoal.training.step import train_step
from tests.models import hf_small
from tests.parallel.layouts import ALONE, NeverStop

Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Return a function that gives the folder of a family, and saves it at the first use."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        return root / name if (root / name).is_dir() else hf_small.save(name, root / name)

    return folder


def ours(folder: Path, dtype: torch.dtype = torch.float32) -> HuggingFaceModel:
    work = folder.parent
    model = build_model(hf_small.config_of(folder, work, "x").model, compute_dtype=dtype)
    materialize(model, folder_weights(model, str(folder)), "cpu")
    assert isinstance(model, HuggingFaceModel)
    return model.eval()


def tokens_of(length: int, batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, hf_small.VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", hf_small.FAMILIES)
@torch.no_grad()
def test_logits_are_transformers(folders: Folders, name: str) -> None:
    model, other = ours(folders(name)), hf_small.theirs(folders(name))
    tokens = tokens_of(24)
    exact = other(tokens).logits
    torch.testing.assert_close(model.logits(model(tokens)), exact, atol=1e-5, rtol=0)
    half = ours(folders(name), torch.bfloat16)
    hidden = half(tokens)
    assert hidden.dtype == torch.bfloat16
    theirs_rounded = hf_small.theirs(folders(name), torch.bfloat16)(tokens).logits
    noise = (theirs_rounded.float() - exact).norm()
    assert (half.logits(hidden).float() - exact).norm() < 1.5 * noise


@pytest.mark.parametrize("name", hf_small.FAMILIES)
@torch.no_grad()
def test_a_document_does_not_know_its_neighbours(folders: Folders, name: str) -> None:
    model, lengths = ours(folders(name)), (9, 1, 14, 6)
    documents = [tokens_of(length, 1, seed=length) for length in lengths]
    ids = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], dim=1)
    positions = torch.cat([torch.arange(n).unsqueeze(0) for n in lengths], dim=1)
    packed = model.logits(model(torch.cat(documents, dim=1), positions, ids))
    alone = torch.cat([model.logits(model(document)) for document in documents], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["gemma2", "gpt_neox", "gpt2"])
@torch.no_grad()
def test_what_is_written_is_the_same_with_and_without_a_cache_and_beside_others(folders: Folders, name: str) -> None:
    model = ours(folders(name))
    prompts = [tokens_of(n, 1, seed=n)[0].tolist() for n in (3, 12, 7)]
    with_cache = generate(model, prompts, max_new_tokens=12)
    assert with_cache == generate(model, prompts, max_new_tokens=12, use_cache=False)
    assert with_cache == [generate(model, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    tokens = torch.tensor(prompts[1:2])
    expected = hf_small.theirs(folders(name)).generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert expected[0, 12:].tolist() == with_cache[1]


def test_a_family_without_a_cache_computes_all_tokens_again(folders: Folders) -> None:
    model = ours(folders("openai-gpt"))
    prompt = tokens_of(5, 1)[0].tolist()
    assert generate(model, [prompt], max_new_tokens=6) == generate(model, [prompt], max_new_tokens=6, use_cache=False)


@torch.no_grad()
def test_keys_that_turn_otherwise_in_a_long_text_are_not_kept(folders: Folders) -> None:
    model = ours(folders("phi3"))
    prompt = tokens_of(hf_small.SHORT - 4, 1)
    text = prompt
    for _ in range(12):  # across the position at which the rotation changes
        text = torch.cat([text, hf_small.theirs(folders("phi3"))(text).logits[:, -1:].argmax(-1)], dim=1)
    assert generate(model, prompt.tolist(), max_new_tokens=12) == [text[0, prompt.shape[1] :].tolist()]


@pytest.mark.parametrize("name", ["gemma2", "phi", "gpt_neox", "cohere"])
def test_training_is_a_plain_loop(folders: Folders, tmp_path: Path, name: str) -> None:
    config = hf_small.config_of(folders(name), tmp_path, "run", data__document_mask=False, optim__weight_decay=0.0)
    run = Run.open(config, ALONE, NeverStop())
    other = hf_small.theirs(folders(name)).train()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step in range(1, 5):
        batches = run.loader.next_step()
        lr = learning_rate(config.optim, step, 4)
        stats = train_step(run.runnable, run.state, batches, step=step, lr=lr, clip_norm=0.0)
        loss, tokens, *_ = stats.read()
        count, expected = sum(b.valid_tokens for b in batches), 0.0
        optimizer.zero_grad()
        for batch in batches:
            logits = other(batch.tokens).logits
            part = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum") / count
            part.backward()
            expected += part.item()
        optimizer.step()
        assert loss / tokens == pytest.approx(expected, rel=1e-5)
    run.close()


@pytest.mark.parametrize(("name", "plain"), [("gemma2", False), ("phi", False), ("cohere", False), ("qwen3", True)])
def test_the_loss_is_of_the_models_own_logits(folders: Folders, name: str, plain: bool) -> None:
    model = ours(folders(name))
    assert model._theirs.head.plain == plain
    tokens, labels = tokens_of(16), tokens_of(16, seed=2)
    labels[0, :3] = -100
    gradients = []
    for chunk_bytes in (2**28, 4 * hf_small.VOCAB * 7):
        model.zero_grad()
        loss = model._theirs.head.loss(model(tokens), labels, 1 / 29, chunk_bytes=chunk_bytes)
        loss.backward()
        expected = F.cross_entropy(model.logits(model(tokens)).flatten(0, 1), labels.flatten())
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "gpt2"])
def test_bfloat16_has_float32_gradients_near_those_of_float32(folders: Folders, name: str) -> None:
    gradients = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = ours(folders(name), dtype).train()
        model.loss(model(tokens_of(33)[:, :-1]), tokens_of(33)[:, 1:], 1 / 64).backward()
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        gradients[dtype] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    wanted = gradients[torch.float32]
    assert (gradients[torch.bfloat16] - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_blocks_are_computed_again_and_compiled(folders: Folders, dtype: torch.dtype) -> None:
    def gradient(change: Callable[[Any], None]) -> torch.Tensor:
        model = ours(folders("gemma2"), dtype).train()
        for block in model.blocks.values():
            change(block)
        model.loss(model(tokens_of(17)[:, :-1]), tokens_of(17)[:, 1:], 1 / 32).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    def again(mode: str) -> Callable[[Any], None]:
        return lambda block: setattr(block, "forward", checkpointed(block.forward, mode))

    def compiled(block: Any) -> None:
        block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")

    plain = gradient(lambda block: None)
    assert torch.equal(gradient(again("full")), plain)
    assert torch.equal(gradient(again("selective")), plain)
    torch.compiler.reset()
    assert (gradient(compiled) - plain).norm() < (1e-5 if dtype == torch.float32 else 5e-2) * plain.norm()


@pytest.mark.slow
def test_a_block_compiles(folders: Folders) -> None:
    model = ours(folders("gpt_neox"))
    tokens = tokens_of(16)
    eager = model(tokens)
    for block in model.blocks.values():
        compile_forward(block, whole=True, bitwise=False, again=False)
    torch.testing.assert_close(model(tokens), eager, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", hf_small.FAMILIES)
def test_names_buffers_and_counts_are_those_of_transformers(folders: Folders, tmp_path: Path, name: str) -> None:
    model, other = ours(folders(name)), hf_small.theirs(folders(name))
    named, wanted = dict(model.named_parameters()), dict(other.named_parameters())
    assert named.keys() == wanted.keys()
    assert all(torch.equal(named[n], wanted[n]) for n in named)
    buffers, expected = dict(model.named_buffers()), dict(other.named_buffers())
    assert buffers.keys() == expected.keys()
    assert all(torch.equal(buffers[n], expected[n]) for n in buffers)
    assert parameter_count(model.shape) == sum(p.numel() for p in named.values())
    tensors = to_hugging_face("hf", named)
    assert tensors.keys() == named.keys()
    save_file({n: t.detach() for n, t in tensors.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folders(name) / "config.json").read_bytes())
    with torch.no_grad():
        again = hf_small.theirs(tmp_path)(tokens_of(9)).logits
        assert torch.equal(again, other(tokens_of(9)).logits)


def test_flops_of_a_native_shape_are_the_same_either_way(folders: Folders, tmp_path: Path) -> None:
    shape = hf_small.config_of(folders("llama"), tmp_path, "x").model
    native = Model(
        vocab_size=hf_small.VOCAB, dim=48, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=88, max_seq_len=64
    )
    attention: Any
    for attention in ("causal", "full"):
        assert flops_per_token(shape, 32, attention) == flops_per_token(native, 32, attention)
    windows = hf_small.config_of(folders("gemma2"), tmp_path, "x").model
    assert flops_per_token(windows, 8) + 1 < flops_per_token(windows, 32)
    full = 12 * 4 * 16 * (32 + 8 + 8)  # two of three layers look back eight tokens
    matrices = flops_per_token(windows, 32, "full") - full
    assert matrices == 6 * (
        parameter_count(windows) - sum(p.numel() for p in ours(folders("gemma2")).parameters() if p.ndim < 2)
    )
    assert why_no_flops(windows, 32) is None


def test_flash_attention_is_for_what_torch_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    capped = type("Capped", (), {"_supports_sdpa": False, "_supports_flash_attn": True})
    plain = type("Plain", (), {"_supports_sdpa": True, "_supports_flash_attn": True})
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert faster_attention_of(capped, cuda, torch.bfloat16) == "flash_attention_2"
    assert faster_attention_of(plain, cuda, torch.bfloat16) is None
    assert faster_attention_of(capped, cuda, torch.float32) is None
    assert faster_attention_of(capped, cpu, torch.bfloat16) is None
    assert (attention_of(capped), attention_of(plain)) == ("eager", "sdpa")


# --- rejected models ---------------------------------------------------------------------------------------------


def resolved(folder: Path, work: Path) -> str:
    with pytest.raises(ConfigError) as raised:
        hf_small.config_of(folder, work, "x")
    return str(raised.value)


def rewritten(folder: Path, tmp_path: Path, **changes: Any) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    return copy


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_local_experts": 8}, "num_local_experts 8: a mixture of experts"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"layerdrop": 0.1}, "layerdrop 0.1"),
        ({"hidden_size": None}, "hidden_size or n_embd"),
        ({"text_config": {}}, "text_config"),
    ],
)
def test_what_a_config_asks_for_and_is_not_built(
    folders: Folders, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    assert words in resolved(rewritten(folders("llama"), tmp_path, **changes), tmp_path)


def test_a_model_that_needs_its_own_code_is_refused(folders: Folders, tmp_path: Path) -> None:
    copy = rewritten(folders("llama"), tmp_path, model_type="strange", auto_map={"AutoConfig": "evil.Config"})
    (copy / "evil.py").write_text("raise SystemExit('this was run')")
    with pytest.raises(
        ModelError, match=r"is a strange, which transformers .* does not know; it comes with its own code"
    ):
        ours(copy)


def test_without_transformers_the_extra_is_named(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ModelError, match=r"shoal\[hf\]"):
        ours(folders("llama"))


def test_without_weights_there_is_no_such_family(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.from"):
        resolve(None, [("model.family", "hf", "here"), ("train.steps", "1", "here")])


def test_a_shape_that_is_not_the_folders_is_refused(folders: Folders, tmp_path: Path) -> None:
    given = {"model.from": folders("llama"), "model.family": "hf", "train.steps": 1, "data.tokenizer": "bytes"}
    where = [(key, str(value), "here") for key, value in given.items()]
    for key, value in (("dim", "64"), ("dropout", "0.3"), ("max_seq_len", "128")):
        with pytest.raises(ConfigError, match=rf"model\.{key} .* differs from"):
            resolve(None, [*where, (f"model.{key}", value, "here")])
    shorter = resolve(None, [*where, ("model.max_seq_len", "48", "here"), ("data.seq_len", "48", "here")])
    assert shorter.config.model.max_seq_len == 48


def test_a_model_that_sees_what_comes_later_is_refused(folders: Folders) -> None:
    model = ours(folders("bert"))
    with pytest.raises(ModelError, match="is not causal"):
        check_sight(model, batch=2, seq_len=16, documents=False, device=torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_family_that_does_not_keep_documents_apart_is_refused_with_a_document_mask(
    folders: Folders, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"batch": 2, "seq_len": 32, "device": torch.device("cpu")}
    check_sight(ours(folders("opt"), dtype), documents=False, **options)
    with pytest.raises(ModelError, match=r"set data\.document_mask to false"):
        check_sight(ours(folders("opt"), dtype), documents=True, **options)
    check_sight(ours(folders("gemma2"), dtype), documents=True, **options)


def test_a_family_whose_code_keeps_to_float32_is_refused_in_bfloat16(folders: Folders) -> None:
    model = ours(folders("openai-gpt"), torch.bfloat16)
    with pytest.raises(ModelError, match=r"set train\.dtype to float32"):
        check_sight(model, batch=2, seq_len=16, documents=False, device=torch.device("cpu"))


def test_weights_of_another_model_are_named(folders: Folders, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not use: model\.layers\.1"):
        ours(rewritten(folders("llama"), tmp_path, num_hidden_layers=1))


def test_the_head_of_a_plain_model_is_the_fused_loss(folders: Folders) -> None:
    model = ours(folders("llama"))
    hidden, labels = model(tokens_of(8)), tokens_of(8, seed=4)
    assert torch.equal(model.loss(hidden, labels), linear_cross_entropy_sum(hidden, model.head_weight(), labels))
