"""API keys: what a file of them may hold, and what needs one."""

from __future__ import annotations

from pathlib import Path

import httpx2
import openai
import pytest
from helpers.served_forest import planner_of, running

from btm_scale.errors import UserError
from btm_scale.serve.keys import Keys

ASK = {"model": "forest", "prompt": "ab", "max_tokens": 8}


def test_keys_are_required_for_the_api_and_not_for_health(experts: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# of the team\nfirst-key\nsecond-key\n")
    with running(*planner_of(experts), keys=Keys.load(tmp_path / "keys")) as server:
        assert len(server.client(api_key="second-key").models.list().data) == 4
        for key in ("first-ke", "x", "first-key2", "# of the team"):
            response = server.post("/v1/completions", ASK, headers={"Authorization": f"Bearer {key}"})
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key="wrong").completions.create(model="forest", prompt="a")
        assert httpx2.get(f"{server.url}/health").status_code == 200


def test_a_key_file_without_keys_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none\n\n")
    with pytest.raises(UserError, match="has no API key"):
        Keys.load(tmp_path / "keys")
    with pytest.raises(UserError, match="Cannot read API keys"):
        Keys.load(tmp_path / "absent")


def test_comments_may_be_indented_and_a_byte_order_mark_is_not_part_of_a_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbffirst-key\r\n  # of the team\n\t second key \n")
    keys = Keys.load(file)
    assert [keys.accept(f"Bearer {key}") for key in ("first-key", "second key", "# of the team")] == [True, True, False]


@pytest.mark.parametrize("key", ["geh\u00e9im", "a\u2028b", "a\x07b", "\u5317"])
def test_a_key_that_no_header_can_have_is_refused_without_repeating_it(key: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"fine\n{key}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"The API key in line 2 of .* has characters that no HTTP header") as refused:
        Keys.load(tmp_path / "keys")
    assert key not in str(refused.value)
