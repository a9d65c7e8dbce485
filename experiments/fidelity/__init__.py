"""How close every scheme comes to the Shapley values of the real step, and to the loss of the whole run."""
