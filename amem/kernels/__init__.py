"""Every op twice: `reference/<op>.py` in torch (the specification and the CPU product), `triton/<op>.py`."""
