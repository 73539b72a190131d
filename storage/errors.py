"""What can go wrong with a store, by the reaction that it asks of a caller."""

from __future__ import annotations


class StoreError(Exception):
    """Base of all errors of the reconstruction store; the message is fit for a user."""


class StoreMissing(StoreError):
    """Nothing is at the given location."""


class NotAStore(StoreError):
    """Something else is at the given location; it is left untouched."""


class StoreTooNew(StoreError):
    """The store was written by a newer version of this software."""


class StoreUnavailable(StoreError):
    """The location cannot be reached, or may not be read or written."""


class StoreRefused(StoreUnavailable):
    """The location answers that it may not or cannot be used: trying again changes nothing."""


class ObjectUnreadable(StoreUnavailable):
    """The disk gives one object no more; that is damage, unless the whole disk fails."""


class ChunkMissing(StoreError):
    """The asked data are not finished: no commit vouches for them."""


class DataDamaged(StoreError):
    """A commit vouches for data that cannot be read back as written."""


class CommitExists(StoreError):
    """Somebody else committed this name first."""


class Claimed(StoreError):
    """A living worker is at work on the same thing."""


class GivenUp(Exception):
    """The caller does not want any more what was waited for or read."""


class ClaimLost(StoreError):
    """The right to work on something was lost: nothing more may be written."""


UNREADABLE = (DataDamaged, ObjectUnreadable)
