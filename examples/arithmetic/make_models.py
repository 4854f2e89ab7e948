"""Writes the untrained teacher and student of the arithmetic example: small Qwen3 models.

    python -m examples.arithmetic.make_models --tokenizer runs/arithmetic/tokenizer \\
        --output runs/arithmetic/models

The initialisation is what makes them learn within minutes. With tied embeddings and a final RMSNorm
a logit is at most about hidden_size * std of the embedding: with the customary 0.02 that is 1.3 at
width 64, too little to be sure of one of 1000 numbers. So the embedding gets embedding_gain /
hidden_size, and each linear layer 1 / sqrt(inputs).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from examples.arithmetic.command_line import load_settings, make_parser
from examples.arithmetic.settings import ModelSettings
from sod_mcore.files import atomic_folder

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""Copied by name: the folder may also be a model's, with weights of its own."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write both models unless they exist."""
    parser = make_parser(str(__doc__), "folder that receives the folders teacher and student")
    parser.add_argument("--tokenizer", type=Path, required=True, help="output of make_tokenizer")
    options = parser.parse_args(arguments)
    settings = load_settings(options)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer, local_files_only=True)
    models = {"teacher": settings.teacher, "student": settings.student}
    for name, model_settings in tqdm(models.items(), desc="models"):
        if (options.output / name).exists():
            print(f"{options.output / name} exists; nothing to do")
            continue
        with atomic_folder(options.output / name) as folder:
            make_model(model_settings, tokenizer).save_pretrained(folder)
            for file in TOKENIZER_FILES:
                shutil.copyfile(options.tokenizer / file, folder / file)


def make_model(settings: ModelSettings, tokenizer: Any) -> Qwen3ForCausalLM:
    """An untrained float32 model; equal seeds give equal weights."""
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.num_hidden_layers,
            num_attention_heads=settings.num_attention_heads,
            num_key_value_heads=settings.num_key_value_heads,
            head_dim=settings.head_dim,
            max_position_embeddings=settings.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype=torch.float32,
        )
    )
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            elif "embed_tokens" in name:
                std = settings.embedding_gain / settings.hidden_size
                parameter.normal_(std=std, generator=generator)
            else:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    return model


if __name__ == "__main__":
    main()
