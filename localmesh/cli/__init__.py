"""The command `localmesh`: arguments in, text or JSON out."""

from localmesh.cli.main import main

__all__ = ["main"]
