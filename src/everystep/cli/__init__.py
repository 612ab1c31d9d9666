"""The command line: parse, ask the door, print."""

from everystep.cli.app import main

__all__ = ["main"]
