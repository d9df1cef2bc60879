"""Whether the hub can be reached: asked once, so that nobody waits for retries; imports nothing heavy before it is."""

from __future__ import annotations

import logging
import ssl
import sys
import urllib.error
import urllib.request
from functools import cache

log = logging.getLogger(__name__)

SECONDS = 5  # to wait for an answer, of any kind


@cache
def stay_offline_without_hub() -> None:
    """Leaves the libraries to what is on this machine where the hub gives no answer, and says so."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=SECONDS):
            return
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(error, urllib.error.HTTPError) or isinstance(reason, ssl.SSLError):
            return  # an answer; certificates are the libraries' own affair
    log.info("the hub %s cannot be reached (%s): only what is on this machine is used", constants.ENDPOINT, reason)
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
