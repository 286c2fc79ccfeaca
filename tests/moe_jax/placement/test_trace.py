import numpy as np
import pytest

from moe_jax.placement.trace import (
    load_trace,
    make_trace,
    save_trace,
    uniform_trace,
    zipf_trace,
)

FIELDS = ("counts", "gates", "tokens", "prefill", "layer")
SIZES = dict(steps=5, layers=3, experts=8, experts_per_token=2)


def same(left, right):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
        assert getattr(left, name).dtype == getattr(right, name).dtype
    assert left.experts_per_token == right.experts_per_token


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("prompt", [0, 300])
def test_a_saved_trace_comes_back(tmp_path, tokens, prompt):
    trace = zipf_trace(**SIZES, tokens=tokens, prompt=prompt)
    path = tmp_path / "new" / "trace.npz"
    save_trace(trace, path)
    same(load_trace(path), trace)
    assert [p.name for p in path.parent.iterdir()] == ["trace.npz"]
    assert (trace.steps, trace.layers, trace.experts) == (5 + (prompt > 0), 3, 8)
    assert trace.prefill.tolist() == [prompt > 0] * (prompt > 0) + 5 * [False]
    assert trace.tokens.tolist() == [prompt] * (prompt > 0) + 5 * [tokens]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "trace.npz"
    old = zipf_trace(**SIZES)
    save_trace(old, path)

    def fail(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="the disk is full"):
        save_trace(uniform_trace(**SIZES), path)
    same(load_trace(path), old)
    assert [p.name for p in tmp_path.iterdir()] == ["trace.npz"]


def test_arrays_are_compact():
    counts = np.zeros((1, 1, 4), np.int64)
    for most, dtype in ((255, np.uint8), (256, np.uint16), (65536, np.uint32)):
        counts[0, 0] = [most, 0, 0, 0]
        assert make_trace(counts, 1).counts.dtype == dtype
    assert make_trace(counts[:0], 1).steps == 0
    assert make_trace(counts, 1).gates.dtype == np.float32  # beyond float16
    assert make_trace(counts // 2, 1).gates.dtype == np.float16


def test_made_up_traces_depend_on_the_seed_only():
    same(zipf_trace(**SIZES, seed=3), zipf_trace(**SIZES, seed=3))
    assert (zipf_trace(**SIZES, seed=3).counts != zipf_trace(**SIZES, seed=4).counts).any()


def test_every_token_chooses_distinct_experts_with_weights_that_sum_to_one():
    trace = zipf_trace(**SIZES, tokens=6)
    assert trace.counts.max() <= 6
    np.testing.assert_allclose(trace.gates.sum(-1, dtype=np.float64), 6, rtol=1e-2)
    assert ((trace.gates > 0) <= (trace.counts > 0)).all()


def test_popularity_follows_the_exponent():
    sizes = dict(steps=4000, layers=1, experts=4, experts_per_token=1)
    share = np.sort(zipf_trace(**sizes).counts.mean((0, 1)))[::-1]
    np.testing.assert_allclose(share, np.array([12, 6, 4, 3]) / 25, atol=0.03)
    share = uniform_trace(**sizes).counts.mean((0, 1))
    np.testing.assert_allclose(share, 0.25, atol=0.03)


def test_locality_keeps_experts_and_their_popularity():
    sizes = dict(steps=3000, layers=2, experts=8, experts_per_token=2)
    stay, share = [], []
    for locality in (0.0, 0.5, 0.9, 1.0):
        used = zipf_trace(**sizes, locality=locality).counts > 0
        stay.append((used[1:] & used[:-1]).sum() / used[1:].sum())
        share.append(np.sort(used.mean((0, 1))))
    assert stay == sorted(stay) and stay[-1] == 1.0
    np.testing.assert_allclose(share[1], share[0], atol=0.04)


def damaged(path, **changes):
    """Rewrites a good file with some arrays replaced; None: left out."""
    with np.load(path) as file:
        fields = {name: file[name] for name in file} | changes
    np.savez(path, **{name: array for name, array in fields.items() if array is not None})


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(gates=None, layer=None), "{} is no routing trace: it lacks gates, layer"),
        (dict(version=np.int64(9)), "{} has version 9, 1 can be read; record it anew"),
        (
            dict(counts=np.zeros((5, 3, 8))),
            "{}: counts has shape (5, 3, 8) of float64, which is none of a trace's; record it anew",
        ),
        (
            dict(tokens=np.ones((5, 1), int)),
            "{}: tokens has shape (5, 1) of int64, which is none of a trace's; record it anew",
        ),
        (
            dict(tokens=np.ones(4, int)),
            "{}: counts have shape (5, 3, 8), so tokens must have (5,); it has (4,); "
            "record it anew",
        ),
        (
            dict(layer=np.arange(4)),
            "{}: counts have shape (5, 3, 8), so layer must have (3,); it has (4,); record it anew",
        ),
        (
            dict(tokens=np.array([1, 2, 1, 1, 1]), layer=np.array([4, 5, 6])),
            "{}: step 1, layer 4: the counts sum to 2, but 2 tokens choose 2 experts each",
        ),
    ],
)
def test_files_that_do_not_fit_together_are_refused(tmp_path, changes, text):
    path = tmp_path / "trace.npz"
    save_trace(zipf_trace(**SIZES), path)
    damaged(path, **changes)
    with pytest.raises(ValueError) as error:
        load_trace(path)
    assert str(error.value) == text.format(path)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.95])
