"""Whether training again without the text of negative value is faster."""
