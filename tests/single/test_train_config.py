"""Settings: from a command line, from TOML, and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mpipar.errors import ConfigError
from mpipar.train.config import Config, TrainConfig
from mpipar.train.config_text import parse, read_toml, to_toml


def test_names_that_scripts_rely_on() -> None:
    arguments = (
        "--run.dir a/b --train.steps 7 --train.global-batch 6 --train.microbatch 3 --train.seq-len 32 --train.seed 5 "
        "--model.layers 2 --model.dim 64 --model.heads 2 --data.dir c --checkpoint.every 3 --resume never"
    )
    config = parse(arguments.split())
    assert config.run.dir == Path("a/b") and config.data.dir == (Path("c"),) and config.resume == "never"
    assert (config.train.steps, config.train.global_batch, config.train.microbatch) == (7, 6, 3)
    assert (config.train.seq_len, config.train.seed, config.checkpoint.every) == (32, 5, 3)
    assert (config.model.layers, config.model.dim, config.model.heads) == (2, 64, 2)


def test_booleans_are_true_and_false() -> None:
    assert parse(["--train.compile", "true"]).train.compile
    assert not parse(["--run.tensorboard", "false"]).run.tensorboard


def test_toml_and_back(tmp_path: Path) -> None:
    config = parse(["--train.lr", "0.5", "--model.tied", "true", "--run.dir", 'odd "name"\\ä\U0001f600'])
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), "utf-8")
    assert read_toml(path) == config


def test_several_data_sets(tmp_path: Path) -> None:
    arguments = "--data.dir a b/c --data.weights 3 0.5 --data.epochs 0 2 --data.documents separate --train.steps 7"
    config = parse(arguments.split())
    assert config.data.dir == (Path("a"), Path("b/c"))
    assert (config.data.weights, config.data.epochs, config.data.documents) == ((3.0, 0.5), (0, 2), "separate")
    path = tmp_path / "c.toml"
    path.write_text(to_toml(config))
    assert read_toml(path) == config
    path.write_text('[data]\ndir = "a"\n')
    assert read_toml(path).data.dir == (Path("a"),)
    path.write_text('[data]\ndir = ["a", "b"]\nweights = [1, 2.5]\n')
    assert read_toml(path).data.weights == (1.0, 2.5)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[train]\nsteps = 9\nlr = 1\nglobal-batch = 32\n")
    for arguments in (["--config", str(path)], [f"--config={path}"]):
        config = parse([*arguments, "--train.steps", "11"])
        assert config.train.steps == 11 and config.train.lr == 1.0 and config.train.global_batch == 32


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[train]\nstep = 9\n", r"'train.step' does not exist: did you mean 'steps'"),
        ("[trian]\n", r"'trian' does not exist: did you mean 'train'"),
        ("[train]\nsteps = 'many'\n", r"'train.steps' is 'many': expected int"),
        ("[train]\nprecision = 'fp8'\n", r"'fp8': expected one of 'auto', 'fp32', 'tf32', 'bf16', 'fp16'"),
        ("[train]\ndevice = 'gpu'\n", r"'train.device' is 'gpu': expected one of 'auto', 'cpu', 'cuda'"),
        ("[train]\nseed = 18446744073709551616\n", r"--train.seed 18446744073709551616 must be in"),
        ("[train]\nlr = inf\n", r"--train.lr inf must be a finite number"),
        ("[train]\neps = -1\n", r"--train.eps -1.0 must be positive"),
        ("[model]\nkv_heads = 'two'\n", r"'model.kv_heads' is 'two': expected int"),
        ("config = 'other.toml'\n", r"'config' does not exist"),
        ("train = 3\n", r"'train' is a section"),
        ("[train\n", r"cannot be read"),
        ("[data]\ndir = []\n", r"--data.dir names no data set"),
        ("[data]\ndir = ['a', 3]\n", r"'data.dir' is 3: expected Path"),
        ("[data]\nweights = [1, 2]\n", r"--data.weights has 2 values for the 1 folders of --data.dir: give one"),
        ("[data]\nweights = [-1]\n", r"--data.weights -1.0 must be a positive number"),
        ("[data]\nepochs = [-1]\n", r"--data.epochs -1 must not be negative"),
        ("[data]\ndir = ['a', 'a']\n", r"--data.dir names a more than once"),
        ("[data]\ndocuments = 'apart'\n", r"'data.documents' is 'apart': expected one of 'joined', 'separate'"),
        ("[train]\nglobal_batch = 5\n", r"--train.global-batch 5 is not a multiple of --train.microbatch 2"),
        ("[model]\ndim = 130\n", r"--model.dim 130 is not a multiple of --model.heads 4"),
    ],
)
def test_files_that_cannot_be(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        parse(["--config", str(path)])


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml cannot be read"):
        parse(["--config", "nowhere.toml"])


@pytest.mark.parametrize("arguments", [["--train.step", "3"], ["--train.steps", "x"], ["--train.steps", "-1"]])
def test_flags_that_cannot_be(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"--train\.steps"):
        parse(arguments)


def test_every_setting_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        parse(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--train.global-batch", "--resume", "--checkpoint.every", "--config", "--comm.timeout-s"):
        assert flag in text


def test_a_sequence_longer_than_the_model_takes() -> None:
    with pytest.raises(ConfigError, match=r"--train.seq-len 2048 is more than --model.max-seq-len 1024"):
        replace(Config(), train=TrainConfig(seq_len=2048))
