"""Runs the model: tokens, rows, pages. Knows no text, no user and no HTTP.

Importing this package imports no torch: `types`, `messages` and `process` are used by the HTTP process.
"""
