"""`inrun train`, from files to a model: text, tokens, models, and the demo's sources of real text.

Each file stands alone and is imported by its own name, so that reading text does not load transformers.
"""
