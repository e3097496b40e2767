"""Choosing a replica: what the router and the client share. Pure: state and time in, decision out."""

from localmesh.balancing.ejection import Ejections
from localmesh.balancing.load import LocalLoad
from localmesh.balancing.picker import Choice, Chooser, Shortage
from localmesh.balancing.retry import Fate, RetryPolicy, Verdict

__all__ = ["Choice", "Chooser", "Ejections", "Fate", "LocalLoad", "RetryPolicy", "Shortage", "Verdict"]
