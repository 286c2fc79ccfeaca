import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoint import open_checkpoint
from moe_jax.checkpoint.huggingface import open_hugging_face

EXPERT = "model.layers.0.mlp.experts"
SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("fused", [False, True], ids=["single experts", "fused experts"])
@pytest.mark.parametrize("shards", [0, 3])
def test_loads_every_layout(make_folder, load, memory, dtype, fused, shards):
    folder = make_folder(dtype=dtype, fused=fused, shards=shards)
    checkpoint = open_checkpoint(folder.path)
    arrays = load(checkpoint, "float32", memory)
    assert set(arrays) == set(folder.targets)
    for name, array in arrays.items():
        assert array.dtype == jnp.float32
        assert array.sharding == memory(name)
        np.testing.assert_array_equal(array, folder.targets[name].astype(np.float32))
    assert checkpoint.weight_bytes("float32") == sum(array.nbytes for array in arrays.values())
    assert checkpoint.config.family == checkpoint.raw_config["model_type"] == "qwen2_moe"
    assert checkpoint.folder == folder.path


def test_rounds_to_the_wanted_dtype(make_folder, load, memory):
    folder = make_folder(dtype="F32")
    for name, array in load(open_checkpoint(folder.path), "bfloat16", memory).items():
        np.testing.assert_array_equal(array, folder.targets[name].astype(jnp.bfloat16))


def test_loads_in_the_order_of_the_targets_and_shows_it(make_folder, load, memory, capsys):
    checkpoint = open_checkpoint(make_folder().path)
    arrays = load(checkpoint, "bfloat16", memory, progress=True)
    assert list(arrays) == list(checkpoint.fills)
    bar = capsys.readouterr().err
    assert "loading" in bar and "100%" in bar
    load(checkpoint, "bfloat16", memory)
    assert not capsys.readouterr().err


def test_shards_an_array_over_devices(make_folder, load):
    mesh = jax.sharding.Mesh(jax.devices()[:1], "x")
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    folder = make_folder()
    arrays = load(open_checkpoint(folder.path), "bfloat16", lambda name: sharding)
    assert arrays["embedding"].sharding == sharding
    np.testing.assert_array_equal(arrays["embedding"], folder.targets["embedding"])


def test_a_single_file_goes_before_an_index(make_folder):
    folder = make_folder()
    (folder.path / INDEX).write_text("not even JSON")
    open_checkpoint(folder.path)


def test_tied_embeddings_ignore_the_unembedding_on_purpose(make_folder):
    folder = make_folder()
    config = json.loads((folder.path / "config.json").read_text())
    (folder.path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert "unembedding" not in open_hugging_face(folder.path).fills


def rename(old: str, new: str):
    def edit(tensors):
        tensors[new] = tensors.pop(old)

    return edit


def put(name: str, shape: tuple[int, ...], dtype: type = np.float32):
    return lambda tensors: tensors.update({name: np.zeros(shape, dtype)})


MISMATCHES = {
    "unknown": (
        put("model.layers.0.adapter", (2,)),
        r"1 checkpoint tensors have no use: model\.layers\.0\.adapter \(no rule uses",
    ),
    "no such layer": (
        put("model.layers.7.input_layernorm.weight", (8,)),
        r"have no use: model\.layers\.7\.input_layernorm\.weight \(there is no layers\.7\.att",
    ),
    "no such expert": (
        put(f"{EXPERT}.3.down_proj.weight", (8, 6)),
        r"have no use: .*experts\.3\.down_proj\.weight \(there is no layers\.0\.experts\.3\.down\)",
    ),
    "bank of a dense layer": (
        put("model.layers.1.mlp.experts.down_proj", (3, 8, 6)),
        r"1 checkpoint tensors have no use: model\.layers\.1\.mlp\.experts\.down_proj",
    ),
    "missing": (
        lambda tensors: tensors.pop("model.norm.weight"),
        "1 weights are filled by no checkpoint tensor: final_norm$",
    ),
    "missing parts": (
        lambda tensors: (
            tensors.pop("model.layers.1.self_attn.k_proj.weight"),
            tensors.pop(f"{EXPERT}.2.up_proj.weight"),
        ),
        r"tensor: layers\.1\.attention\.qkv\[key\], layers\.0\.experts\.2\.gate_up\[up\]$",
    ),
    "renamed": (
        rename("model.norm.weight", "model.final.weight"),
        r"no use: model\.final\.weight .*; 1 weights are filled by no checkpoint tensor: final",
    ),
    "many": (
        lambda tensors: tensors.clear(),
        r"38 weights are filled by no checkpoint tensor: (\S+, ){7}\S+ and 30 more$",
    ),
    "twice": (
        put(f"{EXPERT}.down_proj", (3, 8, 6)),
        r"3 weights are filled twice: layers\.0\.experts\.0\.down \(model\.layers\.0\.mlp\.experts",
    ),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_names_that_do_not_match(make_folder, case):
    edit, message = MISMATCHES[case]
    folder = make_folder(dtype="F32", edit=edit)
    start = re.escape(f"{folder.path} does not match its config.json: ")
    with pytest.raises(ValueError, match=f"^{start}.*{message}"):
        open_checkpoint(folder.path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("model.norm.weight", (9,)), r"'model\.norm\.weight' has shape \[9\], .* \[8\]"),
        (
            put("lm_head.weight", (8, 11)),
            r"'lm_head\.weight' has shape \[8, 11\], config\.json asks for \[11, 8\]",
        ),
        (
            put("model.layers.0.self_attn.k_proj.weight", (8, 8)),
            r"'model.layers.0.self_attn.k_proj.weight' has shape \[8, 8\], .* \[4, 8\]",
        ),
        (
            put("model.norm.weight", (8,), np.int8),
            r"'model\.norm\.weight' has dtype I8, supported are F32, F16, BF16; convert a quant",
        ),
    ],
)
def test_wrong_shape_or_dtype(make_folder, edit, message):
    folder = make_folder(dtype="F32", edit=edit)
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor " + message):
        open_checkpoint(folder.path)


