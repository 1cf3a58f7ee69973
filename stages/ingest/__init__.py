"""Real text -> ``documents``, few-shot tasks -> ``episodes``, pairs -> ``preference_pairs``.

Text is read with bounded memory, whatever the size of the input.

``source.py`` says where text comes from, ``reading.py`` streams it through ``datasets``,
``cleaning.py`` accepts or rejects one text and names it by its content, ``tokens.py`` makes ids,
``packing.py`` cuts them into rows, ``spool.py`` is the sort on disk that keeps memory bounded,
``preparation.py`` runs the three phases, and ``text.py`` is the stage itself.

Tasks are small and held in memory. ``task_sources.py`` says where they come from,
``task_readers.py`` reads them into what ``tasks.py`` checks, ``task_split.py`` gives every example
its role, ``episode_draws.py`` chooses demonstrations, ``templates.py`` and ``episode_building.py``
make rows, ``episode_preparation.py`` runs all that, and ``episodes.py`` is the stage itself.

Preference pairs are held in memory too. ``pair_sources.py`` says where they come from,
``pair_readers.py`` reads them as the dialogues of ``pair_dialogues.py``, ``pair_wording.py`` puts
them through the chat template, ``pair_building.py`` makes rows, ``pair_preparation.py`` runs all
that, and ``preference_pairs.py`` is the stage itself.

Tasks and pairs both read tables with ``records.py`` and keep what they made in
``prepared_rows.py``'s folder.
"""
