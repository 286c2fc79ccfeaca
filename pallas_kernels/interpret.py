"""How kernels are interpreted where no accelerator can run them.

Knows no kernel. Interpretation is slow; it is for tests and debugging.
"""

from jax.experimental.pallas import tpu as pltpu

# Reads outside an array raise, memory nobody wrote is NaN, and two unordered accesses are a race.
TPU_INTERPRETER = pltpu.InterpretParams(
    out_of_bounds_reads="raise", uninitialized_memory="nan", detect_races=True
)
