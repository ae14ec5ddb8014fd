"""The kinds of adapters, one a file: its name is what ``--adapter`` takes, its ``LAYERS`` go over which base.

Its ``SETTINGS``, if it has some, are what ``config.Kind`` takes.
"""