def test_wrong_number_of_experts_in_a_bank(make_folder):
    folder = make_folder(dtype="F32", fused=True, edit=put(f"{EXPERT}.gate_up_proj", (4, 12, 8)))
    with pytest.raises(ValueError, match=r"shape \[4, 12, 8\], config\.json asks for \[3, 12, 8\]"):
        open_checkpoint(folder.path)


def test_missing_shard(make_folder):
    folder = make_folder(shards=3)
    (folder.path / SHARD).unlink()
    with pytest.raises(ValueError, match=f"lacks 1 of the 3 shards its index names: {SHARD}; down"):
        open_checkpoint(folder.path)


def test_truncated_shard(make_folder):
    folder = make_folder(shards=3)
    shard = folder.path / SHARD
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-5])
    message = f"{SHARD} is truncated: its header describes {size} bytes, the file has {size - 5};"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder.path)


def test_shard_truncated_after_opening(make_folder, load, memory):
    folder = make_folder(shards=3)
    checkpoint = open_checkpoint(folder.path)
    (folder.path / SHARD).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{SHARD} ended inside tensor 'model"):
        load(checkpoint, "bfloat16", memory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.update(weight_map=[]), "needs a weight_map"),
        (
            lambda i: i["weight_map"].update(new=SHARD),
            f"{SHARD} lacks tensors that {INDEX} .*: new",
        ),
        (
            lambda i: i["weight_map"].pop("lm_head.weight"),
            f"{SHARD} has tensors that {INDEX} does not name: lm_head.weight",
        ),
        (lambda i: i["weight_map"].update(a="../x"), r"puts tensor 'a' into '\.\./x'; a shard"),
        (lambda i: i["weight_map"].update(a="/etc/x"), "puts tensor 'a' into '/etc/x'"),
        (lambda i: i["weight_map"].update(a="a\\b"), "puts tensor 'a' into"),
        (lambda i: i["weight_map"].update(a=".."), "puts tensor 'a' into"),
        (lambda i: i["weight_map"].update(a=7), "puts tensor 'a' into 7"),
    ],
)
def test_index_that_does_not_match(make_folder, change, message):
    folder = make_folder(shards=3)
    index = json.loads((folder.path / INDEX).read_text())
    change(index)
    (folder.path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder.path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json is not valid JSON: "),
        ("[" * 100_000, r"config\.json is not valid JSON: "),
        ("[]", r"config\.json must hold a JSON object, got list"),
        ('{"model_type": "gpt2"}', r"model_type must be one of .*; got 'gpt2'"),
    ],
)
def test_broken_config(make_folder, text, message):
    folder = make_folder()
    (folder.path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder.path)


def test_pickles_are_refused(make_folder):
    folder = make_folder()
    (folder.path / "model.safetensors").rename(folder.path / "pytorch_model.bin")
    message = (
        r"only as pickle files \(pytorch_model\.bin\), .* refused; convert them to safetensors"
    )
    with pytest.raises(ValueError, match=message):
        open_checkpoint(folder.path)


def test_folder_without_weights(make_folder):
    folder = make_folder()
    (folder.path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"no weights: looked for model.safetensors and {INDEX}"):
        open_checkpoint(folder.path)
