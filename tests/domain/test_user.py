from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

from domain.errors import Conflict, InvalidValue, NotFound
from domain.ids import UserId
from domain.user import API_KEYS_MAX, User
from tests.domain.spec import given

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def registered() -> User:
    return User.register(UserId(UUID(int=1)), "ada@example.org", "Ada")


def key_issued(key_id: str = "key-1"):
    return lambda user: user.issue_key(key_id, "CI", "osk_abc", "digest", NOON)


def test_a_new_user_is_nobody_special():
    given(registered).when().then(role="user", logged_in=False, key_ids=set())


def test_a_user_keeps_no_text_about_the_person():
    assert "ada" not in repr(given(registered).root).lower()


def test_the_first_login_is_noted_and_later_ones_are_not():
    given(registered).when(User.log_in).then(User.LoggedIn, logged_in=True).then_returned(True)
    given(registered, User.log_in).when(User.log_in).then().then_returned(False)


def test_a_user_is_promoted_once():
    before = given(registered)
    before.when(lambda user: user.promote("operator")).then(User.Promoted, role="operator")
    before.when(lambda user: user.promote("user")).then()
    before.when(lambda user: user.promote("king")).then_refused(InvalidValue, pointer="/role")


def test_keys_are_issued_and_revoked():
    before = given(registered, key_issued())
    before.when(key_issued("key-2")).then(User.ApiKeyIssued, key_ids={"key-1", "key-2"})
    before.when(lambda user: user.revoke_key("key-1")).then(User.ApiKeyRevoked, key_ids=set())
    before.when(lambda user: user.revoke_key("key-2")).then_refused(NotFound)


def erasing(user: User) -> None:
    user.request_erasure(NOON)


def test_who_is_to_be_forgotten_loses_every_key_at_once_and_gets_no_other():
    when = given(registered, key_issued(), key_issued("key-2")).when(erasing)
    when.then(User.ApiKeyRevoked, User.ApiKeyRevoked, User.ErasureRequested, key_ids=set())
    asked = given(registered, erasing)
    asked.when(erasing).then()
    for step in (User.log_in, key_issued(), lambda user: user.promote("operator")):
        asked.when(step).then_refused(NotFound)


def test_an_erasure_is_completed_once():
    done = lambda user: user.complete_erasure(2, NOON)  # noqa: E731
    given(registered).when(done).then_refused(Conflict)
    given(registered, erasing).when(done).then(User.Erased, erasure="done")
    given(registered, erasing, done).when(done, erasing).then()


def test_a_user_has_so_many_keys():
    before = given(registered, *(key_issued(f"key-{n}") for n in range(API_KEYS_MAX)))
    before.when(key_issued("one-more")).then_refused(InvalidValue)
