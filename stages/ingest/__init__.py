"""Real text -> the ``documents`` table, with bounded memory whatever the size of the input.

``source.py`` says where text comes from, ``reading.py`` streams it through ``datasets``,
``cleaning.py`` accepts or rejects one text and names it by its content, ``tokens.py`` makes ids,
``packing.py`` cuts them into rows, ``spool.py`` is the sort on disk that keeps memory bounded,
``preparation.py`` runs the three phases, and ``text.py`` is the stage itself.
"""
