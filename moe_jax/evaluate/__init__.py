"""How good a model is: text it has not seen, and what is measured on it."""
