"""Names of preview Spaces: valid, short enough, and unique per branch."""

import pytest
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

from previews.names import MAX_LENGTH, NameTooLong, is_preview, slug, space_name

OWNERS = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9]|-(?!-)){0,18}[A-Za-z0-9]", fullmatch=True)
BRANCHES = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=200)
UNUSUAL_BRANCHES = [
    "feat/X_y",
    "feat/x-y",
    "FEAT/x.y",
    "$(x)",
    ";rm -rf",
    "日本語",
    "ветка",
    "a" * 200,
    "--",
    "-",
    "..",
    "x.git",
    "é",
]


@given(OWNERS, BRANCHES)
def test_names_are_valid_on_the_hub_and_for_hot_reload(owner: str, branch: str) -> None:
    name = space_name(owner, "moondream-playground", branch)
    validate_repo_id(f"{owner}/{name}")
    assert len(f"{owner}-{name}") <= MAX_LENGTH
    assert len(f"{owner}-{name}--7887") <= 63
    assert is_preview(name, "moondream-playground")
    assert name == name.lower() and name.isascii()


@given(st.lists(BRANCHES, min_size=2, max_size=30, unique=True))
def test_names_of_different_branches_differ(branches: list[str]) -> None:
    assert len({space_name("me", "app", branch) for branch in branches}) == len(branches)


def test_names_of_similar_branches_differ() -> None:
    assert len({space_name("me", "app", branch) for branch in UNUSUAL_BRANCHES}) == len(UNUSUAL_BRANCHES)
    assert space_name("me", "app", "feat/X_y").startswith("app-feat-x-y-")


@pytest.mark.parametrize(
    "name", ["app", "app-notes", "app-notes-1234567", "other-x-123abc45", "app-x-1234567g", "app2-123abc45"]
)
def test_other_space_names_are_not_previews(name: str) -> None:
    assert not is_preview(name, "app")


def test_too_long_owner_is_rejected() -> None:
    with pytest.raises(NameTooLong, match="leaves no room"):
        space_name("o" * 40, "moondream-playground", "x")
    assert slug("  Ünï--code  ") == "uni-code"
