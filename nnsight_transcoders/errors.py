"""The package's exceptions: one base class, so that a caller can catch ours and nothing else.

Every message says what is wrong, which input it was, and how to mend it.
"""

from __future__ import annotations


class TranscoderError(Exception):
    """Base class of every error this package raises on purpose."""


class ConfigError(TranscoderError):
    """A configuration value is unknown, missing, or contradicts another one."""


class CheckpointError(TranscoderError):
    """A checkpoint cannot be read: missing, malformed, of the wrong shape, or unsafe."""


class SiteError(TranscoderError):
    """A part of the model (block, norm, attention, site) is missing or not as expected."""


class MismatchError(TranscoderError):
    """A transcoder set does not fit the model it is used with."""


class InputError(TranscoderError):
    """A prompt, token, position, feature or path given by the caller cannot be used."""
