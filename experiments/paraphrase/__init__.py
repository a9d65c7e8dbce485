"""Rewordings: whether the original of a reworded text is found, as fewer and fewer words are the same."""
