"""The note on the page about state that is lost at a restart."""

from __future__ import annotations

from ui.state_notice import FORGETS, NOT_SAVED, BucketStatus, notice_html


def test_note_is_empty_while_the_state_is_saved() -> None:
    assert notice_html(BucketStatus(True, "The state is saved.", 1.0), is_admin=True) == ""


def test_only_administrators_see_why_the_state_is_not_saved() -> None:
    status = BucketStatus(False, "The bucket team/state refuses <b>the token</b>.")
    admin, guest = notice_html(status, is_admin=True), notice_html(status, is_admin=False)
    assert "team/state refuses &lt;b&gt;the token" in admin
    assert NOT_SAVED in guest and "team/state" not in guest


def test_space_without_a_bucket_says_that_it_forgets() -> None:
    assert FORGETS in notice_html(None, is_admin=False)
    assert "STATE_BUCKET" in notice_html(None, is_admin=True) and "STATE_BUCKET" not in notice_html(
        None, is_admin=False
    )
