"""Stage ``conversations``: chats -> ``conversations``, which say what an assistant said."""
