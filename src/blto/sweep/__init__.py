"""Sweeps: many experiments as one resumable queue over one store.

`plan` reads a sweep's file to cells, `queue` decides which of them run, `results` keeps what became of each, `cell` is
the work itself, `live` shows it and `export` copies what is worth keeping. Executors are in `blto.runtime`.
"""
