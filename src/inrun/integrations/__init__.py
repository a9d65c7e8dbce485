"""Where people train: one line on the trainer they have."""
