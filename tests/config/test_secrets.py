"""A secret in a config is refused wherever it is, and no message repeats it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from btm_scale.cli.app import main
from btm_scale.config.run import RunConfig
from btm_scale.config.yaml import dump_text
from btm_scale.errors import ConfigError
from btm_scale.util.secrets import has_secret, is_secret_name, masked

DOMAINS = {"math": {"text": "m.jsonl"}}
TOKEN = "hf_" + "canaryCANARY0123456789"
KEY = "AKIA" + "CANARY0123456789"
URL = "https://me:canaryCANARY@example.org/text"

PLANTED: dict[str, tuple[dict[str, Any], str]] = {
    "a key of a monitor": ({"deepspeed": {"comet": {"api_key": "canaryCANARY"}}}, "deepspeed.comet.api_key"),
    "a number": ({"deepspeed": {"wandb": {"password": 123456789}}}, "deepspeed.wandb.password"),
    "camel case": ({"deepspeed": {"x": {"accessToken": "canaryCANARY"}}}, "deepspeed.x.accessToken"),
    "an assignment": ({"deepspeed": {"x": "WANDB_API_KEY=canaryCANARY"}}, "deepspeed.x"),
    "a list": ({"deepspeed": {"x": [{"y": ["a", TOKEN]}]}}, "deepspeed.x.0.y.1"),
    "a key with the form of a token": ({"deepspeed": {TOKEN: 1}}, "deepspeed.***"),
    "a header": ({"deepspeed": {"headers": {"Authorization": "canaryCANARY"}}}, "deepspeed.headers.Authorization"),
    "an override of a layout": ({"seed_layout": {"x": TOKEN}}, "seed_layout.x"),
    "the name": ({"name": TOKEN}, "name"),
    "a path": ({"text_root": URL}, "text_root"),
    "a glob": ({"domains": {"math": {"text": [URL]}}}, "domains.math.text.0"),
    "the name of a domain": ({"domains": {TOKEN: {"text": "x"}}}, "domains.***"),
    "an unknown key": ({"wandb_api_key": "canaryCANARY"}, "wandb_api_key"),
    "a wrong type": ({"budget": {"tokens": KEY}}, "budget.tokens"),
    "a job option": ({"launch": {"slurm": {"partition": TOKEN}}}, "launch.slurm.partition"),
    "a shell line": ({"launch": {"slurm": {"setup": [f"curl -H 'Authorization: Bearer {TOKEN}'"]}}}, "launch.slurm"),
    "an option": ({"launch": {"mpi": {"command": ["mpirun", "--api-key", "canaryCANARY"]}}}, "launch.mpi.command"),
    "an option with =": ({"launch": {"mpi": {"command": ["x", "--api-key=canaryCANARY"]}}}, "launch.mpi.command"),
    "an option in a line": ({"launch": {"slurm": {"setup": ["login --password canaryCANARY"]}}}, "launch.slurm.setup"),
    "a mapping of paths": ({"tokenizer": {"path": f"/x/{KEY}"}}, "tokenizer.path"),
}


@pytest.mark.parametrize("where", PLANTED)
def test_a_secret_is_refused_with_its_place_and_not_repeated(where: str, tmp_path: Path) -> None:
    values, place = PLANTED[where]
    path = tmp_path / "own.yaml"
    path.write_text(dump_text({"domains": DOMAINS} | values))
    with pytest.raises(ConfigError) as raised:
        RunConfig.load(path)
    assert place in str(raised.value)
    assert "looks like a secret" in str(raised.value)
    assert "canary" not in str(raised.value).replace(str(tmp_path), "").lower()


@pytest.mark.parametrize(
    "override",
    [f"name={TOKEN}", "deepspeed.wandb.api_key=canaryCANARY", f"budget.tokens.x={TOKEN}", TOKEN, f"={TOKEN}"],
)
def test_a_secret_in_an_override_is_not_printed(
    override: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.yaml").write_text(dump_text({"domains": DOMAINS, "budget": {"tokens": 100_000}}))
    with pytest.raises(SystemExit):
        main(["run", str(tmp_path / "own.yaml"), "--out", str(tmp_path / "run"), "--dry-run", "--set", override])
    shown = capsys.readouterr()
    assert "canary" not in (shown.out + shown.err).lower()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"domains": {"token": {"text": "a"}, "secret": {"text": "token=5/*.jsonl", "field": "token"}}},
        {"experts": {"math": {"branch": {"parents": {"secret": 1.0}}}}},
        {"deepspeed": {"wandb": {"enabled": False, "project": "secrets-of-math", "api_key": None}}},
        {"deepspeed": {"tokens_per_step": 5, "key": "x", "monitor": True}},
        {"name": "sk-small", "launch": {"slurm": {"setup": ["module load cuda", "source ~/tokens.sh"]}}},
        {"launch": {"deepspeed": {"connect": ["ssh", "-tt", "{host}"]}}},
    ],
)
def test_what_only_resembles_a_secret_is_allowed(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(dump_text({"domains": DOMAINS} | values))
    RunConfig.load(tmp_path / "own.yaml")


@pytest.mark.parametrize(
    "text",
    [
        TOKEN,
        KEY,
        URL,
        "sk-ant-api03-" + "a" * 30,
        "ghp_" + "a1" * 18,
        "glpat-" + "a" * 20,
        "xoxb-" + "1" * 12,
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        "Authorization: Basic dXNlcjpwYXNzd29yZA==",
        "bearer " + "a" * 20,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmN",
        "s3://key:canary@bucket/text",
        "simplecache::https://me:can@ary@example.org/text",
        "https://canaryCANARY@example.org/text",
    ],
)
def test_known_forms_of_secrets_are_masked(text: str) -> None:
    assert has_secret(f"before {text} after")
    assert text not in masked(f"before {text} after")
    assert masked(f"before {text} after").startswith("before ")


@pytest.mark.parametrize(
    "parameter",
    ["X-Amz-Signature", "X-Amz-Security-Token", "X-Goog-Signature", "sig", "Signature", "AWSAccessKeyId", "token"],
)
def test_urls_that_give_access_are_refused_and_masked(parameter: str, tmp_path: Path) -> None:
    url = f"https://bucket.example.org/a.jsonl?version=3&{parameter}=canaryCANARY&x=1"
    assert "canary" not in masked(f"Cannot read {url}.")
    assert masked(f"Cannot read {url}.").startswith("Cannot read https://bucket.example.org/a.jsonl?version=3&")
    for values in ({"text": url}, {"text": ["a.jsonl", f"filecache::{url}"]}, {"token_files": url}):
        (tmp_path / "own.yaml").write_text(dump_text({"domains": {"math": values}}))
        with pytest.raises(ConfigError, match=r"domains\.math\.(text|token_files).* looks like a secret") as raised:
            RunConfig.load(tmp_path / "own.yaml")
        assert "canary" not in str(raised.value)


@pytest.mark.parametrize(
    "url", ["https://example.org/a.jsonl?version=3&split=train", "s3://bucket/a?.jsonl", "sftp://me@host/x"]
)
def test_other_urls_are_not(url: str) -> None:
    assert not has_secret(url)
    assert masked(url) == url


@pytest.mark.parametrize("name", ["HF_TOKEN", "apiKey", "--password", "aws-secret-access-key", "Authorization"])
def test_names_of_secrets_are_recognized(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["tokens", "batch_tokens", "tokenizer", "KEYBOARD", "NCCL_IB_PKEY", "author", "key"])
def test_names_that_only_resemble_them_are_not(name: str) -> None:
    assert not is_secret_name(name)


def test_the_value_of_a_secret_variable_is_masked() -> None:
    text = "host, line 1: 'HF_TOKEN=canary' and --api-key=\"can ary\" are not hosts; vocab_size=512 is"
    assert masked(text) == "host, line 1: 'HF_TOKEN=***' and --api-key=*** are not hosts; vocab_size=512 is"


def test_a_hostfile_that_is_a_file_of_secrets_is_not_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from btm_scale.cli.exit_codes import exit_codes
    from btm_scale.launch.hostfile import read_hostfile

    (tmp_path / "hostfile").write_text("HF_TOKEN=canary\n")
    with pytest.raises(SystemExit), exit_codes():
        read_hostfile(tmp_path / "hostfile")
    shown = capsys.readouterr().err
    assert "is not a host" in shown
    assert "canary" not in shown
