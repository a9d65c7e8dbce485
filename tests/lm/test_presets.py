"""Models by name, by configuration, by folder: the right architecture, or an error that says what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from inrun.lm.presets import PRESETS, ModelError, build_model
from inrun.lm.tokens import Collate


def parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "vocab_size", "count"),
    [
        ("gpt2-small", 50_257, 124_439_808),
        ("pythia-70m", 50_304, 70_426_624),
        ("pythia-160m", 50_304, 162_322_944),
        ("pythia-410m", 50_304, 405_334_016),
        ("tiny", 4096, 4096 * 128 + 128 * 128 + 4 * (12 * 128**2 + 13 * 128) + 2 * 128),
        ("small", 16_384, 16_384 * 384 + 256 * 384 + 6 * (12 * 384**2 + 13 * 384) + 2 * 384),
    ],
)
def test_presets_have_the_published_sizes(name: str, vocab_size: int, count: int) -> None:
    preset = PRESETS[name]
    assert preset.vocab_size == vocab_size
    with torch.device("meta"):
        model = build_model(name, vocab_size, preset.sequence)
    assert parameters(model) == count
    assert model.dtype == torch.float32
    assert not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))


def test_pythia_is_pythia() -> None:
    config = PRESETS["pythia-410m"].config(50_304, 1024)
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (24, 1024, 16)
    assert (config.intermediate_size, config.hidden_act, config.layer_norm_eps) == (4096, "gelu", 1e-5)
    assert config.rope_parameters["partial_rotary_factor"] == 0.25
    assert config.use_parallel_residual
    assert not config.tie_word_embeddings
    assert PRESETS["gpt2-small"].config(50_257, 1024).tie_word_embeddings


@pytest.mark.parametrize("name", ["gpt2-small", "pythia-410m"])
def test_the_papers_presets_train_as_the_paper_did(name: str) -> None:
    preset = PRESETS[name]
    assert (preset.sequence, preset.batch, preset.steps, preset.clip) == (1024, 16, 20_000, 1.0)
    assert (preset.learning_rate, preset.min_learning_rate, preset.warmup_steps) == (6e-4, 6e-5, 2000)
    assert (preset.betas, preset.weight_decay) == ((0.9, 0.95), 0.1)


def test_tiny_learns_and_padding_does_not_count(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = build_model("tiny", 300, 32, eos=7)
    assert model.config.eos_token_id == 7
    rows = [{"input_ids": torch.arange(3, 3 + n)} for n in (4, 20)]
    model.train(False)
    with torch.no_grad():
        single = [float(model(**Collate(0)([row])).loss) * (len(row["input_ids"]) - 1) for row in rows]
        assert float(model(**Collate(0)(rows)).loss) == pytest.approx(sum(single) / (3 + 19), rel=1e-5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRESETS["tiny"].learning_rate)
    losses = []
    for _ in range(15):
        loss = model(**Collate(0)(rows)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert not caplog.records


def test_fresh_weights_come_from_torchs_generator() -> None:
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(next(build_model("tiny", 300, 16).parameters()))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("saved") / "model"
    model = build_model("tiny", 300, 128)
    model.save_pretrained(folder)
    return folder, model


def test_a_folder_of_weights_gives_those_weights(tmp_path: Path, saved: tuple[Path, PreTrainedModel]) -> None:
    folder, model = saved
    again = build_model(str(folder), 300, 128)
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    build_model("tiny", 300, 128).bfloat16().save_pretrained(tmp_path)
    assert build_model(str(tmp_path), 290, 128).dtype == torch.float32


def test_a_configuration_gives_fresh_weights_for_the_tokenizer(
    tmp_path: Path, saved: tuple[Path, PreTrainedModel]
) -> None:
    shutil.copy(saved[0] / "config.json", tmp_path)
    (tmp_path / "training_args.bin").write_bytes(b"no weights")
    for path in (tmp_path, tmp_path / "config.json"):
        model = build_model(str(path), 444, 64, eos=5)
        assert (model.config.vocab_size, model.config.eos_token_id, model.config.n_layer) == (444, 5, 4)
        assert model.get_input_embeddings().weight.shape == (444, 128)
    llama = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "llama.json").write_text(json.dumps(llama | {"intermediate_size": 48}))
    assert type(build_model(str(tmp_path / "llama.json"), 99, 64)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("vocab_size", [50, 301])
def test_weights_for_another_vocabulary(saved: tuple[Path, PreTrainedModel], vocab_size: int) -> None:
    with pytest.raises(ModelError, match=f"vocabulary mismatch: weights for 300 .* with {vocab_size}; use the tok"):
        build_model(str(saved[0]), vocab_size, 128)


def test_too_few_positions(saved: tuple[Path, PreTrainedModel]) -> None:
    with pytest.raises(ModelError, match="128 positions, fewer than a sequence of 129"):
        build_model(str(saved[0]), 300, 129)
    assert build_model("tiny", 300, 129).config.n_positions == 129


@pytest.mark.parametrize("name", ["pythia-1t", "gpt2", "owner/model"])
def test_an_unknown_name_lists_the_presets_and_fetches_nothing(name: str) -> None:
    with pytest.raises(ModelError, match=f"'{name}' is no preset.*tiny, small, gpt2-small, pythia-70m.*pythia-410m"):
        build_model(name, 300, 128)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a configuration that transformers knows"),
        ("{}", "Should have a `model_type`"),
        ('{"model_type": "nope"}', "does not recognize this architecture"),
        ('{"model_type": "gpt2", "n_layer": "many"}', "expected int, got str"),
        ('{"model_type": "gpt2", "n_head": 7}', "no causal language model can be made"),
        ('{"model_type": "vit"}', "ViTConfig"),
        ('{"model_type": "mine", "auto_map": {"AutoConfig": "c.C"}}', "not a configuration that transformers knows"),
    ],
)
def test_bad_configurations(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        build_model(str(tmp_path / "config.json"), 300, 128)


def test_folders_without_usable_weights(tmp_path: Path, saved: tuple[Path, PreTrainedModel]) -> None:
    with pytest.raises(ModelError, match=r"no config\.json in this folder"):
        build_model(str(tmp_path), 300, 128)
    shutil.copy(saved[0] / "config.json", tmp_path)
    torch.save(saved[1].state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"weights only as pytorch_model\.bin, .* save them as safetensors"):
        build_model(str(tmp_path), 300, 128)
    (tmp_path / "model.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(ModelError, match="the weights cannot be loaded"):
        build_model(str(tmp_path), 300, 128)


def test_weights_that_do_not_fit_the_configuration(tmp_path: Path, saved: tuple[Path, PreTrainedModel]) -> None:
    shutil.copytree(saved[0], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"n_layer": 5}))
    with pytest.raises(ModelError, match=r"12 weights are missing or of another size, e\.g\. \['transformer\.h\.4"):
        build_model(str(tmp_path / "model"), 300, 128)
