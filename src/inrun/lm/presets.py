"""Models by name, by configuration file, or from a folder of weights, with the training defaults of each
name.

`gpt2-small` and `pythia-410m` are the models of "Data Shapley in One Training Run" (arXiv 2406.11011) and
carry the hyperparameters of its language-model runs. Every preset trains without dropout, as pretraining
usually does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from inrun.errors import InrunError

LOADER: Any = AutoModelForCausalLM  # its methods are untyped
OTHER_WEIGHTS = ("pytorch_model*.bin", "*.pth", "*.ckpt", "tf_model*.h5", "flax_model*.msgpack", "*.gguf")


class ModelError(InrunError):
    """No model can be made of what was named: the message says why and what to do."""


@dataclass(frozen=True)
class Preset:
    """An architecture and the settings it is trained with when the user gives none.

    `vocab_size` is that of a tokenizer trained on the spot; `batch` counts examples, `sequence` tokens;
    the learning rate rises over `warmup_steps` and falls to `min_learning_rate` along a cosine.
    """

    summary: str
    architecture: Callable[[int, int], PretrainedConfig]
    sequence: int
    vocab_size: int
    batch: int = 16
    steps: int = 20_000
    learning_rate: float = 6e-4
    min_learning_rate: float = 6e-5
    warmup_steps: int = 2_000
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0

    def config(self, vocab_size: int, sequence: int) -> PretrainedConfig:
        """The configuration for this vocabulary, with positions for at least `sequence` tokens."""
        return self.architecture(vocab_size, sequence)


def gpt2(layers: int, width: int, heads: int, positions: int) -> Callable[[int, int], PretrainedConfig]:
    def config(vocab_size: int, sequence: int) -> PretrainedConfig:
        return GPT2Config(
            vocab_size=vocab_size,
            n_positions=max(positions, sequence),
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,  # the configuration's own belong to OpenAI's vocabulary
            eos_token_id=None,
        )

    return config


def pythia(layers: int, width: int, heads: int) -> Callable[[int, int], PretrainedConfig]:
    def config(vocab_size: int, sequence: int) -> PretrainedConfig:
        return GPTNeoXConfig(
            vocab_size=vocab_size,
            max_position_embeddings=max(2048, sequence),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
            use_parallel_residual=True,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )

    return config


PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        "GPT-2's architecture, 4 layers of 128: minutes on two cores",
        gpt2(4, 128, 4, 128),
        sequence=128,
        vocab_size=4096,
        steps=1_000,
        learning_rate=1e-3,
        min_learning_rate=1e-4,
        warmup_steps=100,
    ),
    "small": Preset(
        "GPT-2's architecture, 6 layers of 384: hours on a few cores, minutes on a GPU",
        gpt2(6, 384, 6, 256),
        sequence=256,
        vocab_size=16_384,
        steps=5_000,
        learning_rate=1e-3,
        min_learning_rate=1e-4,
        warmup_steps=200,
    ),
    "gpt2-small": Preset("GPT-2, 124M; the paper's", gpt2(12, 768, 12, 1024), sequence=1024, vocab_size=50_257),
    "pythia-70m": Preset(
        "Pythia, 70M",
        pythia(6, 512, 8),
        sequence=1024,
        vocab_size=50_304,
        learning_rate=1e-3,
        min_learning_rate=1e-4,
    ),
    "pythia-160m": Preset("Pythia, 162M", pythia(12, 768, 12), sequence=1024, vocab_size=50_304),
    "pythia-410m": Preset("Pythia, 405M; the paper's", pythia(24, 1024, 16), sequence=1024, vocab_size=50_304),
}


def build_model(name_or_path: str, vocab_size: int, sequence: int, *, eos: int | None = None) -> PreTrainedModel:
    """A causal language model in float32, from a preset's name, a configuration or a folder of weights.

    A preset or a configuration (a `config.json`, or a folder with no weights) gives fresh weights, drawn from
    torch's generator, for exactly `vocab_size` tokens. A folder with safetensors gives those weights, whose
    vocabulary must fit: at least `vocab_size`, and no more than a tenth of it unused (padding is common).
    `eos`, the tokenizer's end-of-text token, goes into the configuration of fresh weights. Nothing is
    downloaded, no code of a model's folder runs, no pickle is opened. Raises ModelError for an unknown name,
    a configuration or weights that cannot be loaded or do not fit each other, the vocabulary, or `sequence`.
    """
    preset = PRESETS.get(name_or_path)
    if preset is not None:
        return fresh(preset.config(vocab_size, sequence), eos)
    path = Path(name_or_path).expanduser()
    if not path.exists():
        raise ModelError(
            f"{name_or_path!r} is no preset and no file or folder. Presets: {', '.join(PRESETS)}; or give a "
            "config.json, or a folder with weights as safetensors"
        )
    config = read_config(path)
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and positions < sequence:
        raise ModelError(
            f"{path}: has {positions} positions, fewer than a sequence of {sequence}: give --sequence {positions}"
        )
    if path.is_dir() and any(path.glob("*.safetensors")):
        if not 0.9 * text.vocab_size <= vocab_size <= text.vocab_size:
            raise ModelError(
                f"{path}: vocabulary mismatch: weights for {text.vocab_size} tokens, a tokenizer with "
                f"{vocab_size}; use the tokenizer that belongs to these weights"
            )
        return pretrained(path, config)
    others = [file.name for kind in OTHER_WEIGHTS for file in path.glob(kind)] if path.is_dir() else []
    if others:
        raise ModelError(
            f"{path}: weights only as {', '.join(sorted(others))}, not opened as pickles can run code; "
            "save them as safetensors: model.save_pretrained(folder)"
        )
    text.vocab_size = vocab_size
    return fresh(config, eos)


def read_config(path: Path) -> PretrainedConfig:
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"{path}: no config.json in this folder")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ModelError(f"{path}: not a configuration that transformers knows: {brief(error)}") from error
    return config


def brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def fresh(config: PretrainedConfig, eos: int | None) -> PreTrainedModel:
    if eos is not None:
        config.get_text_config().eos_token_id = eos
    try:
        model: PreTrainedModel = LOADER.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (ValueError, TypeError) as error:
        raise ModelError(f"no causal language model can be made of this configuration: {brief(error)}") from error
    return with_loss(model)


def pretrained(folder: Path, config: PretrainedConfig) -> PreTrainedModel:
    model: PreTrainedModel
    try:
        model, report = LOADER.from_pretrained(
            str(folder),
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: the weights cannot be loaded: {brief(error)}") from error
    wrong = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if wrong:
        raise ModelError(f"{folder}: {len(wrong)} weights are missing or of another size, e.g. {wrong[:3]}")
    return with_loss(model)


def with_loss(model: PreTrainedModel) -> PreTrainedModel:
    """Name the loss that transformers falls back to for GPT-2, which it otherwise does with a warning."""
    model.loss_type = model.loss_type or "ForCausalLM"
    return model
