"""The process of an engine: its life and its ends, and how it goes to the background.

process.py      wait for the first reason to end, and end
background.py   fork, and report to the command that waits until the engine is ready
log.py          the log of an engine without a terminal
"""
