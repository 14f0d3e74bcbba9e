"""Names of Spaces: valid, short enough, and never another branch's."""

import pytest
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

from previews.names import LONGEST, NameTooLong, is_preview, slug, space_name

OWNERS = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9]|-(?!-)){0,18}[A-Za-z0-9]", fullmatch=True)
BRANCHES = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=200)
NASTY = [
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
def test_any_branch_has_a_name_that_the_hub_takes_and_that_hot_reload_can_reach(owner: str, branch: str) -> None:
    name = space_name(owner, "moondream-playground", branch)
    validate_repo_id(f"{owner}/{name}")
    assert len(f"{owner}-{name}") <= LONGEST
    assert len(f"{owner}-{name}--7887") <= 63
    assert is_preview(name, "moondream-playground")
    assert name == name.lower() and name.isascii()


@given(st.lists(BRANCHES, min_size=2, max_size=30, unique=True))
def test_two_branches_never_have_the_same_name(branches: list[str]) -> None:
    assert len({space_name("me", "app", branch) for branch in branches}) == len(branches)


def test_names_that_look_alike_differ() -> None:
    assert len({space_name("me", "app", branch) for branch in NASTY}) == len(NASTY)
    assert space_name("me", "app", "feat/X_y").startswith("app-feat-x-y-")


@pytest.mark.parametrize(
    "name", ["app", "app-notes", "app-notes-1234567", "other-x-123abc45", "app-x-1234567g", "app2-123abc45"]
)
def test_other_spaces_are_not_taken_for_previews(name: str) -> None:
    assert not is_preview(name, "app")


def test_an_owner_without_room_is_refused() -> None:
    with pytest.raises(NameTooLong, match="leaves no room"):
        space_name("o" * 40, "moondream-playground", "x")
    assert slug("  Ünï--code  ") == "uni-code"
