"""The mathematics of the models: weights, layers and the programs that run them."""
