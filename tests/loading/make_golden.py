"""Makes the checkpoints in golden/, and what the transformers library computes from them, for the tests of loading.

    python tests/loading/make_golden.py

with torch 2.13 and transformers 5.23, which the tests do not need. All values are drawn, so that no scale is 1 and no
bias 0; all but GPT-2 are kept in 16 bits, as they are published.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel

GOLDEN = Path(__file__).parent / "golden"
SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
ROTARY = {"rope_type": "default", "rope_theta": 500.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

ENDS = {"bos_token_id": 0, "eos_token_id": 0}

# By folder: class, configuration, dtype on the disk, and the size of a file.
CASES = {
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(vocab_size=61, n_positions=20, n_embd=24, n_layer=2, n_head=3, n_inner=28, **ENDS),
        torch.float32,
        "1GB",
    ),
    "gpt_neox": (
        transformers.GPTNeoXForCausalLM,
        transformers.GPTNeoXConfig(
            **{**SIZES, "num_attention_heads": 3},
            rope_parameters={"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
        ),
        torch.float16,
        "1GB",
    ),
    "gpt_neox_sequential": (
        transformers.GPTNeoXForCausalLM,
        transformers.GPTNeoXConfig(
            **{**SIZES, "num_attention_heads": 3},
            use_parallel_residual=False,
            attention_bias=False,
            tie_word_embeddings=True,
            hidden_act="gelu_new",
        ),
        torch.float16,
        "1GB",
    ),
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**{**GROUPED, "max_position_embeddings": 512}, rope_parameters=LLAMA3),
        torch.bfloat16,
        "8KB",
    ),
    "llama_biased": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            **SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rope_parameters=ROTARY
        ),
        torch.bfloat16,
        "1GB",
    ),
    "qwen2": (
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config(**GROUPED, tie_word_embeddings=True, rope_parameters=ROTARY),
        torch.bfloat16,
        "1GB",
    ),
    "qwen3": (
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config(**GROUPED, head_dim=8, rope_parameters=ROTARY),
        torch.bfloat16,
        "1GB",
    ),
}


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 61, (2, 13), generator=generator)
    for name, (kind, config, dtype, max_shard_size) in CASES.items():
        model = kind(config)
        with torch.no_grad():
            for path, leaf in model.named_parameters():
                draws = torch.randn(leaf.shape, generator=generator)
                is_scale = leaf.ndim == 1 and path.endswith("weight")
                leaf.copy_(1 + 0.3 * draws if is_scale else draws * (0.3 if leaf.ndim == 1 else leaf.shape[-1] ** -0.5))
        model.to(dtype).save_pretrained(GOLDEN / name, max_shard_size=max_shard_size)
        (GOLDEN / name / "generation_config.json").unlink(missing_ok=True)
        model = kind.from_pretrained(GOLDEN / name, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = model(tokens).logits
        np.save(GOLDEN / name / "logits.npy", logits.numpy())
        print(
            f"{name}: {sum(p.numel() for p in model.parameters())} parameters, logits of size {logits.abs().mean():.2f}"
        )
    np.save(GOLDEN / "tokens.npy", tokens.numpy().astype(np.uint8))
    save_tokenizer(GOLDEN / "llama" / "tokenizer.json")
    print(f"{sum(file.stat().st_size for file in GOLDEN.rglob('*') if file.is_file())} bytes")


def save_tokenizer(path: Path) -> None:
    """One that cuts off and pads, as some are published."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=61, show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox jumps over a flat head of the lazy dog"] * 3, trainer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=6)
    tokenizer.save(str(path))


if __name__ == "__main__":
    main()
