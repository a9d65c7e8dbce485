"""Mislabeled images: which values find them, and what training on the best images gives."""
