"""Killed runs against runs that were never stopped: the same command, continued, leaves the same bits.

`python -m tests.fault_injection` is the long form; `test_kills.py` has a few kills of each kind.
"""