def test_cut_files_are_refused(tmp_path, keep):
    path = tmp_path / "trace.npz"
    save_trace(zipf_trace(**SIZES), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match=r"is no routing trace, or damaged: .*; record it anew"):
        load_trace(path)


def test_other_files_are_refused_and_pickles_not_opened(tmp_path):
    path = tmp_path / "trace.npz"
    path.write_text("tokens\n")
    with pytest.raises(ValueError, match=r"is no routing trace, or damaged: .*; record it anew"):
        load_trace(path)
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"is no routing trace, or damaged: .*; record it anew"):
        load_trace(path)
    save_trace(zipf_trace(**SIZES), path)
    damaged(path, counts=np.array([{}], object))
    with pytest.raises(ValueError, match=r"is no routing trace, or damaged: .*; record it anew"):
        load_trace(path)
    with pytest.raises(FileNotFoundError):
        load_trace(tmp_path / "none.npz")


def test_traces_are_named_npz(tmp_path):
    with pytest.raises(ValueError) as error:
        save_trace(zipf_trace(**SIZES), tmp_path / "trace.bin")
    path = tmp_path / "trace.bin"
    assert str(error.value) == (
        f"{path} does not end in .npz; traces are NumPy archives, name them so"
    )


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(steps=0), "{'steps': 0}: a trace needs at least one of each"),
        (dict(layers=0, tokens=-1), "{'layers': 0, 'tokens': -1}: a trace needs at least one"),
        (dict(experts_per_token=9), "a token cannot choose 9 of 8 experts"),
        (dict(locality=1.5), "locality is 1.5; it is a probability, choose one in [0, 1]"),
    ],
)
def test_sizes_are_checked(changes, text):
    with pytest.raises(ValueError) as error:
        zipf_trace(**(SIZES | changes))
    assert str(error.value).startswith(text)


def test_recorded_counts_are_checked():
    with pytest.raises(ValueError) as error:
        make_trace(np.array([[[1, -1]]]), 1)
    assert str(error.value) == "counts hold -1; tokens of an expert cannot be negative"
    with pytest.raises(ValueError) as error:
        make_trace(np.array([[[1, 1]]]), 0)
    assert str(error.value) == "experts_per_token is 0; it must be at least 1"
    with pytest.raises(ValueError) as error:
        make_trace(np.array([[[2, 1]]]), 2)
    assert str(error.value) == (
        "step 0, layer 0: the counts sum to 3, but 1 tokens choose 2 experts each"
    )


def test_a_file_that_unpacks_to_too_much_is_not_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "large.npz"
    save_trace(uniform_trace(steps=4, layers=2, experts=8, experts_per_token=2), path)
    monkeypatch.setattr("moe_jax.placement.trace._MOST_BYTES", 100)
    with pytest.raises(ValueError, match=r"large.npz is no routing trace, .* more than 100"):
        load_trace(path)
