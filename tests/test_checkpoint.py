"""Checkpoints: every format gives the same parameters, every bad one a single clear CheckpointError."""

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Blip2ForConditionalGeneration

from blip2rt import CheckpointError
from blip2rt.export.tokenizer_files import write_tokenizer
from blip2rt.model import Checkpoint, load_blip2
from blip2rt.model.names import TIED_HEAD, TOKEN_EMBEDDINGS

State = dict[str, Tensor]
PROJECTION = "language_projection.weight"
TOKEN_EMBEDDING = TOKEN_EMBEDDINGS["opt"]


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint, to be spoilt."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def stored(directory: Path) -> State:
    return load_file(directory / "model.safetensors")


def store(directory: Path, state: State) -> None:
    save_file(state, directory / "model.safetensors", {"format": "pt"})


def edit_config(directory: Path, section: str | None = None, **values: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (config[section] if section else config).update(values)
    (directory / "config.json").write_text(json.dumps(config))


def refused(source: str | Path) -> str:
    """The message of the one error, which is one line."""
    with pytest.raises(CheckpointError) as error:
        load_blip2(source)
    message = str(error.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def assert_same_parameters(directory: Path, reference: Path) -> None:
    ours, expected = load_blip2(directory).state_dict(), load_blip2(reference).state_dict()
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == ours[name].dtype == torch.float32
        assert torch.equal(ours[name], tensor), name


# --- formats ---------------------------------------------------------------------------------------------------------


def to_shards(directory: Path) -> None:
    model = Blip2ForConditionalGeneration.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="100KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 2


def to_bin(directory: Path) -> None:
    torch.save(stored(directory), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def to_old_bin(directory: Path) -> None:
    """Not a zip, and with the buffer that old versions of transformers saved."""
    state = stored(directory) | {"qformer.embeddings.position_ids": torch.arange(4)[None]}
    torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (directory / "model.safetensors").unlink()


def to_bin_shards(directory: Path) -> None:
    state = stored(directory)
    (directory / "model.safetensors").unlink()
    names = [f"pytorch_model-0000{i + 1}-of-00003.bin" for i in range(3)]
    weight_map = {key: names[i % 3] for i, key in enumerate(state)}
    for name in names:
        torch.save({key: state[key] for key in state if weight_map[key] == name}, directory / name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("convert", [to_shards, to_bin, to_old_bin, to_bin_shards])
def test_formats(convert: Callable[[Path], None], copy: Path, tiny_checkpoint: Path) -> None:
    convert(copy)
    assert_same_parameters(copy, tiny_checkpoint)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_become_float32(dtype: torch.dtype, copy: Path, tmp_path: Path) -> None:
    state = stored(copy)
    rounded = Path(shutil.copytree(copy, tmp_path / "rounded"))
    store(copy, {key: tensor.to(dtype) for key, tensor in state.items()})
    store(rounded, {key: tensor.to(dtype).float() for key, tensor in state.items()})
    assert_same_parameters(copy, rounded)


@pytest.mark.parametrize("config_ties", [True, False])
@pytest.mark.parametrize("head", ["absent", "equal", "different"])
def test_output_layer(head: str, config_ties: bool, copy: Path) -> None:
    """Tied or not, as transformers loads it; the one combination that it would fill with noise is refused."""
    state = stored(copy)
    assert TIED_HEAD not in state
    if head != "absent":
        state[TIED_HEAD] = state[TOKEN_EMBEDDING] + (1.0 if head == "different" else 0.0)
    store(copy, state)
    edit_config(copy, "text_config", tie_word_embeddings=config_ties)
    edit_config(copy, tie_word_embeddings=config_ties)
    if head == "absent" and not config_ties:
        assert TIED_HEAD in refused(copy)
        return
    model = load_blip2(copy)
    own_head = model.decoder.head.lm_head
    assert (own_head is None) == (config_ties and head != "different")
    ours = (own_head or model.decoder.embedding.token).weight
    theirs = Blip2ForConditionalGeneration.from_pretrained(copy)
    assert torch.equal(ours, theirs.language_model.lm_head.weight)
    assert torch.equal(model.decoder.embedding.token.weight, theirs.state_dict()[TOKEN_EMBEDDING])


def test_parameters_are_counted_as_transformers_does(tiny_checkpoint: Path) -> None:
    model = Blip2ForConditionalGeneration.from_pretrained(tiny_checkpoint)
    counts = Checkpoint(tiny_checkpoint).count_parameters()
    assert counts["vision"] == sum(p.numel() for p in model.vision_model.parameters())
    assert counts["decoder"] == sum(p.numel() for p in model.language_model.parameters())
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())


# --- weights that are wrong ------------------------------------------------------------------------------------------


def test_all_wrong_tensors_in_one_error(copy: Path) -> None:
    state = stored(copy)
    names = ["vision_model.post_layernorm.bias", "qformer.layernorm.weight"]
    for name in names:
        del state[name]
    state |= {"adapter.0": torch.ones(2), "adapter.1": torch.ones(2)}
    state[PROJECTION] = torch.ones(3, 5)
    store(copy, state)
    message = refused(copy)
    for part in ("2 missing", "2 unused", "1 misshaped", *names, "adapter.0", "adapter.1", PROJECTION, "[3, 5]"):
        assert part in message


def test_a_hundred_wrong_tensors_are_counted_not_listed(copy: Path) -> None:
    store(copy, stored(copy) | {f"adapter.{i}": torch.ones(1) for i in range(100)})
    message = refused(copy)
    assert "100 unused" in message
    assert "and 80 more" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_names_its_tensor(value: float, copy: Path) -> None:
    state = stored(copy)
    state[PROJECTION][1, 2] = value
    store(copy, state)
    assert PROJECTION in refused(copy)


def test_damaged_files(copy: Path) -> None:
    file = copy / "model.safetensors"
    content = file.read_bytes()
    for spoilt in (
        b"",
        content[:5],
        content[:1000],
        content[:-1],
        content + b"\0",
        os.urandom(5000),
        b"<!DOCTYPE html>",
    ):
        file.write_bytes(spoilt)
        message = refused(copy)
        assert "model.safetensors is damaged or truncated" in message
        assert "copy it anew" in message


def test_damaged_bin_files(copy: Path) -> None:
    to_bin(copy)
    file = copy / "pytorch_model.bin"
    content = file.read_bytes()
    for spoilt in (b"", content[:5], content[:1000], content[:-1], b"PK" + os.urandom(5000), b"<!DOCTYPE html>"):
        file.write_bytes(spoilt)
        assert "pytorch_model.bin is damaged" in refused(copy)


def test_bin_that_is_no_state_dict(copy: Path) -> None:
    state = stored(copy)
    (copy / "model.safetensors").unlink()
    for content in ({"model": state}, [1, 2], {1: torch.ones(2)}, {"a": torch.ones(2, device="meta")}):
        torch.save(content, copy / "pytorch_model.bin")
        assert "dictionary of plain tensors" in refused(copy)


class Malice:
    """A pickle that runs a command."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_in_a_pickle_does_not_run(is_zip: bool, copy: Path, tmp_path: Path) -> None:
    state: dict[str, Any] = stored(copy) | {"evil": Malice(tmp_path / "ran")}
    torch.save(state, copy / "pytorch_model.bin", _use_new_zipfile_serialization=is_zip)
    (copy / "model.safetensors").unlink()
    assert "code, which blip2rt does not run" in refused(copy)
    assert not (tmp_path / "ran").exists()


def test_shards(copy: Path) -> None:
    """Truncated, missing, of another checkpoint, and an index that is broken."""
    to_shards(copy)
    index, shard = copy / "model.safetensors.index.json", sorted(copy.glob("model-*.safetensors"))[1]
    content = json.loads(index.read_text())
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    assert f"{shard.name} is damaged" in refused(copy)
    shard.unlink()
    assert f"lacks {shard.name}" in refused(copy)
    save_file({"other": torch.ones(1)}, shard)
    assert "disagree" in refused(copy)
    shard.write_bytes(whole)
    for broken in ("", "{", "[]", json.dumps({"weight_map": [1]}), json.dumps({"weight_map": {"a": 1}})):
        index.write_text(broken)
        assert index.name in refused(copy)
    content["weight_map"] |= {"absent.weight": shard.name}
    index.write_text(json.dumps(content))
    assert "absent.weight" in refused(copy)


# --- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{", "[1]", '"text"', "\xff", "[" * 100_000])
def test_broken_config(content: str, copy: Path) -> None:
    (copy / "config.json").write_bytes(content.encode("latin-1"))
    assert "config.json" in refused(copy)


CONFIGS: dict[str, tuple[str | None, dict[str, Any], str]] = {
    "not blip-2": (None, {"model_type": "llama"}, "this is not a BLIP-2"),
    "no model type": (None, {"model_type": None}, "this is not a BLIP-2"),
    "llama": ("text_config", {"model_type": "llama"}, "'llama'"),
    "section": (None, {"text_config": 3}, "text_config must be an object"),
    "post-norm": ("text_config", {"do_layer_norm_before": False}, "opt-350m"),
    "projected": ("text_config", {"word_embed_proj_dim": 16}, "opt-350m"),
    "text in q-former": ("qformer_config", {"use_qformer_text_input": True}, "missing: embeddings.position_embeddings"),
    "no qkv bias": ("vision_config", {"qkv_bias": False}, "unused: vision_model.encoder.layers.0.self_attn.qkv.bias"),
    "activation": ("vision_config", {"hidden_act": "mish"}, "'mish'"),
    "heads": ("vision_config", {"num_attention_heads": 3}, "not a multiple"),
    "no layers": ("vision_config", {"num_hidden_layers": 0}, "vision_config.num_hidden_layers is 0"),
    "negative": ("text_config", {"ffn_dim": -4}, "text_config.ffn_dim is -4"),
    "not a number": ("qformer_config", {"hidden_size": "9"}, "qformer_config.hidden_size is '9'"),
    "truth value": ("qformer_config", {"intermediate_size": True}, "qformer_config.intermediate_size is True"),
    "nan eps": ("vision_config", {"layer_norm_eps": float("nan")}, "vision_config.layer_norm_eps is nan"),
    "infinite eps": ("vision_config", {"layer_norm_eps": float("inf")}, "vision_config.layer_norm_eps is inf"),
    "oblong": ("vision_config", {"image_size": [28, 42]}, "vision_config.image_size is [28, 42]"),
    "small picture": ("vision_config", {"image_size": 3}, "smaller than patch_size"),
    "queries": (None, {"num_query_tokens": 0}, "num_query_tokens is 0"),
    "bos": ("text_config", {"bos_token_id": 70}, "bos_token_id 70 is beyond the 70 embedding rows"),
    "no bos": ("text_config", {"bos_token_id": None}, "text_config.bos_token_id is None"),
    "eos": ("text_config", {"eos_token_id": [3, 5000]}, "eos_token_id 5000 is beyond the 70 embedding rows"),
    "pad": ("text_config", {"pad_token_id": 71}, "pad_token_id 71 is beyond the 70 embedding rows"),
    "pads": ("text_config", {"pad_token_id": [1]}, "text_config.pad_token_id is [1]"),
    "image": (None, {"image_token_index": 70}, "image_token_index 70 is beyond the 70 embedding rows"),
    "other sizes": ("text_config", {"num_hidden_layers": 7}, "missing"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_wrong_config(name: str, copy: Path) -> None:
    section, values, expected = CONFIGS[name]
    edit_config(copy, section, **values)
    assert expected in refused(copy)


def test_all_wrong_config_values_in_one_error(copy: Path) -> None:
    edit_config(copy, "vision_config", hidden_size="x", layer_norm_eps=-1)
    edit_config(copy, "text_config", vocab_size=None)
    message = refused(copy)
    for field in ("vision_config.hidden_size", "vision_config.layer_norm_eps", "text_config.vocab_size"):
        assert field in message


# --- what is not there -----------------------------------------------------------------------------------------------


def test_incomplete_directories(copy: Path, tmp_path: Path) -> None:
    (copy / "config.json").unlink()
    assert "no config.json" in refused(copy)
    (copy / "model.safetensors").unlink()
    assert "holds no weights" in refused(copy)
    assert "is a file" in refused(copy / "tokenizer.json")
    assert "no such directory" in refused(tmp_path / "nothing" / "here")
    assert "no such directory" in refused("nothing")


def test_hub_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection, and a hub that takes the call and never answers: one sentence, within seconds."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (9, silent.getsockname()[1]):
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
            start = time.monotonic()
            message = refused("no-such-organisation/blip2")
            assert time.monotonic() - start < 5
            assert "could not be fetched from the hub" in message
            assert "pass the path" in message


@pytest.mark.parametrize("kinds", [{".bin", ".safetensors"}, {".bin"}])
def test_hub_gives_each_weight_once(kinds: set[str], copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published repositories hold the weights as safetensors and as .bin."""
    asked: list[str] = []
    names = [SimpleNamespace(rfilename=f"model{kind}") for kind in kinds]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=names))

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert Checkpoint("organisation/blip2").directory == copy
    assert ("*.safetensors" in asked, "*.bin" in asked) == (".safetensors" in kinds, ".safetensors" not in kinds)


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_tokenizers_that_do_not_fit(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has id 69 \('<image>'\), but the language model has 60 embedding rows"):
        write_tokenizer(copy, tmp_path, vocab_size=60)
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"cannot be read .* --tokenizer"):
        write_tokenizer(copy, tmp_path, vocab_size=70)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no tokenizer .* --tokenizer"):
        write_tokenizer(copy, tmp_path, vocab_size=70)
    with pytest.raises(CheckpointError, match="no tokenizer directory"):
        write_tokenizer(tmp_path / "nothing", tmp_path, vocab_size=70)
    assert not (tmp_path / "tokenizer.json").exists()
