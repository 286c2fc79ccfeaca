"""Cost curves of one expert on this machine: measured once, kept between runs, checked at load."""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from host_offload import calibration_cache
from host_offload.calibration import Calibration
from moe_jax.config import ModelConfig
from moe_jax.engine.expert_timing import ExpertTiming
from moe_jax.placement.curves import CostCurves

_log = logging.getLogger(__name__)
_checked: dict[Path, Calibration] = {}


def measure_costs(
    config: ModelConfig,
    dtype: np.dtype,
    host_dtype: str | None = None,
    *,
    driven: bool = False,
    recalibrate: bool = False,
    progress: bool = False,
) -> CostCurves:
    """What one expert of this model costs here on the host, over the link and on the device.

    See `calibrate`. On a GPU the host and the link work beside the device. On a TPU the host does
    so only in layers that are `driven`: no call of a compiled one was ever scheduled beside device
    work there. On the CPU backend all is done by the same cores, one thing after another.
    """
    found = calibrate(
        config, dtype, host_dtype, driven=driven, recalibrate=recalibrate, progress=progress
    )
    backend = jax.default_backend()
    host_beside = backend == "gpu" or (driven and backend != "cpu")
    return CostCurves(
        tokens=jnp.asarray(found.sizes, jnp.float32),
        host=jnp.asarray(found.host.seconds, jnp.float32),
        device=jnp.asarray(found.device.seconds, jnp.float32),
        stream=jnp.float32(found.transfer),
        host_launch=jnp.float32(found.host_launch),
        link_latency=jnp.float32(found.link_latency),
        memory=jnp.float32(found.work_bytes / found.read_rate),
        host_beside=jnp.float32(host_beside),
        link_beside=jnp.float32(backend != "cpu"),
    )


def calibrate(
    config: ModelConfig,
    dtype: np.dtype,
    host_dtype: str | None = None,
    *,
    driven: bool = False,
    recalibrate: bool = False,
    progress: bool = False,
) -> Calibration:
    """Returns the calibration kept for this machine and experts of this shape, or measures it.

    A kept one is checked once per process by timing one token on the host, 64 on the device and,
    where there is a link, one transfer; where one of them is off by more than 25 %, all is
    measured again. Measuring takes up to 10 s; sizes for which no time is left are inferred from
    others. What was wrong with a kept calibration, what was inferred, and that a result could not
    be kept, are logged as warnings.

    Args:
      dtype: of weights and activations.
      host_dtype: "int8" if the host's experts are kept in it; None: `dtype`.
      driven: whether Python copies what is streamed. On the CPU backend a compiled layer takes many
        times as long to copy an expert, and a transfer is what it takes longer for it.
      recalibrate: whether to measure again in any case.
      progress: whether to show a bar while measuring.
    """
    timing = ExpertTiming(config, dtype, host_dtype, driven)
    key = calibration_cache.machine_key() | timing.key
    path = Path(calibration_cache.file_name(key))
    try:
        path = calibration_cache.cache_folder() / path
        kept_in = path.parent
    except OSError as error:
        _log.warning("calibrations cannot be kept: %s", error)
        kept_in = None
    if not recalibrate and path in _checked:
        return _checked[path]
    found = None if recalibrate or kept_in is None else _kept(path, key, timing)
    if found is None:
        found = timing.measure(progress)
        _warn_of_inferred(found)
        if kept_in is not None:
            try:
                calibration_cache.write(path, key, found)
            except OSError as error:
                _log.warning("the calibration cannot be kept in %s: %s", kept_in, error)
    _checked[path] = found
    return found


def _kept(path: Path, key: calibration_cache.Key, timing: ExpertTiming) -> Calibration | None:
    """The kept calibration, if there is one that can be read and is still true."""
    try:
        kept = calibration_cache.read(path, key)
    except ValueError as error:
        _log.warning("the calibration %s cannot be used: %s; measuring again", path, error)
        return None
    reason = None if kept is None else timing.differs(kept)
    if reason is not None:
        _log.warning("%s; measuring again", reason)
        return None
    return kept


def _warn_of_inferred(found: Calibration) -> None:
    for name, curve in (("host", found.host), ("device", found.device)):
        missing = [n for n, done in zip(found.sizes, curve.measured, strict=True) if not done]
        if missing:
            _log.warning(
                "calibration stopped after %.1f s, to end in time: what an expert takes on the "
                "%s with %s tokens is inferred from other counts",
                found.spent,
                name,
                ", ".join(map(str, missing)),
            )
