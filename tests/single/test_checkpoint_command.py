"""`python -m mpipar.checkpoint`: what it finds, and what it makes for other programs."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import functional as F

from mpipar.checkpoint import Checkpoint, load, save
from mpipar.checkpoint.export import export
from mpipar.checkpoint.plan import plan
from mpipar.checkpoint.write import hold
from mpipar.errors import CheckpointError
from mpipar.model import ModelConfig, Transformer, initialise
from mpipar.storage import BLOCK_BYTES
from mpipar.train.config_text import to_table
from tests.single.test_checkpoint_plan import write


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """MPI must not be needed: importing it is an error."""
    program = "import sys; sys.modules['mpi4py'] = None; sys.argv[0] = 'checkpoint'; "
    program += "from mpipar.checkpoint.__main__ import main; sys.exit(main())"
    line = [sys.executable, "-W", "error", "-c", program, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=50)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tensors = {"weights/x": torch.randn(300, 400), "weights/y": torch.ones(3).bfloat16()}
    tensors |= {"optimizer/x/step": torch.tensor(3.0), "weights/empty": torch.empty(0, 2)}
    return save(tmp_path / "checkpoints", 12, tensors, {"seen": 1}, files={"config.toml": "a = 1\n"}, keep=1)


def test_what_it_says_in_a_plain_process(path: Path) -> None:
    info = command("info", path, "--tensors")
    assert info.returncode == 0, info.stderr
    assert "weights     3 tensors, 120,003 elements" in info.stdout
    assert "weights/x float32 300x400" in info.stdout and "weights/y bfloat16 3" in info.stdout
    sound = command("verify", path.parent.parent)
    assert sound.returncode == 0 and sound.stdout.startswith("sound: ")
    assert command("digest", path).stdout.startswith("sha256:")
    for offset in (5, 30_000):
        content = bytearray((path / "state-0.h5").read_bytes())
        content[offset] ^= 1
        (path / "state-0.h5").write_bytes(content)
        damaged = command("verify", path)
        assert damaged.returncode == 1 and "Traceback" not in damaged.stderr
        assert damaged.stderr.startswith("mpipar: error: ") and "state-0.h5" in damaged.stderr


@pytest.mark.parametrize("num_hosts", [1, 3])
def test_a_flipped_bit_anywhere_is_found_in_its_file(path: Path, num_hosts: int) -> None:
    """In the index, in texts, in every part of a file of tensors: user block, header, data, gaps, checksums."""
    if num_hosts > 1:
        with load(path) as whole:
            tensors = dict(whole)
        path = write(path.parent, plan([hold(tensors)] * num_hosts, range(num_hosts)), tensors)
    rng = random.Random(1)
    files = sorted(path.iterdir())
    assert [file.name for file in files] == ["config.toml", "index.json", *(f"state-{i}.h5" for i in range(num_hosts))]
    for file in files:
        content = file.read_bytes()
        size = len(content)
        ends = range(min(size, 700)), range(max(0, size - 300), size), range(BLOCK_BYTES, min(size, BLOCK_BYTES + 9))
        places = {place for part in ends for place in rng.sample(part, min(len(part), 60))}
        places |= {max(0, content.find(b"\0" * 64)), *(rng.randrange(size) for _ in range(60))}
        for place in sorted(places):
            damaged = bytearray(content)
            damaged[place] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=file.name.replace(".", r"\.")), load(path) as found:
                found.verify()
        file.write_bytes(content)
    with load(path) as found:
        found.verify()


def test_a_file_of_another_checkpoint_is_found(path: Path) -> None:
    """Sound in itself, but not the one that was saved with this index."""
    tensors = {"weights/x": torch.randn(300, 400), "weights/y": torch.ones(3).bfloat16()}
    tensors |= {"optimizer/x/step": torch.tensor(3.0), "weights/empty": torch.empty(0, 2)}
    other = save(path.parent, 13, tensors, {}, files={}, keep=2)
    (other / "state-0.h5").replace(path / "state-0.h5")
    with load(path) as found, pytest.raises(CheckpointError, match=r"state-0\.h5 is not the one of index\.json"):
        found["weights/x"]


def test_an_index_names_no_file_outside(path: Path) -> None:
    """Its checksum is right: whoever made it meant it."""
    import zlib

    index = json.loads((path / "index.json").read_bytes())
    del index["crc32"]
    index["texts"] = {"../../secret": {"bytes": 1, "crc32": 0}}
    body = json.dumps(index).encode()[1:] + b"\n"
    (path / "index.json").write_bytes(b'{"crc32": "%08x",\n' % zlib.crc32(body) + body)
    with pytest.raises(CheckpointError, match="no plain name"):
        load(path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "kv_heads"), [("llama", 2), ("gpt2", 4)])
def test_exported_weights_give_the_same_logits(tmp_path: Path, family: str, kv_heads: int, tied: bool) -> None:
    """Computed as the Hugging Face library's modeling_llama.py and modeling_gpt2.py do, from what was exported."""
    config = ModelConfig(
        family="gpt2" if family == "gpt2" else "llama",
        layers=2,
        dim=32,
        heads=4,
        kv_heads=kv_heads,
        max_seq_len=16,
        tied=tied,
    ).resolved()
    model = Transformer(config, vocab_size=50)
    initialise(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # biases and norms too
    tensors = {f"weights/{name}": parameter for name, parameter in model.named_parameters()}
    attributes = {"config": {"model": to_table(config)}, "vocab_size": 50}
    path = save(tmp_path / "checkpoints", 1, tensors, attributes, files={}, keep=1)
    with Checkpoint(path) as found:
        export(found, tmp_path / "out", "huggingface")
        with pytest.raises(CheckpointError, match="exists"):
            export(found, tmp_path / "out", "huggingface")
        export(found, tmp_path / "own", "mpipar")
    own = load_file(tmp_path / "own" / "model.safetensors")
    assert all(torch.equal(own[name], parameter) for name, parameter in model.named_parameters())
    weights = load_file(tmp_path / "out" / "model.safetensors")
    facts = json.loads((tmp_path / "out" / "config.json").read_text())
    tokens = torch.randint(0, 50, (1, 11), generator=torch.Generator().manual_seed(1))
    logits = (gpt2 if family == "gpt2" else llama)(weights, facts, tokens[0])
    torch.testing.assert_close(logits, model(tokens)[0], atol=1e-5, rtol=1e-5)


def attend(q, k, v):
    """[T, H, D] each -> [T, H D]."""
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
    hidden = torch.ones(len(q), len(q)).triu(1).bool()
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).flatten(1)


