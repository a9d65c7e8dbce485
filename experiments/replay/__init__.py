"""Whether values by the loss at the end of the run predict what leaving examples out of training does to it."""
