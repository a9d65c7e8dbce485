"""Which source helps a target when: value by source over the course of a run."""