def llama(w, c, tokens):
    dim, heads, kv_heads = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    width = dim // heads
    frequencies = 1.0 / c["rope_theta"] ** (torch.arange(0, width, 2) / width)
    angles = torch.cat([torch.outer(torch.arange(len(tokens)), frequencies)] * 2, -1)[:, None]

    def norm(x, weight):
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + c["rms_norm_eps"])

    def turn(x):
        half = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1)  # rotate_half
        return x * angles.cos() + half * angles.sin()

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        y = norm(x, w[p + "input_layernorm.weight"])
        q, k, v = ((y @ w[f"{p}self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, width)) for n in "qkv")
        k, v = (z.repeat_interleave(heads // kv_heads, 1) for z in (turn(k), v))
        x = x + attend(turn(q), k, v) @ w[p + "self_attn.o_proj.weight"].T
        y = norm(x, w[p + "post_attention_layernorm.weight"])
        gated = F.silu(y @ w[p + "mlp.gate_proj.weight"].T) * (y @ w[p + "mlp.up_proj.weight"].T)
        x = x + gated @ w[p + "mlp.down_proj.weight"].T
    head = w["model.embed_tokens.weight"] if c["tie_word_embeddings"] else w["lm_head.weight"]
    return norm(x, w["model.norm.weight"]) @ head.T


def gpt2(w, c, tokens):
    width = c["n_embd"] // c["n_head"]

    def norm(x, name):
        return F.layer_norm(x, (c["n_embd"],), w[name + ".weight"], w[name + ".bias"], c["layer_norm_epsilon"])

    def conv1d(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    x = w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][: len(tokens)]
    for i in range(c["n_layer"]):
        p = f"transformer.h.{i}."
        q, k, v = conv1d(norm(x, p + "ln_1"), p + "attn.c_attn").split(c["n_embd"], -1)
        x = x + conv1d(attend(*(z.unflatten(-1, (-1, width)) for z in (q, k, v))), p + "attn.c_proj")
        x = x + conv1d(F.gelu(conv1d(norm(x, p + "ln_2"), p + "mlp.c_fc"), approximate="tanh"), p + "mlp.c_proj")
    head = w["transformer.wte.weight"] if c["tie_word_embeddings"] else w["lm_head.weight"]
    return norm(x, "transformer.ln_f") @ head.T


def test_a_model_that_the_library_has_not(tmp_path: Path) -> None:
    config = ModelConfig(family="gpt2", layers=1, dim=32, heads=4, kv_heads=2).resolved()
    model = Transformer(config, vocab_size=50)
    tensors = {f"weights/{name}": parameter for name, parameter in model.named_parameters()}
    attributes = {"config": {"model": to_table(config)}, "vocab_size": 50}
    with Checkpoint(save(tmp_path, 1, tensors, attributes, files={}, keep=1)) as found:
        with pytest.raises(CheckpointError, match=r"kv-heads 2: give --names mpipar"):
            export(found, tmp_path / "out", "huggingface")
        assert not (tmp_path / "out").exists()


def test_weights_that_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library has errors of its own."""

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    config = {"model": {"family": "llama"}}
    path = save(tmp_path, 1, {"weights/x": torch.ones(3)}, {"config": config, "vocab_size": 3}, files={}, keep=1)
    with load(path) as found:
        export(found, tmp_path / "out", "mpipar")
        modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
        assert len(modes) == 1, "others may read either"
        monkeypatch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(CheckpointError, match=r"--out .*again cannot be written: .*No space left.*Make room"):
            export(found, tmp_path / "again", "mpipar")
    assert not (tmp_path / "again").exists()
