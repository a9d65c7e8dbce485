"""What values lose when the target's gradient is used for several steps, and when its batches rotate."""
