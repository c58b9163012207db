"""The distributed layout: what each process of it does. Any of them may run more than once; `up` does all in one."""

from __future__ import annotations

from oshaani.roles.api import api
from oshaani.roles.processor import processor
from oshaani.roles.projector import projector
from oshaani.roles.relay import relay

__all__ = ["api", "processor", "projector", "relay"]
