"""How good a model is: held-out loss, and how alike its experts are."""
