"""The saved reward functions that a visitor sees: in the database, or for guests in the browser. Uses no Gradio."""

from __future__ import annotations

from itertools import islice
from typing import Any

from access.permissions import AccessDenied
from access.roles import Role, Visitor
from rewards import RewardFunction, RewardFunctionError
from storage.reward_functions import RewardFunctionStore, StoreError, clean_name

MAX_IN_BROWSER = 50
SHARED = "“{}” is shared by this deployment, and only an administrator may change it. Save it under another name."


class SavedFunctions:
    """The visitor's own reward functions, and the deployment's, which everyone sees and only administrators change.

    Own ones of guests are in the browser, the others' in the database. An own one hides a shared one of the same name.
    """

    def __init__(self, store: RewardFunctionStore, visitor: Visitor, browser: Any = None) -> None:
        """Create the view of a visitor.

        Args:
            store: The database's reward functions.
            visitor: The visitor.
            browser: The object kept in a guest's browser; see `BrowserStore`.
        """
        self.store, self.visitor = store, visitor
        self.browser = BrowserStore(browser) if visitor.role == Role.GUEST else None

    def own_names(self) -> list[str]:
        """Return the names of the visitor's own reward functions. Raises StoreError."""
        if self.browser is not None:
            return self.browser.names()
        return [saved.name for saved in self.store.list(owner=self.visitor.id)]

    def shared_names(self) -> list[str]:
        """Return the names of the deployment's reward functions that no own one hides. Raises StoreError."""
        if self.browser is None and self.visitor.id == "":
            return []
        own = {name.casefold() for name in self.own_names()}
        return [saved.name for saved in self.store.list() if saved.name.casefold() not in own]

    def weights(self) -> dict[str, dict[str, float]]:
        """Return the weights of all reward functions that the visitor sees, by name. Raises StoreError."""
        shared = set(self.shared_names())
        functions = {saved.name: saved.function for saved in self.store.list() if saved.name in shared}
        if self.browser is not None:
            functions |= {name: self.browser.get(name) for name in self.browser.names()}
        else:
            functions |= {saved.name: saved.function for saved in self.store.list(owner=self.visitor.id)}
        return {name: dict(function.weights) for name, function in functions.items()}

    def get(self, name: str) -> RewardFunction:
        """Return a reward function that the visitor sees. Raises StoreError."""
        if self._is_shared(name):
            return self.store.get(name)
        return self.browser.get(name) if self.browser is not None else self.store.get(name, owner=self.visitor.id)

    def save(self, name: str, function: RewardFunction, overwrite: bool = False) -> str:
        """Save a reward function and return its cleaned name.

        Raises:
            AccessDenied: The name is that of a shared one to be overwritten, and the visitor is no administrator.
            StoreError: The name is invalid, or taken and not to be overwritten, or there is no room.
        """
        if overwrite and self._is_shared(name):
            self._check_may_share(name)
            return self.store.save(name, function, overwrite=True).name
        if self.browser is not None:
            return self.browser.save(name, function, overwrite)
        return self.store.save(name, function, overwrite, owner=self.visitor.id).name

    def rename(self, old: str, new: str) -> str:
        """Rename a reward function and return its cleaned name. Raises AccessDenied or StoreError."""
        if self._is_shared(old):
            self._check_may_share(old)
            self.store.rename(old, new)
        elif self.browser is not None:
            self.browser.rename(old, new)
        else:
            self.store.rename(old, new, owner=self.visitor.id)
        return clean_name(new)

    def delete(self, name: str) -> None:
        """Delete a reward function. Raises AccessDenied or StoreError."""
        if self._is_shared(name):
            self._check_may_share(name)
            self.store.delete(name)
        elif self.browser is not None:
            self.browser.delete(name)
        else:
            self.store.delete(name, owner=self.visitor.id)

    def _is_shared(self, name: str) -> bool:
        key = clean_name(name).casefold()
        if self.browser is not None and key in map(str.casefold, self.browser.names()):
            return False  # also while the database cannot be read
        return key in map(str.casefold, self.shared_names())

    def _check_may_share(self, name: str) -> None:
        if self.visitor.role < Role.ADMIN:
            raise AccessDenied(SHARED.format(name))


class BrowserStore:
    """A guest's reward functions in a JSON object. Names are unique regardless of case.

    The browser sends the object with every event and stores the changed one. A page can send anything, so entries that
    are no valid reward functions are left out.

    Attributes:
        ignored: Whether a part of the object was left out.
    """

    def __init__(self, content: Any) -> None:
        """Read the object: weights by name, as `content` returns it. None is an empty one."""
        self._functions: dict[str, RewardFunction] = {}
        self.ignored = content is not None and not isinstance(content, dict)
        entries = content.items() if isinstance(content, dict) else ()
        for key, weights in islice(entries, 2 * MAX_IN_BROWSER):
            try:
                name, function = clean_name(key), RewardFunction.from_json(weights)
                if len(self._functions) >= MAX_IN_BROWSER or self._find(name) is not None:
                    raise StoreError("full", "There are too many reward functions, or two of the same name.")
                self._functions[name] = function
            except (StoreError, RewardFunctionError):
                self.ignored = True

    @property
    def content(self) -> dict[str, dict[str, float]]:
        """The object to keep in the browser."""
        return {name: dict(self._functions[name].weights) for name in self.names()}

    def names(self) -> list[str]:
        """Return the names, sorted."""
        return sorted(self._functions, key=str.casefold)

    def get(self, name: str) -> RewardFunction:
        """Return the reward function with this name. Raises StoreError."""
        return self._functions[self._existing(name)]

    def save(self, name: str, function: RewardFunction, overwrite: bool = False) -> str:
        """Save a reward function and return its cleaned name.

        Raises:
            StoreError: The name is invalid, or taken and not to be overwritten, or there is no room.
        """
        name = clean_name(name)
        taken = self._find(name)
        if taken is not None and not overwrite:
            raise _taken(name)
        if taken is None and len(self._functions) >= MAX_IN_BROWSER:
            message = f"This browser has {MAX_IN_BROWSER} saved reward functions, which is the limit. Delete one first."
            raise StoreError("full", message)
        self._functions.pop(taken or "", None)
        self._functions[name] = function
        return name

    def rename(self, old: str, new: str) -> str:
        """Rename a reward function and return its cleaned name. Raises StoreError."""
        new, old = clean_name(new), self._existing(old)
        if self._find(new) not in (None, old):
            raise _taken(new)
        self._functions[new] = self._functions.pop(old)
        return new

    def delete(self, name: str) -> None:
        """Delete the reward function with this name. Raises StoreError."""
        del self._functions[self._existing(name)]

    def _find(self, name: str) -> str | None:
        """Return the name of the reward function whose name is equal regardless of case."""
        return next((other for other in self._functions if other.casefold() == name.casefold()), None)

    def _existing(self, name: str) -> str:
        found = self._find(clean_name(name))
        if found is None:
            raise StoreError("unknown", f"There is no reward function called “{name}”. It may have been deleted.")
        return found


def _taken(name: str) -> StoreError:
    return StoreError("taken", f"A reward function called “{name}” already exists. Choose another name.")
