"""`inrun doctor` on models that it is given by folder or by function, and its exit status."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from inrun.cli.main import main

SIZES = {"vocab_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
KINDS = {
    "llama": (AutoModelForCausalLM, {"hidden_size": 16, "num_key_value_heads": 1, **SIZES}),
    "bert": (AutoModelForMaskedLM, {"hidden_size": 16, "max_position_embeddings": 64, **SIZES}),
    "t5": (
        AutoModelForSeq2SeqLM,
        {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_a_language_model(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head, settings = KINDS[kind]
    torch.manual_seed(0)
    head.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(tmp_path / "model")
    assert main(["doctor", str(tmp_path / "model"), "--tokens", "8", "--double"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "pass"
    assert "mixed: nothing" in out
    assert "against per-example autograd" in out
    assert ("lifted: " in out) == (kind == "t5")


def test_a_text_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head, settings = KINDS["llama"]
    head.from_config(AutoConfig.for_model("llama", **settings)).save_pretrained(tmp_path / "model")
    vocabulary = {word: k for k, word in enumerate(["[UNK]", "[EOS]", "one", "two", "three"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[EOS]").save_pretrained(tmp_path / "model")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": "one two three " * n}) + "\n" for n in (1, 2, 3)))
    given = ["doctor", str(tmp_path / "model"), "--data", str(tmp_path / "text.jsonl")]
    assert main([*given, "--examples", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"]
    assert {c["parameter"] for c in found["covered"]} >= {"model.embed_tokens.weight", "model.norm.weight"}
    assert main(given) == 1
    assert "has 3 documents: give --examples 3" in capsys.readouterr().err


FUNCTIONS = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy

def losses(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="none")

def batch():
    return torch.randn(4, 6), torch.randint(0, 3, (4,))

def sound():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, batch(), losses

def with_optimizer():
    model = nn.Linear(6, 3)
    return model, batch(), losses, torch.optim.SGD([model.weight], lr=0.1)

def mixing():
    return nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 3)), batch(), losses

def nothing():
    return nn.Linear(6, 3)
"""


def test_a_function_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "doctored.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "doctored:sound", "--every"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("0.weight", "0.bias", "2.weight", "2.bias"))
    assert main(["doctor", "doctored:with_optimizer"]) == 0
    out = capsys.readouterr().out
    assert "frozen: 3 entries" in out
    assert main(["doctor", "doctored:mixing"]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "FAIL"
    assert "mixed: batch normalisation in training mode" in out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("doctored:nothing", "must return (model, batch, losses)"),
        ("doctored:absent", "has no function 'absent'"),
        ("nowhere:sound", "there is no module 'nowhere'"),
        ("no/such/folder", "no Hugging Face model is there"),
    ],
)
def test_what_is_not_there_is_said(
    given: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "doctored.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["doctor", given]) == 1
    assert said in capsys.readouterr().err


def test_a_model_whose_loss_is_not_known_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = AutoConfig.for_model("bert", **KINDS["bert"][1])
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    assert main(["doctor", str(tmp_path / "model")]) == 1
    assert "is a BertForSequenceClassification" in capsys.readouterr().err
