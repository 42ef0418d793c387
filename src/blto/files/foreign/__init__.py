"""Readers of formats that other programs write as pickles: nothing in such a file is ever run."""
