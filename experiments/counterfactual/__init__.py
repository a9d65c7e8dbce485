"""What the target's loss does when examples are really removed, and which method's values say so."""
