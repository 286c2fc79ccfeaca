"""Loading and running a model: the public face's machinery."""
